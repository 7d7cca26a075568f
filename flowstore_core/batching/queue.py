"""The queue of one operation, whose concurrent calls share batches."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from flowstore_core.batching.call import PendingCall
from flowstore_core.batching.slots import SlotQueue
from flowstore_core.errors import OutcomeUnknownError

I = TypeVar("I")  # noqa: E741 - an item
R = TypeVar("R")


class CallScheduler(Protocol):
    """The part of a Batcher that the queue of an operation uses."""

    loop: asyncio.AbstractEventLoop
    time: Callable[[], float]
    slots: SlotQueue
    closing: bool

    async def wait_for_slot(self, queued_at: float) -> None:
        """Acquire a slot, or raise StoreUnavailableError or StoreClosedError."""

    def wake(self) -> None:
        """A call was queued: start a worker unless a running one will check the queues anyway."""

    def compensate(self, call: PendingCall, outcome: Any) -> None:
        """Start the compensation of a call whose caller was cancelled."""


class BatchedOperation(Generic[I, R]):
    """One kind of call whose concurrent calls share batches; made by ``Batcher.operation``."""

    def __init__(
        self,
        scheduler: CallScheduler,
        name: str,
        run: Callable[[Sequence[I]], Awaitable[Sequence[R | Exception]]]
        | Callable[[Sequence[PendingCall]], Sequence[R | Exception]],
        *,
        keyed: bool,
        coalesce: Callable[[I, R, I], R | Exception] | None,
        size_of: Callable[[I], int] | None,
        ordered: bool,
        decode: Callable[[I, Any], R] | None,
    ) -> None:
        self.name = name
        self.run: Callable[..., Any] = run
        self.keyed = keyed
        self.ordered = ordered
        self.coalesce = coalesce
        self.size_of = size_of
        self.queue: deque[PendingCall] = deque()
        self._scheduler = scheduler
        self._decode = decode

    async def submit(
        self,
        key: Hashable,
        item: I,
        on_abandoned: Callable[[R | OutcomeUnknownError], Awaitable[None]] | None = None,
    ) -> R:
        """Send an item with the next batch and return its own result.

        ``on_abandoned`` compensates for an item whose caller was cancelled after the item was sent. It
        gets the outcome, or the OutcomeUnknownError that the call ended with; see ShieldedTasks.run.

        Raises the error that ``run`` returned for the item; StoreUnavailableError when the item was not
        sent within the queue timeout, in which case it never happened; StoreClosedError.
        """
        scheduler = self._scheduler
        queued_at = scheduler.time()
        slots = scheduler.slots
        if slots.in_use < slots.capacity and not scheduler.closing:
            slots.in_use += 1
        else:
            await scheduler.wait_for_slot(queued_at)
        # Every call passes here: the constructor is faster than loop.create_future().
        future: asyncio.Future[Any] = asyncio.Future(loop=scheduler.loop)
        call = PendingCall(key, item, future, on_abandoned, queued_at)
        self.queue.append(call)
        scheduler.wake()
        try:
            outcome = await future
        except asyncio.CancelledError:
            # Resolved and cancelled at the same moment. A future that is cancelled first is compensated
            # for when the batch resolves it.
            if future.done() and not future.cancelled():
                scheduler.compensate(call, future.exception() or future.result())
            raise
        return outcome if self._decode is None else self._decode(item, outcome)

    def accept_transfer(self, call: PendingCall) -> None:
        """Queue a call whose outcome at a different Batcher was a Transfer to this operation."""
        call.queued_at = self._scheduler.time()
        self._scheduler.slots.in_use += 1
        self.queue.append(call)
        self._scheduler.wake()
