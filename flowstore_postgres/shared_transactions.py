"""Transactions that concurrent calls of one operation share.

They have their own Batcher: see database.py.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable, Sequence
from functools import partial
from typing import Any, TypeVar

import asyncpg

from flowstore_core import FlowStoreError
from flowstore_core.batching import BatchedOperation, Batcher
from flowstore_postgres.errors import ROW_LEVEL_SQLSTATE_CLASSES
from flowstore_postgres.transactions import BEGIN_INDEX_ONLY, Transaction, Transactions

I = TypeVar("I")  # noqa: E741 - an item
Work = Callable[[Transaction, Sequence[I]], Awaitable[Sequence[Any]]]
"""Writes some items, and returns for each its result or the error for its caller."""

MAX_BATCH = 64
"""Maximum number of calls that share a transaction."""
WORKERS = 2


class BatchRejectedError(FlowStoreError):
    """One of the items conflicts with other work, so each item gets a transaction of its own."""


class SharedTransactions:
    """The shared transactions of one store."""

    def __init__(self, transactions: Transactions, *, queue_timeout: float) -> None:
        self._transactions = transactions
        self._batcher = Batcher(
            workers=WORKERS,
            max_rows=MAX_BATCH,
            queue_timeout=queue_timeout,
            timeout_hint="raise pool_size or acquire_timeout, or send fewer calls at once",
        )
        self._operations: dict[str, BatchedOperation[Any, Any]] = {}

    async def run(
        self, name: str, key: Hashable, item: I, work: Work[I], *, size_of: Callable[[I], int]
    ) -> Any:
        """The result of one item. Two items with one key never share a transaction.

        An operation has one ``work``, which may raise BatchRejectedError for several items.
        """
        operation = self._operations.get(name)
        if operation is None:
            run = partial(self._run, name, work)
            operation = self._batcher.operation(name, run, keyed=True, size_of=size_of)
            self._operations[name] = operation
        return await operation.submit(key, item)

    async def _run(self, name: str, work: Work[I], items: Sequence[I]) -> Sequence[Any]:
        async def shared(transaction: Transaction) -> Sequence[Any]:
            try:
                return await work(transaction, items)
            except asyncpg.PostgresError as error:
                if len(items) > 1 and (error.sqlstate or "")[:2] in ROW_LEVEL_SQLSTATE_CLASSES:
                    raise BatchRejectedError from None
                raise

        try:
            return await self._transactions.run(name, shared, begin=BEGIN_INDEX_ONLY)
        except BatchRejectedError:
            return [await self._run_alone(name, work, item) for item in items]

    async def _run_alone(self, name: str, work: Work[I], item: I) -> Any:
        try:
            [result] = await self._run(name, work, [item])
        except FlowStoreError as error:
            return error
        return result

    async def aclose(self, seconds: float) -> None:
        await self._batcher.drain(seconds)
