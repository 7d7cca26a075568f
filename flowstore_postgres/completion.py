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
from flowstore_core.batching import Batcher, Method
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
# Locked, because completing a step does not lock the run.
READ_BLOCKERS = """
SELECT run_id, step_key, status,
       dispatched_at IS NOT NULL
       OR claimed_at IS NOT NULL
          AND (claim_expires_at IS NULL OR claim_expires_at > coalesce($2, clock_timestamp())) AS held
FROM {schema}.steps WHERE run_id = ANY($1::uuid[]) ORDER BY run_id, step_key FOR SHARE{wait}
"""
WAIT_FOR_BLOCKERS = READ_BLOCKERS.replace("{wait}", "")
# A step that is missing for being held is not what is expected.
FREE_BLOCKERS = READ_BLOCKERS.replace("{wait}", " SKIP LOCKED")
COMPLETE_RUNS = """
UPDATE {schema}.runs r SET status = c.status, completed_at = coalesce($3, clock_timestamp())
FROM unnest($1::uuid[], $2::text[]) AS c (run_id, status) WHERE r.run_id = c.run_id
"""


class Ending(NamedTuple):
    """A call of complete_run."""

    run_id: UUID
    status: RunStatus
    expected: Mapping[str, StepStatus] | None

    def is_met_by(self, steps: Sequence[tuple[str, str | None, bool]]) -> bool:
        """Whether the steps, as key, status and whether held, are what is expected."""
        if self.expected is None:
            return True
        statuses = {key: status for key, status, _ in steps if status is not None}
        return statuses == self.expected and not any(held and status is None for _, status, held in steps)


class _RefusedError(FlowStoreError):
    """One of the runs was the reason that nothing happened; alone, each call hears of its own."""


class Completion:
    """The calls of complete_run of one store."""

    def __init__(self, database: Database, *, patience: float) -> None:
        self._database = database
        self._batcher = Batcher(lanes=1, largest=LARGEST, patience=patience)
        self._method: Method[Ending, bool] = self._batcher.method("complete_run", self._run, keyed=True)

    async def complete(self, ending: Ending) -> bool:
        """True where it was done together with others; False says nothing but that it was not."""
        self._database.check_place()
        return await self._method.call(ending.run_id, ending)

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
    wanted = {ending.run_id for ending in endings}
    free = {row[0] for row in await transaction.rows(LOCK_RUNS, sorted(wanted))}
    asked = [ending for ending in endings if ending.run_id in free]
    if conditional := [ending.run_id for ending in asked if ending.expected is not None]:
        steps: dict[UUID, list[tuple[str, str | None, bool]]] = {run_id: [] for run_id in conditional}
        for row in await transaction.rows(FREE_BLOCKERS, conditional, transaction.now):
            steps[row[0]].append((row[1], row[2], row[3]))
        asked = [ending for ending in asked if ending.is_met_by(steps.get(ending.run_id, ()))]
    if asked:
        await transaction.execute(
            COMPLETE_RUNS,
            [ending.run_id for ending in asked],
            [ending.status.value for ending in asked],
            transaction.now,
        )
    return {ending.run_id for ending in asked}
