"""Caches between the engine and the store: the plan of a run, and the list of runs with work to do.

A cache may be stale but never decides anything: every write is checked by the store. Dropping a cache costs
one more read.
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
from flowstore_replay.wfcommons import Task, Workflow

MIN_POLL_INTERVAL = 0.02
MAX_POLL_INTERVAL = 0.3
"""Seconds between two polls. An idle engine backs off from the minimum to the maximum; a busy engine polls
at the maximum."""
VIEW_TTL = 2.0
"""Seconds for which a cached plan is used; afterwards changes by other workers become visible."""

_SUCCEEDED = StepStatus.SUCCEEDED
_STARTABLE = (None, StepStatus.PENDING)
_IN_PROGRESS = (StepStatus.PENDING, StepStatus.RUNNING)


class Plan:
    """The steps of a run that are ready, computed from its statuses and updated as steps succeed."""

    def __init__(self, workflow: Workflow, statuses: Mapping[str, StepStatus]) -> None:
        self.statuses: dict[str, StepStatus] = dict(statuses)
        self.ready: list[Task] = []
        """Tasks that have not started and whose parents have all succeeded."""
        self.unfinished = 0
        """Number of tasks that have not succeeded."""
        self.in_progress = sum(status in _IN_PROGRESS for status in statuses.values())
        """Number of started, unfinished steps; a worker executes them or recovery will find them."""
        self.failed = StepStatus.FAILED in self.statuses.values()
        self._workflow = workflow
        self._open_parents: dict[str, int] = {}
        """Number of unfinished parents of each unfinished task."""
        succeeded = {key for key, status in statuses.items() if status is _SUCCEEDED}
        for task in workflow.tasks:
            if task.key not in succeeded:
                self.unfinished += 1
                self._open_parents[task.key] = len(set(task.parents) - succeeded)
                self._add_if_ready(task)

    def record_success(self, key: str) -> None:
        before, self.statuses[key] = self.statuses.get(key), _SUCCEEDED
        if before in _IN_PROGRESS:
            self.in_progress -= 1
        if self._open_parents.pop(key, None) is None:
            return
        self.unfinished -= 1
        self.ready = [task for task in self.ready if task.key != key]
        for child in self._workflow.children[key]:
            if child.key in self._open_parents:
                self._open_parents[child.key] -= 1
                self._add_if_ready(child)

    def _add_if_ready(self, task: Task) -> None:
        if not self._open_parents[task.key] and self.statuses.get(task.key) in _STARTABLE:
            self.ready.append(task)


@dataclass(slots=True)
class RunView:
    """A slot's cached view of its run."""

    plan: Plan | None = None
    """None: the statuses have to be read."""
    read_at: float = 0.0
    is_fresh: bool = False
    """Whether the statuses were read after the slot's last write."""
    is_completed: bool = False
    """Whether this slot completed the run."""
    dispatched: set[str] = field(default_factory=set)
    outputs: dict[str, str] = field(default_factory=dict)
    on_surplus: Callable[[], None] | None = None
    """Called when the run has more ready steps than the slot can execute."""

    def cached_plan(self) -> Plan | None:
        """The plan, or None if there is none or it has expired."""
        if monotonic() > self.read_at + VIEW_TTL:
            self.plan = None
        return self.plan

    def refresh(self, workflow: Workflow, statuses: Mapping[str, StepStatus]) -> Plan:
        """Replace the cache by the statuses just read."""
        self.plan, self.is_fresh = Plan(workflow, statuses), True
        self.read_at = monotonic()
        self.dispatched.clear()
        self.outputs.clear()
        return self.plan

    def record_success(self, key: str, output: str) -> None:
        """Add a step that this slot completed."""
        self.outputs[key] = output
        if self.plan is not None:
            self.plan.record_success(key)
            self.is_fresh = False

    def invalidate(self) -> bool:
        """Drop the plan. True if reading again may show something new."""
        was_fresh, self.plan, self.is_fresh = self.is_fresh, None, False
        return not was_fresh


@dataclass(slots=True)
class Slot:
    """Capacity of an engine for one step at a time."""

    run_id: UUID | None = None
    """The run that the slot works on for as long as the run has ready steps."""
    view: RunView = field(default_factory=RunView)

    @property
    def open_run(self) -> UUID | None:
        """The assigned run, unless this slot has completed it."""
        return None if self.view.is_completed else self.run_id

    def assign(self, run_id: UUID, snapshot: WorkSnapshot) -> RunView:
        """Bind the slot to a run; a surplus of ready steps lists the run again for other slots."""
        self.run_id, self.view = run_id, RunView(on_surplus=lambda: snapshot.runs.append(run_id))
        return self.view

    def release(self) -> None:
        self.run_id = None


@dataclass(slots=True)
class WorkSnapshot:
    """The work found by the latest poll. Slots remove the entries that they handle."""

    stop_reasons: dict[UUID, str] = field(default_factory=dict)
    """Runs to stop that no slot has tried to finish yet."""
    stopping: frozenset[UUID] = frozenset()
    stalled: deque[StalledStep] = field(default_factory=deque)
    runs: deque[UUID] = field(default_factory=deque)
    """Active runs without a slot, in random order, so that workers spread over them."""

    def set_stop_reasons(self, reasons: Mapping[UUID, str]) -> None:
        self.stop_reasons, self.stopping = dict(reasons), frozenset(reasons)

    def list_runs(self, active: Collection[UUID]) -> None:
        self.runs.clear()
        self.runs.extend(random.sample(list(active), len(active)))


class WorkPoller:
    """The snapshot that the slots of one engine share; polls again when it is used up or old."""

    def __init__(
        self,
        slots: Collection[Slot],
        list_active: Callable[[], Awaitable[Collection[UUID]]],
        find_exceptions: Callable[[WorkSnapshot], Awaitable[None]],
    ) -> None:
        """``find_exceptions`` fills in the runs to stop and the stalled steps."""
        self._slots = slots
        self._list_active = list_active
        self._find_exceptions = find_exceptions
        self._snapshot = WorkSnapshot()
        self._all_completed = False
        self._lock = asyncio.Lock()
        self._interval = MIN_POLL_INTERVAL
        self._polled_at: float | None = None

    async def poll(self) -> WorkSnapshot | None:
        """The current snapshot, or None if no run is active any more."""
        if self._is_due():
            async with self._lock:
                # Another slot may have polled while this one waited for the lock.
                if self._is_due():
                    await self._refresh()
        return None if self._all_completed else self._snapshot

    def _is_due(self) -> bool:
        if self._polled_at is None:
            return True
        age = monotonic() - self._polled_at
        return not self._all_completed and age >= (
            MAX_POLL_INTERVAL if self._snapshot.runs else self._interval
        )

    async def _refresh(self) -> None:
        snapshot = self._snapshot
        if not snapshot.runs:
            active = await self._list_active()
            self._all_completed = not active
            # A run with a slot is listed only for its surplus.
            snapshot.list_runs({*active} - {slot.run_id for slot in self._slots})
        if not self._all_completed:
            await self._find_exceptions(snapshot)
        found = snapshot.runs or snapshot.stalled or snapshot.stop_reasons
        self._interval = MIN_POLL_INTERVAL if found else min(2 * self._interval, MAX_POLL_INTERVAL)
        self._polled_at = monotonic()
