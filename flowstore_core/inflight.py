"""Work that outlives its caller: what a cancelled call had won is given back (CON-4).

A statement that was sent cannot be unsent, so a backend runs each write as a task of its own. When
the caller is cancelled the task goes on to its end, and ``give_back`` compensates for its effect. A
compensation that fails is retried until it succeeds or the store closes; closing waits for it, bounded.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from itertools import count
from typing import Any, TypeVar

from flowstore_core.errors import OutcomeUnknownError, StoreClosedError

T = TypeVar("T")

FIRST_PAUSE = 0.05
LONGEST_PAUSE = 5.0
"""The backoff of a compensation, in seconds, while the store is open."""
LONGEST_PAUSE_CLOSING = 0.2
"""The same while the store waits for it to close."""

_log = logging.getLogger("flowstore_core")


class InFlight:
    """The tasks of one store that go on without their callers."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[Any]] = set()
        self._closing = asyncio.Event()

    async def run(
        self,
        operation: Coroutine[Any, Any, T],
        give_back: Callable[[T | OutcomeUnknownError], Awaitable[None]] | None = None,
    ) -> T:
        """Await an operation that goes on when the caller is cancelled.

        ``give_back`` then gets its result, or the OutcomeUnknownError that it ended with, to undo its
        effect. It is called until it succeeds, so it must be idempotent, and undo nothing but the effect
        of this very call.
        """
        task = self._begin(operation)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.cancelled():
                self._begin(self._finish(task, give_back))
            raise

    def undo(
        self,
        give_back: Callable[[T | OutcomeUnknownError], Awaitable[None]],
        result: T | OutcomeUnknownError,
    ) -> None:
        """Begin the compensation of a cancelled call."""
        self._begin(self._undo(give_back, result))

    # The callers are gone, so the log is the only place left to say what failed; the store's own errors
    # hold no secret.

    async def _finish(
        self,
        task: asyncio.Task[T],
        give_back: Callable[[T | OutcomeUnknownError], Awaitable[None]] | None,
    ) -> None:
        result: T | OutcomeUnknownError
        try:
            result = await task
        except OutcomeUnknownError as error:
            result = error
            if give_back is None:
                _log.warning("the outcome of a cancelled call is unknown", exc_info=True)
        except Exception:  # noqa: BLE001 - said in the log
            _log.warning("a cancelled call failed after its caller had gone", exc_info=True)
            return
        if give_back is not None:
            await self._undo(give_back, result)

    async def _undo(
        self,
        give_back: Callable[[T | OutcomeUnknownError], Awaitable[None]],
        result: T | OutcomeUnknownError,
    ) -> None:
        pause = FIRST_PAUSE
        for tries in count(1):
            try:
                await give_back(result)
                return
            except StoreClosedError:
                _log.warning("the store was closed before a cancelled call was compensated for")
                return
            except Exception:  # noqa: BLE001 - said in the log, and retried
                _log.log(
                    logging.WARNING if tries == 1 else logging.DEBUG,
                    "the compensation of a cancelled call failed; it is retried",
                    exc_info=True,
                    extra={"flowstore.attempt": tries},
                )
            await self._pause(pause * random.uniform(0.5, 1.5))
            pause = min(pause * 2, LONGEST_PAUSE)

    async def _pause(self, seconds: float) -> None:
        if self._closing.is_set():
            await asyncio.sleep(min(seconds, LONGEST_PAUSE_CLOSING))
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._closing.wait()

    def _begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def is_current(self) -> bool:
        """Whether the running task is one of them."""
        return asyncio.current_task() in self.tasks

    def hasten(self) -> None:
        """Retry the compensations at once, and with short pauses from now on: the store is closing."""
        self._closing.set()

    async def drain(self, seconds: float) -> None:
        """Wait until nothing is in flight, at most that long, then cancel the rest."""
        self.hasten()
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
