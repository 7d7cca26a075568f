"""Broken waiters and deliveries."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from flowstore_core import ConflictError, SignalDeliveryResult, SignalDeliveryStatus
from tests.mutants import broken
from tests.mutants.sql_patching import Cut, PostgresSurgery, SqliteSurgery

NOT_FOUND = SignalDeliveryResult(status=SignalDeliveryStatus.NOT_FOUND, step_key=None, delivered_at=None)


@broken("memory", "SIG-1")
class RegisterDropsPayload:
    """Registers a delivered waiter anew, and its payload is gone."""

    async def register_waiter(self, **given: Any) -> None:
        await super().register_waiter(**given)
        waiter = self._runs[given["run_id"].int].waiters[given["step_key"]]
        waiter.delivered_at = waiter.payload_json = None


@broken("sqlite", "SIG-1")
class RegisterResetsCreatedAt(SqliteSurgery):
    """Puts a waiter that is registered again at the end of the queue."""

    cut = Cut((r"expires_at = excluded\.expires_at", r"\g<0>, created_at = excluded.created_at"))

    def begin(self) -> None:
        # Only of waiters: claims are inserted by a statement that looks alike.
        whole = self.cut
        self.cut = lambda statement: whole(statement) if "INTO waiters" in statement else statement


@broken("postgresql", "SIG-1")
class ExpiredWaiterRegistersAgain:
    """Revives an expired waiter without its being removed."""

    async def register_waiter(self, **given: Any) -> None:
        try:
            await super().register_waiter(**given)
        except ConflictError:
            waiter = await super().get_waiter(run_id=given["run_id"], step_key=given["step_key"])
            if waiter is None or waiter.expired_at is None:
                raise
            await super().remove_waiter(run_id=given["run_id"], step_key=given["step_key"])
            await super().register_waiter(**given)


@broken("memory", "SIG-2", concurrent=True)
class DeliveredTwice:
    """Chooses a waiter, and gives it the payload a moment later, though another may have."""

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


@broken("sqlite", "SIG-2")
class NewestWaiterServed(SqliteSurgery):
    """Gives the payload to the newest waiter."""

    cut = Cut((r"(delivered_at IS NULL AND expired_at IS NULL\s+ORDER BY) created_at", r"\1 created_at DESC"))


@broken("postgresql", "SIG-2")
class OldDeliverySpeaksFirst:
    """Says ALREADY_DELIVERED although another waiter under this name is still waiting."""

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


@broken("memory", "SIG-2")
class DeliveryIdIgnored:
    """Delivers a second time what is said again because the answer was lost."""

    async def deliver_signal(self, **given: Any) -> Any:
        return await super().deliver_signal(**{**given, "delivery_id": None})


@broken("sqlite", "SIG-2")
class DeliveryIdForgottenWithWaiter:
    """Forgets the delivery ids when their waiter is removed."""

    async def remove_waiter(self, **given: Any) -> Any:
        removed = await super().remove_waiter(**given)
        await self.write(
            lambda db, now: db.execute(
                "DELETE FROM deliveries WHERE run_id = ? AND step_key = ?",
                (given["run_id"].bytes, given["step_key"]),
            )
        )
        return removed


@broken("postgresql", "SIG-2")
class DeliveryIdForgottenWithRun:
    """Says NOT_FOUND to a delivery id that it has delivered, once the run is over."""

    async def deliver_signal(self, **given: Any) -> Any:
        status = await super().get_run_status(run_id=given["run_id"])
        if status is not None and status.is_terminal:
            given["delivery_id"] = None
        result = await super().deliver_signal(**given)
        return NOT_FOUND if status is not None and status.is_terminal else result


@broken("memory", "SIG-3")
class TerminalRunForgetsDeliveries:
    """Says NOT_FOUND on a run that is over, though a waiter under that name was delivered to."""

    async def deliver_signal(self, **given: Any) -> Any:
        result = await super().deliver_signal(**given)
        run = self._runs.get(given["run_id"].int)
        over = run is not None and run.status.is_terminal
        return NOT_FOUND if over and result.status is SignalDeliveryStatus.ALREADY_DELIVERED else result


@broken("postgresql", "SIG-3", concurrent=True, look_at=("SIG-2",))
class LockedWaiterSkipped(PostgresSurgery):
    """Looks for a waiter with SKIP LOCKED, and for a delivered one when all are locked: neither is found."""

    cut = Cut(
        (
            r"AND delivered_at IS NULL AND expired_at IS NULL\s+ORDER BY created_at, step_key LIMIT 1",
            r"\g<0> FOR UPDATE SKIP LOCKED",
        ),
        # Deliveries of a run no longer follow each other.
        (r"(SELECT status FROM \{schema\}\.runs WHERE run_id = \$1) FOR UPDATE", r"\1"),
    )


@broken("sqlite", "SIG-3")
class NothingFoundOnceDelivered:
    """Says NOT_FOUND when all waiters under the name were served."""

    async def deliver_signal(self, **given: Any) -> Any:
        result = await super().deliver_signal(**given)
        return NOT_FOUND if result.status is SignalDeliveryStatus.ALREADY_DELIVERED else result


@broken("memory", "SIG-3")
class NewestDeliveryNamed:
    """Names the newest delivered waiter in ALREADY_DELIVERED, not the oldest."""

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


@broken("memory", "SIG-4")
class ExpiryOverridesDelivery:
    """Expires a waiter that got its payload."""

    async def expire_waiter(self, **given: Any) -> Any:
        run = self._runs.get(given["run_id"].int)
        waiter = None if run is None else run.waiters.get(given["step_key"])
        now = self._now()
        if waiter is not None and waiter.expires_at is not None and waiter.expires_at <= now:
            waiter.expired_at = waiter.expired_at or now
        return await super().expire_waiter(**given)


@broken("sqlite", "SIG-4", concurrent=True)
class ExpiryDecidedBefore:
    """Sees that a waiter is due and undelivered, and expires it in the next transaction."""

    async def expire_waiter(self, **given: Any) -> Any:
        found = await super().get_waiter(**given)
        if found is None or found.delivered_at is not None or found.expired_at is not None:
            return found

        def expire(db: Any, now: int) -> None:
            db.execute(
                "UPDATE waiters SET expired_at = ? WHERE run_id = ? AND step_key = ? AND expires_at <= ?",
                (now, given["run_id"].bytes, given["step_key"], now),
            )

        await self.write(expire)
        return await super().get_waiter(**given)


@broken("postgresql", "SIG-4")
class ExpiredWaiterServed(PostgresSurgery):
    """Delivers to a waiter that was expired."""

    cut = Cut(
        (r"AND delivered_at IS NULL AND expired_at IS NULL(\s+ORDER BY)", r"AND delivered_at IS NULL\1")
    )


@broken("postgresql", "SIG-4", concurrent=True)
class RemovalLosesPayload:
    """Reads the waiter, then removes it, and returns what it read: a payload that came in between is lost."""

    async def remove_waiter(self, **given: Any) -> Any:
        found = await super().get_waiter(**given)
        removed = await super().remove_waiter(**given)
        return None if removed is None else found or removed


@broken("memory", "SIG-4")
class ExpiryKnowsNoDeadline:
    """Expires a waiter before its time."""

    async def expire_waiter(self, **given: Any) -> Any:
        run = self._runs.get(given["run_id"].int)
        waiter = None if run is None else run.waiters.get(given["step_key"])
        if waiter is not None and waiter.delivered_at is None and waiter.expired_at is None:
            waiter.expired_at = self._now()
        return await super().expire_waiter(**given)
