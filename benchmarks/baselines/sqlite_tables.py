"""Tables and statements of the SQLite baselines, the same as those of PostgreSQL in SQLite's dialect."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID

BUSY_SECONDS = 30.0

TABLES = """
CREATE TABLE runs (
    run_id BLOB NOT NULL PRIMARY KEY, status TEXT NOT NULL, started_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE step_dispatches (
    run_id BLOB NOT NULL, step_key TEXT NOT NULL, dispatched_at INTEGER NOT NULL, job_id TEXT,
    PRIMARY KEY (run_id, step_key)
) STRICT, WITHOUT ROWID;
CREATE TABLE step_claims (
    run_id BLOB NOT NULL, step_key TEXT NOT NULL, claimed_at INTEGER NOT NULL,
    PRIMARY KEY (run_id, step_key)
) STRICT, WITHOUT ROWID;
CREATE TABLE steps (
    run_id BLOB NOT NULL, step_key TEXT NOT NULL, step_type TEXT NOT NULL, status TEXT NOT NULL,
    attempt_count INTEGER NOT NULL, input_json TEXT, output_json TEXT, started_at INTEGER NOT NULL,
    completed_at INTEGER, PRIMARY KEY (run_id, step_key)
) STRICT, WITHOUT ROWID;
CREATE TABLE step_attempts (
    run_id BLOB NOT NULL, step_key TEXT NOT NULL, attempt_no INTEGER NOT NULL, status TEXT NOT NULL,
    input_json TEXT, output_json TEXT, started_at INTEGER NOT NULL, completed_at INTEGER,
    PRIMARY KEY (run_id, step_key, attempt_no)
) STRICT, WITHOUT ROWID;
"""
ADD_RUN = "INSERT INTO runs VALUES (?, 'Running', ?)"
CLAIM = "INSERT INTO step_claims VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
DISPATCH = "INSERT INTO step_dispatches VALUES (?, ?, ?, NULL) ON CONFLICT DO NOTHING"
ANNOTATE = "UPDATE step_dispatches SET job_id = ? WHERE run_id = ? AND step_key = ?"
RUN_STATUS = "SELECT status FROM runs WHERE run_id = ?"
NEXT_ATTEMPT = """
SELECT coalesce(max(attempt_no), 0) + 1 FROM step_attempts WHERE run_id = ? AND step_key = ?
"""
ADD_ATTEMPT = "INSERT INTO step_attempts VALUES (?, ?, ?, 'Running', ?, NULL, ?, NULL)"
PUT_STEP = """
INSERT INTO steps VALUES (?, ?, ?, 'Running', ?, ?, NULL, ?, NULL)
ON CONFLICT (run_id, step_key) DO UPDATE SET
    step_type = excluded.step_type, status = excluded.status, attempt_count = excluded.attempt_count,
    input_json = excluded.input_json, output_json = NULL, completed_at = NULL
"""
CLOSE_STEP = """
UPDATE steps SET status = ?, output_json = ?, completed_at = ?
WHERE run_id = ? AND step_key = ? AND attempt_count = ? AND status = 'Running'
"""
CLOSE_ATTEMPT = """
UPDATE step_attempts SET status = ?, output_json = ?, completed_at = ?
WHERE run_id = ? AND step_key = ? AND attempt_no = ?
"""
COUNT_COMPLETED = """
SELECT count(*) FROM steps JOIN step_attempts USING (run_id, step_key, status)
WHERE run_id = ? AND status = 'Succeeded'
"""
COUNT_CLAIMED = "SELECT count(*) FROM step_claims WHERE run_id = ?"


def connect(path: Path, *, busy_seconds: float = BUSY_SECONDS) -> sqlite3.Connection:
    """A connection with durable commits (WAL, synchronous=FULL) and explicit transactions."""
    db = sqlite3.connect(path, timeout=busy_seconds, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    return db


def create(path: Path) -> None:
    """Create the tables in a new file."""
    db = connect(path)
    db.executescript(TABLES)
    db.close()


class Records:
    """Starts and counts runs on a separate connection."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def add_runs(self, run_ids: Sequence[UUID]) -> None:
        db = connect(self._path)
        db.execute("BEGIN IMMEDIATE")
        db.executemany(ADD_RUN, [(one.bytes, 0) for one in run_ids])
        db.execute("COMMIT")
        db.close()

    async def count_completed(self, run_ids: Sequence[UUID]) -> int:
        return self._count(COUNT_COMPLETED, run_ids)

    async def count_claimed(self, run_ids: Sequence[UUID]) -> int:
        return self._count(COUNT_CLAIMED, run_ids)

    def _count(self, statement: str, run_ids: Sequence[UUID]) -> int:
        db = connect(self._path)
        found = sum(int(db.execute(statement, (one.bytes,)).fetchone()[0]) for one in run_ids)
        db.close()
        return found
