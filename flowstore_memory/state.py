"""The mutable, private data structures of the memory backend.

No operation of the noun files awaits between its reads and its writes; cleanup awaits only between batches.
Therefore each operation is atomic and linearizable (CON-1), and a cancelled call has either happened
completely or not at all (CON-4): a task can only be cancelled at an ``await``. A store belongs to one event
loop, so a private store needs no lock. A store that threads share takes a lock in store.py.

Operations check first and write last, so an error changes nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple, NoReturn
from uuid import UUID

from flowstore_core import (
    BufferedSignal,
    FlowEventRecord,
    FlowStepAttemptRecord,
    RunNotFoundError,
    RunStatus,
    SignalDeliveryResult,
    StepStatus,
)
from flowstore_core.status import TERMINAL_STEP_STATUSES
from flowstore_core.tags import RunTags
from flowstore_core.timeseries import EARLIEST
from flowstore_core.watching import WaitingCalls

# Scope of an idempotency key: flow_id, trigger_key, idempotency_key (IDM-1).
Key = tuple[UUID, str, str]

# Attribute access on an enum class is slow in Python 3.11, and record_step_start is frequent.
_RUNNING = StepStatus.RUNNING


@dataclass(slots=True, eq=False)
class QueuedDispatch:
    """The queue of a dispatch and the fields of the attempts to come (QUE-7)."""

    queue: str
    priority: int
    step_type: str
    input_json: str | None
    indexed_at: datetime | None = None
    """The time under which the queue's index has the step; None: it has not."""


class QueueEntry(NamedTuple):
    """A step in the index of a queue, in the order of QUE-2 (queue_index.py)."""

    ready_at: datetime
    run_id: UUID
    step_key: str
    number: int
    """Unique, so that a comparison never reaches the dispatch."""
    queued: QueuedDispatch


@dataclass(slots=True, eq=False)
class StepState:
    """A step key of a run: the step, if started, with its newest attempt, its claim and its dispatch.

    One object, like one row of a table, because the garbage collector visits every object of a process with
    millions of steps.
    """

    status: StepStatus | None = None
    """None: never started, or reset by retry_step; the step is not visible."""
    reopened: bool = False
    """True from retry_step until the next attempt starts."""
    started_owner: str | None = None
    """The owner that started the newest attempt under its claim (STP-3)."""

    attempt: int = 0
    """The number of the newest attempt; 0 if there is none. Its fields follow."""
    step_type: str = ""
    input_json: str | None = None
    output_json: str | None = None
    error_message: str | None = None
    job_id: str | None = None
    started_at: datetime = EARLIEST
    completed_at: datetime | None = None
    rescheduled: bool = False
    """True after reschedule_step for this attempt, so that a repeated call is a no-op (STP-7)."""

    claimed_at: datetime | None = None
    """None: no claim."""
    owner: str | None = None
    expires_at: datetime | None = None

    dispatched_at: datetime | None = None
    """None: no dispatch."""
    due_at: datetime | None = None
    queue_job_id: str | None = None
    """The job id of the dispatch; ``job_id`` is that of the attempt."""
    queued: QueuedDispatch | None = None
    """None: no dispatch, or one that names no queue."""

    def start(self, step_type: str, input_json: str | None, job_id: str | None, now: datetime) -> None:
        """Start the next attempt. The caller archives the previous one."""
        self.status = _RUNNING
        self.reopened = False
        self.attempt += 1
        self.step_type = step_type
        self.input_json = input_json
        self.output_json = None
        self.error_message = None
        self.job_id = job_id
        self.started_at = now
        self.completed_at = None
        self.rescheduled = False

    def is_started_by(self, owner: str) -> bool:
        """Whether the newest attempt is open and this owner started it under its claim (STP-3)."""
        return self.status is _RUNNING and self.started_owner == owner

    def close(
        self, status: StepStatus, output_json: str | None, error_message: str | None, now: datetime
    ) -> None:
        """Close the newest attempt."""
        self.status = status
        self.output_json = output_json
        self.error_message = error_message
        self.completed_at = now

    def has_live_claim(self, now: datetime) -> bool:
        """Whether the claim is live; a lease does not expire while the step is terminal (CLM-4)."""
        if self.claimed_at is None:
            return False
        if self.expires_at is None or now < self.expires_at:
            return True
        return self.status in TERMINAL_STEP_STATUSES

    def claim(self, owner: str | None, now: datetime, expires_at: datetime | None) -> None:
        self.claimed_at = now
        self.owner = owner
        self.expires_at = expires_at
        self.started_owner = None

    def clear_claim(self) -> None:
        self.claimed_at = self.owner = self.expires_at = None

    def dispatch(self, now: datetime, due_at: datetime | None, queued: QueuedDispatch | None) -> None:
        """Record a new dispatch."""
        self.dispatched_at = now
        self.due_at = due_at
        self.queue_job_id = None
        self.queued = queued

    def clear_dispatch(self) -> None:
        self.dispatched_at = self.due_at = self.queue_job_id = self.queued = None


@dataclass(slots=True, eq=False)
class WaiterState:
    """A signal waiter of a step."""

    signal_name: str
    created_at: datetime
    expires_at: datetime | None
    delivered_at: datetime | None = None
    payload_json: str | None = None
    expired_at: datetime | None = None

    def is_open(self, at: datetime) -> bool:
        """Whether a signal may still arrive: undelivered, not closed and not past expires_at (STP-8)."""
        if self.delivered_at is not None or self.expired_at is not None:
            return False
        return self.expires_at is None or at < self.expires_at


@dataclass(slots=True, eq=False)
class RunState:
    """A run and its state, except its control record and its idempotency keys."""

    run_id: UUID
    flow_id: UUID
    flow_name: str
    trigger_key: str
    trigger_data: str | None
    job_id: str | None
    source_run_id: UUID | None
    started_at: datetime
    status: RunStatus = RunStatus.RUNNING
    completed_at: datetime | None = None
    tags: RunTags = ()
    steps: dict[str, StepState] = field(default_factory=dict)
    waiters: dict[str, WaiterState] = field(default_factory=dict)
    # Immutable state is stored as the frozen records that reads return.
    earlier: dict[str, list[FlowStepAttemptRecord]] = field(default_factory=dict)
    """The attempts before the newest by step key; for a reopened or reset step, the newest too."""
    deliveries: dict[str, SignalDeliveryResult] = field(default_factory=dict)
    buffered: list[BufferedSignal] = field(default_factory=list)
    """The payloads that no waiter has taken, oldest first (MBX-1)."""
    outputs: dict[str, str] = field(default_factory=dict)
    events: list[FlowEventRecord] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class ControlState:
    """A control record. It may exist before its run (CTL-1)."""

    flow_id: UUID
    trigger_key: str
    idempotency_key: str | None
    timeout_at: datetime | None
    created_at: datetime
    cancelled_at: datetime | None = None
    cancel_reason: str | None = None
    timed_out_at: datetime | None = None
    timeout_reason: str | None = None

    @property
    def is_stopped(self) -> bool:
        """Whether either latch is set (CTL-2)."""
        return self.cancelled_at is not None or self.timed_out_at is not None

    def clear_stops(self, now: datetime) -> None:
        """Clear both latches and an elapsed deadline (STP-6)."""
        self.cancelled_at = self.cancel_reason = None
        self.timed_out_at = self.timeout_reason = None
        if self.timeout_at is not None and self.timeout_at <= now:
            self.timeout_at = None


@dataclass(slots=True, eq=False)
class RegisteredKey:
    """The run that is registered under an idempotency key."""

    run_id: UUID
    created_at: datetime


class Runs(dict[int, RunState]):
    """Runs by ``run_id.int``: an int hashes faster than a UUID, whose hash is computed in Python.

    ``runs[run_id.int]`` raises RunNotFoundError for an unknown run; ``runs.get(run_id.int)`` does not (UNK).
    """

    def __missing__(self, number: int) -> NoReturn:
        raise RunNotFoundError(UUID(int=number))


class Namespace:
    """The data of one store, shared by all opens of one name."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        """A lock for threads: other threads may open the same name."""
        self.runs = Runs()
        self.controls: dict[UUID, ControlState] = {}
        self.keys: dict[Key, RegisteredKey] = {}
        self.keys_of: dict[UUID, list[Key]] = {}
        self.queue_index: dict[tuple[str, int], list[QueueEntry]] = {}
        """A heap of queued steps for each queue and priority; see queue_index.py."""
        self.waiting: set[WaitingCalls] = set()
        """The waiting calls of every open store."""

    def wake(self) -> None:
        """Wake every waiting call: a step is ready earlier than it was, or a run has ended."""
        for calls in self.waiting:
            if calls:
                calls.wake_from_thread()

    def register(self, key: Key, run_id: UUID, now: datetime) -> None:
        self.keys[key] = RegisteredKey(run_id, now)
        self.keys_of.setdefault(run_id, []).append(key)

    def delete_keys(self, run_id: UUID) -> None:
        """Delete the keys that are registered to a run."""
        for key in self.keys_of.pop(run_id, ()):
            del self.keys[key]


class OpenNamespace:
    """One open of a namespace, with its clock. Base class of the noun classes."""

    def __init__(self, namespace: Namespace, now: Callable[[], datetime]) -> None:
        self._namespace = namespace
        self._runs = namespace.runs
        self._now = now
        self._waiting = WaitingCalls()

    def attach(self) -> None:
        """Let other opens of the namespace wake the waiting calls of this one."""
        with self._namespace.lock:
            self._namespace.waiting.add(self._waiting)

    def detach(self) -> None:
        """End the waiting calls."""
        with self._namespace.lock:
            self._namespace.waiting.discard(self._waiting)
        self._waiting.close()
