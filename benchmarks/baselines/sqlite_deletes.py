"""Cleanup by hand on SQLite: DELETE in small batches on a connection of its own, behind busy_timeout.

The index of searches is not kept up: its entries stay, and lead nowhere.
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
