"""Mutants of exports and imports."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from flowstore_core import ArchivedStep, ConflictError, RunAlreadyExistsError, RunArchive
from flowstore_postgres.store import PostgresStore
from tests.mutants import mutant
from tests.mutants.sql_patching import PatchedPostgres, SqlPatch


class _ChangedExport:
    """An export in which steps, or other parts, are wrong."""

    async def export_run(self, **given: Any) -> RunArchive | None:
        archive: RunArchive | None = await super().export_run(**given)  # type: ignore[misc]
        if archive is None:
            return None
        steps = [self._step(step) for step in archive.steps]
        return self._parts(replace(archive, steps=tuple(step for step in steps if step is not None)))

    def _step(self, step: ArchivedStep) -> ArchivedStep | None:
        return step

    def _parts(self, archive: RunArchive) -> RunArchive:
        return archive


@mutant("postgresql", "XFR-1")
class ExportForgetsResetSteps(_ChangedExport):
    """Exports only the steps that reads show, and keys with a claim or a dispatch."""

    def _step(self, step: ArchivedStep) -> ArchivedStep | None:
        return step if step.status or step.claim or step.dispatch else None


@mutant("sqlite", "XFR-1")
class ExportForgetsThatAStepWasRescheduled(_ChangedExport):
    """Leaves out the mark of reschedule_step, so that a repeated call raises."""

    def _step(self, step: ArchivedStep) -> ArchivedStep:
        return replace(step, rescheduled=False)


@mutant("memory", "XFR-1")
class ExportForgetsTheStartingOwner(_ChangedExport):
    """Leaves out the owner that started an attempt, which advance_run compares."""

    def _step(self, step: ArchivedStep) -> ArchivedStep:
        return replace(step, started_owner=None)


@mutant("postgresql", "XFR-1")
class ExportForgetsDeliveries(_ChangedExport):
    """Leaves out remembered delivery ids whose waiter was removed."""

    def _parts(self, archive: RunArchive) -> RunArchive:
        waiting = {waiter.step_key for waiter in archive.waiters}
        return replace(
            archive, deliveries=tuple(one for one in archive.deliveries if one.step_key in waiting)
        )


@mutant("sqlite", "XFR-2")
class ExportMergesTheReasons(_ChangedExport):
    """Exports the control record as reads show it, with one reason for both latches."""

    def _parts(self, archive: RunArchive) -> RunArchive:
        control = archive.control
        if control is None or control.timed_out_at is None or control.cancel_requested_at is None:
            return archive
        return replace(archive, control=replace(control, timed_out_reason=control.cancel_reason))


@mutant("postgresql", "XFR-1")
class ImportRenumbersEvents(PatchedPostgres):
    """Does not carry the counter of events over, so that the next event gets a number twice."""

    patch_sql = SqlPatch(
        (
            r"source_run_id, last_event, start_token\)\nSELECT a\.\*, gen_random_uuid\(\)",
            "source_run_id, start_token, last_event)\nSELECT a.run_id, a.tags, a.flow_id, a.flow_name, "
            "a.status, a.trigger_key, a.trigger_data, a.job_id, a.started_at, a.completed_at, "
            "a.source_run_id, gen_random_uuid(), 0",
        ),
    )


@mutant("memory", "XFR-1")
class ImportRoundsTimes:
    """Stores the start of a run to the millisecond."""

    async def import_run(self, *, archive: RunArchive) -> bool:
        started_at = archive.run.started_at
        rounded = started_at.replace(microsecond=started_at.microsecond // 1000 * 1000)
        run = replace(archive.run, started_at=rounded)
        return bool(await super().import_run(archive=replace(archive, run=run)))


@mutant("memory", "XFR-2")
class ExportKeepsClaims(_ChangedExport):
    """Does not end the claims of workers, so that imported steps wait for them."""

    async def export_run(self, **given: Any) -> RunArchive | None:
        self._held = {claim.step_key: claim for claim in await self.get_step_claims(given["run_id"])}  # type: ignore[attr-defined]
        return await super().export_run(**given)

    def _step(self, step: ArchivedStep) -> ArchivedStep:
        return replace(step, claim=self._held.get(step.step_key))


@mutant("sqlite", "XFR-2")
class ExportEndsEveryClaim(_ChangedExport):
    """Ends the claims on terminal steps too, so that a second delivery wins after a retry."""

    def _step(self, step: ArchivedStep) -> ArchivedStep:
        claim, last = step.claim, step.attempts[-1] if step.attempts else None
        if claim is None or last is None or last.completed_at is None:
            return step
        return replace(step, claim=replace(claim, expires_at=last.completed_at))


@mutant("postgresql", "XFR-2")
class ImportLeavesQueuesEmpty(PatchedPostgres):
    """Stores the queue of a dispatch, and not that its step is pending there."""

    patch_sql = SqlPatch((r"CASE WHEN a\.dispatch_queue IS NOT NULL THEN 0 END", "NULL::integer"))


@mutant("sqlite", "XFR-2", concurrent=True)
class ExportReadsTwice(_ChangedExport):
    """Reads the outputs and the rest from two snapshots."""

    async def export_run(self, **given: Any) -> RunArchive | None:
        outputs = await self.get_outputs(given["run_id"], prefix="", after=None, take=None)  # type: ignore[attr-defined]
        await asyncio.sleep(0)
        archive = await super().export_run(**given)
        return None if archive is None else replace(archive, outputs=tuple(sorted(outputs.items())))


@mutant("memory", "XFR-3")
class ImportReplacesAnotherRun:
    """Replaces a stored run that differs from the archive."""

    async def import_run(self, *, archive: RunArchive) -> bool:
        try:
            return bool(await super().import_run(archive=archive))
        except RunAlreadyExistsError:
            del self._runs[archive.run.run_id.int]
            return bool(await super().import_run(archive=archive))


@mutant("sqlite", "XFR-3")
class ImportRefusesTheSameRun:
    """Raises for every stored run, so that a repeated call fails."""

    async def import_run(self, *, archive: RunArchive) -> bool:
        if not await super().import_run(archive=archive):
            raise RunAlreadyExistsError(archive.run.run_id)
        return True


@mutant("postgresql", "XFR-3")
class ImportDropsTakenKeys:
    """Imports a run without its idempotency keys if one of them is taken."""

    async def import_run(self, *, archive: RunArchive) -> bool:
        try:
            return bool(await super().import_run(archive=archive))
        except RunAlreadyExistsError:
            raise
        except ConflictError:
            return bool(await super().import_run(archive=replace(archive, idempotency_keys=())))


@mutant("postgresql", "XFR-3")
class ImportKeepsOrphanedKeys(PatchedPostgres):
    """Leaves keys of the id that are not in the archive."""

    patch_sql = SqlPatch(
        (
            r"\ADELETE FROM \{schema\}\.idempotency_keys WHERE run_id = ANY\(\$1::uuid\[\]\)\Z",
            "DELETE FROM {schema}.idempotency_keys WHERE run_id = ANY($1::uuid[]) AND false",
        ),
    )


@mutant("memory", "XFR-3", concurrent=True)
class ImportStoresTheRunFirst:
    """Stores the run, and its steps and outputs a moment later."""

    async def import_run(self, *, archive: RunArchive) -> bool:
        bare = replace(archive, steps=(), outputs=(), events=(), waiters=())
        number = archive.run.run_id.int
        if number in self._runs or not await super().import_run(archive=bare):
            return bool(await super().import_run(archive=archive))
        await asyncio.sleep(0)
        self._runs.pop(number, None)
        return bool(await super().import_run(archive=archive))


@mutant("postgresql", "WAT-1")
class ImportSendsNoHint:
    """Stores ready steps without waking the calls that wait for them."""

    async def import_run(self, *, archive: RunArchive) -> bool:
        return await PostgresStore.import_run(self, archive=archive)  # type: ignore[arg-type]
