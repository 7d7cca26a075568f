"""Watching: wait until a step is ready or a run has ended, instead of polling (WAT)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from datetime import timedelta
from typing import Protocol, TypeVar
from uuid import UUID

from flowstore_core.errors import FlowStoreError, StoreClosedError
from flowstore_core.status import RunStatus

T = TypeVar("T")

MAX_TIMEOUT = timedelta(hours=1)


class Watch(Protocol):
    """Capability WATCH: hints that wake idle workers; the store's state decides, not the hint (WAT-1)."""

    async def wait_for_steps(self, queues: Collection[str], *, timeout: timedelta) -> bool:
        """Wait until a step of these queues may be ready; False at the time-out (WAT-1).

        True at once if one is ready, and when one becomes ready by a commit of any process or as time
        passes. True may be wrong, and a wake-up may be missed when a process dies or a connection breaks,
        so call claim_next_steps in either case, and pause after True and an empty claim. ``timeout`` is
        real time, more than 0 and at most an hour. A store waits with one connection or thread, however many
        calls wait (WAT-2).
        """
        ...

    async def wait_for_run(self, run_id: UUID, *, timeout: timedelta) -> RunStatus | None:
        """Wait until a run has ended, and return its terminal status; None at the time-out (WAT-1).

        None at once for an unknown run, and as soon as the run is deleted.
        """
        ...


class WaitingCalls:
    """The waiting calls of one store, for backends: each looks at the store again whenever it is woken.

    A call waits for topics, such as the names of queues, so that a backend whose wake-ups name their topics
    wakes no other call.
    """

    def __init__(self) -> None:
        self._events: dict[asyncio.Event, frozenset[str]] = {}
        self._loop = asyncio.get_running_loop()
        self.is_closed: bool = False
        """Whether calls that wait end with StoreClosedError."""

    def __bool__(self) -> bool:
        """Whether any call waits."""
        return bool(self._events)

    def wake(self, topics: Collection[str] | None = None) -> None:
        """Let the calls that wait for any of these topics (None: every call) look at the store again.

        Call it in the store's event loop.
        """
        for event, own in self._events.items():
            if topics is None or not own.isdisjoint(topics):
                event.set()

    def wake_from_thread(self) -> None:
        """Like wake, for every call, from any thread."""
        self._loop.call_soon_threadsafe(self.wake)

    def close(self) -> None:
        """End every waiting call with StoreClosedError."""
        self.is_closed = True
        self.wake()

    async def wait(
        self,
        look: Callable[[], Awaitable[tuple[T | None, float | None]]],
        timeout: timedelta,
        topics: Collection[str] = (),
    ) -> T | None:
        """The result of ``look``, as soon as it has one; None at the time-out.

        ``look`` reads the store and returns a result, or None and the number of seconds after which time
        alone may bring one (None: never). It is called first, at every wake-up, after these seconds, and
        once more at the time-out.
        """
        deadline = self._loop.time() + timeout.total_seconds()
        event = asyncio.Event()
        self._events[event] = frozenset(topics)
        try:
            while not self.is_closed:
                event.clear()
                try:
                    found, seconds = await look()
                except FlowStoreError:
                    if self.is_closed:
                        break  # Closing has interrupted it.
                    raise
                if found is not None:
                    return found
                left = deadline - self._loop.time()
                if left <= 0:
                    return None
                await _wait_for_event(event, left if seconds is None else min(left, seconds))
            raise StoreClosedError
        finally:
            del self._events[event]


async def _wait_for_event(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass  # It is time to look again.
