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
from time import monotonic
from uuid import UUID

from flowstore_core import StalledStep, StepStatus
from flowstore_replay.wfformat import Task, Workflow

SHORTEST_PAUSE = 0.02
LONGEST_PAUSE = 0.3
"""Seconds between two looks at the store while there is nothing to do, and at most while there is."""
REMEMBERED = 2.0
"""For how many seconds a hand goes by what it knows of its run: then it sees what others changed there."""

_SUCCEEDED = StepStatus.SUCCEEDED
_STARTABLE = (None, StepStatus.PENDING)
_MOVING = (StepStatus.PENDING, StepStatus.RUNNING)


class Plan:
    """Which steps of a run can be done next, from its statuses; kept up as steps succeed."""

    def __init__(self, workflow: Workflow, statuses: Mapping[str, StepStatus]) -> None:
        self.statuses: dict[str, StepStatus] = dict(statuses)
        self.ready: list[Task] = []
        """Neither begun nor waiting for a parent."""
        self.unfinished = 0
        """How many tasks have not succeeded."""
        self.moving = sum(status in _MOVING for status in statuses.values())
        """How many steps are begun and not over: somebody's work, or what recovery finds."""
        self.failed = StepStatus.FAILED in self.statuses.values()
        self._workflow = workflow
        self._waits: dict[str, int] = {}
        """For how many parents each unfinished task waits."""
        succeeded = {key for key, status in statuses.items() if status is _SUCCEEDED}
        for task in workflow.tasks:
            if task.key not in succeeded:
                self.unfinished += 1
                self._waits[task.key] = len(set(task.parents) - succeeded)
                self._note_ready(task)

    def note_success(self, key: str) -> None:
        before, self.statuses[key] = self.statuses.get(key), _SUCCEEDED
        if before in _MOVING:
            self.moving -= 1
        if self._waits.pop(key, None) is None:
            return
        self.unfinished -= 1
        self.ready = [task for task in self.ready if task.key != key]
        for child in self._workflow.children[key]:
            if child.key in self._waits:
                self._waits[child.key] -= 1
                self._note_ready(child)

    def _note_ready(self, task: Task) -> None:
        if not self._waits[task.key] and self.statuses.get(task.key) in _STARTABLE:
            self.ready.append(task)


@dataclass(slots=True)
class View:
    """What one hand knows of the run that it follows."""

    plan: Plan | None = None
    """None: the statuses have to be read."""
    read_at: float = 0.0
    is_fresh: bool = False
    """Whether they were read since the hand last did something."""
    is_over: bool = False
    """Whether the run was completed here."""
    dispatched: set[str] = field(default_factory=set)
    outputs: dict[str, str] = field(default_factory=dict)
    leave: Callable[[], None] | None = None
    """Called when the run has more to do at once than the hand takes."""

    def known(self) -> Plan | None:
        """The plan; None when it is not known, or was made too long ago."""
        if monotonic() > self.read_at + REMEMBERED:
            self.plan = None
        return self.plan

    def see(self, workflow: Workflow, statuses: Mapping[str, StepStatus]) -> Plan:
        """Begin with what the store says now."""
        self.plan, self.is_fresh = Plan(workflow, statuses), True
        self.read_at = monotonic()
        self.dispatched.clear()
        self.outputs.clear()
        return self.plan

    def note_success(self, key: str, output: str) -> None:
        """A step was done here."""
        self.outputs[key] = output
        if self.plan is not None:
            self.plan.note_success(key)
            self.is_fresh = False

    def forget(self) -> bool:
        """Read before anything else is decided; whether there may be anything new to read."""
        was_fresh, self.plan, self.is_fresh = self.is_fresh, None, False
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
        age = monotonic() - self._made
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
        self._made = monotonic()
