"""Broken runs."""

from __future__ import annotations

import asyncio
from types import MappingProxyType
from typing import Any

from flowstore_core import RunAlreadyExistsError, RunStatus
from tests.mutants import broken
from tests.mutants.sql_patching import Cut, PostgresSurgery, SqliteSurgery


async def _record_of(store: Any, run_id: Any) -> Any:
    runs = await store.get_runs(flow_id=None, after=None, skip=0, take=1000)
    return next(run for run in runs if run.run_id == run_id)


@broken("sqlite", "RUN-1")
class StartRunReturnsTheOther:
    """Takes an id that exists for a repetition, and returns the run that is there."""

    async def start_run(self, **given: Any) -> Any:
        try:
            return await super().start_run(**given)
        except RunAlreadyExistsError:
            return await _record_of(self, given["run_id"])


@broken("postgresql", "RUN-1", concurrent=True, look_at=("IDM-3",))
class StartRunLooksFirst:
    """Refuses an id that it finds, but of several that start it at once all succeed."""

    async def start_run(self, **given: Any) -> Any:
        if await super().get_run_status(run_id=given["run_id"]) is not None:
            raise RunAlreadyExistsError(given["run_id"])
        try:
            return await super().start_run(**given)
        except RunAlreadyExistsError:
            return await _record_of(self, given["run_id"])


@broken("memory", "RUN-2")
class LastTerminalStatusWins:
    """Moves a run from one terminal status to another."""

    async def complete_run(self, **given: Any) -> bool:
        run = self._runs[given["run_id"].int]
        if run.status is not RunStatus.RUNNING and given["expected"] is None:
            run.status = given["status"]
        return bool(await super().complete_run(**given))


@broken("sqlite", "RUN-2")
class CompleteIgnoresExpected:
    """Completes whatever the steps are."""

    async def complete_run(self, **given: Any) -> bool:
        return bool(await super().complete_run(**{**given, "expected": None}))


@broken("memory", "RUN-2")
class CompleteOverlooksDispatches:
    """Compares the statuses, but not the claims and dispatches on other keys."""

    async def complete_run(self, **given: Any) -> bool:
        statuses = await super().get_step_statuses(run_id=given["run_id"])
        if given["expected"] is not None and dict(statuses) != dict(given["expected"]):
            self._runs[given["run_id"].int]
            return False
        return bool(await super().complete_run(**{**given, "expected": None}))


@broken("postgresql", "RUN-2", concurrent=True)
class ExpectedComparedBefore:
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


@broken("memory", "RUN-2", concurrent=True)
class CompletedByAll:
    """All who found the run Running are told that they completed it."""

    async def complete_run(self, **given: Any) -> bool:
        found = self._runs[given["run_id"].int].status
        await asyncio.sleep(0)
        done = await super().complete_run(**given)
        return bool(done or (found is RunStatus.RUNNING and given["expected"] is None))


@broken("memory", "RUN-3")
class OutputsAreLive:
    """Returns a view of its own mapping, which changes under the reader."""

    async def get_outputs(self, **given: Any) -> Any:
        await super().get_outputs(**given)
        run = self._runs.get(given["run_id"].int)
        return MappingProxyType({} if run is None else run.outputs)


@broken("memory", "RUN-4")
class TerminalRunTakesClaims:
    """Claims and dispatches steps of a run that is over."""

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


@broken("memory", "RUN-4", concurrent=True, look_at=("RUN-2",))
class StartLooksAtRunBefore:
    """Looks whether the run is over, and starts the step a moment later, when it may be."""

    async def record_step_start(self, **given: Any) -> int:
        run = self._runs[given["run_id"].int]
        found = run.status
        await asyncio.sleep(0)
        status, run.status = run.status, found
        try:
            return int(await super().record_step_start(**given))
        finally:
            run.status = status


@broken("sqlite", "RUN-4")
class TerminalRunGetsSignals(SqliteSurgery):
    """Delivers to a waiter of a run that is over."""

    cut = Cut((r"AND status = 'Running' (AND signal_name)", r"\1"))


@broken("memory", "RUN-4", concurrent=True)
class DeliveryLooksAtRunBefore:
    """Looks whether the run is over, and delivers a moment later, when it may be."""

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


@broken("postgresql", "RUN-4", concurrent=True)
class DeliveryLocksNoRun(PostgresSurgery):
    """Reads the run without locking it, so that it may end before the delivery."""

    cut = Cut((r"(SELECT status FROM \{schema\}\.runs WHERE run_id = \$1) FOR UPDATE", r"\1"))


@broken("sqlite", "RUN-4")
class OwnClaimOutlivesRun:
    """Tells the owner of a claim True even when the run is over."""

    async def try_claim_step(self, **given: Any) -> bool:
        won = await super().try_claim_step(**given)
        if won or given["owner"] is None:
            return bool(won)
        claims = await super().get_step_claims(run_id=given["run_id"])
        return any(
            claim.step_key == given["step_key"] and claim.owner == given["owner"] and claim.expires_at is None
            for claim in claims
        ) and given["step_key"] not in await super().get_step_statuses(run_id=given["run_id"])


@broken("postgresql", "UNK")
class WaiterOfNoRun:
    """Says nothing when the run of a waiter is unknown."""

    async def register_waiter(self, **given: Any) -> None:
        if await super().get_run_status(run_id=given["run_id"]) is not None:
            await super().register_waiter(**given)


@broken("memory", "UNK")
class StatusesOfNoRunRaise:
    """Raises for the statuses of an unknown run, which are empty."""

    async def get_step_statuses(self, **given: Any) -> Any:
        self._runs[given["run_id"].int]
        return await super().get_step_statuses(**given)
