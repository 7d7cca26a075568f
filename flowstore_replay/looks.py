"""What an engine has read lately: it only ever lags behind the store, which decides all the same.

A worker that follows a run knows what it has just done itself, and need not ask for it; the hands of an
engine share one look at all runs. Dropping either costs nothing but another read.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from uuid import UUID

from flowstore_core import StalledStep, StepStatus

SHORTEST_PAUSE = 0.02
LONGEST_PAUSE = 0.3
"""Seconds between two looks at the store while there is nothing to do, and at most while there is."""
REMEMBERED = 2.0
"""For how many seconds a hand goes by what it knows of its run: then it sees what others changed there."""


@dataclass(slots=True)
class View:
    """What one hand knows of the run that it follows."""

    statuses: dict[str, StepStatus] | None = None
    """None: they have to be read."""
    read_at: float = 0.0
    is_fresh: bool = False
    """Whether they were read since the hand last did something."""
    is_over: bool = False
    """Whether the run was completed here."""
    dispatched: set[str] = field(default_factory=set)
    outputs: dict[str, str] = field(default_factory=dict)
    leave: Callable[[], None] | None = None
    """Called when the run has more to do at once than the hand takes."""

    def known(self) -> dict[str, StepStatus] | None:
        """The statuses; None when they are not known, or were read too long ago."""
        if asyncio.get_running_loop().time() > self.read_at + REMEMBERED:
            self.statuses = None
        return self.statuses

    def see(self, statuses: Mapping[str, StepStatus]) -> dict[str, StepStatus]:
        """Begin with what the store says now."""
        self.statuses, self.is_fresh = dict(statuses), True
        self.read_at = asyncio.get_running_loop().time()
        self.dispatched.clear()
        self.outputs.clear()
        return self.statuses

    def note_success(self, key: str, output: str) -> None:
        """A step was done here."""
        self.outputs[key] = output
        if self.statuses is not None:
            self.statuses[key] = StepStatus.SUCCEEDED
            self.is_fresh = False

    def forget(self) -> bool:
        """Read before anything else is decided; whether there may be anything new to read."""
        was_fresh, self.statuses, self.is_fresh = self.is_fresh, None, False
        return not was_fresh


@dataclass(slots=True)
class Hand:
    """One of the steps that an engine may do at a time."""

    run_id: UUID | None = None
    """The run that it follows for as long as there is something to do."""
    view: View = field(default_factory=View)

    def follow(self, run_id: UUID, look: Look) -> View:
        self.run_id, self.view = run_id, View(leave=lambda: look.runs.append(run_id))
        return self.view

    def let_go(self) -> None:
        self.run_id = None


@dataclass(slots=True)
class Look:
    """What is to be done at all, as it was a moment ago; hands take from it."""

    reasons: dict[UUID, str] = field(default_factory=dict)
    """Runs to stop that no hand has tried to end yet."""
    stopping: frozenset[UUID] = frozenset()
    stalled: deque[StalledStep] = field(default_factory=deque)
    runs: deque[UUID] = field(default_factory=deque)
    """Active runs that no hand has looked at yet, in any order, so that workers spread over them."""

    def stop(self, reasons: dict[UUID, str]) -> None:
        self.reasons, self.stopping = dict(reasons), frozenset(reasons)

    def list_runs(self, active: Collection[UUID]) -> None:
        self.runs.clear()
        self.runs.extend(random.sample(list(active), len(active)))


class Watch:
    """The look that the hands of one engine share, made anew when it is used up or old."""

    def __init__(
        self,
        hands: Collection[Hand],
        list_active: Callable[[], Awaitable[Collection[UUID]]],
        look_around: Callable[[Look], Awaitable[None]],
    ) -> None:
        self._hands = hands
        self._list_active = list_active
        self._look_around = look_around
        self._look = Look()
        self._is_over = False
        self._lock = asyncio.Lock()
        self._pause = SHORTEST_PAUSE
        self._made: float | None = None

    async def look(self) -> Look | None:
        """None once no run is active any more."""
        if self._is_old():
            async with self._lock:
                # Another hand may have been faster.
                if self._is_old():
                    await self._renew()
        return None if self._is_over else self._look

    def _is_old(self) -> bool:
        if self._made is None:
            return True
        age = asyncio.get_running_loop().time() - self._made
        return not self._is_over and age >= (LONGEST_PAUSE if self._look.runs else self._pause)

    async def _renew(self) -> None:
        look = self._look
        if not look.runs:
            active = await self._list_active()
            self._is_over = not active
            # A run that one hand follows is no other's, but for what that hand leaves to others.
            look.list_runs({*active} - {hand.run_id for hand in self._hands})
        if not self._is_over:
            await self._look_around(look)
        found = look.runs or look.stalled or look.reasons
        self._pause = SHORTEST_PAUSE if found else min(2 * self._pause, LONGEST_PAUSE)
        self._made = asyncio.get_running_loop().time()
