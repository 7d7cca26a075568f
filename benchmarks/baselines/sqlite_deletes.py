"""Cleanup without flowstore on SQLite: DELETE in small batches on a separate connection with busy_timeout.

It does not update the search index, so entries of deleted runs stay in it.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

BATCH = 20
TABLES = (
    "steps",
    "attempts",
    "outputs",
    "events",
    "waiters",
    "deliveries",
    "controls",
    "idempotency_keys",
    "runs",
)


def delete_oldest(path: Path, runs: int) -> None:
    """Delete the oldest completed runs with all their rows."""
    db = sqlite3.connect(path, isolation_level=None, timeout=30)
    db.execute("PRAGMA synchronous = FULL")
    oldest = db.execute(
        "SELECT run_id FROM runs WHERE completed_at IS NOT NULL ORDER BY completed_at LIMIT ?", (runs,)
    ).fetchall()
    for start in range(0, len(oldest), BATCH):
        db.execute("BEGIN IMMEDIATE")
        for table in TABLES:
            db.executemany(f"DELETE FROM {table} WHERE run_id = ?", oldest[start : start + BATCH])
        db.execute("COMMIT")
    db.close()
