"""Completion of runs on PostgreSQL: concurrent completions share a transaction (RUN-4).

The shared transaction handles only the fast path: runs and steps that are not locked and match the
expectation. Everything else is left to a dedicated transaction of the call, which waits for locks; a shared
transaction never does. Completions have their own Batcher: see database.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple
from uuid import UUID

import asyncpg

from flowstore_core import FlowStoreError, RunStatus, StepStatus
from flowstore_core.batching import BatchedOperation, Batcher
from flowstore_postgres.errors import ROW_LEVEL_SQLSTATE_CLASSES
from flowstore_postgres.transactions import Transaction, Transactions

MAX_BATCH = 64
"""Maximum number of runs that are completed in one transaction."""

LOCK_RUNS = """
SELECT run_id FROM {schema}.runs WHERE run_id = ANY($1::uuid[]) AND status = 'Running'
ORDER BY run_id FOR UPDATE SKIP LOCKED
"""
# $2 are the new statuses, $3 the expected step statuses (Completion.encode_expected), $4 the runs that have
# an expectation. The snapshot is taken after the runs are locked, so no step is claimed or dispatched
# any more. The steps are locked too, because completing a step does not lock its run; a step that another
# transaction has locked does not match.
COMPLETE_RUNS = """
WITH completion AS (
    SELECT * FROM unnest($1::uuid[], $2::text[], $3::text[]) AS e (run_id, status, expected)
), locked AS MATERIALIZED (
    SELECT run_id, step_key, status,
           dispatched_at IS NOT NULL
           OR claimed_at IS NOT NULL
              AND (claim_expires_at IS NULL OR claim_expires_at > coalesce($5, clock_timestamp())) AS held
    FROM {schema}.steps WHERE run_id = ANY($4::uuid[]) ORDER BY run_id, step_key FOR SHARE{wait}
), found AS (
    SELECT run_id, bool_or(held AND status IS NULL) AS held,
           string_agg(length(step_key) || ':' || step_key || status, '' ORDER BY step_key) AS statuses
    FROM locked GROUP BY run_id
)
UPDATE {schema}.runs r SET status = e.status, completed_at = coalesce($5, clock_timestamp())
FROM completion e LEFT JOIN found f USING (run_id)
WHERE r.run_id = e.run_id
  AND (e.expected IS NULL OR e.expected = coalesce(f.statuses, '') AND f.held IS NOT true)
RETURNING r.run_id
"""
# Fast path, for the shared transaction.
COMPLETE_UNLOCKED_RUNS = COMPLETE_RUNS.replace("{wait}", " SKIP LOCKED")
# Slow path, for a dedicated transaction.
LOCK_AND_COMPLETE_RUNS = COMPLETE_RUNS.replace("{wait}", "")


class Completion(NamedTuple):
    """A call of complete_run."""

    run_id: UUID
    status: RunStatus
    expected: Mapping[str, StepStatus] | None

    def encode_expected(self) -> str | None:
        """The expected statuses in the format of the statement; the lengths make it unambiguous."""
        if self.expected is None:
            return None
        return "".join(f"{len(key)}:{key}{status.value}" for key, status in sorted(self.expected.items()))


async def complete_runs(
    transaction: Transaction, statement: str, completions: Sequence[Completion]
) -> set[UUID]:
    """Complete the runs that match their expectation and return their ids.

    The runs must be locked and Running.
    """
    rows = await transaction.rows(
        statement,
        [completion.run_id for completion in completions],
        [completion.status.value for completion in completions],
        [completion.encode_expected() for completion in completions],
        [completion.run_id for completion in completions if completion.expected is not None],
        transaction.now,
    )
    return {row[0] for row in rows}


class _BatchRejectedError(FlowStoreError):
    """One of the runs made the batch fail. Each call then uses its own transaction and gets its own error."""


class RunCompleter:
    """The batched calls of complete_run of one store."""

    def __init__(self, transactions: Transactions, *, queue_timeout: float) -> None:
        self._transactions = transactions
        self._batcher = Batcher(workers=2, max_rows=MAX_BATCH, queue_timeout=queue_timeout)
        self._operation: BatchedOperation[Completion, bool] = self._batcher.operation(
            "complete_run", self._run, keyed=True
        )

    async def try_complete(self, completion: Completion) -> bool:
        """True if the batch completed the run; False means use a dedicated transaction."""
        return await self._operation.submit(completion.run_id, completion)

    async def _run(self, completions: Sequence[Completion]) -> Sequence[bool]:
        async def work(transaction: Transaction) -> set[UUID]:
            try:
                return await _complete_unlocked(transaction, completions)
            except asyncpg.PostgresError as error:
                if (error.sqlstate or "")[:2] in ROW_LEVEL_SQLSTATE_CLASSES:
                    raise _BatchRejectedError from None
                raise

        try:
            completed = await self._transactions.run("complete_run", work)
        except _BatchRejectedError:
            return [False] * len(completions)
        return [completion.run_id in completed for completion in completions]

    async def aclose(self, seconds: float) -> None:
        await self._batcher.drain(seconds)


async def _complete_unlocked(transaction: Transaction, completions: Sequence[Completion]) -> set[UUID]:
    run_ids = sorted(completion.run_id for completion in completions)
    locked = {row[0] for row in await transaction.rows(LOCK_RUNS, run_ids)}
    candidates = [completion for completion in completions if completion.run_id in locked]
    return await complete_runs(transaction, COMPLETE_UNLOCKED_RUNS, candidates) if candidates else set()
