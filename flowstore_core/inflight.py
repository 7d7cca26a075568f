"""Work that outlives its caller: what a cancelled call had won is given back (CON-4).

A statement that was sent cannot be unsent, so a backend runs each write as a task of its own. When
the caller is cancelled the task goes on to its end, and what it won is given back; closing the store
waits for these, bounded.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_log = logging.getLogger("flowstore_core")


class InFlight:
    """The tasks of one store that go on without their callers."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[Any]] = set()

    async def run(
        self,
        operation: Coroutine[Any, Any, T],
        give_back: Callable[[T], Awaitable[None]] | None = None,
    ) -> T:
        """Await an operation that goes on when the caller is cancelled.

        ``give_back`` then gets its result, to undo what nobody will hear of.
        """
        task = self._begin(operation)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.cancelled():
                self._begin(_finish(task, give_back))
            raise

    def undo(self, give_back: Callable[[T], Awaitable[None]], result: T) -> None:
        """Have given back what a call had won whose caller has gone."""
        self._begin(_undo(give_back, result))

    def _begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def is_current(self) -> bool:
        """Whether the running task is one of them."""
        return asyncio.current_task() in self.tasks

    async def drain(self, seconds: float) -> None:
        """Wait until nothing is in flight, at most that long, then cancel the rest."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        # Giving back begins new work, hence the loop.
        while self.tasks and (left := deadline - loop.time()) > 0:
            await asyncio.wait(set(self.tasks), timeout=left)
        if rest := set(self.tasks):
            _log.warning(
                "closing with %d calls unfinished after %.1f s",
                len(rest),
                seconds,
                extra={"flowstore.wait_seconds": seconds, "flowstore.calls": len(rest)},
            )
            for task in rest:
                task.cancel()
            await asyncio.wait(rest, timeout=seconds)


# The callers are gone, so the log is the only place left to say what failed; the store's own errors
# hold no secret.


async def _finish(task: asyncio.Task[T], give_back: Callable[[T], Awaitable[None]] | None) -> None:
    try:
        result = await task
    except Exception:  # noqa: BLE001 - said in the log
        _log.warning("a cancelled call failed after its caller had gone", exc_info=True)
    else:
        if give_back is not None:
            await _undo(give_back, result)


async def _undo(give_back: Callable[[T], Awaitable[None]], result: T) -> None:
    try:
        await give_back(result)
    except Exception:  # noqa: BLE001 - said in the log
        _log.warning("a cancelled call could not give back what it had won", exc_info=True)


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Await work to its end even when cancelled; the cancellation is raised afterwards."""
    task = asyncio.create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return task.result()
    if not task.cancelled() and (failure := task.exception()) is not None:
        _log.debug("cancelled while this failed with %s", type(failure).__name__)
    raise cancelled
