"""Lease renewal beside running work."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_log = logging.getLogger("flowstore_replay")

CHECKS_PER_BEAT = 4
"""How often the timer fires in one renewal interval; a first renewal is late by at most one check."""


class LeaseKeeper(Generic[T]):
    """Renews the leases of all work that one engine executes.

    One timer serves all work: most work ends before its first renewal is due and then costs neither a
    timer nor a task.
    """

    def __init__(self, interval: float) -> None:
        """``interval``: seconds between two renewals of one lease."""
        self._interval = interval
        self._active: set[_Renewal[T]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def run_with_renewal(
        self, work: Awaitable[T | None], renew: Callable[[], Awaitable[T | None]]
    ) -> T | None:
        """Await ``work`` and call ``renew`` at every interval. Returns the result of the work.

        The first result of ``renew`` other than None cancels the work and is returned instead. An error of
        ``renew`` cancels the work and is raised.
        """
        task: Any = asyncio.current_task()
        cancelling = task.cancelling()
        renewal = _Renewal(renew, self._interval, monotonic() + self._interval, task)
        self._active.add(renewal)
        if self._timer is None:
            self._schedule_check(asyncio.get_running_loop())
        try:
            return await work
        except asyncio.CancelledError:
            # As in asyncio.timeout, which would cost every step the creation of a scope.
            if not renewal.ended_work or task.uncancel() > cancelling:
                raise
            if renewal.failure is not None:
                raise renewal.failure from None
            return renewal.stop_result
        finally:
            self._active.discard(renewal)
            if renewal.task is not None:
                await _cancel_and_wait(renewal.task)

    def _schedule_check(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = loop.call_later(self._interval / CHECKS_PER_BEAT, self._start_due, loop)

    def _start_due(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the renewals whose first deadline has passed."""
        self._timer = None
        if self._active:
            self._schedule_check(loop)
        for renewal in self._active:
            if renewal.task is None and renewal.first_due <= monotonic():
                renewal.task = loop.create_task(renewal.keep_renewing())


class _Renewal(Generic[T]):
    """The periodic renewal of one lease."""

    __slots__ = ("_interval", "_renew", "_work", "ended_work", "failure", "first_due", "stop_result", "task")

    def __init__(
        self,
        renew: Callable[[], Awaitable[T | None]],
        interval: float,
        first_due: float,
        work: asyncio.Task[Any],
    ) -> None:
        self._renew = renew
        self._interval = interval
        self._work = work
        self.first_due = first_due
        """When the first renewal is due, by the monotonic clock."""
        self.task: asyncio.Task[None] | None = None
        self.stop_result: T | None = None
        self.failure: BaseException | None = None
        self.ended_work = False
        """Whether the work was cancelled because of ``stop_result`` or ``failure``."""

    async def keep_renewing(self) -> None:
        """Renew until the work has to stop, then cancel it."""
        try:
            while True:
                self.stop_result = await self._renew()
                if self.stop_result is not None:
                    break
                await asyncio.sleep(self._interval)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 - not swallowed: run_with_renewal raises it
            self.failure = error
        self.ended_work = True
        self._work.cancel()


async def _cancel_and_wait(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait until it has ended. Its error, if any, is logged and dropped."""
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled() and (error := task.exception()):
            _log.debug("dropped: %s", error)
