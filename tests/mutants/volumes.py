"""Mutants that are correct for few items, small texts and few callers."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import datetime
from itertools import islice
from typing import Any
from uuid import UUID

from flowstore_core import FlowStoreError, RunPage, RunStatus
from tests.mutants import mutant
from tests.mutants.sql_patching import PatchedPostgres, SqlPatch


@mutant("sqlite", "UNK")
class StatusesOfFirstThousandSteps:
    """Returns the statuses of the first 1,000 steps of a run."""

    async def get_step_statuses(self, **given: Any) -> Any:
        return dict(islice((await super().get_step_statuses(**given)).items(), 1000))


@mutant("postgresql", "CLM-4")
class ClaimsOfOnePage(PatchedPostgres):
    """Lists the first 10,000 claims of a run."""

    patch_sql = SqlPatch(
        (r"(WHERE run_id = \$1 AND claimed_at IS NOT NULL ORDER BY step_key)", r"\1 LIMIT 10000")
    )


@mutant("sqlite", "QRY-3")
class AttemptsOfOnePage:
    """Shows the newest 1,000 attempts of a step."""

    async def get_run_detail(self, **given: Any) -> Any:
        detail = await super().get_run_detail(**given)
        if detail is None:
            return None
        steps = tuple(replace(step, attempts=step.attempts[-1000:]) for step in detail.steps)
        return replace(detail, steps=steps)


@mutant("sqlite", "STP-6")
class ResetOfAsManyKeysAsParameters:
    """Resets the first 32,766 of the given keys, the most parameters of a statement in some databases."""

    async def retry_step(self, **given: Any) -> None:
        given["reset"] = frozenset(sorted(given["reset"])[:32_766])
        await super().retry_step(**given)


@mutant("memory", "SIG-2")
class RemembersThousandDeliveries:
    """Remembers the newest 1,000 delivery ids of a run."""

    async def deliver_signal(self, **given: Any) -> Any:
        result = await super().deliver_signal(**given)
        run = self._runs.get(given["run_id"].int)
        if run is not None and len(run.deliveries) > 1000:
            del run.deliveries[next(iter(run.deliveries))]
        return result


@mutant("memory", "RET-1")
class CleanupOfThousandRuns:
    """Deletes at most 1,000 runs in one call."""

    def begin(self) -> None:
        self._spared: set[UUID] = set()

    async def cleanup(self, **given: Any) -> int:
        self._spared = set()
        over = [run.run_id for run in self._runs.values() if self._is_over(run.run_id, given["cutoff"])]
        self._spared = set(over[1000:])
        return int(await super().cleanup(**given))

    def _is_over(self, run_id: UUID, cutoff: datetime) -> bool:
        return run_id not in self._spared and bool(super()._is_over(run_id, cutoff))


@mutant("memory", "RET-4")
class CleanupOfThousandOrphans:
    """Deletes the old keys of at most 1,000 runs that never started in one call."""

    def _delete_orphans(self, cutoff: datetime) -> None:
        keys_of = self._namespace.keys_of
        orphans = [run_id for run_id in keys_of if run_id.int not in self._runs]
        spared = {run_id: keys_of.pop(run_id) for run_id in orphans[1000:]}
        super()._delete_orphans(cutoff)
        keys_of.update(spared)


@mutant("memory", "QRY-3")
class TotalOfResultWindow:
    """Counts at most 10,000 matching runs, as a search engine does."""

    async def get_runs_page(self, **given: Any) -> Any:
        page = await super().get_runs_page(**given)
        return RunPage(page.runs, min(page.total_count, 10_000))


@mutant("memory", "STP-8")
class StalledStepsOfFirstCandidates:
    """Sorts the first 1,000 candidates by the start of the stall, instead of all."""

    async def get_stalled_steps(self, **given: Any) -> Any:
        every = await super().get_stalled_steps(**{**given, "take": 1_000_000})
        candidates = sorted(every, key=lambda step: (step.run_id, step.step_key))[:1000]
        candidates.sort(key=lambda step: (step.since, step.run_id, step.step_key))
        return tuple(candidates[: given["take"]])


@mutant("sqlite", "CON-1", concurrent=True)
class ErrorOfAnotherCall:
    """In a batch of more than 256 completions every failing call gets the error of the first one."""

    def begin(self) -> None:
        self._pending = 0
        self._first: FlowStoreError | None = None

    async def record_step_complete(self, **given: Any) -> None:
        self._pending += 1
        crowded = self._pending > 256
        try:
            await super().record_step_complete(**given)
        except FlowStoreError as error:
            self._first = self._first or error
            raise self._first if crowded else error from None
        finally:
            self._pending -= 1
            if not self._pending:
                self._first = None


@mutant("postgresql", "INP-2")
class ReasonCutAtOneMillion:
    """Cuts the reason of a cancel at a million characters."""

    async def request_cancel(self, **given: Any) -> bool:
        reason = given["reason"]
        return bool(await super().request_cancel(**{**given, "reason": reason and reason[:1_000_000]}))


@mutant("sqlite", "INP-2", concurrent=True)
class BatchOfFortyMegabytes:
    """Drops outputs for which a batch of 40 MiB has no room."""

    def begin(self) -> None:
        self._pending = 0

    async def save_output(self, **given: Any) -> None:
        size = len(given["value_json"])
        if self._pending + size > 40 * 2**20:
            return
        self._pending += size
        try:
            await super().save_output(**given)
        finally:
            self._pending -= size


@mutant("memory", "QRY-4", concurrent=True)
class ActiveCounterLosesUpdates:
    """Counts active runs in a counter that each call reads, changes and writes back."""

    async def _add(self, change: int) -> None:
        active = self._active()
        await asyncio.sleep(0)
        self._namespace.active = active + change

    def _active(self) -> int:
        return getattr(self._namespace, "active", 0)

    async def start_run(self, **given: Any) -> Any:
        run = await super().start_run(**given)
        await self._add(1)
        return run

    async def trigger_run(self, **given: Any) -> Any:
        result = await super().trigger_run(**given)
        await self._add(int(result.created))
        return result

    async def complete_run(self, **given: Any) -> bool:
        won = bool(await super().complete_run(**given))
        await self._add(-won)
        return won

    async def retry_step(self, **given: Any) -> None:
        run = self._runs.get(given["run_id"].int)
        ended = run is not None and run.status is not RunStatus.RUNNING
        await super().retry_step(**given)
        await self._add(int(ended))

    async def get_statistics(self, **given: Any) -> Any:
        return replace(await super().get_statistics(**given), active_runs=self._active())
