"""A bounded number of places, first come, first served."""

from __future__ import annotations

import asyncio
from collections import OrderedDict


class Places:
    """Counts who has a place; whoever finds none waits for one that is left."""

    def __init__(self, capacity: int) -> None:
        self.capacity: int = capacity
        self.taken: int = 0
        """With those that were handed to a waiter a moment ago; may exceed the capacity."""
        self._waiters: OrderedDict[asyncio.Future[None], None] = OrderedDict()

    async def take(self, until: float) -> None:
        """Wait for a place and take it; TimeoutError at that time of the event loop."""
        if self.taken < self.capacity:
            self.taken += 1
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters[place] = None
        try:
            async with asyncio.timeout_at(until):
                await place
        except (TimeoutError, asyncio.CancelledError):
            if place.done() and not place.cancelled():
                # Handed over at the very moment of giving up: it goes to the next.
                self.leave(1)
            else:
                self._waiters.pop(place, None)
            raise

    def leave(self, count: int) -> None:
        """Hand places to those who have waited longest; the rest are free."""
        while count and self._waiters:
            place, _ = self._waiters.popitem(last=False)
            if not place.done():
                place.set_result(None)
                count -= 1
        self.taken -= count

    def open(self) -> None:
        """Let in all who wait, whatever the capacity."""
        self.taken += len(self._waiters)
        self.leave(len(self._waiters))
