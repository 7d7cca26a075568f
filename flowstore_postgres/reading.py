"""Reads of one run each that share a statement when there are many at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID

from flowstore_core.batching import BatchedOperation, Batcher

if TYPE_CHECKING:
    from flowstore_postgres.database import Database

LANES = 2

Rows = list[Any]


class Reading:
    """The shared reads of one store.

    A call is answered from a snapshot that was taken after it came, so it sees what its caller wrote.
    """

    def __init__(self, database: Database, *, patience: float) -> None:
        self._database = database
        self._batcher = Batcher(
            workers=LANES,
            queue_timeout=patience,
            timeout_hint="raise pool_size or acquire_timeout, or send fewer calls at once",
        )
        self._methods: dict[str, BatchedOperation[UUID, Rows]] = {}

    async def rows(self, statement: str, run_id: UUID) -> Rows:
        """The run's rows of a SELECT that takes an array of run_ids and gives run_id first."""
        if self._batcher.acquire_direct_slot():
            try:
                return list(await self._database.read(statement, [run_id]))
            finally:
                self._batcher.release_direct_slot()
        method = self._methods.get(statement) or self._method(statement)
        return await method.submit(run_id, run_id)

    def _method(self, statement: str) -> BatchedOperation[UUID, Rows]:
        async def run(run_ids: Sequence[UUID]) -> Sequence[Rows]:
            found: dict[UUID, Rows] = {run_id: [] for run_id in run_ids}
            for row in await self._database.read(statement, run_ids):
                found[row[0]].append(row)
            return [found[run_id] for run_id in run_ids]

        # Nobody changes the rows, so calls for one run get the same.
        made = self._batcher.operation("a read", run, keyed=True, coalesce=lambda first, rows, later: rows)
        self._methods[statement] = made
        return made

    async def aclose(self, seconds: float) -> None:
        await self._batcher.drain(seconds)
