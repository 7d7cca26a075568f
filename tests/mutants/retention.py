"""Broken cleanups."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

from tests.mutants import broken
from tests.mutants.sql_patching import Cut, PostgresSurgery, SqliteSurgery


def _forget(table: str, name: str, clause: str = "RET-1") -> type:
    """A cleanup that leaves the rows of one table."""

    class CleanupForgets(SqliteSurgery):
        cut = Cut((rf"\ADELETE FROM {table} WHERE run_id = \?\Z", "SELECT ?"))

    CleanupForgets.__name__ = f"CleanupForgets{name}"
    CleanupForgets.__doc__ = f"Leaves the rows of table {table}."
    return broken("sqlite", clause)(CleanupForgets)


_forget("attempts", "Attempts")
_forget("steps", "Steps")
_forget("outputs", "Outputs")
_forget("events", "Events")
_forget("waiters", "Waiters")
_forget("deliveries", "Deliveries")
_forget("controls", "Controls")
_forget("idempotency_keys", "Keys", "IDM-4")


@broken("memory", "RET-1")
class CleanupTakesTheCutoff:
    """Deletes runs completed at the cutoff too, not strictly before it."""

    async def cleanup(self, **given: Any) -> int:
        return int(await super().cleanup(cutoff=given["cutoff"] + timedelta(microseconds=1)))


@broken("postgresql", "RET-1")
class CleanupCountsTables(PostgresSurgery):
    """Returns more than the number of runs."""

    async def cleanup(self, **given: Any) -> int:
        return 2 * int(await super().cleanup(**given))


@broken("sqlite", "RET-2")
class CleanupTakesRunningRuns(SqliteSurgery):
    """Deletes old runs that still run."""

    cut = Cut(
        (r"completed_at IS NOT NULL AND completed_at < \? ORDER BY completed_at", "started_at < ?"),
        (r"run_id = \? AND completed_at < \?", "run_id = ? AND started_at < ?"),
    )


@broken("memory", "RET-2", concurrent=True)
class CleanupForgetsToLookAgain:
    """Collects what is over, and deletes it a moment later without looking whether it was reopened."""

    async def cleanup(self, **given: Any) -> int:
        over = [run.run_id for run in self._runs.values() if self._is_over(run.run_id, given["cutoff"])]
        await asyncio.sleep(0)
        for run_id in over:
            if self._runs.pop(run_id.int, None) is not None:
                self._namespace.controls.pop(run_id, None)
                self._delete_keys(run_id)
        return len(over) + int(await super().cleanup(**given))


@broken("postgresql", "RET-2", concurrent=True)
class CleanupDeletesByOldList(PostgresSurgery):
    """Deletes by the list it made before it had the locks: a run reopened meanwhile goes too."""

    cut = Cut(
        (
            r"= ANY\(\$1::uuid\[\]\) AND completed_at < \$2",
            "= ANY($1::uuid[]) AND $2::timestamptz IS NOT NULL AND (SELECT pg_sleep(0.02) IS NOT NULL)",
        )
    )


@broken("memory", "RET-3", concurrent=True, look_at=("RET-2",))
class CleanupInTwoActs:
    """Deletes the steps, and the run a moment later."""

    async def cleanup(self, **given: Any) -> int:
        for run in self._runs.values():
            if self._is_over(run.run_id, given["cutoff"]):
                run.steps.clear()
                run.outputs.clear()
        await asyncio.sleep(0)
        return int(await super().cleanup(**given))


@broken("sqlite", "RET-3", concurrent=True, look_at=("RET-2",))
class CleanupTableByTable:
    """Deletes table by table, each in a transaction of its own."""

    async def cleanup(self, **given: Any) -> int:
        since = (given["cutoff"] - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
        for table in ("outputs", "steps", "attempts"):
            statement = (
                f"DELETE FROM {table} WHERE run_id IN "
                "(SELECT run_id FROM runs WHERE completed_at IS NOT NULL AND completed_at < ?)"
            )
            await self.write(lambda db, now, text=statement: db.execute(text, (since,)).rowcount)
        return int(await super().cleanup(**given))


@broken("sqlite", "RET-4")
class CleanupTakesYoungKeys(SqliteSurgery):
    """Sweeps keys and controls whose run is about to start."""

    cut = Cut((r"created_at <= :grace", "(created_at <= :grace OR TRUE)"))


@broken("memory", "RET-4")
class CleanupLeavesOrphans:
    """Never sweeps the keys and controls of runs that never started."""

    def _delete_orphans(self, cutoff: datetime) -> None:
        return None


@broken("postgresql", "RET-4")
class CleanupSweepsWhatRuns(PostgresSurgery):
    """Sweeps the controls of old runs that still run."""

    cut = Cut(
        (r"AND NOT EXISTS \(SELECT FROM \{schema\}\.runs r WHERE r\.run_id = [ci]\.run_id\)", "AND true"),
    )
