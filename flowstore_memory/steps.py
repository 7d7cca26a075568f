"""Steps: start, complete, skip, retry, reschedule, stalled steps (STP)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from uuid import UUID

from flowstore_core import (
    ClaimLostError,
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
from flowstore_core.queues import StepRequest
from flowstore_core.status import TERMINAL_RUN_STATUSES, TERMINAL_STEP_STATUSES
from flowstore_memory.attempts import archive_attempt, skip_step, start_attempt, step_record
from flowstore_memory.queue_index import index_run, index_step
from flowstore_memory.requests import settle_requests
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
            if step.is_started_by(owner):
                return step.attempt
        if step is None:
            step = run.steps[step_key] = StepState()
        start_attempt(run, step_key, step, step_type, input_json, job_id, owner, now)
        # A queued step that had failed may be ready again.
        index_step(self._namespace, run, step_key, step)
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
        owner: str | None = None,
    ) -> None:
        step = started_step(self._runs[run_id.int], step_key)
        check_attempt(run_id, step_key, step, attempt, owner)
        if step.completed_at is None:
            step.close(status, output_json, error_message, self._now())
        else:
            check_outcome(run_id, step_key, step, (status, output_json, error_message))

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
        skip_step(run, step_key, step, step_type, reason, now)
        step.started_owner = owner

    async def retry_step(
        self,
        run_id: UUID,
        step_key: str,
        *,
        attempt: int | None = None,
        reset: Collection[str] = (),
        dispatch: Sequence[StepRequest] = (),
    ) -> None:
        run = self._runs[run_id.int]
        step = started_step(run, step_key)
        if attempt is not None and attempt != step.attempt:
            raise StaleAttemptError(run_id, step_key, attempt, step.attempt)
        now = self._now()
        if not step.reopened:
            _reopen(run, step_key, step, now)
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
            index_run(self._namespace, run)
        settle_requests(self._namespace, run, dispatch, now)

    async def get_step(self, run_id: UUID, step_key: str) -> FlowStepRecord | None:
        run = self._runs.get(run_id.int)
        step = None if run is None else run.steps.get(step_key)
        if run is None or step is None or step.status is None:
            return None
        return step_record(run, step_key, step, step.status)

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
        error_message: str | None = None,
        due_at: datetime | None = None,
        owner: str | None = None,
    ) -> None:
        run = self._runs[run_id.int]
        step = started_step(run, step_key)
        failed = error_message is not None
        if failed and step.attempt == attempt and _is_rescheduled_after_failure(run, step_key, step):
            return
        check_attempt(run_id, step_key, step, attempt, owner)
        now = self._now()
        if step.completed_at is None:
            status = StepStatus.FAILED if failed else StepStatus.PENDING
            step.close(status, output_json, error_message, now)
        elif failed:
            if step.rescheduled and step.status is StepStatus.FAILED:
                return
            check_outcome(run_id, step_key, step, (StepStatus.FAILED, output_json, error_message))
        elif step.status is not StepStatus.PENDING:
            raise StepAlreadyCompletedError(run_id, step_key, attempt)
        elif step.rescheduled:
            return
        step.rescheduled = True
        queued = step.queued
        if failed and run.status is RunStatus.RUNNING:
            _reopen(run, step_key, step, now)
        step.clear_claim()
        step.clear_dispatch()
        if run.status is RunStatus.RUNNING:
            step.dispatch(now, due_at, queued)
            index_step(self._namespace, run, step_key, step)

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
            if (stall := _stall(step, run.waiters.get(key), at)) is not None
        ]
        found.sort(key=lambda stalled: (stalled.since, stalled.run_id, stalled.step_key))
        return tuple(found[:take])


def started_step(run: RunState, step_key: str) -> StepState:
    step = run.steps.get(step_key)
    if step is None or step.status is None:
        raise StepNotFoundError(run.run_id, step_key)
    return step


def check_attempt(
    run_id: UUID, step_key: str, step: StepState, attempt: int | None, owner: str | None
) -> None:
    """Check that ``attempt`` is the newest, that the step is not reopened, and who started it (STP-4)."""
    if step.reopened or (attempt is not None and attempt != step.attempt):
        raise StaleAttemptError(run_id, step_key, attempt, step.attempt)
    if owner is not None and step.started_owner != owner:
        raise ClaimLostError(run_id, step_key)


def _clear_step(run: RunState, step_key: str, step: StepState) -> None:
    """Remove claim, dispatch and undelivered waiter of a step that is reopened or reset (STP-6)."""
    step.clear_claim()
    step.clear_dispatch()
    waiter = run.waiters.get(step_key)
    if waiter is not None and waiter.delivered_at is None:
        del run.waiters[step_key]


def check_outcome(
    run_id: UUID, step_key: str, step: StepState, outcome: tuple[StepStatus, str | None, str | None]
) -> None:
    """Raise StepAlreadyCompletedError if the newest attempt was closed with another outcome (STP-4)."""
    if (step.status, step.output_json, step.error_message) != outcome:
        raise StepAlreadyCompletedError(run_id, step_key, step.attempt)


def _is_rescheduled_after_failure(run: RunState, step_key: str, step: StepState) -> bool:
    """Whether reschedule_step closed the newest attempt as Failed and reopened the step (STP-7)."""
    if not (step.reopened and step.rescheduled):
        return False
    return run.earlier[step_key][-1].status is StepStatus.FAILED


def _reopen(run: RunState, step_key: str, step: StepState, now: datetime) -> None:
    """Make a step Pending and remove its claim, dispatch and undelivered waiter (STP-6)."""
    archive_attempt(run, step_key, step, now)
    step.status = StepStatus.PENDING
    step.reopened = True
    _clear_step(run, step_key, step)


def _stall(step: StepState, waiter: WaiterState | None, at: datetime) -> tuple[StallReason, datetime] | None:
    """The reason and start of a stall; None if the step is not stalled (STP-8)."""
    if step.status in TERMINAL_STEP_STATUSES or (waiter is not None and waiter.is_open(at)):
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
    if step.dispatched_at is not None:
        since = max(since, step.due_at or step.dispatched_at)
    if waiter is not None and waiter.delivered_at is None and waiter.expires_at is not None:
        since = max(since, waiter.expires_at)
    return (reason, since) if since <= at else None
