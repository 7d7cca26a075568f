"""Cleanup, and the deletion of one run, on PostgreSQL."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from functools import partial
from uuid import UUID

from flowstore_core import FlowStoreError, RunNotCompletedError, RunStatus
from flowstore_core.retention import ORPHAN_GRACE
from flowstore_postgres.database import Database
from flowstore_postgres.search import index_batch, is_indexed
from flowstore_postgres.sql_placeholders import in_microseconds
from flowstore_postgres.transactions import Transaction, affected_rows

log = logging.getLogger("flowstore_postgres")

GRACE = in_microseconds(ORPHAN_GRACE)
BATCH = 500
"""Number of runs that one query finds, and maximum number of orphans that one transaction deletes."""
RUNS_PER_TRANSACTION = 20
"""Maximum number of runs that one transaction deletes. It takes some milliseconds of the server's time, in
statements of less than one, so that no caller waits long for a processor or a row (RET-3)."""
INDEX_BATCH = 32
"""Maximum number of ended runs that one transaction adds to the index for searches."""
REST_FACTOR = 1.0
"""The pause after each transaction of cleanup, as a multiple of the transaction's duration."""

FIND_COMPLETED = """
SELECT run_id FROM {schema}.runs WHERE completed_at < $1 ORDER BY completed_at, run_id LIMIT $2
"""
# Locks keys before runs, as trigger_run does; another order could deadlock with it. It waits for locked rows,
# because a skipped run would never be deleted. PostgreSQL re-reads a row after the wait, so a run that was
# reopened meanwhile is kept whole (RET-2).
LOCK_KEYS_OF_RUNS = """
WITH keys AS MATERIALIZED (
    SELECT FROM {schema}.idempotency_keys WHERE run_id = ANY($1::uuid[])
    ORDER BY flow_id, trigger_key, idempotency_key FOR UPDATE
)
"""
LOCK_COMPLETED = (
    LOCK_KEYS_OF_RUNS
    + """
SELECT run_id FROM {schema}.runs
WHERE run_id = ANY($1::uuid[]) AND completed_at < $2 AND (SELECT count(*) FROM keys) >= 0
ORDER BY run_id FOR UPDATE
"""
)
LOCK_DELETABLE = (
    LOCK_KEYS_OF_RUNS
    + """
SELECT status, flow_id, started_at FROM {schema}.runs
WHERE run_id = ANY($1::uuid[]) AND (SELECT count(*) FROM keys) >= 0 FOR UPDATE
"""
)
CHILDREN = (
    "pending",
    "steps",
    "attempts",
    "outputs",
    "events",
    "waiters",
    "deliveries",
    "controls",
    "idempotency_keys",
)
# A separate statement, because its snapshot includes rows that were written during the wait for the locks.
DELETE_RUNS = (
    "WITH "
    + ", ".join(
        f"{table} AS (DELETE FROM {{schema}}.{table} WHERE run_id = ANY($1::uuid[]))" for table in CHILDREN
    )
    + " DELETE FROM {schema}.runs WHERE run_id = ANY($1::uuid[])"
)

# Two statements, because the snapshot of the second includes a run that a trigger started during the wait
# for its key.
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
# Summaries of days whose runs are mostly deleted. They are computed again on demand.
DELETE_SUMMARIES = (
    "DELETE FROM {schema}.run_summaries WHERE day < ($1::timestamptz AT TIME ZONE 'UTC')::date - 1"
)
# The summaries that count a deleted run, and all of a flow without runs.
DELETE_SUMMARIES_OF_RUN = """
DELETE FROM {schema}.run_summaries
WHERE granularity IN ('hour', 'day') AND scope IN ('', $1::uuid::text) AND (
    day = ($2::timestamptz AT TIME ZONE 'UTC')::date
    OR (scope = $1::uuid::text AND NOT EXISTS (SELECT FROM {schema}.runs WHERE flow_id = $1))
)
"""
DELETE_ORPHANED_CONTROLS = """
DELETE FROM {schema}.controls c WHERE run_id = ANY($1::uuid[])
  AND NOT EXISTS (SELECT FROM {schema}.runs r WHERE r.run_id = c.run_id)
"""

FOLDING = "fold the changes of runs into the counters"

# Longer than any call probes for its COMMIT: the maximum of retry_timeout is one hour.
DELETE_COMMITS = "DELETE FROM {schema}.commits WHERE noted_at < clock_timestamp() - interval '24 hours'"
FOLD_CHANGES = "SELECT {schema}.fold_run_changes()"
# A summary is used only while the day's number of changes matches. This also deletes summaries that include
# unfolded changes; they are computed again on demand.
DELETE_STALE_SUMMARIES = """
DELETE FROM {schema}.run_summaries s
WHERE NOT EXISTS (SELECT FROM {schema}.run_days d WHERE d.day = s.day AND d.changes = s.changes)
"""


class Retention:
    """The contract of these operations is in flowstore_core/retention.py."""

    _database: Database

    async def cleanup(self, *, cutoff: datetime) -> int:
        deleted = 0
        while found := await self._database.read(FIND_COMPLETED, cutoff, BATCH):
            runs = [row[0] for row in found]
            for start in range(0, len(runs), RUNS_PER_TRANSACTION):
                deleted += await self._run_paced(
                    partial(_delete_runs, runs[start : start + RUNS_PER_TRANSACTION], cutoff)
                )
        for sweep in (_sweep_keys, _sweep_controls):
            while await self._run_paced(partial(sweep, cutoff)):
                pass
        await self._run_paced(partial(_delete_summaries_and_commits, cutoff))
        await self._maintain(FOLDING, _fold)
        await self._maintain("delete stale summaries", _delete_stale_summaries)
        if await is_indexed(self._database):
            await self._maintain(
                "add ended runs to the index for searches", partial(index_batch, INDEX_BATCH)
            )
        return deleted

    async def delete_run(self, *, run_id: UUID) -> bool:
        deleted = await self._database.transaction("delete_run", partial(_delete_run, run_id))
        if deleted is None:
            return False
        try:
            await self._database.transaction("delete_run", partial(_forget_counts, *deleted))
        except FlowStoreError as error:
            _log_failure("delete_run", FOLDING, error)
        return True

    async def _maintain(self, task: str, work: Callable[[Transaction], Awaitable[int]]) -> None:
        """Repeat optional maintenance until nothing is left; a failure is logged."""
        try:
            while await self._run_paced(work):
                pass
        except FlowStoreError as error:
            _log_failure("cleanup", task, error)

    async def _run_paced(self, work: Callable[[Transaction], Awaitable[int]]) -> int:
        loop = asyncio.get_running_loop()
        began = loop.time()
        done = await self._database.transaction("cleanup", work)
        await asyncio.sleep(REST_FACTOR * (loop.time() - began))
        return done


async def _delete_runs(runs: Sequence[UUID], cutoff: datetime, transaction: Transaction) -> int:
    """Delete the runs that are still completed, each whole, and return their number."""
    locked = [row[0] for row in await transaction.rows(LOCK_COMPLETED, runs, cutoff)]
    return affected_rows(await transaction.execute(DELETE_RUNS, locked)) if locked else 0


async def _delete_run(run_id: UUID, transaction: Transaction) -> tuple[UUID, datetime] | None:
    """Delete a terminal run and return its flow and its start; None without a run."""
    row = await transaction.row(LOCK_DELETABLE, [run_id])
    if row is None:
        return None
    if row["status"] == RunStatus.RUNNING:
        raise RunNotCompletedError(run_id)
    await transaction.execute(DELETE_RUNS, [run_id])
    return row["flow_id"], row["started_at"]


async def _forget_counts(flow_id: UUID, started_at: datetime, transaction: Transaction) -> None:
    """Delete what the counters keep of a deleted run and, without another run, of its flow."""
    await transaction.execute(DELETE_SUMMARIES_OF_RUN, flow_id, started_at)
    await transaction.row(FOLD_CHANGES)


async def _fold(transaction: Transaction) -> int:
    return int((await transaction.row(FOLD_CHANGES))[0])


async def _delete_stale_summaries(transaction: Transaction) -> int:
    await transaction.execute(DELETE_STALE_SUMMARIES)
    return 0


async def _sweep_keys(cutoff: datetime, transaction: Transaction) -> int:
    rows = await transaction.rows(LOCK_ORPHANED_KEYS, cutoff, transaction.now, GRACE, BATCH)
    if not rows:
        return 0
    columns = [list(column) for column in zip(*rows, strict=True)]
    return affected_rows(await transaction.execute(DELETE_ORPHANED_KEYS, *columns))


async def _sweep_controls(cutoff: datetime, transaction: Transaction) -> int:
    rows = await transaction.rows(LOCK_ORPHANED_CONTROLS, cutoff, transaction.now, GRACE, BATCH)
    if not rows:
        return 0
    return affected_rows(await transaction.execute(DELETE_ORPHANED_CONTROLS, [row[0] for row in rows]))


async def _delete_summaries_and_commits(cutoff: datetime, transaction: Transaction) -> int:
    await transaction.execute(DELETE_SUMMARIES, cutoff)
    return affected_rows(await transaction.execute(DELETE_COMMITS))


def _log_failure(operation: str, task: str, error: FlowStoreError) -> None:
    log.warning(
        "%s could not %s: %s",
        operation,
        task,
        error,
        extra={"flowstore.operation": operation, "flowstore.sqlstate": error.database_code},
    )
