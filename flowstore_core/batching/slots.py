"""A FIFO counting semaphore with a deadline."""

from __future__ import annotations

import asyncio
from collections import OrderedDict


class SlotQueue:
    """Slots in a bounded queue, granted in the order of request; belongs to one event loop."""

    def __init__(self, capacity: int) -> None:
        self.capacity: int = capacity
        self.in_use: int = 0
        """Slots that are held, or were just granted to a waiting caller. May exceed the capacity."""
        self._waiters: OrderedDict[asyncio.Future[None], None] = OrderedDict()

    async def acquire(self, deadline: float) -> None:
        """Acquire a slot, waiting for one if necessary.

        ``deadline`` is a time of the event loop, in seconds; after it the call raises TimeoutError.
        """
        if self.in_use < self.capacity:
            self.in_use += 1
            return
        slot: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters[slot] = None
        try:
            async with asyncio.timeout_at(deadline):
                await slot
        except (TimeoutError, asyncio.CancelledError):
            if slot.done() and not slot.cancelled():
                # Granted at the moment of the timeout or cancellation: pass it on.
                self.release(1)
            else:
                self._waiters.pop(slot, None)
            raise

    def release(self, count: int) -> None:
        """Release slots; waiting callers get them first, longest wait first."""
        while count and self._waiters:
            slot, _ = self._waiters.popitem(last=False)
            if not slot.done():
                slot.set_result(None)
                count -= 1
        self.in_use -= count

    def open_all(self) -> None:
        """Grant a slot to every waiting caller, beyond the capacity if necessary."""
        self.in_use += len(self._waiters)
        self.release(len(self._waiters))
