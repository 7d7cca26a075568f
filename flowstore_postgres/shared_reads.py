"""Reads of single runs that share a statement when there are many at once.

They have their own Batcher: see database.py.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from uuid import UUID

from flowstore_core.batching import BatchedOperation, Batcher

WORKERS = 2

Rows = list[Any]


class SharedReads:
    """The shared reads of one store.

    The snapshot of a read is taken after the call arrived, so the caller sees its own writes. ``read`` is
    Database.read.
    """

    def __init__(self, read: Callable[..., Awaitable[Sequence[Any]]], *, queue_timeout: float) -> None:
        self._read = read
        self._batcher = Batcher(
            workers=WORKERS,
            queue_timeout=queue_timeout,
            timeout_hint="raise pool_size or acquire_timeout, or send fewer calls at once",
        )
        self._operations: dict[str, BatchedOperation[UUID, Rows]] = {}

    async def rows(self, sql: str, run_id: UUID) -> Rows:
        """The run's rows of a SELECT that takes an array of run ids and returns run_id first."""
        if self._batcher.acquire_direct_slot():
            try:
                return list(await self._read(sql, [run_id]))
            finally:
                self._batcher.release_direct_slot()
        operation = self._operations.get(sql) or self._new_operation(sql)
        return await operation.submit(run_id, run_id)

    def _new_operation(self, sql: str) -> BatchedOperation[UUID, Rows]:
        async def run(run_ids: Sequence[UUID]) -> Sequence[Rows]:
            found: dict[UUID, Rows] = {run_id: [] for run_id in run_ids}
            for row in await self._read(sql, run_ids):
                found[row[0]].append(row)
            return [found[run_id] for run_id in run_ids]

        # No caller changes the rows, so concurrent calls for one run share them.
        operation = self._batcher.operation(
            "a read", run, keyed=True, coalesce=lambda first, rows, later: rows
        )
        self._operations[sql] = operation
        return operation

    async def aclose(self, seconds: float) -> None:
        await self._batcher.drain(seconds)
