"""Mutants that fail under cancellation, process crashes and concurrent opening."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import Any

from flowstore_core import RunNotFoundError, StepStatus
from tests.mutants import mutant


@mutant("sqlite", "CON-4")
class CancelledClaimIsKept:
    """Never releases the claim of a cancelled call."""

    def begin(self) -> None:
        write = self._database.write
        self._database.write = lambda work, on_abandoned=None: write(work)


@mutant("postgresql", "CON-4")
class CancelledDispatchIsKept:
    """Never releases the dispatch of a cancelled call."""

    async def try_record_dispatch(self, **given: Any) -> bool:
        work = asyncio.ensure_future(super().try_record_dispatch(**given))
        return bool(await asyncio.shield(work))


@mutant("sqlite", "CON-4")
class CompletionInTwoTransactions:
    """Sets the status in one transaction and the output in the next."""

    async def record_step_complete(self, **given: Any) -> None:
        await super().record_step_complete(**{**given, "output_json": None})
        await self._database.write(
            lambda db, now: db.execute(
                "UPDATE steps SET output_json = ? WHERE run_id = ? AND step_key = ? AND output_json IS NULL",
                (given["output_json"], given["run_id"].bytes, given["step_key"]),
            )
        )


@mutant("postgresql", "CON-4")
class RetryInTwoTransactions:
    """Reopens the run in one transaction and the step in the next."""

    async def retry_step(self, **given: Any) -> None:
        statuses = await super().get_step_statuses(run_id=given["run_id"])
        if given["step_key"] in statuses:

            async def reopen(transaction: Any) -> None:
                await transaction.execute(
                    "UPDATE {schema}.runs SET status = 'Running', completed_at = NULL WHERE run_id = $1",
                    given["run_id"],
                )

            await self._database.transaction("retry_step", reopen)
        await super().retry_step(**given)


@mutant("postgresql", "CON-4")
class RescheduleInThreeTransactions:
    """Closes the attempt, releases the claim and records the dispatch in three transactions."""

    async def reschedule_step(self, **given: Any) -> None:
        step = {"run_id": given["run_id"], "step_key": given["step_key"]}
        statuses = await super().get_step_statuses(run_id=given["run_id"])
        if statuses.get(given["step_key"]) is StepStatus.RUNNING:
            await super().record_step_complete(
                **step,
                status=StepStatus.PENDING,
                output_json=given["output_json"],
                error_message=None,
                attempt=given["attempt"],
                owner=given["owner"],
            )
            await super().release_step_claim(**step, owner=None)
        await super().reschedule_step(**given)


@mutant("memory", "CON-4")
class SkipInTwoSteps:
    """Claims for the skipping owner, and skips in a second step."""

    async def record_skipped_step(self, **given: Any) -> None:
        if given["owner"] is not None:
            await super().try_claim_step(
                run_id=given["run_id"], step_key=given["step_key"], owner=given["owner"], lease=None
            )
            await asyncio.sleep(0)
        await super().record_skipped_step(**given)


_watched: list[asyncio.Task[None]] = []


@mutant("memory", "CON-4")
class TaskLeaked:
    """Starts a watchdog task per call that outlives a cancelled call."""

    async def start_run(self, **given: Any) -> Any:
        watchdog = asyncio.create_task(asyncio.sleep(3600))
        _watched.append(watchdog)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        started = await super().start_run(**given)
        watchdog.cancel()
        _watched.remove(watchdog)
        return started


@mutant("sqlite", "CON-4")
class ThreadLeaked:
    """Leaks a thread for each cancelled call."""

    async def start_run(self, **given: Any) -> Any:
        try:
            return await super().start_run(**given)
        except asyncio.CancelledError:
            threading.Thread(target=threading.Event().wait, daemon=True).start()
            raise


@mutant("sqlite", "CON-4")
class FileLeaked:
    """Leaks an open file for each cancelled call."""

    async def request_cancel(self, **given: Any) -> bool:
        handle = os.open(os.devnull, os.O_RDONLY)
        done = await super().request_cancel(**given)
        os.close(handle)
        return bool(done)


@mutant("memory", "CON-4")
class CleanupNotAtomicPerRun:
    """Deletes the control records of runs, and the runs in a second step."""

    async def cleanup(self, **given: Any) -> int:
        over = [run.run_id for run in self._runs.values() if self._is_over(run.run_id, given["cutoff"])]
        for run_id in over:
            self._namespace.controls.pop(run_id, None)
        await asyncio.sleep(0)
        return int(await super().cleanup(**given))


class _WriteBehind:
    """Acknowledges a write at once and executes it later; its own reads wait for pending writes."""

    def begin(self) -> None:
        self._behind: set[asyncio.Task[Any]] = set()

    async def _later(self, operation: Any, given: Any) -> None:
        async def late() -> None:
            await asyncio.sleep(0.2)
            await operation(**given)

        if await super().get_run_status(run_id=given["run_id"]) is None:  # type: ignore[misc]
            raise RunNotFoundError(given["run_id"])
        task = asyncio.create_task(late())
        self._behind.add(task)
        task.add_done_callback(self._behind.discard)

    async def save_output(self, **given: Any) -> None:
        await self._later(super().save_output, given)  # type: ignore[misc]

    async def get_outputs(self, **given: Any) -> Any:
        await asyncio.gather(*self._behind)
        return await super().get_outputs(**given)  # type: ignore[misc]

    async def get_output(self, **given: Any) -> Any:
        await asyncio.gather(*self._behind)
        return await super().get_output(**given)  # type: ignore[misc]


@mutant("sqlite", "CON-5")
class AckBeforeCommit(_WriteBehind):
    """Acknowledges outputs before the commit."""


@mutant("postgresql", "CON-5")
class AckBeforeSend(_WriteBehind):
    """Acknowledges outputs before the statement is sent."""


@mutant("sqlite", "CON-2")
class TicketOfADeadWaiter:
    """Serves the writers of a run one after the other, by tickets. The ticket of a dead process is removed if
    it was being served, but not if it waited: then every later writer waits for ever."""

    async def opened(self) -> None:
        table = "CREATE TABLE IF NOT EXISTS tickets (number INTEGER PRIMARY KEY, run_id BLOB, server INTEGER)"
        await self._database.write(lambda db, now: db.execute(table))

    async def _serve(self, operation: Any, given: Any) -> Any:
        run_id = given["run_id"].bytes

        async def work() -> Any:
            ticket = await self._database.write(lambda db, now: _take_ticket(db, run_id))
            while not await self._database.write(lambda db, now: _is_served(db, run_id, ticket)):  # noqa: ASYNC110
                await asyncio.sleep(0.002)
            try:
                return await operation(**given)
            finally:
                await self._database.write(
                    lambda db, now: db.execute("DELETE FROM tickets WHERE number = ?", (ticket,))
                )

        # In a task of its own, so that a cancelled call leaves no ticket.
        return await asyncio.shield(asyncio.ensure_future(work()))

    async def request_cancel(self, **given: Any) -> Any:
        return await self._serve(super().request_cancel, given)

    async def record_step_start(self, **given: Any) -> Any:
        return await self._serve(super().record_step_start, given)

    async def record_step_complete(self, **given: Any) -> Any:
        return await self._serve(super().record_step_complete, given)

    async def complete_run(self, **given: Any) -> Any:
        return await self._serve(super().complete_run, given)

    async def save_output(self, **given: Any) -> Any:
        return await self._serve(super().save_output, given)

    async def append_event(self, **given: Any) -> Any:
        return await self._serve(super().append_event, given)


def _take_ticket(db: Any, run_id: bytes) -> Any:
    ticket = db.execute("INSERT INTO tickets (run_id) VALUES (?)", (run_id,)).lastrowid
    _is_served(db, run_id, ticket)
    return ticket


def _is_served(db: Any, run_id: bytes, ticket: int) -> bool:
    first = "SELECT number, server FROM tickets WHERE run_id = ? ORDER BY number LIMIT 1"
    number, server = db.execute(first, (run_id,)).fetchone()
    if server is not None and not _is_alive(server):
        db.execute("DELETE FROM tickets WHERE number = ?", (number,))
        number, server = db.execute(first, (run_id,)).fetchone()
    if number == ticket:
        db.execute("UPDATE tickets SET server = ? WHERE number = ?", (os.getpid(), ticket))
    return bool(number == ticket)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@mutant("sqlite", "CON-6", concurrent=True)
class SchemaCheckThenCreate:
    """Checks for its table, then creates it: most concurrent openers fail."""

    async def opened(self) -> None:
        query = "SELECT COUNT(*) FROM sqlite_schema WHERE name = 'mutants'"
        found = await self._database.read(lambda db: db.execute(query).fetchone()[0])
        if not found:
            await asyncio.sleep(0.01)
            await self._database.write(lambda db, now: db.execute("CREATE TABLE mutants (mutant TEXT)"))
