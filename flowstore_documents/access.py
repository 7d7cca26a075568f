"""What the noun classes share: the transactions of a store, for reads and for writes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from flowstore_core import OutcomeUnknownError
from flowstore_core.backend import ShieldedTasks
from flowstore_documents import keys
from flowstore_documents.space import KeyValueSpace, Page, Range
from flowstore_documents.transactions import AHEAD, IntentMet, Transaction, Transactions

T = TypeVar("T")


class Access:
    """Base class of the noun classes."""

    def __init__(self, space: KeyValueSpace, transactions: Transactions) -> None:
        self._space = space
        self._transactions = transactions
        self._shielded = ShieldedTasks()

    async def _read(self, operation: str, work: Callable[[Transaction], Awaitable[T]]) -> T:
        return await self._transactions.run(operation, work)

    async def _write(
        self,
        operation: str,
        work: Callable[[Transaction], Coroutine[Any, Any, T]],
        on_abandoned: Callable[[T | OutcomeUnknownError], Awaitable[None]] | None = None,
        *,
        hot_key: bytes | None = None,
    ) -> T:
        """Run a transaction that continues when its caller is cancelled (CON-4)."""
        running = self._transactions.run(operation, work, hot_key=hot_key)
        return await self._shielded.run(running, on_abandoned)


async def finish_intents(
    transaction: Transaction, ranges: Sequence[Range] = (), *, ahead: Sequence[Range] = ()
) -> Sequence[Page]:
    """Let every change that began before this read of many runs end. Returns the pages of ``ranges``.

    The first items of the ranges ``ahead``, which are scanned later, are read with them.
    """
    wanted = [keys.prefix_range(keys.INTENTS, 1, keys_only=True), *ranges]
    intents, *pages = (await transaction.read_ahead((), ahead, wanted)).pages
    for key, _ in intents.items:
        raise IntentMet(keys.parse_run(key))
    return pages


async def groups_of(
    transaction: Transaction, prefix: bytes, group: Callable[[bytes], bytes]
) -> AsyncIterator[bytes]:
    """The groups that have keys with a prefix, in order. ``group`` returns the prefix of a key's group."""
    start, found = prefix, b""
    while True:
        wanted = Range(start, keys.end_of(prefix), AHEAD, keys_only=True)
        (page,) = (await transaction.read((), [wanted])).pages
        for key, _ in page.items:
            if group(key) != found:
                found = group(key)
                yield found
        if not page.more:
            return
        start = keys.end_of(found)
