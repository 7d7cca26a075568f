"""Reads of single runs and steps that share a statement when there are many at once.

They have their own Batcher: see database.py.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Any

from flowstore_core.batching import BatchedOperation, Batcher

WORKERS = 2

Key = tuple[Hashable, ...]
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
        self._operations: dict[str, BatchedOperation[Key, Rows]] = {}

    async def rows(self, sql: str, *key: Hashable) -> Rows:
        """The rows for one key of a SELECT over many: a run id, or a run id and a step key.

        The SELECT takes an array for each part of the key and returns these parts first.
        """
        if self._batcher.acquire_direct_slot():
            try:
                return list(await self._read(sql, *([part] for part in key)))
            finally:
                self._batcher.release_direct_slot()
        operation = self._operations.get(sql) or self._new_operation(sql)
        return await operation.submit(key, key)

    def _new_operation(self, sql: str) -> BatchedOperation[Key, Rows]:
        async def run(keys: Sequence[Key]) -> Sequence[Rows]:
            found: dict[Key, Rows] = {key: [] for key in keys}
            for row in await self._read(sql, *zip(*keys, strict=True)):
                found[row[: len(keys[0])]].append(row)
            return [found[key] for key in keys]

        # No caller changes the rows, so concurrent calls for one key share them.
        operation = self._batcher.operation(
            "a read", run, keyed=True, coalesce=lambda first, rows, later: rows
        )
        self._operations[sql] = operation
        return operation

    async def aclose(self, seconds: float) -> None:
        await self._batcher.drain(seconds)
