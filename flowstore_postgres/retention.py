"""Cleanup on PostgreSQL."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from functools import partial
from uuid import UUID

from flowstore_core import FlowStoreError
from flowstore_core.retention import ORPHAN_GRACE
from flowstore_postgres.connection import Transaction
from flowstore_postgres.database import Database, in_microseconds
from flowstore_postgres.search import gather, is_indexed

log = logging.getLogger("flowstore_postgres")

GRACE = in_microseconds(ORPHAN_GRACE)
BATCH = 500
"""Runs that are looked up at once; orphans that are deleted at once at most."""
TURN = 20
"""Runs that are deleted in one transaction: some milliseconds of the server's time, in statements of less
than one, so that nobody waits long for a processor or a row (RET-3)."""
GATHERED = 32
"""Ended runs that become quick to search in one transaction."""
REST = 1.0
"""How long cleanup rests after each transaction, as a multiple of what that took."""

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
    WHERE created_at < $1 AND created_at <= coalesce($2, clock_timestamp()) - $3::bigint * {microsecond}
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
    WHERE created_at < $1 AND created_at <= coalesce($2, clock_timestamp()) - $3::bigint * {microsecond}
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
DELETE_COMMITS = "DELETE FROM {schema}.commits WHERE noted_at < clock_timestamp() - interval '24 hours'"


class Retention:
    _database: Database

    async def cleanup(self, *, cutoff: datetime) -> int:
        deleted = 0
        while found := await self._database.read(FIND_COMPLETED, cutoff, BATCH):
            runs = [row[0] for row in found]
            for start in range(0, len(runs), TURN):
                deleted += await self._in_turn(partial(_delete_runs, runs[start : start + TURN], cutoff))
        for sweep in (_sweep_keys, _sweep_controls):
            while await self._in_turn(partial(sweep, cutoff)):
                pass
        await self._in_turn(partial(_drop_notes, cutoff))
        if await is_indexed(self._database):
            await self._gather()
        return deleted

    async def _gather(self) -> None:
        """Add ended runs to the index for searches; a search finds them without it."""
        try:
            while await self._in_turn(partial(gather, GATHERED)):
                pass
        except FlowStoreError as error:
            log.warning(
                "cleanup could not add ended runs to the index for searches: %s",
                error,
                extra={"flowstore.operation": "cleanup", "flowstore.sqlstate": error.database_code},
            )

    async def _in_turn(self, work: Callable[[Transaction], Awaitable[int]]) -> int:
        loop = asyncio.get_running_loop()
        began = loop.time()
        done = await self._database.transaction("cleanup", work)
        await asyncio.sleep(REST * (loop.time() - began))
        return done


async def _delete_runs(runs: Sequence[UUID], cutoff: datetime, transaction: Transaction) -> int:
    """Delete those that are still completed, each whole; how many."""
    locked = [row[0] for row in await transaction.rows(LOCK_COMPLETED, runs, cutoff)]
    return _count(await transaction.execute(DELETE_RUNS, locked)) if locked else 0


async def _sweep_keys(cutoff: datetime, transaction: Transaction) -> int:
    rows = await transaction.rows(LOCK_ORPHANED_KEYS, cutoff, transaction.now, GRACE, BATCH)
    if not rows:
        return 0
    columns = [list(column) for column in zip(*rows, strict=True)]
    return _count(await transaction.execute(DELETE_ORPHANED_KEYS, *columns))


async def _sweep_controls(cutoff: datetime, transaction: Transaction) -> int:
    rows = await transaction.rows(LOCK_ORPHANED_CONTROLS, cutoff, transaction.now, GRACE, BATCH)
    if not rows:
        return 0
    return _count(await transaction.execute(DELETE_ORPHANED_CONTROLS, [row[0] for row in rows]))


async def _drop_notes(cutoff: datetime, transaction: Transaction) -> int:
    await transaction.execute(DELETE_SUMMARIES, cutoff)
    return _count(await transaction.execute(DELETE_COMMITS))


def _count(tag: str) -> int:
    return int(tag.rpartition(" ")[2])
