"""Cleanup on PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from uuid import UUID

from flowstore_core.retention import ORPHAN_GRACE
from flowstore_postgres.connection import Transaction
from flowstore_postgres.database import Database
from flowstore_postgres.search import gather_texts, is_indexed

BATCH = 500
"""Runs that are looked up at once."""
TURN = 20
PAUSE = 1.0

FIND_COMPLETED = """
SELECT run_id FROM {schema}.runs WHERE completed_at < $1 ORDER BY completed_at, run_id LIMIT $2
"""
# Keys before runs: trigger_run locks in that order too, and would deadlock with any other. Locked rows are
# waited for, not skipped: a skipped run would stay. After the wait the row is read again, so a run that was
# reopened meanwhile drops out, whole (RET-2).
LOCK_COMPLETED = """
WITH keys AS MATERIALIZED (
    SELECT FROM {schema}.idempotency_keys WHERE run_id = ANY($1::uuid[])
    ORDER BY flow_id, trigger_key, idempotency_key FOR UPDATE
)
SELECT run_id FROM {schema}.runs
WHERE run_id = ANY($1::uuid[]) AND completed_at < $2 AND (SELECT count(*) FROM keys) >= 0
ORDER BY run_id FOR UPDATE
"""
CHILDREN = (
    "steps",
    "attempts",
    "outputs",
    "events",
    "waiters",
    "deliveries",
    "controls",
    "idempotency_keys",
)
# A statement of its own: its snapshot sees what was written while the locks were waited for.
DELETE_RUNS = (
    "WITH "
    + ", ".join(
        f"{table} AS (DELETE FROM {{schema}}.{table} WHERE run_id = ANY($1::uuid[]))" for table in CHILDREN
    )
    + " DELETE FROM {schema}.runs WHERE run_id = ANY($1::uuid[])"
)

# Two statements: the second one's snapshot sees a run that a trigger started while we waited for its
# key. A key that another call is using right now is left for the next cleanup.
LOCK_ORPHANED_KEYS = """
SELECT flow_id, trigger_key, idempotency_key FROM {schema}.idempotency_keys k
WHERE (flow_id, trigger_key, idempotency_key) IN (
    SELECT flow_id, trigger_key, idempotency_key FROM {schema}.idempotency_keys i
    WHERE created_at < $1 AND created_at <= coalesce($2, clock_timestamp()) - $3::interval
      AND NOT EXISTS (SELECT FROM {schema}.runs r WHERE r.run_id = i.run_id)
    ORDER BY created_at LIMIT $4
)
ORDER BY flow_id, trigger_key, idempotency_key FOR UPDATE
"""
DELETE_ORPHANED_KEYS = """
DELETE FROM {schema}.idempotency_keys k
USING unnest($1::uuid[], $2::text[], $3::text[]) AS o (flow_id, trigger_key, idempotency_key)
WHERE k.flow_id = o.flow_id AND k.trigger_key = o.trigger_key AND k.idempotency_key = o.idempotency_key
  AND NOT EXISTS (SELECT FROM {schema}.runs r WHERE r.run_id = k.run_id)
"""
LOCK_ORPHANED_CONTROLS = """
SELECT run_id FROM {schema}.controls c
WHERE run_id IN (
    SELECT run_id FROM {schema}.controls i
    WHERE created_at < $1 AND created_at <= coalesce($2, clock_timestamp()) - $3::interval
      AND NOT EXISTS (SELECT FROM {schema}.runs r WHERE r.run_id = i.run_id)
    ORDER BY created_at LIMIT $4
)
ORDER BY run_id FOR UPDATE
"""
# Of days whose runs are gone, or most of them: whoever asks for one again has it computed again.
DELETE_SUMMARIES = (
    "DELETE FROM {schema}.run_summaries WHERE day < ($1::timestamptz AT TIME ZONE 'UTC')::date - 1"
)
DELETE_ORPHANED_CONTROLS = """
DELETE FROM {schema}.controls c WHERE run_id = ANY($1::uuid[])
  AND NOT EXISTS (SELECT FROM {schema}.runs r WHERE r.run_id = c.run_id)
"""

# Longer than anybody asks what became of a COMMIT, whatever retry_timeout.
DELETE_COMMITS = "DELETE FROM {schema}.commits WHERE noted_at < clock_timestamp() - interval '1 day'"


class Retention:
    _database: Database

    async def cleanup(self, *, cutoff: datetime) -> int:
        loop = asyncio.get_running_loop()
        deleted = 0

        async def delete_runs(transaction: Transaction, runs: Sequence[UUID]) -> int:
            locked = [row[0] for row in await transaction.rows(LOCK_COMPLETED, runs, cutoff)]
            return _count(await transaction.execute(DELETE_RUNS, locked)) if locked else 0

        while found := [row[0] for row in await self._database.read(FIND_COMPLETED, cutoff, BATCH)]:
            while found:
                some, found = found[:TURN], found[TURN:]
                began = loop.time()
                deleted += await self._database.transaction("cleanup", partial(delete_runs, runs=some))
                took = loop.time() - began
                await asyncio.sleep(PAUSE * took)

        async def sweep_keys(transaction: Transaction) -> int:
            rows = await transaction.rows(LOCK_ORPHANED_KEYS, cutoff, transaction.now, ORPHAN_GRACE, BATCH)
            if not rows:
                return 0
            columns = [list(column) for column in zip(*rows, strict=True)]
            return _count(await transaction.execute(DELETE_ORPHANED_KEYS, *columns))

        while await self._database.transaction("cleanup", sweep_keys):
            pass

        async def sweep_controls(transaction: Transaction) -> int:
            rows = await transaction.rows(
                LOCK_ORPHANED_CONTROLS, cutoff, transaction.now, ORPHAN_GRACE, BATCH
            )
            if not rows:
                return 0
            return _count(await transaction.execute(DELETE_ORPHANED_CONTROLS, [row[0] for row in rows]))

        while await self._database.transaction("cleanup", sweep_controls):
            pass

        async def drop_summaries(transaction: Transaction) -> None:
            await transaction.execute(DELETE_SUMMARIES, cutoff)
            await transaction.execute(DELETE_COMMITS)

        await self._database.transaction("cleanup", drop_summaries)
        if await is_indexed(self._database):
            # What ended since the last time becomes quick to search.
            while await gather_texts(self._database):
                pass
        return deleted


def _count(tag: str) -> int:
    return int(tag.rpartition(" ")[2])
