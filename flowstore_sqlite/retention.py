"""Retention in SQLite: cleanup in short transactions that find their rows by index."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from datetime import datetime, timedelta
from functools import partial

from flowstore_core.retention import ORPHAN_GRACE
from flowstore_sqlite.database import Database, Write
from flowstore_sqlite.search import DROP_TRIGRAMS, gather_texts, is_indexed
from flowstore_sqlite.statistics import DAY
from flowstore_sqlite.values import to_us

BATCH = 200
BATCH_SECONDS = 0.05
"""A batch ends early after that long, so that writers do not wait for runs with much history."""
PAUSE_SECONDS = 0.005
"""Between batches, for the writers of other processes."""

FIND_COMPLETED = """
SELECT run_id FROM runs WHERE completed_at IS NOT NULL AND completed_at < ? ORDER BY completed_at LIMIT ?
"""
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

# The runs that did start are few here: older ones that were completed are gone by now.
DELETE_ORPHANED_CONTROLS = """
DELETE FROM controls WHERE run_id IN (
    SELECT run_id FROM controls
    WHERE created_at < :cutoff AND created_at <= :grace
        AND NOT EXISTS (SELECT 1 FROM runs WHERE runs.run_id = controls.run_id)
    LIMIT :most
)
"""
DELETE_ORPHANED_KEYS = """
DELETE FROM idempotency_keys WHERE (flow_id, trigger_key, idempotency_key) IN (
    SELECT flow_id, trigger_key, idempotency_key FROM idempotency_keys
    WHERE created_at < :cutoff AND created_at <= :grace
        AND NOT EXISTS (SELECT 1 FROM runs WHERE runs.run_id = idempotency_keys.run_id)
    LIMIT :most
)
"""


DELETE_SUMMARIES = "DELETE FROM run_summaries WHERE day < ?"


class Retention(Database):
    """See flowstore_core.retention for the promises."""

    async def cleanup(self, cutoff: datetime) -> int:
        before = to_us(cutoff)
        deleted = await self._in_batches(partial(_delete_runs, before))
        await self._in_batches(partial(_sweep, DELETE_ORPHANED_CONTROLS, before))
        await self._in_batches(partial(_sweep, DELETE_ORPHANED_KEYS, before))
        await self.write(partial(_drop_summaries, before))
        if await self.read(is_indexed):
            # What ended since the last time becomes quick to search.
            await self._in_batches(gather_texts)
        return deleted

    async def _in_batches(self, batch: Write[int]) -> int:
        total = 0
        while count := await self.write(batch):
            total += count
            await asyncio.sleep(PAUSE_SECONDS)
        return total


def _delete_runs(before: int, db: sqlite3.Connection, now: int) -> int:
    """Delete a batch of runs, each whole; how many, 0 when none is left."""
    deadline = time.monotonic() + BATCH_SECONDS
    deleted = 0
    indexed = is_indexed(db)
    for row in db.execute(FIND_COMPLETED, (before, BATCH)).fetchall():
        if indexed:
            db.execute(DROP_TRIGRAMS, row)
        for statement in DELETE_RUN:
            db.execute(statement, row)
        deleted += 1
        if time.monotonic() > deadline:
            break
    return deleted


def _drop_summaries(before: int, db: sqlite3.Connection, now: int) -> None:
    """Of days whose runs are gone, or most of them: whoever asks for one has it computed again."""
    db.execute(DELETE_SUMMARIES, (before // DAY - 1,))


def _sweep(statement: str, before: int, db: sqlite3.Connection, now: int) -> int:
    """Delete a batch of orphans; how many, 0 when none is left."""
    grace = now - ORPHAN_GRACE // timedelta(microseconds=1)
    return db.execute(statement, {"cutoff": before, "grace": grace, "most": BATCH}).rowcount
