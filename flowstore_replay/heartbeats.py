"""Work under a lease: done in the caller's own task, with a heartbeat beside it once it takes long."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Generic, TypeVar

from flowstore_replay.patience import cancel

T = TypeVar("T")

LOOKS = 4
"""So many looks at what is due fall between two beats; a beat is late by at most one of them."""


class Heartbeats(Generic[T]):
    """The heartbeats of all work that one engine has under way.

    One timer serves them all: most work is over before its first beat, and then costs neither a timer nor
    a task of its own.
    """

    def __init__(self, every: float) -> None:
        """``every``: seconds between two beats of one piece of work."""
        self._every = every
        self._under_way: set[_Pulse[T]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def during(self, work: Awaitable[None], beat: Callable[[], Awaitable[T | None]]) -> T | None:
        """Await work, and beat meanwhile; None when the work came to its end.

        The first answer of a beat that is not None cancels the work, and is returned; an error of a beat
        cancels it and is raised.
        """
        scope = asyncio.timeout(None)
        pulse = _Pulse(beat, self._every, monotonic() + self._every, scope)
        self._under_way.add(pulse)
        if self._timer is None:
            self._look_later(asyncio.get_running_loop())
        try:
            async with scope:
                await work
        except TimeoutError:
            if not scope.expired():
                raise
            if pulse.failure is not None:
                raise pulse.failure from None
            return pulse.answer
        finally:
            self._under_way.discard(pulse)
            if pulse.beating is not None:
                await cancel(pulse.beating)
        return None

    def _look_later(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = loop.call_later(self._every / LOOKS, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin the beats that are due."""
        self._timer = None
        if self._under_way:
            self._look_later(loop)
        for pulse in self._under_way:
            if pulse.beating is None and pulse.first <= monotonic():
                pulse.beating = loop.create_task(pulse.keep_beating())


class _Pulse(Generic[T]):
    """The heartbeat of one piece of work."""

    __slots__ = ("_beat", "_every", "_scope", "answer", "beating", "failure", "first")

    def __init__(
        self,
        beat: Callable[[], Awaitable[T | None]],
        every: float,
        first: float,
        scope: asyncio.Timeout,
    ) -> None:
        self._beat = beat
        self._every = every
        self._scope = scope
        self.first = first
        """When the first beat is due, by the monotonic clock."""
        self.beating: asyncio.Task[None] | None = None
        self.answer: T | None = None
        self.failure: BaseException | None = None

    async def keep_beating(self) -> None:
        try:
            while True:
                self.answer = await self._beat()
                if self.answer is not None:
                    break
                await asyncio.sleep(self._every)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 - not swallowed: raised once the work has ended
            self.failure = error
        self._scope.reschedule(asyncio.get_running_loop().time())
