"""Mutants of cleanup."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

from flowstore_core import RunNotCompletedError, RunStatus
from tests.mutants import mutant
from tests.mutants.sql_patching import PatchedPostgres, PatchedSqlite, SqlPatch


def _omit_table(table: str, name: str, clause: str = "RET-1") -> type:
    """A cleanup that leaves the rows of one table."""

    class CleanupLeaves(PatchedSqlite):
        patch_sql = SqlPatch((rf"\ADELETE FROM {table} WHERE run_id = \?\Z", "SELECT ?"))

    CleanupLeaves.__name__ = f"CleanupLeaves{name}"
    CleanupLeaves.__doc__ = f"Leaves the rows of table {table}."
    return mutant("sqlite", clause)(CleanupLeaves)


_omit_table("attempts", "Attempts")
_omit_table("steps", "Steps")
_omit_table("outputs", "Outputs")
_omit_table("events", "Events")
_omit_table("waiters", "Waiters")
_omit_table("deliveries", "Deliveries")
_omit_table("controls", "Controls")
_omit_table("idempotency_keys", "Keys", "IDM-4")


@mutant("memory", "RET-1")
class CleanupIncludesCutoff:
    """Deletes runs completed exactly at the cutoff, too."""

    async def cleanup(self, **given: Any) -> int:
        return int(await super().cleanup(cutoff=given["cutoff"] + timedelta(microseconds=1)))


@mutant("postgresql", "RET-1")
class CleanupCountsRows(PatchedPostgres):
    """Returns more than the number of runs."""

    async def cleanup(self, **given: Any) -> int:
        return 2 * int(await super().cleanup(**given))


@mutant("sqlite", "RET-2")
class CleanupDeletesRunningRuns(PatchedSqlite):
    """Deletes old runs that are still Running."""

    patch_sql = SqlPatch(
        (r"completed_at IS NOT NULL AND completed_at < \? ORDER BY completed_at", "started_at < ?"),
        (r"run_id = \? AND completed_at < \?", "run_id = ? AND started_at < ?"),
    )


@mutant("memory", "RET-2", concurrent=True)
class CleanupWithoutRecheck:
    """Collects completed runs, and deletes them later without checking for reopened ones."""

    async def cleanup(self, **given: Any) -> int:
        over = [run.run_id for run in self._runs.values() if self._is_over(run.run_id, given["cutoff"])]
        await asyncio.sleep(0)
        for run_id in over:
            if self._runs.pop(run_id.int, None) is not None:
                self._namespace.controls.pop(run_id, None)
                self._namespace.delete_keys(run_id)
        return len(over) + int(await super().cleanup(**given))


@mutant("postgresql", "RET-2", concurrent=True)
class CleanupUsesStaleList(PatchedPostgres):
    """Deletes by a list made before taking the locks, including a run reopened in between."""

    patch_sql = SqlPatch(
        (
            r"= ANY\(\$1::uuid\[\]\) AND completed_at < \$2",
            "= ANY($1::uuid[]) AND $2::timestamptz IS NOT NULL AND (SELECT pg_sleep(0.02) IS NOT NULL)",
        )
    )


@mutant("memory", "RET-3", concurrent=True, more_clauses=("RET-2",))
class CleanupInTwoSteps:
    """Deletes the steps, and the run in a second step."""

    async def cleanup(self, **given: Any) -> int:
        for run in self._runs.values():
            if self._is_over(run.run_id, given["cutoff"]):
                run.steps.clear()
                run.outputs.clear()
        await asyncio.sleep(0)
        return int(await super().cleanup(**given))


@mutant("sqlite", "RET-3", concurrent=True, more_clauses=("RET-2",))
class CleanupPerTableTransactions:
    """Deletes table by table, each in its own transaction."""

    async def cleanup(self, **given: Any) -> int:
        since = (given["cutoff"] - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
        for table in ("outputs", "steps", "attempts"):
            statement = (
                f"DELETE FROM {table} WHERE run_id IN "
                "(SELECT run_id FROM runs WHERE completed_at IS NOT NULL AND completed_at < ?)"
            )
            await self._database.write(lambda db, now, text=statement: db.execute(text, (since,)).rowcount)
        return int(await super().cleanup(**given))


@mutant("memory", "RET-5")
class DeletionLeavesControl:
    """delete_run leaves the control record of the run."""

    async def delete_run(self, **given: Any) -> bool:
        control = self._namespace.controls.get(given["run_id"])
        deleted = bool(await super().delete_run(**given))
        if deleted and control is not None:
            self._namespace.controls[given["run_id"]] = control
        return deleted


@mutant("sqlite", "RET-5")
class DeletionEndsRunningRuns:
    """delete_run completes a Running run, and deletes it."""

    async def delete_run(self, **given: Any) -> bool:
        try:
            return bool(await super().delete_run(**given))
        except RunNotCompletedError:
            await super().complete_run(**given, status=RunStatus.CANCELLED, expected=None)
            return bool(await super().delete_run(**given))


@mutant("postgresql", "RET-5", concurrent=True)
class DeletionInTwoTransactions:
    """delete_run deletes the outputs of a terminal run, and the run in a second transaction."""

    async def delete_run(self, **given: Any) -> bool:
        status = await super().get_run_status(**given)
        if status is not None and status is not RunStatus.RUNNING:
            await super().delete_outputs(**given, prefix="")
        return bool(await super().delete_run(**given))


@mutant("sqlite", "RET-4")
class CleanupDeletesYoungKeys(PatchedSqlite):
    """Deletes keys and control records of runs that are about to start."""

    patch_sql = SqlPatch((r"created_at <= :grace", "(created_at <= :grace OR TRUE)"))


@mutant("memory", "RET-4")
class CleanupLeavesOrphans:
    """Never deletes the keys and control records of runs that never started."""

    def _delete_orphans(self, cutoff: datetime) -> None:
        return None


@mutant("postgresql", "RET-4")
class CleanupDeletesLiveControls(PatchedPostgres):
    """Deletes the control records of old runs that are still Running."""

    patch_sql = SqlPatch(
        (r"AND NOT EXISTS \(SELECT FROM \{schema\}\.runs r WHERE r\.run_id = [ci]\.run_id\)", "AND true"),
    )
