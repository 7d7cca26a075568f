"""A bounded number of tasks that empty a queue."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


class Senders:
    """At most ``limit`` tasks, each of which sends until nothing waits any more."""

    def __init__(self, send_waiting: Callable[[], Awaitable[None]], limit: int) -> None:
        self._send_waiting = send_waiting
        self._limit = limit
        self._tasks: set[asyncio.Task[None]] = set()

    def wake(self) -> None:
        """Start a task unless all are sending; call it after each addition to the queue."""
        if len(self._tasks) < self._limit:
            self._tasks.add(asyncio.create_task(self._run()))

    async def _run(self) -> None:
        try:
            await self._send_waiting()
        finally:
            # At once, not in a callback of the task: what is added meanwhile needs a new task.
            sender = asyncio.current_task()
            assert sender is not None
            self._tasks.discard(sender)

    async def cancel(self) -> bool:
        """End the tasks. False if there were none."""
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # A task that is cancelled before it begins does not run at all.
        self._tasks.clear()
        return bool(tasks)
