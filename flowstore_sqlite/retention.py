"""Retention in SQLite: cleanup in short slices that find their rows by index, and the deletion of one run."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import partial
from uuid import UUID

from flowstore_core import RunNotCompletedError, RunStatus
from flowstore_core.retention import ORPHAN_GRACE
from flowstore_sqlite.codecs import to_us
from flowstore_sqlite.database import Database
from flowstore_sqlite.paced_work import PacedWriter
from flowstore_sqlite.search import DROP_TRIGRAMS, empty_index, has_only_deleted, index_some, is_indexed
from flowstore_sqlite.statistics import DAY

BATCH = 500
"""Maximum number of runs that one read finds, and of orphans that one slice deletes."""

FIND_COMPLETED = """
SELECT run_id FROM runs WHERE completed_at IS NOT NULL AND completed_at < ? ORDER BY completed_at LIMIT ?
"""
IS_COMPLETED = "SELECT 1 FROM runs WHERE run_id = ? AND completed_at < ?"
DELETE_RUN = (
    "DELETE FROM attempts WHERE run_id = ?",
    "DELETE FROM steps WHERE run_id = ?",
    "DELETE FROM outputs WHERE run_id = ?",
    "DELETE FROM events WHERE run_id = ?",
    "DELETE FROM waiters WHERE run_id = ?",
    "DELETE FROM deliveries WHERE run_id = ?",
    "DELETE FROM controls WHERE run_id = ?",
    "DELETE FROM idempotency_keys WHERE run_id = ?",
    "DELETE FROM runs WHERE run_id = ?",
)

READ_DELETABLE = "SELECT status, flow_id, started_at FROM runs WHERE run_id = ?"
# The summaries that count the run, and all of a flow without runs.
DELETE_SUMMARIES_OF_RUN = """
DELETE FROM run_summaries
WHERE granularity IN ('hour', 'day') AND scope IN (X'', :flow_id) AND (
    day = :day OR (scope = :flow_id AND NOT EXISTS (SELECT 1 FROM runs WHERE flow_id = :flow_id))
)
"""

# Few of these rows have a run: completed runs before the cutoff are already deleted.
DELETE_ORPHANED_CONTROLS = """
DELETE FROM controls WHERE run_id IN (
    SELECT run_id FROM controls
    WHERE created_at < :cutoff AND created_at <= :grace
        AND NOT EXISTS (SELECT 1 FROM runs WHERE runs.run_id = controls.run_id)
    LIMIT :batch
)
"""
DELETE_ORPHANED_KEYS = """
DELETE FROM idempotency_keys WHERE (flow_id, trigger_key, idempotency_key) IN (
    SELECT flow_id, trigger_key, idempotency_key FROM idempotency_keys
    WHERE created_at < :cutoff AND created_at <= :grace
        AND NOT EXISTS (SELECT 1 FROM runs WHERE runs.run_id = idempotency_keys.run_id)
    LIMIT :batch
)
"""

# Summaries of days before the cutoff, and stale ones, which are recomputed when needed.
FIND_STALE_SUMMARIES = """
SELECT granularity, scope, kept.day FROM run_summaries AS kept LEFT JOIN run_days ON run_days.day = kept.day
WHERE kept.day < ? OR kept.changes IS NOT run_days.changes LIMIT ?
"""
DELETE_SUMMARY = "DELETE FROM run_summaries WHERE granularity = ? AND scope = ? AND day = ?"


class Retention:
    """See flowstore_core.retention for the contract."""

    _database: Database

    async def cleanup(self, cutoff: datetime) -> int:
        before = to_us(cutoff)
        paced = PacedWriter(self._database.write)
        deleted = 0
        while found := await self._database.read(partial(_find_completed, before)):
            while found:
                done, count = await paced.run_slice(partial(_delete_runs, before, found))
                deleted += count
                found = found[done:]
        for statement in (DELETE_ORPHANED_CONTROLS, DELETE_ORPHANED_KEYS):
            while await paced.run_slice(partial(_delete_orphans, statement, before)):
                pass
        while stale := await self._database.read(partial(_find_stale_summaries, before)):
            await paced.run_slice(partial(_delete_summaries, stale))
            if len(stale) < BATCH:
                break
        if await self._database.read(is_indexed):
            # Index the runs that ended since the last cleanup.
            while await paced.run_slice(index_some):
                pass
            if await self._database.read(has_only_deleted):
                await self._database.write(empty_index)
        return deleted

    async def delete_run(self, run_id: UUID) -> bool:
        return await self._database.write(partial(_delete_run, run_id))


def _find_completed(before: int, db: sqlite3.Connection) -> list[tuple[bytes]]:
    return db.execute(FIND_COMPLETED, (before, BATCH)).fetchall()


def _delete_runs(
    before: int, found: Sequence[tuple[bytes]], db: sqlite3.Connection, now: int, until: float
) -> tuple[int, int]:
    """Delete runs, each completely, until the deadline. Returns how many were examined and deleted."""
    done = deleted = 0
    indexed = is_indexed(db)
    for row in found:
        # It may have been reopened or deleted since it was found (RET-2).
        if db.execute(IS_COMPLETED, (*row, before)).fetchone() is not None:
            _delete_whole(db, row[0], indexed=indexed)
            deleted += 1
        done += 1
        if time.monotonic() > until:
            break
    return done, deleted


def _delete_run(run_id: UUID, db: sqlite3.Connection, now: int) -> bool:
    row = db.execute(READ_DELETABLE, (run_id.bytes,)).fetchone()
    if row is None:
        return False
    status, flow_id, started_at = row
    if status == RunStatus.RUNNING:
        raise RunNotCompletedError(run_id)
    indexed = is_indexed(db)
    _delete_whole(db, run_id.bytes, indexed=indexed)
    db.execute(DELETE_SUMMARIES_OF_RUN, {"flow_id": flow_id, "day": started_at // DAY})
    if indexed:
        empty_index(db, now)
    return True


def _delete_whole(db: sqlite3.Connection, run_id: bytes, *, indexed: bool) -> None:
    """Delete a run with everything that belongs to it."""
    if indexed:
        db.execute(DROP_TRIGRAMS, (run_id,))
    for statement in DELETE_RUN:
        db.execute(statement, (run_id,))


def _find_stale_summaries(before: int, db: sqlite3.Connection) -> list[tuple[str, bytes, int]]:
    return db.execute(FIND_STALE_SUMMARIES, (before // DAY - 1, BATCH)).fetchall()


def _delete_summaries(
    stale: Sequence[tuple[str, bytes, int]], db: sqlite3.Connection, now: int, until: float
) -> None:
    db.executemany(DELETE_SUMMARY, stale)


def _delete_orphans(statement: str, before: int, db: sqlite3.Connection, now: int, until: float) -> int:
    """Delete a batch of orphans; returns how many."""
    grace = now - ORPHAN_GRACE // timedelta(microseconds=1)
    return db.execute(statement, {"cutoff": before, "grace": grace, "batch": BATCH}).rowcount
