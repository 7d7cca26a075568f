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
from flowstore_memory.state import AttemptState, Opened, RunState, StepState, WaiterState

# Looking a member up in its class is slow in Python 3.11, and a step is started often.
_RUNNING = StepStatus.RUNNING
_FINAL = frozenset({StepStatus.SUCCEEDED, StepStatus.SKIPPED})
"""Only retry_step opens such a step again; a failed one may simply be started anew (STP-2)."""


class Steps(Opened):
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
        run = self._runs[run_id]
        if run.status in TERMINAL_RUN_STATUSES:
            raise RunCompletedError(run_id, step_key)
        now = self._now()
        step = run.steps.get(step_key)
        if step is not None and step.status in _FINAL:
            raise StepAlreadyCompletedError(run_id, step_key)
        if owner is not None:
            if step is None or step.owner != owner or not step.has_live_claim(now):
                raise ClaimLostError(run_id, step_key)
            if step.started_owner == owner and step.status is _RUNNING:
                return len(step.attempts)
        if step is None:
            step = run.steps[step_key] = StepState()
        _supersede(step, now)
        step.attempts.append(AttemptState(step_type, _RUNNING, now, input_json, job_id))
        step.status = _RUNNING
        step.reopened = False
        step.started_owner = owner
        return len(step.attempts)

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
        step = _started(self._runs[run_id], step_key)
        last = _current(run_id, step_key, step, attempt)
        if last.completed_at is not None:
            if (last.status, last.output_json, last.error_message) == (
                status,
                output_json,
                error_message,
            ):
                return
            raise StepAlreadyCompletedError(run_id, step_key, len(step.attempts))
        last.close(status, output_json, error_message, self._now())
        step.status = status

    async def record_skipped_step(
        self,
        run_id: UUID,
        step_key: str,
        step_type: str,
        reason: str | None = None,
        *,
        owner: str | None = None,
    ) -> None:
        run = self._runs[run_id]
        now = self._now()
        step = run.steps.get(step_key) or StepState()
        if step.status in TERMINAL_STEP_STATUSES:
            if (
                owner is not None
                and step.status is StepStatus.SKIPPED
                and step.started_owner == owner
                and step.attempts[-1].error_message == reason
            ):
                return
            raise StepAlreadyCompletedError(run_id, step_key)
        if owner is not None:
            if not step.has_live_claim(now):
                step.claim(owner, now, None)
            elif step.owner != owner:
                raise ClaimLostError(run_id, step_key)
        _supersede(step, now)
        skipped = AttemptState(step_type, StepStatus.SKIPPED, now)
        skipped.close(StepStatus.SKIPPED, None, reason, now)
        step.attempts.append(skipped)
        step.status = StepStatus.SKIPPED
        step.reopened = False
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
        run = self._runs[run_id]
        step = _started(run, step_key)
        if attempt is not None and attempt != len(step.attempts):
            raise StaleAttemptError(run_id, step_key, attempt, len(step.attempts))
        now = self._now()
        if not step.reopened:
            _supersede(step, now)
            step.status = StepStatus.PENDING
            step.reopened = True
            _forget(run, step_key, step)
            for key in reset:
                # The step itself is Pending by now, so its own key does nothing here.
                other = run.steps.get(key)
                if other is not None and other.status is StepStatus.SKIPPED:
                    other.status = None
                    _forget(run, key, other)
        if run.status in TERMINAL_RUN_STATUSES:
            run.status = RunStatus.RUNNING
            run.completed_at = None
            if (control := self._space.controls.get(run_id)) is not None:
                # Or the retry would be stopped at once.
                control.clear_stops(now)

    async def get_step_statuses(self, run_id: UUID) -> Mapping[str, StepStatus]:
        run = self._runs.get(run_id)
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
        run = self._runs[run_id]
        step = _started(run, step_key)
        last = _current(run_id, step_key, step, attempt)
        now = self._now()
        if last.completed_at is None:
            last.close(StepStatus.PENDING, output_json, None, now)
            step.status = StepStatus.PENDING
        elif last.status is not StepStatus.PENDING:
            raise StepAlreadyCompletedError(run_id, step_key, attempt)
        elif last.rescheduled:
            return
        last.rescheduled = True
        step.drop_claim()
        step.drop_dispatch()
        if run.status is RunStatus.RUNNING:
            step.dispatched_at = now
            step.due_at = due_at

    async def get_stalled_steps(
        self, *, as_of: datetime | None = None, take: int = 100
    ) -> Sequence[StalledStep]:
        moment = self._now() if as_of is None else as_of
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
            if not _waits(run.waiters.get(key), moment) and (stall := _stall(step, moment)) is not None
        ]
        found.sort(key=lambda stalled: (stalled.since, stalled.run_id, stalled.step_key))
        return tuple(found[:take])


def step_records(run: RunState) -> tuple[FlowStepRecord, ...]:
    """Every step by the start of its first attempt, then key (QRY-3)."""
    records = [
        _step_record(run.run_id, key, step, step.status)
        for key, step in run.steps.items()
        if step.status is not None
    ]
    return tuple(sorted(records, key=lambda record: (record.started_at, record.step_key)))


def _step_record(run_id: UUID, step_key: str, step: StepState, status: StepStatus) -> FlowStepRecord:
    last = step.attempts[-1]
    ended = status.is_terminal
    return FlowStepRecord(
        run_id=run_id,
        step_key=step_key,
        step_type=last.step_type,
        status=status,
        input_json=last.input_json,
        output_json=None if step.reopened else last.output_json,
        error_message=None if step.reopened else last.error_message,
        job_id=last.job_id,
        started_at=step.attempts[0].started_at,
        completed_at=last.completed_at if ended else None,
        attempt_count=len(step.attempts) + step.reopened,
        attempts=tuple(
            FlowStepAttemptRecord(
                run_id=run_id,
                step_key=step_key,
                attempt=number,
                step_type=attempt.step_type,
                status=attempt.status,
                input_json=attempt.input_json,
                output_json=attempt.output_json,
                error_message=attempt.error_message,
                job_id=attempt.job_id,
                started_at=attempt.started_at,
                completed_at=attempt.completed_at,
            )
            for number, attempt in enumerate(step.attempts, 1)
        ),
    )


def _started(run: RunState, step_key: str) -> StepState:
    step = run.steps.get(step_key)
    if step is None or step.status is None:
        raise StepNotFoundError(run.run_id, step_key)
    return step


def _current(run_id: UUID, step_key: str, step: StepState, attempt: int | None) -> AttemptState:
    """The last attempt, if it is the one that is meant and still decides (STP-4)."""
    last = len(step.attempts)
    if step.reopened or (attempt is not None and attempt != last):
        raise StaleAttemptError(run_id, step_key, attempt, last)
    return step.attempts[-1]


def _supersede(step: StepState, now: datetime) -> None:
    """Close the last attempt if it is still open: at most one is, and it is the last (STP-1)."""
    if step.attempts and step.attempts[-1].completed_at is None:
        error = superseded_by(len(step.attempts) + 1)
        step.attempts[-1].close(StepStatus.FAILED, None, error, now)


def _forget(run: RunState, step_key: str, step: StepState) -> None:
    """Drop what belonged to the attempts so far, when a step is reopened or reset (STP-6)."""
    step.drop_claim()
    step.drop_dispatch()
    waiter = run.waiters.get(step_key)
    if waiter is not None and waiter.delivered_at is None:
        del run.waiters[step_key]


def _waits(waiter: WaiterState | None, moment: datetime) -> bool:
    """Whether a signal may still move the step (STP-8)."""
    if waiter is None or waiter.delivered_at is not None or waiter.expired_at is not None:
        return False
    return waiter.expires_at is None or moment < waiter.expires_at


def _stall(step: StepState, moment: datetime) -> tuple[StallReason, datetime] | None:
    """Why nothing will move the step, and since when; None if something will (STP-8)."""
    if step.status in TERMINAL_STEP_STATUSES:
        return None
    if step.claimed_at is not None:
        if step.expires_at is None:
            return None
        reason, since = StallReason.LEASE_EXPIRED, step.expires_at
    elif step.dispatched_at is not None:
        reason, since = StallReason.DISPATCH_DUE, step.due_at or step.dispatched_at
    elif step.status is not None:
        last = step.attempts[-1]
        reason, since = StallReason.NOT_DISPATCHED, last.completed_at or last.started_at
    else:
        return None
    return (reason, since) if since <= moment else None
