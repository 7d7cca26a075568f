"""Retention in SQLite: cleanup in short transactions that find their rows by index."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import partial

from flowstore_core.retention import ORPHAN_GRACE
from flowstore_sqlite.database import Database, Write
from flowstore_sqlite.search import DROP_TRIGRAMS, gather_texts, is_indexed
from flowstore_sqlite.statistics import DAY
from flowstore_sqlite.values import to_us

BATCH = 500
"""Runs that are looked up at once."""
SHORTEST_TURN = 0.0003
"""How long cleanup keeps the writers waiting while there are any; the run that it is at is finished."""
LONGEST_TURN = 0.01
PAUSE_SECONDS = 0.001
"""Between turns, for the writers of other processes."""

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
        turn = Turn()
        deleted = 0
        while found := await self.read(partial(_find_completed, before)):
            while found:
                turn, (done, count) = await self.write(turn.of(partial(_delete_runs, before, found)))
                deleted += count
                del found[:done]
                await asyncio.sleep(turn.pause)
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


class Turn:
    def __init__(self, seconds=SHORTEST_TURN, seen=None, pause=0.001):
        self.seconds, self.seen, self.pause = seconds, seen, pause

    def of(self, work):
        def write(db, now):
            seen = (db.total_changes, db.execute("PRAGMA data_version").fetchone()[0])
            alone = seen == self.seen or self.seen is None
            seconds = min(2 * self.seconds, LONGEST_TURN) if alone else SHORTEST_TURN
            answer = work(time.monotonic() + seconds, db)
            return Turn(seconds, (db.total_changes, seen[1]), 0.001 if alone else PAUSE_SECONDS), answer
        return write


def _find_completed(before: int, db: sqlite3.Connection) -> list[bytes]:
    return [row[0] for row in db.execute(FIND_COMPLETED, (before, BATCH))]


def _delete_runs(before: int, found: Sequence[bytes], until: float, db: sqlite3.Connection) -> tuple[int, int]:
    """Delete runs, each whole, until it is time; how many were looked at and how many deleted."""
    done = deleted = 0
    indexed = is_indexed(db)
    for run_id in found:
        # Not one that was reopened meanwhile.
        if db.execute(IS_COMPLETED, (run_id, before)).fetchone():
            if indexed:
                db.execute(DROP_TRIGRAMS, (run_id,))
            for statement in DELETE_RUN:
                db.execute(statement, (run_id,))
            deleted += 1
        done += 1
        if time.monotonic() > until:
            break
    return done, deleted


def _drop_summaries(before: int, db: sqlite3.Connection, now: int) -> None:
    """Of days whose runs are gone, or most of them: whoever asks for one has it computed again."""
    db.execute(DELETE_SUMMARIES, (before // DAY - 1,))


def _sweep(statement: str, before: int, db: sqlite3.Connection, now: int) -> int:
    """Delete a batch of orphans; how many, 0 when none is left."""
    grace = now - ORPHAN_GRACE // timedelta(microseconds=1)
    return db.execute(statement, {"cutoff": before, "grace": grace, "most": BATCH}).rowcount
