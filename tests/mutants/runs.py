"""Mutants of runs and of unknown runs."""

from __future__ import annotations

import asyncio
from types import MappingProxyType
from typing import Any

from flowstore_core import RunAlreadyExistsError, RunStatus
from tests.mutants import mutant
from tests.mutants.sql_patching import PatchedPostgres, PatchedSqlite, SqlPatch


async def _record_of(store: Any, run_id: Any) -> Any:
    runs = await store.get_runs(flow_id=None, after=None, skip=0, take=1000)
    return next(run for run in runs if run.run_id == run_id)


@mutant("sqlite", "RUN-1")
class StartRunReturnsExistingRun:
    """Treats a stored id as a repeated call and returns the existing run."""

    async def start_run(self, **given: Any) -> Any:
        try:
            return await super().start_run(**given)
        except RunAlreadyExistsError:
            return await _record_of(self, given["run_id"])


@mutant("postgresql", "RUN-1", concurrent=True, more_clauses=("IDM-3",))
class StartRunCheckThenInsert:
    """Refuses an id that it finds, but every concurrent start of one id succeeds."""

    async def start_run(self, **given: Any) -> Any:
        if await super().get_run_status(run_id=given["run_id"]) is not None:
            raise RunAlreadyExistsError(given["run_id"])
        try:
            return await super().start_run(**given)
        except RunAlreadyExistsError:
            return await _record_of(self, given["run_id"])


@mutant("memory", "RUN-2")
class LastTerminalStatusWins:
    """Moves a run from one terminal status to another."""

    async def complete_run(self, **given: Any) -> bool:
        run = self._runs[given["run_id"].int]
        if run.status is not RunStatus.RUNNING and given["expected"] is None:
            run.status = given["status"]
        return bool(await super().complete_run(**given))


@mutant("sqlite", "RUN-2")
class CompleteIgnoresExpected:
    """Ignores ``expected``."""

    async def complete_run(self, **given: Any) -> bool:
        return bool(await super().complete_run(**{**given, "expected": None}))


@mutant("memory", "RUN-2")
class CompleteIgnoresOtherKeys:
    """Compares the statuses but ignores claims and dispatches on other keys."""

    async def complete_run(self, **given: Any) -> bool:
        statuses = await super().get_step_statuses(run_id=given["run_id"])
        if given["expected"] is not None and dict(statuses) != dict(given["expected"]):
            self._runs[given["run_id"].int]
            return False
        return bool(await super().complete_run(**{**given, "expected": None}))


@mutant("postgresql", "RUN-2", concurrent=True)
class ExpectedComparedEarlier:
    """Compares the statuses in one transaction and completes in the next."""

    async def complete_run(self, **given: Any) -> bool:
        if given["expected"] is None or await super().get_run_status(run_id=given["run_id"]) is None:
            return bool(await super().complete_run(**given))
        statuses = await super().get_step_statuses(run_id=given["run_id"])
        dispatched = await super().get_dispatched_step_keys(run_id=given["run_id"])
        claimed = await super().get_claimed_step_keys(run_id=given["run_id"])
        if dict(statuses) != dict(given["expected"]) or (dispatched | claimed) - statuses.keys():
            return False
        await asyncio.sleep(0.01)
        return bool(await super().complete_run(**{**given, "expected": None}))


@mutant("memory", "RUN-2", concurrent=True)
class CompleteTrueForEveryRacer:
    """Returns True to every caller that found the run Running."""

    async def complete_run(self, **given: Any) -> bool:
        found = self._runs[given["run_id"].int].status
        await asyncio.sleep(0)
        done = await super().complete_run(**given)
        return bool(done or (found is RunStatus.RUNNING and given["expected"] is None))


@mutant("memory", "RUN-3")
class OutputsLiveMapping:
    """Returns a live view of its own mapping, which changes under the reader."""

    async def get_outputs(self, **given: Any) -> Any:
        await super().get_outputs(**given)
        run = self._runs.get(given["run_id"].int)
        return MappingProxyType({} if run is None else run.outputs)


@mutant("memory", "RUN-4")
class TerminalRunAcceptsClaims:
    """Claims and dispatches steps of a terminal run."""

    async def try_claim_step(self, **given: Any) -> bool:
        return bool(await self._as_if_running(super().try_claim_step, given))

    async def try_record_dispatch(self, **given: Any) -> bool:
        return bool(await self._as_if_running(super().try_record_dispatch, given))

    async def _as_if_running(self, operation: Any, given: Any) -> Any:
        run = self._runs[given["run_id"].int]
        status, run.status = run.status, RunStatus.RUNNING
        try:
            return await operation(**given)
        finally:
            run.status = status


@mutant("memory", "RUN-4", concurrent=True, more_clauses=("RUN-2",))
class StartChecksRunEarlier:
    """Checks that the run is Running, and starts the step later, when the run may be terminal."""

    async def record_step_start(self, **given: Any) -> int:
        run = self._runs[given["run_id"].int]
        found = run.status
        await asyncio.sleep(0)
        status, run.status = run.status, found
        try:
            return int(await super().record_step_start(**given))
        finally:
            run.status = status


@mutant("sqlite", "RUN-4")
class TerminalRunAcceptsSignals(PatchedSqlite):
    """Delivers to a waiter of a terminal run."""

    patch_sql = SqlPatch((r"AND status = 'Running' (AND signal_name)", r"\1"))


@mutant("memory", "RUN-4", concurrent=True)
class DeliveryChecksRunEarlier:
    """Checks that the run is Running, and delivers later, when the run may be terminal."""

    async def deliver_signal(self, **given: Any) -> Any:
        run = self._runs.get(given["run_id"].int)
        if run is None or run.status is not RunStatus.RUNNING:
            return await super().deliver_signal(**given)
        await asyncio.sleep(0)
        status, run.status = run.status, RunStatus.RUNNING
        try:
            return await super().deliver_signal(**given)
        finally:
            run.status = status


@mutant("postgresql", "RUN-4", concurrent=True)
class DeliveryWithoutRunLock(PatchedPostgres):
    """Reads the run without locking it, so that it may be completed before the delivery."""

    patch_sql = SqlPatch((r"(SELECT status FROM \{schema\}\.runs WHERE run_id = \$1) FOR UPDATE", r"\1"))


@mutant("sqlite", "RUN-4")
class OwnClaimOutlivesRun:
    """Returns True to the owner of a claim on a terminal run."""

    async def try_claim_step(self, **given: Any) -> bool:
        won = await super().try_claim_step(**given)
        if won or given["owner"] is None:
            return bool(won)
        claims = await super().get_step_claims(run_id=given["run_id"])
        return any(
            claim.step_key == given["step_key"] and claim.owner == given["owner"] and claim.expires_at is None
            for claim in claims
        ) and given["step_key"] not in await super().get_step_statuses(run_id=given["run_id"])


@mutant("postgresql", "UNK")
class WaiterOfUnknownRun:
    """Accepts a waiter of an unknown run without an error."""

    async def register_waiter(self, **given: Any) -> None:
        if await super().get_run_status(run_id=given["run_id"]) is not None:
            await super().register_waiter(**given)


@mutant("memory", "UNK")
class StatusesOfUnknownRunRaise:
    """Raises for the statuses of an unknown run instead of returning an empty mapping."""

    async def get_step_statuses(self, **given: Any) -> Any:
        self._runs[given["run_id"].int]
        return await super().get_step_statuses(**given)
