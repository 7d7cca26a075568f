"""The state of the model: frozen values in plain dicts, cheap to copy and hashable.

The model states the contract a second time, as simply as possible: no argument checks (core does them), no
concurrency, no storage. It shares no code with the memory backend, so that the two do not share mistakes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from flowstore_core import (
    BufferedSignal,
    FlowEventRecord,
    FlowRunRecord,
    FlowSignalWaiter,
    FlowStepAttemptRecord,
    RunNotFoundError,
    SignalDeliveryResult,
    StepClaim,
    StepDispatch,
    StepStatus,
)

Scope = tuple[UUID, str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The state of one step key: its attempts, claim and dispatch."""

    status: StepStatus | None = None
    """None if the key never started or was reset."""
    attempts: tuple[FlowStepAttemptRecord, ...] = ()
    reopened: bool = False
    rescheduled: bool = False
    claim: StepClaim | None = None
    started_under: StepClaim | None = None
    """The claim under which the last attempt started or was skipped (STP-3, STP-5)."""
    dispatch: StepDispatch | None = None

    @property
    def is_open(self) -> bool:
        return self.status is StepStatus.RUNNING

    @property
    def is_terminal(self) -> bool:
        return self.status is not None and self.status.is_terminal

    def held(self, now: datetime) -> bool:
        """Whether the claim is live; a lease does not expire while the step is terminal (CLM-4)."""
        if self.claim is None:
            return False
        expires_at = self.claim.expires_at
        return expires_at is None or now < expires_at or self.is_terminal


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """A control record with both latches; reads combine them (CTL-2)."""

    flow_id: UUID
    trigger_key: str
    idempotency_key: str | None
    timeout_at: datetime | None
    created_at: datetime
    cancelled: tuple[datetime, str | None] | None = None
    timed_out: tuple[datetime, str | None] | None = None


@dataclass(slots=True)
class Run:
    """Everything that belongs to one run id; one linearizable object (CON-1)."""

    record: FlowRunRecord | None = None
    control: Control | None = None
    steps: dict[str, Step] = field(default_factory=dict)
    waiters: dict[str, FlowSignalWaiter] = field(default_factory=dict)
    deliveries: dict[str, SignalDeliveryResult] = field(default_factory=dict)
    buffered: tuple[BufferedSignal, ...] = ()
    outputs: dict[str, str] = field(default_factory=dict)
    events: tuple[FlowEventRecord, ...] = ()

    def copy(self) -> Run:
        return Run(
            self.record,
            self.control,
            dict(self.steps),
            dict(self.waiters),
            dict(self.deliveries),
            self.buffered,
            dict(self.outputs),
            self.events,
        )

    def frozen(self) -> object:
        """A hashable value that compares equal for equal states."""
        return (
            self.record,
            self.control,
            frozenset(self.steps.items()),
            frozenset(self.waiters.items()),
            frozenset(self.deliveries.items()),
            self.buffered,
            frozenset(self.outputs.items()),
            self.events,
        )


@dataclass(slots=True)
class State:
    """The state of a whole store."""

    runs: dict[UUID, Run] = field(default_factory=dict)
    keys: dict[Scope, tuple[UUID, datetime]] = field(default_factory=dict)
    """The run that holds each idempotency key, and the time of its registration."""

    def copy(self) -> State:
        return State({run_id: run.copy() for run_id, run in self.runs.items()}, dict(self.keys))

    def frozen(self) -> object:
        runs = frozenset((run_id, run.frozen()) for run_id, run in self.runs.items())
        return runs, frozenset(self.keys.items())


class Base:
    """Shared state access for the classes of the model."""

    def __init__(self, clock: Callable[[], datetime], state: State | None = None) -> None:
        self._clock = clock
        self.state = State() if state is None else state

    @property
    def now(self) -> datetime:
        return self._clock()

    def at(self, run_id: UUID) -> Run:
        """Return the run's state for writing, creating it if absent."""
        return self.state.runs.setdefault(run_id, Run())

    def get(self, run_id: UUID) -> Run:
        """Return the run's state for reading."""
        return self.state.runs.get(run_id) or Run()

    def require(self, run_id: UUID) -> tuple[Run, FlowRunRecord]:
        """Return a started run and its record, or raise RunNotFoundError (UNK)."""
        run = self.get(run_id)
        if run.record is None:
            raise RunNotFoundError(run_id)
        return run, run.record
