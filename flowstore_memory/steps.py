"""Steps: start, complete, skip, retry, reschedule, stalled steps (STP)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from uuid import UUID

from flowstore_core import (
    ClaimLostError,
    FlowStepAttemptRecord,
    FlowStepRecord,
    RunCompletedError,
    RunStatus,
    StaleAttemptError,
    StalledStep,
    StallReason,
    StepAlreadyCompletedError,
    StepNotFoundError,
    StepStatus,
)
from flowstore_core.status import TERMINAL_RUN_STATUSES, TERMINAL_STEP_STATUSES
from flowstore_core.steps import superseded_by
from flowstore_memory.state import OpenNamespace, RunState, StepState, WaiterState

_FINAL = frozenset({StepStatus.SUCCEEDED, StepStatus.SKIPPED})
"""Statuses that only retry_step reopens; a failed step may be started again (STP-2)."""


class Steps(OpenNamespace):
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
        run = self._runs[run_id.int]
        if run.status in TERMINAL_RUN_STATUSES:
            raise RunCompletedError(run_id, step_key)
        now = self._now()
        step = run.steps.get(step_key)
        if step is not None and step.status in _FINAL:
            raise StepAlreadyCompletedError(run_id, step_key)
        if owner is not None:
            if step is None or step.owner != owner or not step.has_live_claim(now):
                raise ClaimLostError(run_id, step_key)
            if step.started_owner == owner and step.status is StepStatus.RUNNING:
                return step.attempt
        if step is None:
            step = run.steps[step_key] = StepState()
        elif step.attempt:
            archive_attempt(run, step_key, step, now)
        step.start(step_type, input_json, job_id, now)
        step.started_owner = owner
        return step.attempt

    async def record_step_complete(
        self,
        run_id: UUID,
        step_key: str,
        status: StepStatus,
        *,
        output_json: str | None = None,
        error_message: str | None = None,
        attempt: int | None = None,
    ) -> None:
        step = _started(self._runs[run_id.int], step_key)
        _check_attempt(run_id, step_key, step, attempt)
        if step.completed_at is not None:
            if (step.status, step.output_json, step.error_message) == (
                status,
                output_json,
                error_message,
            ):
                return
            raise StepAlreadyCompletedError(run_id, step_key, step.attempt)
        step.close(status, output_json, error_message, self._now())

    async def record_skipped_step(
        self,
        run_id: UUID,
        step_key: str,
        step_type: str,
        reason: str | None = None,
        *,
        owner: str | None = None,
    ) -> None:
        run = self._runs[run_id.int]
        now = self._now()
        step = run.steps.get(step_key) or StepState()
        if step.status in TERMINAL_STEP_STATUSES:
            if (
                owner is not None
                and step.status is StepStatus.SKIPPED
                and step.started_owner == owner
                and step.error_message == reason
            ):
                return
            raise StepAlreadyCompletedError(run_id, step_key)
        if owner is not None:
            if not step.has_live_claim(now):
                step.claim(owner, now, None)
            elif step.owner != owner:
                raise ClaimLostError(run_id, step_key)
        archive_attempt(run, step_key, step, now)
        step.start(step_type, None, None, now)
        step.close(StepStatus.SKIPPED, None, reason, now)
        step.started_owner = owner
        run.steps[step_key] = step

    async def retry_step(
        self,
        run_id: UUID,
        step_key: str,
        *,
        attempt: int | None = None,
        reset: Collection[str] = (),
    ) -> None:
        run = self._runs[run_id.int]
        step = _started(run, step_key)
        if attempt is not None and attempt != step.attempt:
            raise StaleAttemptError(run_id, step_key, attempt, step.attempt)
        now = self._now()
        if not step.reopened:
            archive_attempt(run, step_key, step, now)
            step.status = StepStatus.PENDING
            step.reopened = True
            _clear_step(run, step_key, step)
            for key in reset:
                # The key of the retried step has no effect here: its status is Pending.
                other = run.steps.get(key)
                if other is not None and other.status is StepStatus.SKIPPED:
                    archive_attempt(run, key, other, now)
                    other.status = None
                    _clear_step(run, key, other)
        if run.status in TERMINAL_RUN_STATUSES:
            run.status = RunStatus.RUNNING
            run.completed_at = None
            if (control := self._namespace.controls.get(run_id)) is not None:
                # Otherwise the run would be stopped again at once.
                control.clear_stops(now)

    async def get_step_statuses(self, run_id: UUID) -> Mapping[str, StepStatus]:
        run = self._runs.get(run_id.int)
        steps = {} if run is None else run.steps
        found = {key: step.status for key, step in sorted(steps.items()) if step.status is not None}
        return MappingProxyType(found)

    async def reschedule_step(
        self,
        run_id: UUID,
        step_key: str,
        *,
        attempt: int,
        output_json: str | None = None,
        due_at: datetime | None = None,
    ) -> None:
        run = self._runs[run_id.int]
        step = _started(run, step_key)
        _check_attempt(run_id, step_key, step, attempt)
        now = self._now()
        if step.completed_at is None:
            step.close(StepStatus.PENDING, output_json, None, now)
        elif step.status is not StepStatus.PENDING:
            raise StepAlreadyCompletedError(run_id, step_key, attempt)
        elif step.rescheduled:
            return
        step.rescheduled = True
        step.clear_claim()
        step.clear_dispatch()
        if run.status is RunStatus.RUNNING:
            step.dispatched_at = now
            step.due_at = due_at

    async def get_stalled_steps(
        self, *, as_of: datetime | None = None, take: int = 100
    ) -> Sequence[StalledStep]:
        at = self._now() if as_of is None else as_of
        found = [
            StalledStep(
                run_id=run.run_id,
                step_key=key,
                status=step.status or StepStatus.PENDING,
                reason=stall[0],
                since=stall[1],
            )
            for run in self._runs.values()
            if run.status is RunStatus.RUNNING
            for key, step in run.steps.items()
            if not _awaits_signal(run.waiters.get(key), at) and (stall := _stall(step, at)) is not None
        ]
        found.sort(key=lambda stalled: (stalled.since, stalled.run_id, stalled.step_key))
        return tuple(found[:take])


def step_records(run: RunState) -> tuple[FlowStepRecord, ...]:
    """All visible steps, ordered by start of the first attempt, then key (QRY-3)."""
    records = [
        _step_record(run, key, step, step.status)
        for key, step in run.steps.items()
        if step.status is not None
    ]
    return tuple(sorted(records, key=lambda record: (record.started_at, record.step_key)))


def _step_record(run: RunState, step_key: str, step: StepState, status: StepStatus) -> FlowStepRecord:
    attempts = _attempt_records(run, step_key, step, status)
    return FlowStepRecord(
        run_id=run.run_id,
        step_key=step_key,
        step_type=step.step_type,
        status=status,
        input_json=step.input_json,
        output_json=None if step.reopened else step.output_json,
        error_message=None if step.reopened else step.error_message,
        job_id=step.job_id,
        started_at=attempts[0].started_at,
        completed_at=step.completed_at if status.is_terminal else None,
        attempt_count=step.attempt + step.reopened,
        attempts=attempts,
    )


def _attempt_records(
    run: RunState, step_key: str, step: StepState, status: StepStatus
) -> tuple[FlowStepAttemptRecord, ...]:
    """All attempts of a visible step, by number."""
    earlier = run.earlier.get(step_key, ())
    if step.reopened:
        return tuple(earlier)
    return (*earlier, _attempt_record(run, step_key, step, status))


def _attempt_record(
    run: RunState, step_key: str, step: StepState, status: StepStatus
) -> FlowStepAttemptRecord:
    """The newest attempt. Its status is that of the step until the step is reopened or reset."""
    return FlowStepAttemptRecord(
        run_id=run.run_id,
        step_key=step_key,
        attempt=step.attempt,
        step_type=step.step_type,
        status=status,
        input_json=step.input_json,
        output_json=step.output_json,
        error_message=step.error_message,
        job_id=step.job_id,
        started_at=step.started_at,
        completed_at=step.completed_at,
    )


def _started(run: RunState, step_key: str) -> StepState:
    step = run.steps.get(step_key)
    if step is None or step.status is None:
        raise StepNotFoundError(run.run_id, step_key)
    return step


def _check_attempt(run_id: UUID, step_key: str, step: StepState, attempt: int | None) -> None:
    """Raise StaleAttemptError unless ``attempt`` is the newest and the step is not reopened (STP-4)."""
    if step.reopened or (attempt is not None and attempt != step.attempt):
        raise StaleAttemptError(run_id, step_key, attempt, step.attempt)


def archive_attempt(run: RunState, step_key: str, step: StepState, now: datetime) -> None:
    """Close the newest attempt and copy it to the earlier ones, unless it is there already.

    Only the newest attempt of a step can be open (STP-1).
    """
    if step.status is None or step.reopened:
        return
    if step.completed_at is None:
        step.close(StepStatus.FAILED, None, superseded_by(step.attempt + 1), now)
    run.earlier.setdefault(step_key, []).append(_attempt_record(run, step_key, step, step.status))


def _clear_step(run: RunState, step_key: str, step: StepState) -> None:
    """Remove claim, dispatch and undelivered waiter of a step that is reopened or reset (STP-6)."""
    step.clear_claim()
    step.clear_dispatch()
    waiter = run.waiters.get(step_key)
    if waiter is not None and waiter.delivered_at is None:
        del run.waiters[step_key]


def _awaits_signal(waiter: WaiterState | None, at: datetime) -> bool:
    """Whether a signal may still arrive for the step (STP-8)."""
    if waiter is None or waiter.delivered_at is not None or waiter.expired_at is not None:
        return False
    return waiter.expires_at is None or at < waiter.expires_at


def _stall(step: StepState, at: datetime) -> tuple[StallReason, datetime] | None:
    """The reason and start of a stall; None if the step is not stalled (STP-8)."""
    if step.status in TERMINAL_STEP_STATUSES:
        return None
    if step.claimed_at is not None:
        if step.expires_at is None:
            return None
        reason, since = StallReason.LEASE_EXPIRED, step.expires_at
    elif step.dispatched_at is not None:
        reason, since = StallReason.DISPATCH_DUE, step.due_at or step.dispatched_at
    elif step.status is not None:
        reason, since = StallReason.NOT_DISPATCHED, step.completed_at or step.started_at
    else:
        return None
    return (reason, since) if since <= at else None
