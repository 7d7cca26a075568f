"""Queues: the store hands out dispatched steps to workers and advances their runs (QUE)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol
from uuid import UUID

from flowstore_core.errors import ConflictError, FlowStoreError, RunNotFoundError, StepNotFoundError
from flowstore_core.redaction import redacted_repr
from flowstore_core.status import RunStatus, StepStatus

ADVANCE_ERRORS = (RunNotFoundError, StepNotFoundError, ConflictError)
"""The errors that advance_runs returns instead of raising them; each concerns one step."""
DEFAULT_QUEUE = "default"
MAX_PRIORITY = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRequest:
    """A step to dispatch to a queue once other steps have ended (QUE-4)."""

    __repr__ = redacted_repr

    step_key: str
    step_type: str
    """The step_type of the attempts that claim_next_steps opens."""
    input_json: str | None = None
    """The input of these attempts."""
    queue: str = DEFAULT_QUEUE
    priority: int = 0
    """0 to 9; steps with a higher priority are claimed first."""
    due_at: datetime | None = None
    """The time before which the step is not ready; None: at once."""
    after: tuple[str, ...] = ()
    """The keys of the steps that must have ended first."""
    accept: frozenset[StepStatus] = frozenset({StepStatus.SUCCEEDED})
    """The statuses of those steps with which this step runs; with any other it is skipped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimedStep:
    """A step that claim_next_steps claimed for this caller, with its open attempt (QUE-1)."""

    __repr__ = redacted_repr

    run_id: UUID
    flow_id: UUID
    flow_name: str
    step_key: str
    step_type: str
    input_json: str | None
    attempt: int
    owner: str
    """The token of this claim, to renew and release it and to advance the run."""
    queue: str
    priority: int
    dispatched_at: datetime
    due_at: datetime | None
    claimed_at: datetime
    expires_at: datetime
    """The end of the lease."""
    cancel_requested: bool
    """Whether a latch of the run is set (CTL-2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedStep:
    """The terminal outcome of an attempt, and what follows from it: the arguments of advance_run (QUE-4)."""

    __repr__ = redacted_repr

    run_id: UUID
    step_key: str
    status: StepStatus
    attempt: int
    owner: str | None = None
    output_json: str | None = None
    error_message: str | None = None
    dispatch: Sequence[StepRequest] = ()
    complete_as: RunStatus | None = None
    failed_as: RunStatus | None = RunStatus.FAILED


@dataclass(frozen=True, slots=True, kw_only=True)
class RunAdvance:
    """The effects of ending one step on its run."""

    dispatched: tuple[str, ...]
    """The keys of the steps that the call dispatched, in the order of its requests."""
    run_completed: bool
    """Whether the call completed the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueStatistics:
    """The numbers of queued steps of one queue that are not terminal; each step counts once (QUE-8)."""

    queue: str
    ready: int
    scheduled: int
    """Due later, or claimed under a lease that a waiter or due time outlasts."""
    waiting: int
    """Waiting for a signal."""
    running: int
    """Claimed."""
    oldest_ready_at: datetime | None
    """The earliest time at which one of the ready steps became ready; None without a ready step."""


class Queues(Protocol):
    """Capability QUEUES: the store is the work queue of its engine."""

    async def claim_next_steps(
        self,
        queues: Collection[str],
        *,
        lease: timedelta,
        limit: int = 1,
        worker: str | None = None,
    ) -> Sequence[ClaimedStep]:
        """Claim up to ``limit`` ready steps of these queues and open their attempts (QUE-1).

        The steps come by priority (higher first), ready_at, run_id, step_key (QUE-2). Each claim has its own
        new owner and ends after ``lease``; ``worker`` is the job_id of the attempts. Each step is claimed and
        started atomically, the set of steps need not be. Of all concurrent callers at most one gets a step.
        Fewer than ``limit`` steps: no other was ready and free at some moment of the call.

        A cancelled call gives its claims back (QUE-3).
        """
        ...

    async def advance_run(
        self,
        run_id: UUID,
        step_key: str,
        status: StepStatus | str,
        *,
        attempt: int,
        owner: str | None = None,
        output_json: str | None = None,
        error_message: str | None = None,
        dispatch: Sequence[StepRequest] = (),
        complete_as: RunStatus | str | None = None,
        failed_as: RunStatus | str | None = RunStatus.FAILED,
    ) -> RunAdvance:
        """Record the outcome of an attempt, dispatch what it makes possible, and complete the run (QUE-4).

        In one transaction, serial with other advances of the run: close the attempt as record_step_complete
        does, with a terminal ``status``; settle the requests in their order; with ``complete_as``, complete
        the run if nothing is left to do (QUE-6), as ``failed_as`` if a step failed or a request stayed
        behind. With ``owner``, that owner must have started the attempt. On a terminal run only the outcome
        is recorded. Repeating the call records nothing again and settles what is missing.

        Raises, in this order: RunNotFoundError, StepNotFoundError, StaleAttemptError, ClaimLostError,
        StepAlreadyCompletedError for an attempt that was closed with a different outcome.
        """
        ...

    async def advance_runs(self, steps: Sequence[EndedStep]) -> Sequence[RunAdvance | FlowStoreError]:
        """End up to 1,000 steps, each as advance_run does; their results in the same order (QUE-4).

        The result of a step is an error where advance_run would raise RunNotFoundError, StepNotFoundError,
        StaleAttemptError, ClaimLostError or StepAlreadyCompletedError. Each step is ended alone, in its own
        atomic change; steps of one run take effect in their order. So one error affects no other step.

        A cancelled call, or one that raises an error, has ended any of the steps. Repeating it is safe.
        """
        ...

    async def redispatch_step(
        self,
        run_id: UUID,
        step_key: str,
        *,
        queue: str | None = None,
        priority: int | None = None,
        due_at: datetime | None = None,
    ) -> bool:
        """Replace the dispatch of a queued step, for example to move it to another queue (QUE-7).

        None keeps a value of the old dispatch. False, and nothing changes, if the step is not queued, is
        terminal or has a live claim, or if its run is not Running. Atomic.
        """
        ...

    async def get_queues(self) -> Sequence[QueueStatistics]:
        """The numbers of queued steps that are not terminal, by queue, from one snapshot (QUE-8)."""
        ...


def not_accepted(step_key: str, status: StepStatus) -> str:
    """The error_message of a step that was skipped because of the status of an earlier one (QUE-4)."""
    return f"not run: {step_key} is {status}"
