"""Mutants of latches, deadlines and control records."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from tests.mutants import mutant
from tests.mutants.sql_patching import PatchedPostgres, PatchedSqlite, SqlPatch


@mutant("memory", "CTL-1")
class ConfigureClearsLatch:
    """Clears the cancel latch when the run is configured again."""

    async def configure_run(self, **given: Any) -> None:
        await super().configure_run(**given)
        control = self._namespace.controls[given["run_id"]]
        control.cancelled_at = control.cancel_reason = None


@mutant("sqlite", "CTL-1")
class ConfigureResetsCreatedAt(PatchedSqlite):
    """Overwrites created_at."""

    patch_sql = SqlPatch((r"timeout_at = excluded\.timeout_at", r"\g<0>, created_at = excluded.created_at"))


@mutant("postgresql", "CTL-1")
class ConfigureIgnoresNone(PatchedPostgres):
    """Keeps the deadline when None is given to overwrite it."""

    patch_sql = SqlPatch(
        (
            r"timeout_at = excluded\.timeout_at",
            "timeout_at = coalesce(excluded.timeout_at, controls.timeout_at)",
        )
    )


@mutant("memory", "CTL-1")
class ConfigureRegistersKey:
    """Registers the idempotency key that it should only store."""

    async def configure_run(self, **given: Any) -> None:
        await super().configure_run(**given)
        if given["idempotency_key"] is not None:
            await super().try_register_idempotency_key(
                **{name: given[name] for name in ("flow_id", "trigger_key", "idempotency_key", "run_id")}
            )


@mutant("postgresql", "CTL-1")
class ControlRecordsInOrderOfIds(PatchedPostgres):
    """Returns the control records in the order of their run ids."""

    patch_sql = SqlPatch((r"ORDER BY n$", "ORDER BY run_id"))


@mutant("postgresql", "CTL-2", concurrent=True)
class CancelCheckThenWrite:
    """Reads the cancel latch, then writes it: every concurrent caller gets True."""

    async def request_cancel(self, **given: Any) -> bool:
        found = await super().get_run_control(run_id=given["run_id"])
        known = await super().get_run_status(run_id=given["run_id"]) is not None
        if found is None and not known:
            return False
        if found is None or found.cancel_requested_at is None:
            await super().request_cancel(**given)
            return True
        return bool(await super().request_cancel(**given))


@mutant("memory", "CTL-2", concurrent=True)
class TimeoutCheckThenWrite:
    """Reads the time-out latch, then writes it: every concurrent caller gets True."""

    async def mark_timed_out(self, **given: Any) -> bool:
        control = self._namespace.controls.get(given["run_id"])
        found = control is not None and control.timed_out_at is None
        await asyncio.sleep(0)
        done = await super().mark_timed_out(**given)
        due = given["as_of"] is None or (
            control and control.timeout_at and control.timeout_at <= given["as_of"]
        )
        return bool(done or (found and due))


@mutant("memory", "CTL-2")
class CancelTrueAgain:
    """Returns True for every cancel of a run that is cancelled already."""

    async def request_cancel(self, **given: Any) -> bool:
        await super().request_cancel(**given)
        return given["run_id"] in self._namespace.controls


@mutant("memory", "CTL-2")
class TimeoutReasonTakesPrecedence:
    """Shows the time-out's reason although the user gave one."""

    async def get_run_control(self, **given: Any) -> Any:
        record = await super().get_run_control(**given)
        control = self._namespace.controls.get(given["run_id"])
        if record is None or control is None or control.timed_out_at is None:
            return record
        return replace(record, cancel_reason=control.timeout_reason, cancel_requested_at=control.timed_out_at)


@mutant("sqlite", "CTL-2")
class TimeoutIgnoresAsOf:
    """Ignores as_of and times a run out before its deadline."""

    async def mark_timed_out(self, **given: Any) -> bool:
        return bool(await super().mark_timed_out(**{**given, "as_of": None}))


@mutant("postgresql", "CTL-2")
class CancelNeedsControl:
    """Cannot cancel a run that was never configured."""

    async def request_cancel(self, **given: Any) -> bool:
        if await super().get_run_control(run_id=given["run_id"]) is None:
            return False
        return bool(await super().request_cancel(**given))


@mutant("sqlite", "CTL-2")
class LastCancelReasonWins(PatchedSqlite):
    """Overwrites the reason of an earlier cancel."""

    patch_sql = SqlPatch(
        (
            r"cancelled_at = \?, cancel_reason = \? WHERE run_id = \? AND cancelled_at IS NULL",
            "cancelled_at = coalesce(cancelled_at, ?), cancel_reason = ? WHERE run_id = ?",
        )
    )


@mutant("memory", "CTL-3")
class StopListOmitsCancels:
    """Lists only runs past their deadline and omits cancelled runs."""

    async def get_runs_to_stop(self, **given: Any) -> Any:
        found = await super().get_runs_to_stop(**{**given, "take": 1000})
        moment = given["as_of"] or self._now()
        due = [
            run
            for run in found
            if (at := self._namespace.controls[run.run_id].timeout_at) is not None and at <= moment
        ]
        return tuple(due[: given["take"]])


@mutant("sqlite", "CTL-3")
class StopListNullsFirst(PatchedSqlite):
    """Orders runs without deadline first."""

    patch_sql = SqlPatch((r"ORDER BY timeout_at IS NULL, timeout_at", "ORDER BY timeout_at"))


@mutant("postgresql", "CTL-3")
class StopListOmitsTimedOut(PatchedPostgres):
    """Omits runs with a set time-out latch, so a stopper that crashed never finds them again."""

    patch_sql = SqlPatch(
        (
            r"c\.timeout_at <= coalesce\(\$1, \$2, clock_timestamp\(\)\)\s+OR",
            r"c.timed_out_at IS NULL AND \g<0>",
        ),
        (r" OR c\.timed_out_at IS NOT NULL", ""),
    )


@mutant("postgresql", "CTL-3")
class ExtendKeepsLatch(PatchedPostgres):
    """Sets the new deadline but keeps the time-out latch."""

    patch_sql = SqlPatch(
        (r"SET timeout_at = \$2, timed_out_at = NULL, timed_out_reason = NULL", "SET timeout_at = $2")
    )


@mutant("memory", "CTL-3")
class ExtendClearsCancel:
    """Clears a user's cancel together with the time-out."""

    async def extend_deadline(self, **given: Any) -> bool:
        done = await super().extend_deadline(**given)
        if done:
            control = self._namespace.controls[given["run_id"]]
            control.cancelled_at = control.cancel_reason = None
        return bool(done)
