"""Mutants of buffered signals."""

from __future__ import annotations

import asyncio
from typing import Any

from flowstore_core import BufferedSignal, ConflictError, SignalDeliveryResult, SignalDeliveryStatus
from tests.mutants import mutant
from tests.mutants.sql_patching import PatchedPostgres, PatchedSqlite, SqlPatch

BUFFERED = SignalDeliveryResult(status=SignalDeliveryStatus.BUFFERED, step_key=None, delivered_at=None)


@mutant("memory", "MBX-1")
class LastBufferedFirstOut:
    """A waiter takes the newest payload instead of the oldest."""

    async def register_waiter(self, **given: Any) -> None:
        buffered = self._runs[given["run_id"].int].buffered
        buffered.reverse()
        try:
            await super().register_waiter(**given)
        finally:
            buffered.reverse()


@mutant("sqlite", "MBX-1")
class TakenPayloadStaysBuffered:
    """A waiter takes a payload and leaves it in the buffer for the next waiter."""

    async def register_waiter(self, **given: Any) -> None:
        run_id = given["run_id"]
        before = await super().get_buffered_signals(run_id)
        await super().register_waiter(**given)
        for one in set(before) - set(await super().get_buffered_signals(run_id)):
            await super().deliver_signal(
                run_id, one.signal_name, one.payload_json, delivery_id=None, buffer=True
            )


@mutant("postgresql", "MBX-1")
class DeliveredWaiterStopsBuffering:
    """Returns ALREADY_DELIVERED with buffer too, so a signal between two waits is lost."""

    async def deliver_signal(self, **given: Any) -> Any:
        result = await super().deliver_signal(**{**given, "buffer": False})
        lost = result.status is SignalDeliveryStatus.ALREADY_DELIVERED
        return result if lost else await super().deliver_signal(**given)


@mutant("memory", "MBX-1")
class RenamedWaiterTakesNothing:
    """Only a new waiter takes a payload; one that gets another signal_name waits for ever."""

    async def register_waiter(self, **given: Any) -> None:
        run = self._runs[given["run_id"].int]
        if given["step_key"] not in run.waiters:
            await super().register_waiter(**given)
            return
        buffered, run.buffered = run.buffered, []
        try:
            await super().register_waiter(**given)
        finally:
            run.buffered = buffered


@mutant("sqlite", "MBX-1")
class DeliveredWaiterTakesAnother:
    """A delivered waiter that is registered again takes the next payload in place of its own."""

    async def register_waiter(self, **given: Any) -> None:
        await super().register_waiter(**given)
        of_step = (given["run_id"], given["step_key"])
        waiter = await super().get_waiter(*of_step)
        named = [
            one
            for one in await super().get_buffered_signals(given["run_id"])
            if waiter is not None and one.signal_name == waiter.signal_name
        ]
        if named:
            await super().remove_waiter(*of_step)
            await super().register_waiter(**given)


@mutant("postgresql", "MBX-1")
class TerminalRunBuffers:
    """Buffers signals of a terminal run, which no step will read."""

    async def deliver_signal(self, **given: Any) -> Any:
        status = await super().get_run_status(run_id=given["run_id"])
        result = await super().deliver_signal(**given)
        ended = status is not None and status.is_terminal
        if not ended or not given.get("buffer") or result.status is not SignalDeliveryStatus.NOT_FOUND:
            return result
        sql = "INSERT INTO {schema}.buffered_signals VALUES ($1, $2, 1, $3, clock_timestamp()) RETURNING 1"
        values = (given["run_id"], given["signal_name"], given["payload_json"])
        await self._database.compensate(sql, *values)
        return BUFFERED


@mutant("sqlite", "MBX-1")
class BufferFoldsNames:
    """Buffers signals under their names in lower case."""

    async def deliver_signal(self, run_id: Any, signal_name: str, payload_json: str, **given: Any) -> Any:
        name = signal_name.lower() if given.get("buffer") else signal_name
        return await super().deliver_signal(run_id, name, payload_json, **given)


@mutant("postgresql", "MBX-1")
class DeliveryTimeOfTheServer(PatchedPostgres):
    """A renamed waiter that takes a payload gets the server's time instead of the store's."""

    patch_sql = SqlPatch(
        (
            r"SET delivered_at = \$3( WHERE run_id = \$1 AND step_key = \$2)",
            r"SET delivered_at = coalesce(now(), $3)\1",
        )
    )


@mutant("memory", "MBX-1")
class TakenPayloadWakesNoStep:
    """The step of a renamed waiter that takes a payload is not put back into its queue."""

    async def register_waiter(self, **given: Any) -> None:
        run = self._runs[given["run_id"].int]
        waiter = run.waiters.get(given["step_key"])
        buffered, run.buffered = run.buffered, []
        is_new = waiter is None
        try:
            await super().register_waiter(**given)
        finally:
            run.buffered = buffered
        waiter = run.waiters[given["step_key"]]
        named = [one for one in buffered if one.signal_name == waiter.signal_name]
        if named and (is_new or waiter.delivered_at is None):
            waiter.delivered_at, waiter.payload_json = self._now(), named[0].payload_json
            buffered.remove(named[0])


@mutant("memory", "MBX-1", concurrent=True)
class BufferCheckThenWrite:
    """Finds no open waiter, and buffers later, although a waiter may have been registered in between."""

    async def deliver_signal(self, **given: Any) -> Any:
        run = self._runs.get(given["run_id"].int)
        if run is None or not given.get("buffer") or given["delivery_id"] in run.deliveries:
            return await super().deliver_signal(**given)
        is_awaited = any(
            one.signal_name == given["signal_name"] and one.delivered_at is None
            for one in run.waiters.values()
        )
        await asyncio.sleep(0)
        if is_awaited or run.status.is_terminal or given["delivery_id"] in run.deliveries:
            return await super().deliver_signal(**given)
        record = {name: given[name] for name in ("run_id", "signal_name", "payload_json")}
        run.buffered.append(BufferedSignal(**record, buffered_at=self._now()))
        if given["delivery_id"] is not None:
            run.deliveries[given["delivery_id"]] = BUFFERED
        return BUFFERED


@mutant("sqlite", "MBX-1", concurrent=True)
class PayloadTakenInASecondTransaction:
    """Registers a waiter under another name first: a delivery in between finds no waiter."""

    async def register_waiter(self, **given: Any) -> None:
        if await super().get_waiter(given["run_id"], given["step_key"]) is None:
            await super().register_waiter(**{**given, "signal_name": "not yet"})
        await super().register_waiter(**given)


@mutant("postgresql", "MBX-1", concurrent=True, more_clauses=("SIG-3", "MBX-2"))
class SignalsWithoutLock(PatchedPostgres):
    """Signals and waiters do not lock the run, so a waiter and a payload miss each other."""

    patch_sql = SqlPatch((r"(SELECT status FROM \{schema\}\.runs WHERE run_id = \$3) FOR UPDATE", r"\1"))


@mutant("memory", "MBX-2")
class BufferedIdIgnored:
    """Does not remember the delivery_id of a buffered signal: a repeated call buffers it again."""

    async def deliver_signal(self, **given: Any) -> Any:
        result = await super().deliver_signal(**given)
        if result.status is SignalDeliveryStatus.BUFFERED:
            self._runs[given["run_id"].int].deliveries.pop(given["delivery_id"], None)
        return result


@mutant("sqlite", "MBX-2")
class BufferedIdForgottenWithItsPayload:
    """Forgets the ids of buffered signals when a waiter takes one: a repeated call delivers it again."""

    async def register_waiter(self, **given: Any) -> None:
        count = len(await super().get_buffered_signals(given["run_id"]))
        await super().register_waiter(**given)
        if len(await super().get_buffered_signals(given["run_id"])) < count:
            sql = "DELETE FROM deliveries WHERE run_id = ? AND step_key = ''"
            await self._database.write(lambda db, now: db.execute(sql, (given["run_id"].bytes,)))


@mutant("postgresql", "MBX-2")
class BufferedIdBecomesDelivered:
    """A repeated delivery_id of a buffered signal is DELIVERED once the payload is taken."""

    async def deliver_signal(self, **given: Any) -> Any:
        result = await super().deliver_signal(**given)
        run_id = given["run_id"]
        if result.status is not SignalDeliveryStatus.BUFFERED or given["delivery_id"] is None:
            return result
        if await super().get_buffered_signals(run_id=run_id):
            return result
        waiters = await super().get_waiters(run_id=run_id)
        taken = next((one for one in waiters if one.delivered_at is not None), None)
        if taken is None:
            return result
        return SignalDeliveryResult(
            status=SignalDeliveryStatus.DELIVERED, step_key=taken.step_key, delivered_at=taken.delivered_at
        )


@mutant("sqlite", "MBX-2")
class BufferWithoutLimit(PatchedSqlite):
    """Buffers any number of signals of a run."""

    patch_sql = SqlPatch(
        (r"SELECT COUNT\(\*\) FROM buffered_signals", "SELECT 0 * COUNT(*) FROM buffered_signals")
    )


@mutant("postgresql", "MBX-2")
class LimitOfBufferForEachName(PatchedPostgres):
    """Buffers 1,000 signals of each name."""

    patch_sql = SqlPatch(
        (
            r"(FROM \{schema\}\.buffered_signals WHERE run_id = \$1)( HAVING)",
            r"\1 AND signal_name = $2\2",
        )
    )


@mutant("memory", "MBX-2")
class RefusedIdRemembered:
    """Remembers the delivery_id of a signal that exceeds the limit: a later call buffers nothing."""

    async def deliver_signal(self, **given: Any) -> Any:
        try:
            return await super().deliver_signal(**given)
        except ConflictError:
            if given["delivery_id"] is not None:
                self._runs[given["run_id"].int].deliveries[given["delivery_id"]] = BUFFERED
            raise


@mutant("memory", "MBX-2")
class RetryDropsBuffered:
    """retry_step drops the buffered signals of the run with its step's waiter."""

    async def retry_step(self, **given: Any) -> None:
        await super().retry_step(**given)
        self._runs[given["run_id"].int].buffered.clear()


@mutant("sqlite", "MBX-2")
class CompletionDropsBuffered:
    """complete_run drops the buffered signals, which a reopened run needs."""

    async def complete_run(self, run_id: Any, status: Any, **given: Any) -> Any:
        completed = await super().complete_run(run_id, status, **given)
        if completed:
            sql = "DELETE FROM buffered_signals WHERE run_id = ?"
            await self._database.write(lambda db, now: db.execute(sql, (run_id.bytes,)))
        return completed


@mutant("memory", "RET-1")
class CleanupKeepsBuffered:
    """cleanup keeps the buffered signals of deleted runs for later runs with the same id."""

    async def cleanup(self, cutoff: Any) -> int:
        before = {number: run.buffered for number, run in self._runs.items()}
        deleted = int(await super().cleanup(cutoff))
        self._kept = getattr(self, "_kept", {}) | {
            number: buffered for number, buffered in before.items() if number not in self._runs
        }
        return deleted

    async def start_run(self, **given: Any) -> Any:
        record = await super().start_run(**given)
        self._runs[given["run_id"].int].buffered.extend(getattr(self, "_kept", {}).pop(record.run_id.int, ()))
        return record


@mutant("postgresql", "WAT-1")
class TakenPayloadSendsNoHint:
    """Sends no hint when a renamed waiter takes a payload, so other stores learn of it at their time-out."""

    async def _register_waiter(self, *arguments: Any) -> bool:
        await super()._register_waiter(*arguments)
        return False
