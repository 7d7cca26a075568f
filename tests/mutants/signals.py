"""Mutants of waiters and deliveries."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from flowstore_core import ConflictError, SignalDeliveryResult, SignalDeliveryStatus
from tests.mutants import mutant
from tests.mutants.sql_patching import PatchedPostgres, PatchedSqlite, SqlPatch

NOT_FOUND = SignalDeliveryResult(status=SignalDeliveryStatus.NOT_FOUND, step_key=None, delivered_at=None)


@mutant("memory", "SIG-1")
class RegisterDropsPayload:
    """Drops the payload of a delivered waiter that is registered again."""

    async def register_waiter(self, **given: Any) -> None:
        await super().register_waiter(**given)
        waiter = self._runs[given["run_id"].int].waiters[given["step_key"]]
        waiter.delivered_at = waiter.payload_json = None


@mutant("sqlite", "SIG-1")
class RegisterResetsCreatedAt(PatchedSqlite):
    """Moves a waiter that is registered again to the end of the queue."""

    patch_sql = SqlPatch((r"signal_name = excluded\.signal_name", r"\g<0>, created_at = excluded.created_at"))


@mutant("postgresql", "SIG-1")
class ExpiredWaiterReregistered:
    """Registers an expired waiter again although it was not removed."""

    async def register_waiter(self, **given: Any) -> None:
        try:
            await super().register_waiter(**given)
        except ConflictError:
            waiter = await super().get_waiter(run_id=given["run_id"], step_key=given["step_key"])
            if waiter is None or waiter.expired_at is None:
                raise
            await super().remove_waiter(run_id=given["run_id"], step_key=given["step_key"])
            await super().register_waiter(**given)


@mutant("memory", "SIG-2", concurrent=True)
class DeliveryCheckThenWrite:
    """Chooses a waiter, and delivers later, although another delivery may have reached it in between."""

    async def deliver_signal(self, **given: Any) -> Any:
        run = self._runs.get(given["run_id"].int)
        waiting = (
            []
            if run is None
            else [
                (waiter.created_at, key)
                for key, waiter in run.waiters.items()
                if waiter.signal_name == given["signal_name"]
                and waiter.delivered_at is None
                and waiter.expired_at is None
            ]
        )
        known = run is not None and given["delivery_id"] in run.deliveries
        await asyncio.sleep(0)
        if run is None or not waiting or known:
            return await super().deliver_signal(**given)
        _, key = min(waiting)
        waiter = run.waiters.get(key)
        if waiter is None or waiter.delivered_at is None:
            return await super().deliver_signal(**given)
        waiter.payload_json = given["payload_json"]
        return SignalDeliveryResult(
            status=SignalDeliveryStatus.DELIVERED, step_key=key, delivered_at=waiter.delivered_at
        )


@mutant("sqlite", "SIG-2")
class DeliveryToNewestWaiter(PatchedSqlite):
    """Delivers to the newest waiter."""

    patch_sql = SqlPatch(
        (r"(delivered_at IS NULL AND expired_at IS NULL\s+ORDER BY) created_at", r"\1 created_at DESC")
    )


@mutant("postgresql", "SIG-2")
class AlreadyDeliveredTakesPrecedence:
    """Returns ALREADY_DELIVERED although another waiter of this name is undelivered."""

    async def deliver_signal(self, **given: Any) -> Any:
        if given["delivery_id"] is None:
            for waiter in await super().get_waiters(run_id=given["run_id"]):
                if waiter.signal_name == given["signal_name"] and waiter.delivered_at is not None:
                    return SignalDeliveryResult(
                        status=SignalDeliveryStatus.ALREADY_DELIVERED,
                        step_key=waiter.step_key,
                        delivered_at=waiter.delivered_at,
                    )
        return await super().deliver_signal(**given)


@mutant("memory", "SIG-2")
class DeliveryIdIgnored:
    """Ignores the delivery_id and delivers a repeated call a second time."""

    async def deliver_signal(self, **given: Any) -> Any:
        return await super().deliver_signal(**{**given, "delivery_id": None})


@mutant("sqlite", "SIG-2")
class DeliveryIdForgottenWithWaiter:
    """Forgets delivery ids when their waiter is removed."""

    async def remove_waiter(self, **given: Any) -> Any:
        removed = await super().remove_waiter(**given)
        await self._database.write(
            lambda db, now: db.execute(
                "DELETE FROM deliveries WHERE run_id = ? AND step_key = ?",
                (given["run_id"].bytes, given["step_key"]),
            )
        )
        return removed


@mutant("postgresql", "SIG-2")
class DeliveryIdForgottenOnTerminalRun:
    """Returns NOT_FOUND for a remembered delivery_id once the run is terminal."""

    async def deliver_signal(self, **given: Any) -> Any:
        status = await super().get_run_status(run_id=given["run_id"])
        if status is not None and status.is_terminal:
            given["delivery_id"] = None
        result = await super().deliver_signal(**given)
        return NOT_FOUND if status is not None and status.is_terminal else result


@mutant("memory", "SIG-3")
class TerminalRunForgetsDeliveries:
    """Returns NOT_FOUND on a terminal run although a waiter of that name was delivered."""

    async def deliver_signal(self, **given: Any) -> Any:
        result = await super().deliver_signal(**given)
        run = self._runs.get(given["run_id"].int)
        over = run is not None and run.status.is_terminal
        return NOT_FOUND if over and result.status is SignalDeliveryStatus.ALREADY_DELIVERED else result


@mutant("postgresql", "SIG-3", concurrent=True, more_clauses=("SIG-2",))
class LockedWaiterSkipped(PatchedPostgres):
    """Selects a waiter with SKIP LOCKED: a delivery finds neither a free nor a delivered waiter."""

    patch_sql = SqlPatch(
        (
            r"AND delivered_at IS NULL AND expired_at IS NULL\s+ORDER BY created_at, step_key LIMIT 1",
            r"\g<0> FOR UPDATE SKIP LOCKED",
        ),
        # Deliveries to one run are no longer serialised.
        (r"(SELECT status FROM \{schema\}\.runs WHERE run_id = \$3) FOR UPDATE", r"\1"),
    )


@mutant("sqlite", "SIG-3")
class NotFoundOnceDelivered:
    """Returns NOT_FOUND when every waiter of the name was delivered."""

    async def deliver_signal(self, **given: Any) -> Any:
        result = await super().deliver_signal(**given)
        return NOT_FOUND if result.status is SignalDeliveryStatus.ALREADY_DELIVERED else result


@mutant("memory", "SIG-3")
class AlreadyDeliveredNamesNewest:
    """Names the newest instead of the oldest delivered waiter in ALREADY_DELIVERED."""

    async def deliver_signal(self, **given: Any) -> Any:
        result = await super().deliver_signal(**given)
        if result.status is not SignalDeliveryStatus.ALREADY_DELIVERED:
            return result
        waiters = self._runs[given["run_id"].int].waiters.items()
        _, key, waiter = max(
            (waiter.created_at, key, waiter)
            for key, waiter in waiters
            if waiter.signal_name == given["signal_name"] and waiter.delivered_at is not None
        )
        return replace(result, step_key=key, delivered_at=waiter.delivered_at)


@mutant("memory", "SIG-4")
class ExpiryOverridesDelivery:
    """Expires a delivered waiter."""

    async def expire_waiter(self, **given: Any) -> Any:
        run = self._runs.get(given["run_id"].int)
        waiter = None if run is None else run.waiters.get(given["step_key"])
        now = self._now()
        if waiter is not None and waiter.expires_at is not None and waiter.expires_at <= now:
            waiter.expired_at = waiter.expired_at or now
        return await super().expire_waiter(**given)


@mutant("sqlite", "SIG-4", concurrent=True)
class ExpiryCheckThenWrite:
    """Checks that a waiter is due and undelivered, and expires it in the next transaction."""

    async def expire_waiter(self, **given: Any) -> Any:
        found = await super().get_waiter(**given)
        if found is None or found.delivered_at is not None or found.expired_at is not None:
            return found

        def expire(db: Any, now: int) -> None:
            db.execute(
                "UPDATE waiters SET expired_at = ? WHERE run_id = ? AND step_key = ? AND expires_at <= ?",
                (now, given["run_id"].bytes, given["step_key"], now),
            )

        await self._database.write(expire)
        return await super().get_waiter(**given)


@mutant("postgresql", "SIG-4")
class ExpiredWaiterDelivered(PatchedPostgres):
    """Delivers to an expired waiter."""

    patch_sql = SqlPatch(
        (r"AND delivered_at IS NULL AND expired_at IS NULL(\s+ORDER BY)", r"AND delivered_at IS NULL\1")
    )


@mutant("postgresql", "SIG-4", concurrent=True)
class RemovalReturnsStaleRow:
    """Reads the waiter, then removes it and returns that row: a payload delivered in between is lost."""

    async def remove_waiter(self, **given: Any) -> Any:
        found = await super().get_waiter(**given)
        removed = await super().remove_waiter(**given)
        return None if removed is None else found or removed


@mutant("memory", "SIG-4")
class ExpiryIgnoresExpiresAt:
    """Expires a waiter before its expires_at."""

    async def expire_waiter(self, **given: Any) -> Any:
        run = self._runs.get(given["run_id"].int)
        waiter = None if run is None else run.waiters.get(given["step_key"])
        if waiter is not None and waiter.delivered_at is None and waiter.expired_at is None:
            waiter.expired_at = self._now()
        return await super().expire_waiter(**given)
