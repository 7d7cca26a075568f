"""Tasks that continue when their caller is cancelled, and the compensation for their effect (CON-4).

A statement that was sent cannot be recalled, so a backend runs each write as a task. When the caller is
cancelled, the task continues to its end and ``on_abandoned`` compensates for its effect. A compensation
that fails is retried until it succeeds or the store closes; closing waits for it for a bounded time.
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
MAX_PAUSE = 5.0
"""Bounds of the backoff of a compensation, in seconds, while the store is open."""
MAX_PAUSE_CLOSING = 0.2
"""The upper bound while the store is closing."""

_log = logging.getLogger("flowstore_core")


class ShieldedTasks:
    """The tasks of one store that continue when their callers are cancelled."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[Any]] = set()
        self._closing = asyncio.Event()

    async def run(
        self,
        operation: Coroutine[Any, Any, T],
        on_abandoned: Callable[[T | OutcomeUnknownError], Awaitable[None]] | None = None,
    ) -> T:
        """Await an operation that continues when the caller is cancelled.

        ``on_abandoned`` then gets its result, or the OutcomeUnknownError that it ended with, to undo its
        effect. It is called until it succeeds, so it must be idempotent, and it must undo the effect of
        this call only.
        """
        task = self.start(operation)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.cancelled():
                self.start(self._finish(task, on_abandoned))
            raise

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start work that no caller awaits; ``drain`` waits for it."""
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def compensate(
        self,
        on_abandoned: Callable[[T | OutcomeUnknownError], Awaitable[None]],
        outcome: T | OutcomeUnknownError,
    ) -> None:
        """Start the compensation of a cancelled call."""
        self.start(self._compensate(on_abandoned, outcome))

    # The caller is cancelled, so failures go to the log. The store's own errors hold no secret.

    async def _finish(
        self,
        task: asyncio.Task[T],
        on_abandoned: Callable[[T | OutcomeUnknownError], Awaitable[None]] | None,
    ) -> None:
        outcome: T | OutcomeUnknownError
        try:
            outcome = await task
        except OutcomeUnknownError as error:
            outcome = error
            if on_abandoned is None:
                _log.warning("the outcome of a cancelled call is unknown", exc_info=True)
        except Exception:  # noqa: BLE001 - logged
            _log.warning("a cancelled call failed", exc_info=True)
            return
        if on_abandoned is not None:
            await self._compensate(on_abandoned, outcome)

    async def _compensate(
        self,
        on_abandoned: Callable[[T | OutcomeUnknownError], Awaitable[None]],
        outcome: T | OutcomeUnknownError,
    ) -> None:
        pause = FIRST_PAUSE
        for attempt in count(1):
            try:
                await on_abandoned(outcome)
                return
            except StoreClosedError:
                _log.warning("the store was closed before a cancelled call was compensated for")
                return
            except Exception:  # noqa: BLE001 - logged and retried
                _log.log(
                    logging.WARNING if attempt == 1 else logging.DEBUG,
                    "the compensation of a cancelled call failed; it is retried",
                    exc_info=True,
                    extra={"flowstore.attempt": attempt},
                )
            await self._pause(pause * random.uniform(0.5, 1.5))
            pause = min(pause * 2, MAX_PAUSE)

    async def _pause(self, seconds: float) -> None:
        if self._closing.is_set():
            await asyncio.sleep(min(seconds, MAX_PAUSE_CLOSING))
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._closing.wait()

    def is_current(self) -> bool:
        """Whether the running task is one of them."""
        return asyncio.current_task() in self.tasks

    def hasten(self) -> None:
        """Retry compensations at once, and with short pauses from now on: the store is closing."""
        self._closing.set()

    async def drain(self, seconds: float) -> None:
        """Wait until no task is left, at most ``seconds``, then cancel the rest."""
        self.hasten()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        # A compensation starts new tasks, hence the loop.
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


async def run_to_completion(work: Coroutine[Any, Any, T]) -> T:
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
