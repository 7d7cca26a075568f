"""Steps and their attempts: the records and the promises of starting and closing them (STP)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol
from uuid import UUID

from flowstore_core.redaction import redacted_repr
from flowstore_core.status import StallReason, StepStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowStepAttemptRecord:
    """One attempt of a step; attempts are numbered 1, 2, ... without gaps (STP-1)."""

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
    """When it was closed, as Pending too; None while it is open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowStepRecord:
    """One step with its attempts; its own fields are those of the newest attempt."""

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
    """The last attempt's number, or that of the attempt to come once retry_step reopened the step."""
    attempts: tuple[FlowStepAttemptRecord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StalledStep:
    """A step that nothing will move by itself (STP-8)."""

    run_id: UUID
    step_key: str
    status: StepStatus
    """Pending also for a key that was dispatched or claimed but never started."""
    reason: StallReason
    since: datetime


class StepAttempts(Protocol):
    """Opening, closing and reopening attempts."""

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

        The step becomes Running; its output, error and completion are cleared. An attempt that is
        still open is closed as Failed with a message that names its successor. With ``owner`` the
        caller must hold that owner's unexpired claim; said again under the same claim while its
        attempt is open, it returns that attempt's number and changes nothing (STP-3).

        Raises, in this order: RunNotFoundError, RunCompletedError (RUN-4), StepAlreadyCompletedError
        on a Succeeded or Skipped step (STP-2), ClaimLostError. Atomic.
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
    ) -> None:
        """Close an attempt (None: the last started) and give the step the same outcome (STP-4).

        ``status`` is Succeeded, Failed, Skipped, or Pending: a poll that is not done. The same
        outcome again is a no-op. Allowed on a terminal run. Both rows change in one transaction.

        Raises RunNotFoundError, StepNotFoundError, StaleAttemptError for an attempt that is not the
        last one or whose step retry_step has reopened, StepAlreadyCompletedError for another outcome
        on a closed attempt.
        """
        ...

    async def retry_step(
        self,
        run_id: UUID,
        step_key: str,
        *,
        attempt: int | None = None,
        reset: Collection[str] = (),
    ) -> None:
        """Reopen a step and its run, atomically (STP-6).

        The step becomes Pending with output, error and completion cleared and attempt_count raised to
        the number of the attempt to come; its claim, its dispatch and its undelivered waiter go; its
        attempts stay, an open one closed as Failed. The run is Running; if it was terminal, its
        latches and an elapsed deadline are cleared. Keys in ``reset`` that are Skipped become
        unstarted; their attempts and numbering stay. Again before the next start: a no-op, except
        that a run that became terminal meanwhile is Running again.

        Raises RunNotFoundError, StepNotFoundError, StaleAttemptError when ``attempt`` is given and is
        not the last one started (a double click).
        """
        ...


class StepRuntime(Protocol):
    """What a running engine asks and records between attempts."""

    async def get_step_statuses(self, run_id: UUID) -> Mapping[str, StepStatus]:
        """Every started step with its status, read-only, by step_key; empty for an unknown run."""
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
        """Record, atomically, one attempt that starts and ends Skipped, its error_message the reason (STP-5).

        An open attempt is closed as in STP-1. With ``owner`` it takes the claim in the same
        transaction; the same owner and reason again is a no-op. Allowed on a terminal run.

        Raises RunNotFoundError, StepAlreadyCompletedError on a terminal step, ClaimLostError if
        another holds the claim.
        """
        ...


class Recovery(Protocol):
    """Capability RECOVERY: no step is lost between two calls of a dying process."""

    async def reschedule_step(
        self,
        run_id: UUID,
        step_key: str,
        *,
        attempt: int,
        output_json: str | None = None,
        due_at: datetime | None = None,
    ) -> None:
        """Close the attempt as Pending, remove the claim and renew the dispatch, in one step (STP-7).

        Said again for the attempt that it closed it is a no-op; after record_step_complete as Pending
        it reschedules all the same. On a terminal run nothing is dispatched.

        Raises RunNotFoundError, StepNotFoundError, StaleAttemptError, StepAlreadyCompletedError.
        """
        ...

    async def get_stalled_steps(
        self, *, as_of: datetime | None = None, take: int = 100
    ) -> Sequence[StalledStep]:
        """What nothing will move, in Running runs, by since, run_id, step_key (STP-8).

        Steps that are not terminal, and keys dispatched or claimed but never started, whose claim has
        expired by ``as_of`` (None: the store's now), or that have no claim and whose dispatch is
        missing or due. A step that waits for an undelivered signal is not stalled. A missing dispatch
        counts from the end of the last attempt, so pass ``as_of`` = now - grace.
        """
        ...


SUPERSEDED_BY = "superseded by attempt "


def superseded_by(attempt: int) -> str:
    """The error_message of an open attempt that another attempt closes (STP-1)."""
    return f"{SUPERSEDED_BY}{attempt}"
