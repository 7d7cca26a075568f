"""Ending runs on PostgreSQL: runs that end at the same moment share a transaction.

Only what is plain is done together: runs that nobody holds, whose steps nobody holds and are what the
caller expects. Whatever else there is to find out, a transaction of the call's own finds out; it waits for
locks, which nothing that others share ever does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple
from uuid import UUID

import asyncpg

from flowstore_core import FlowStoreError, RunStatus, StepStatus
from flowstore_core.batching import BatchedOperation, Batcher
from flowstore_postgres.batches import OF_A_ROW
from flowstore_postgres.connection import Transaction

if TYPE_CHECKING:
    from flowstore_postgres.database import Database

LARGEST = 64
"""Runs that end in one transaction."""

LOCK_RUNS = """
SELECT run_id FROM {schema}.runs WHERE run_id = ANY($1::uuid[]) AND status = 'Running'
ORDER BY run_id FOR UPDATE SKIP LOCKED
"""
# $2 and $3 are the statuses to end with and what is expected, as Ending.expected_text says it; $4 are the
# runs of which something is. A snapshot taken behind the runs' locks: nothing is claimed or dispatched in
# them any more. The steps are locked too, because completing one does not lock its run; where others hold
# one, it is not what is expected.
END_RUNS = """
WITH ending AS (
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
FROM ending e LEFT JOIN found f USING (run_id)
WHERE r.run_id = e.run_id
  AND (e.expected IS NULL OR e.expected = coalesce(f.statuses, '') AND f.held IS NOT true)
RETURNING r.run_id
"""
END_FREE_RUNS = END_RUNS.replace("{wait}", " SKIP LOCKED")
WAIT_AND_END_RUNS = END_RUNS.replace("{wait}", "")


class Ending(NamedTuple):
    """A call of complete_run."""

    run_id: UUID
    status: RunStatus
    expected: Mapping[str, StepStatus] | None

    @property
    def expected_text(self) -> str | None:
        """What is expected, as the statement spells what it finds: the lengths make it unambiguous."""
        if self.expected is None:
            return None
        return "".join(f"{len(key)}:{key}{status.value}" for key, status in sorted(self.expected.items()))


async def end_runs(transaction: Transaction, statement: str, endings: Sequence[Ending]) -> set[UUID]:
    """End those of these runs, which are locked and Running, that are as expected; which were."""
    rows = await transaction.rows(
        statement,
        [ending.run_id for ending in endings],
        [ending.status.value for ending in endings],
        [ending.expected_text for ending in endings],
        [ending.run_id for ending in endings if ending.expected is not None],
        transaction.now,
    )
    return {row[0] for row in rows}


class _RefusedError(FlowStoreError):
    """One of the runs was the reason that nothing happened; alone, each call hears of its own."""


class Completion:
    """The calls of complete_run of one store."""

    def __init__(self, database: Database, *, patience: float) -> None:
        self._database = database
        self._batcher = Batcher(workers=2, max_rows=LARGEST, queue_timeout=patience)
        self._method: BatchedOperation[Ending, bool] = self._batcher.operation(
            "complete_run", self._run, keyed=True
        )

    async def complete(self, ending: Ending) -> bool:
        """True where it was done together with others; False says nothing but that it was not."""
        return await self._method.submit(ending.run_id, ending)

    async def _run(self, endings: Sequence[Ending]) -> Sequence[bool]:
        async def work(transaction: Transaction) -> set[UUID]:
            try:
                return await _complete(transaction, endings)
            except asyncpg.PostgresError as error:
                if (error.sqlstate or "")[:2] in OF_A_ROW:
                    raise _RefusedError from None
                raise

        try:
            done = await self._database.transaction("complete_run", work)
        except _RefusedError:
            return [False] * len(endings)
        return [ending.run_id in done for ending in endings]

    async def aclose(self, seconds: float) -> None:
        await self._batcher.drain(seconds)


async def _complete(transaction: Transaction, endings: Sequence[Ending]) -> set[UUID]:
    wanted = sorted(ending.run_id for ending in endings)
    free = {row[0] for row in await transaction.rows(LOCK_RUNS, wanted)}
    asked = [ending for ending in endings if ending.run_id in free]
    return await end_runs(transaction, END_FREE_RUNS, asked) if asked else set()
