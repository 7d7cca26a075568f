"""Cleanup by hand on PostgreSQL: DELETE in small batches, one connection, one batch after another."""

from __future__ import annotations

import asyncpg

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


async def delete_oldest(url: str, schema: str, runs: int) -> None:
    """Delete the oldest completed runs with all their rows, without locking against other deletes."""
    db = await asyncpg.connect(url)
    try:
        found = await db.fetch(
            f"SELECT run_id FROM {schema}.runs WHERE completed_at IS NOT NULL ORDER BY completed_at LIMIT $1",
            runs,
        )
        oldest = [row[0] for row in found]
        for start in range(0, len(oldest), BATCH):
            async with db.transaction():
                for table in TABLES:
                    await db.execute(
                        f"DELETE FROM {schema}.{table} WHERE run_id = ANY($1)", oldest[start : start + BATCH]
                    )
    finally:
        await db.close()
