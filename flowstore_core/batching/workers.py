"""The two sides of a Batcher's workers: the interface they implement and the one they call."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import Any, Protocol

from flowstore_core.batching.call import PendingCall
from flowstore_core.batching.queue import BatchedOperation

GRACE_SECONDS = 1.0
"""Seconds that a worker may take to stop."""

Batch = tuple[BatchedOperation[Any, Any], list[PendingCall]]
"""The calls of one operation that are sent together."""


class BatchWorkers(Protocol):
    """What carries batches to the database. A Batcher calls every method on its event loop.

    A free worker calls ``source.next_batch()``, writes the batch and calls
    ``source.resolve(operation, calls, outcomes)``, or ``source.abandon(operation, calls)`` when it will
    never learn the outcome.
    """

    def wake(self) -> None:
        """Calls are queued. Runs for every queued call, so it must return quickly when no worker is free."""

    def pending(self) -> Collection[asyncio.Future[Any]]:
        """Futures to await until nothing is queued or in flight; empty when that is the case."""
        ...

    async def stop(self) -> None:
        """Take no further batch; resolve or abandon those in flight within GRACE_SECONDS."""


class BatchSource(Protocol):
    """The part of a Batcher that workers use."""

    loop: asyncio.AbstractEventLoop
    max_rows: int

    @property
    def direct_in_use(self) -> int:
        """1 while a caller holds the direct slot, else 0."""
        ...

    @property
    def queued(self) -> int:
        """The number of queued calls, including callers that were just granted a slot."""
        ...

    def has_calls(self) -> bool:
        """Whether a caller still waits for a queued call."""
        ...

    def next_batch(self, workers: int = 1, in_flight: int = 0) -> Batch | None:
        """Take the next batch from the queues; None when they are empty.

        ``workers`` is the number of workers that share the queues; ``in_flight`` is the number of calls
        that the other workers hold.
        """
        ...

    def resolve(
        self, operation: BatchedOperation[Any, Any], calls: Sequence[PendingCall], outcomes: Sequence[Any]
    ) -> None:
        """Hand each call its outcome, in order."""

    def abandon(self, operation: BatchedOperation[Any, Any], calls: Sequence[PendingCall]) -> None:
        """Resolve calls of a batch whose outcome will never be known."""
