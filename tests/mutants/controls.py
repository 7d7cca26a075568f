"""Broken latches, deadlines and control records."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from tests.mutants import broken
from tests.mutants.sql_patching import Cut, PostgresSurgery, SqliteSurgery


@broken("memory", "CTL-1")
class ConfigureClearsLatch:
    """Clears the cancel when the run is configured again."""

    async def configure_run(self, **given: Any) -> None:
        await super().configure_run(**given)
        control = self._namespace.controls[given["run_id"]]
        control.cancelled_at = control.cancel_reason = None


@broken("sqlite", "CTL-1")
class ConfigureResetsCreatedAt(SqliteSurgery):
    """Sets created_at anew."""

    cut = Cut((r"timeout_at = excluded\.timeout_at", r"\g<0>, created_at = excluded.created_at"))


@broken("postgresql", "CTL-1")
class ConfigureKeepsWhatIsNone(PostgresSurgery):
    """Keeps the deadline when None is given to overwrite it."""

    cut = Cut(
        (
            r"timeout_at = excluded\.timeout_at",
            "timeout_at = coalesce(excluded.timeout_at, controls.timeout_at)",
        )
    )


@broken("memory", "CTL-1")
class ConfigureRegistersKey:
    """Registers the idempotency key that it should only note."""

    async def configure_run(self, **given: Any) -> None:
        await super().configure_run(**given)
        if given["idempotency_key"] is not None:
            await super().try_register_idempotency_key(
                **{name: given[name] for name in ("flow_id", "trigger_key", "idempotency_key", "run_id")}
            )


@broken("postgresql", "CTL-2", concurrent=True)
class LatchReadThenWritten:
    """Reads the latch and writes it in two steps: all who found it open are told True."""

    async def request_cancel(self, **given: Any) -> bool:
        found = await super().get_run_control(run_id=given["run_id"])
        known = await super().get_run_status(run_id=given["run_id"]) is not None
        if found is None and not known:
            return False
        if found is None or found.cancel_requested_at is None:
            await super().request_cancel(**given)
            return True
        return bool(await super().request_cancel(**given))


@broken("memory", "CTL-2", concurrent=True)
class TimeoutReadThenWritten:
    """Reads the time-out latch and writes it a moment later: all who found it open are told True."""

    async def mark_timed_out(self, **given: Any) -> bool:
        control = self._namespace.controls.get(given["run_id"])
        found = control is not None and control.timed_out_at is None
        await asyncio.sleep(0)
        done = await super().mark_timed_out(**given)
        due = given["as_of"] is None or (
            control and control.timeout_at and control.timeout_at <= given["as_of"]
        )
        return bool(done or (found and due))


@broken("memory", "CTL-2")
class LatchAnswersTwice:
    """Tells everybody True who asks for a cancel that is set."""

    async def request_cancel(self, **given: Any) -> bool:
        await super().request_cancel(**given)
        return given["run_id"] in self._namespace.controls


@broken("memory", "CTL-2")
class TimeoutSpeaksFirst:
    """Shows the time-out's reason though the user gave one."""

    async def get_run_control(self, **given: Any) -> Any:
        record = await super().get_run_control(**given)
        control = self._namespace.controls.get(given["run_id"])
        if record is None or control is None or control.timed_out_at is None:
            return record
        return replace(record, cancel_reason=control.timeout_reason, cancel_requested_at=control.timed_out_at)


@broken("sqlite", "CTL-2")
class TimeoutIgnoresAsOf:
    """Times a run out before its deadline."""

    async def mark_timed_out(self, **given: Any) -> bool:
        return bool(await super().mark_timed_out(**{**given, "as_of": None}))


@broken("postgresql", "CTL-2")
class CancelNeedsControl:
    """Cannot cancel a run that was never configured."""

    async def request_cancel(self, **given: Any) -> bool:
        if await super().get_run_control(run_id=given["run_id"]) is None:
            return False
        return bool(await super().request_cancel(**given))


@broken("sqlite", "CTL-2")
class ReasonOfTheLastWins(SqliteSurgery):
    """Overwrites the reason of a cancel that is set already."""

    cut = Cut(
        (
            r"cancelled_at = \?, cancel_reason = \? WHERE run_id = \? AND cancelled_at IS NULL",
            "cancelled_at = coalesce(cancelled_at, ?), cancel_reason = ? WHERE run_id = ?",
        )
    )


@broken("memory", "CTL-3")
class StopListForgetsCancels:
    """Lists only runs past their deadline, not those whose cancel is requested."""

    async def get_runs_to_stop(self, **given: Any) -> Any:
        found = await super().get_runs_to_stop(**{**given, "take": 1000})
        moment = given["as_of"] or self._now()
        due = [
            run
            for run in found
            if (at := self._namespace.controls[run.run_id].timeout_at) is not None and at <= moment
        ]
        return tuple(due[: given["take"]])


@broken("sqlite", "CTL-3")
class StopListPutsNoneFirst(SqliteSurgery):
    """Puts runs without deadline first."""

    cut = Cut((r"ORDER BY timeout_at IS NULL, timeout_at", "ORDER BY timeout_at"))


@broken("postgresql", "CTL-3")
class StopListForgetsLatched(PostgresSurgery):
    """Leaves out runs whose time-out is latched already, so a crashed stopper never comes back to them."""

    cut = Cut(
        (
            r"c\.timeout_at <= coalesce\(\$1, \$2, clock_timestamp\(\)\)\s+OR",
            r"c.timed_out_at IS NULL AND \g<0>",
        ),
        (r" OR c\.timed_out_at IS NOT NULL", ""),
    )


@broken("postgresql", "CTL-3")
class ExtendKeepsLatch(PostgresSurgery):
    """Sets the new deadline but leaves the run timed out."""

    cut = Cut((r"SET timeout_at = \$2, timed_out_at = NULL, timed_out_reason = NULL", "SET timeout_at = $2"))


@broken("memory", "CTL-3")
class ExtendForgetsCancel:
    """Undoes a user's cancel with the time-out."""

    async def extend_deadline(self, **given: Any) -> bool:
        done = await super().extend_deadline(**given)
        if done:
            control = self._namespace.controls[given["run_id"]]
            control.cancelled_at = control.cancel_reason = None
        return bool(done)
