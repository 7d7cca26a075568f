"""Steps and their attempts: the records, and the operations that start and close attempts (STP)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol
from uuid import UUID

from flowstore_core.queues import StepRequest
from flowstore_core.redaction import redacted_repr
from flowstore_core.status import StallReason, StepStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowStepAttemptRecord:
    """An attempt of a step; attempts are numbered 1, 2, ... without gaps (STP-1)."""

    __repr__ = redacted_repr

    run_id: UUID
    step_key: str
    attempt: int
    step_type: str
    status: StepStatus
    input_json: str | None
    output_json: str | None
    error_message: str | None
    job_id: str | None
    started_at: datetime
    completed_at: datetime | None
    """When the attempt was closed, also as Pending; None while it is open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowStepRecord:
    """A step with its attempts; its own fields are those of the newest attempt."""

    __repr__ = redacted_repr

    run_id: UUID
    step_key: str
    step_type: str
    status: StepStatus
    input_json: str | None
    output_json: str | None
    error_message: str | None
    job_id: str | None
    started_at: datetime
    """The start of the first attempt."""
    completed_at: datetime | None
    """None unless the status is terminal."""
    attempt_count: int
    """The number of the last attempt; after retry_step, that of the next attempt."""
    attempts: tuple[FlowStepAttemptRecord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StalledStep:
    """A step that makes no progress without intervention (STP-8)."""

    run_id: UUID
    step_key: str
    status: StepStatus
    """Pending, too, for a key that was dispatched or claimed but never started."""
    reason: StallReason
    since: datetime


class StepAttempts(Protocol):
    """Operations that open, close and reopen attempts."""

    async def record_step_start(
        self,
        run_id: UUID,
        step_key: str,
        step_type: str,
        *,
        input_json: str | None = None,
        job_id: str | None = None,
        owner: str | None = None,
    ) -> int:
        """Open the next attempt and return its number, gapless from 1 under any concurrency (STP-1).

        The step becomes Running; its output, error and completion are cleared. An open attempt is closed
        as Failed with a message that names its successor. With ``owner``, that owner must hold an unexpired
        claim on the step; repeated under the same claim while the attempt is open, the call returns the
        number of that attempt and changes nothing (STP-3). Atomic.

        Raises, in this order: RunNotFoundError, RunCompletedError (RUN-4), StepAlreadyCompletedError for a
        Succeeded or Skipped step (STP-2), ClaimLostError.
        """
        ...

    async def record_step_complete(
        self,
        run_id: UUID,
        step_key: str,
        status: StepStatus | str,
        *,
        output_json: str | None = None,
        error_message: str | None = None,
        attempt: int | None = None,
        owner: str | None = None,
    ) -> None:
        """Close an attempt (None: the last started) and record the same outcome on its step (STP-4).

        ``status`` is Succeeded, Failed, Skipped, or Pending for a poll that is not done. With ``owner``, that
        owner must have started the attempt. Repeating the same outcome is a no-op. Allowed on a terminal run.
        Step and attempt change in one transaction.

        Raises, in this order: RunNotFoundError, StepNotFoundError, StaleAttemptError for an attempt that is
        not the last one or whose step retry_step has reopened, ClaimLostError if another owner, or none,
        started the attempt, StepAlreadyCompletedError if the attempt is closed with a different outcome.
        """
        ...

    async def retry_step(
        self,
        run_id: UUID,
        step_key: str,
        *,
        attempt: int | None = None,
        reset: Collection[str] = (),
        dispatch: Sequence[StepRequest] = (),
    ) -> None:
        """Reopen a step and its run, atomically (STP-6).

        The step becomes Pending: output, error and completion are cleared, attempt_count is raised to the
        number of the next attempt, and its claim, dispatch and undelivered waiter are deleted. Its attempts
        are kept; an open one is closed as Failed. The run becomes Running; if it was terminal, its latches
        and an elapsed deadline are cleared. Skipped steps in ``reset`` become unstarted and keep their
        attempts and numbering. With ``dispatch`` (capability QUEUES) the requests are settled last, in the
        same transaction (QUE-4). Repeated before the next start, the call is a no-op, except that it reopens
        a run that has become terminal in the meantime and settles the requests.

        Raises RunNotFoundError, StepNotFoundError, StaleAttemptError if ``attempt`` is given and is not the
        last one started (a double click).
        """
        ...


class StepRuntime(Protocol):
    """Operations of a running engine between attempts."""

    async def get_step(self, run_id: UUID, step_key: str) -> FlowStepRecord | None:
        """One step as get_run_detail shows it, with its attempts, from one snapshot (QRY-3).

        None for an unknown run and for a key that never started or was reset by retry_step. The cost does
        not grow with the number of steps: an engine that replays a run reads one step at a time.
        """
        ...

    async def get_step_statuses(self, run_id: UUID) -> Mapping[str, StepStatus]:
        """The status of every started step, read-only, ordered by step_key; empty for an unknown run."""
        ...

    async def record_skipped_step(
        self,
        run_id: UUID,
        step_key: str,
        step_type: str,
        reason: str | None = None,
        *,
        owner: str | None = None,
    ) -> None:
        """Record one attempt that starts and ends Skipped, with ``reason`` as error_message (STP-5).

        An open attempt is closed as in STP-1. With ``owner``, the same transaction claims the step;
        repeating the call with the same owner and reason is a no-op. Allowed on a terminal run. Atomic.

        Raises RunNotFoundError, StepAlreadyCompletedError for a terminal step, ClaimLostError if a different
        owner holds the claim.
        """
        ...


class Recovery(Protocol):
    """Capability RECOVERY: rescheduling and finding the steps of crashed workers."""

    async def reschedule_step(
        self,
        run_id: UUID,
        step_key: str,
        *,
        attempt: int,
        output_json: str | None = None,
        error_message: str | None = None,
        due_at: datetime | None = None,
        owner: str | None = None,
    ) -> None:
        """Close the attempt as Pending, delete the claim and renew the dispatch, atomically (STP-7).

        With ``error_message`` (capability QUEUES) the attempt is closed as Failed and the step is retried,
        in the same transaction. The new dispatch keeps the queue of the old one. With ``owner``, that owner
        must have started the attempt.

        Repeated for the attempt that it closed, the call is a no-op; after record_step_complete as Pending
        it still reschedules. On a terminal run it dispatches nothing.

        Raises RunNotFoundError, StepNotFoundError, StaleAttemptError, ClaimLostError,
        StepAlreadyCompletedError, in this order.
        """
        ...

    async def get_stalled_steps(
        self, *, as_of: datetime | None = None, take: int = 100
    ) -> Sequence[StalledStep]:
        """The stalled steps of Running runs, ordered by since, run_id, step_key (STP-8).

        A step that is not terminal, or a key that was dispatched or claimed but never started, is stalled
        if its claim has expired by ``as_of`` (None: the store's now), or if it has no claim and its dispatch
        is missing or due. A step that waits for an undelivered signal is not stalled. A missing dispatch
        counts from the end of the last attempt, so pass ``as_of`` = now - grace.
        """
        ...


SUPERSEDED_BY = "superseded by attempt "


def superseded_by(attempt: int) -> str:
    """The error_message of an open attempt that its successor closes (STP-1)."""
    return f"{SUPERSEDED_BY}{attempt}"
