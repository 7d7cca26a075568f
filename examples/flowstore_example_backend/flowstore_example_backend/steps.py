"""Steps: start, complete, skip, retry, statuses (STP)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
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
    StepAlreadyCompletedError,
    StepClaim,
    StepNotFoundError,
    StepStatus,
)
from flowstore_core.backend import superseded_by
from flowstore_example_backend.document import Document, Step
from flowstore_example_backend.folder import Folder

Attempts = tuple[FlowStepAttemptRecord, ...]


class Steps(Folder):
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
        def start(document: Document) -> int:
            if document.existing_run(run_id).status.is_terminal:
                raise RunCompletedError(run_id, step_key)
            step = document.steps.get(step_key)
            if step is not None and step.status in (StepStatus.SUCCEEDED, StepStatus.SKIPPED):
                raise StepAlreadyCompletedError(run_id, step_key)
            if owner is not None:
                claim = document.claims.get(step_key)
                if claim is None or claim.owner != owner:
                    raise ClaimLostError(run_id, step_key)
                if step is not None and step.started_owner == owner and step.status is StepStatus.RUNNING:
                    return len(step.attempts)
            now = self._now()
            attempts = _close_superseded(step, now)
            attempt = FlowStepAttemptRecord(
                run_id=run_id,
                step_key=step_key,
                attempt=len(attempts) + 1,
                step_type=step_type,
                status=StepStatus.RUNNING,
                input_json=input_json,
                output_json=None,
                error_message=None,
                job_id=job_id,
                started_at=now,
                completed_at=None,
            )
            document.steps[step_key] = Step(
                status=StepStatus.RUNNING,
                attempts=(*attempts, attempt),
                reopened=False,
                started_owner=owner,
            )
            return attempt.attempt

        return await self._change(run_id, start)

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
        def complete(document: Document) -> None:
            document.existing_run(run_id)
            step = _started(document, run_id, step_key)
            last = step.attempts[-1]
            if step.reopened or attempt not in (None, last.attempt):
                raise StaleAttemptError(run_id, step_key, attempt, last.attempt)
            if owner is not None and step.started_owner != owner:
                raise ClaimLostError(run_id, step_key)
            outcome = (status, output_json, error_message)
            if last.completed_at is None:
                closed = replace(
                    last,
                    status=status,
                    output_json=output_json,
                    error_message=error_message,
                    completed_at=self._now(),
                )
                document.steps[step_key] = replace(
                    step, status=status, attempts=(*step.attempts[:-1], closed)
                )
            elif (last.status, last.output_json, last.error_message) != outcome:
                raise StepAlreadyCompletedError(run_id, step_key, last.attempt)

        await self._change(run_id, complete)

    async def record_skipped_step(
        self,
        run_id: UUID,
        step_key: str,
        step_type: str,
        reason: str | None = None,
        *,
        owner: str | None = None,
    ) -> None:
        def skip(document: Document) -> None:
            document.existing_run(run_id)
            step = document.steps.get(step_key)
            if step is not None and step.status is not None and step.status.is_terminal:
                recorded = (StepStatus.SKIPPED, step.started_owner, step.attempts[-1].error_message)
                if owner is not None and recorded == (step.status, owner, reason):
                    return
                raise StepAlreadyCompletedError(run_id, step_key)
            now = self._now()
            if owner is not None:
                claim = document.claims.setdefault(
                    step_key,
                    StepClaim(run_id=run_id, step_key=step_key, owner=owner, claimed_at=now, expires_at=None),
                )
                if claim.owner != owner:
                    raise ClaimLostError(run_id, step_key)
            attempts = _close_superseded(step, now)
            attempt = FlowStepAttemptRecord(
                run_id=run_id,
                step_key=step_key,
                attempt=len(attempts) + 1,
                step_type=step_type,
                status=StepStatus.SKIPPED,
                input_json=None,
                output_json=None,
                error_message=reason,
                job_id=None,
                started_at=now,
                completed_at=now,
            )
            document.steps[step_key] = Step(
                status=StepStatus.SKIPPED,
                attempts=(*attempts, attempt),
                reopened=False,
                started_owner=owner,
            )

        await self._change(run_id, skip)

    async def retry_step(
        self,
        run_id: UUID,
        step_key: str,
        *,
        attempt: int | None = None,
        reset: Collection[str] = (),
    ) -> None:
        def retry(document: Document) -> None:
            run = document.existing_run(run_id)
            step = _started(document, run_id, step_key)
            if attempt not in (None, len(step.attempts)):
                raise StaleAttemptError(run_id, step_key, attempt, len(step.attempts))
            now = self._now()
            if not step.reopened:
                document.steps[step_key] = Step(
                    status=StepStatus.PENDING,
                    attempts=_close_superseded(step, now),
                    reopened=True,
                    started_owner=None,
                )
                _clear_step(document, step_key)
                for key in set(reset) - {step_key}:
                    other = document.steps.get(key)
                    if other is not None and other.status is StepStatus.SKIPPED:
                        document.steps[key] = replace(other, status=None, started_owner=None)
                        _clear_step(document, key)
            if run.status.is_terminal:
                document.run = replace(run, status=RunStatus.RUNNING, completed_at=None)
                _clear_stops(document, now)

        await self._change(run_id, retry)

    async def get_step(self, run_id: UUID, step_key: str) -> FlowStepRecord | None:
        document = self._documents.get(run_id) or Document()
        step = document.steps.get(step_key)
        return (
            None if step is None or step.status is None else step_record(run_id, step_key, step, step.status)
        )

    async def get_step_statuses(self, run_id: UUID) -> Mapping[str, StepStatus]:
        document = self._documents.get(run_id)
        return MappingProxyType({} if document is None else document.statuses())


def step_record(run_id: UUID, step_key: str, step: Step, status: StepStatus) -> FlowStepRecord:
    last = step.attempts[-1]
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
        completed_at=last.completed_at if status.is_terminal else None,
        attempt_count=len(step.attempts) + step.reopened,
        attempts=step.attempts,
    )


def _started(document: Document, run_id: UUID, step_key: str) -> Step:
    step = document.steps.get(step_key)
    if step is None or step.status is None:
        raise StepNotFoundError(run_id, step_key)
    return step


def _close_superseded(step: Step | None, now: datetime) -> Attempts:
    """The attempts of a step, with an open last attempt closed as superseded (STP-1)."""
    if step is None:
        return ()
    last = step.attempts[-1]
    if last.completed_at is not None:
        return step.attempts
    error = superseded_by(last.attempt + 1)
    closed = replace(last, status=StepStatus.FAILED, error_message=error, completed_at=now)
    return (*step.attempts[:-1], closed)


def _clear_step(document: Document, step_key: str) -> None:
    """Remove claim, dispatch and undelivered waiter of a step that is reopened or reset (STP-6)."""
    document.claims.pop(step_key, None)
    document.dispatches.pop(step_key, None)
    waiter = document.waiters.get(step_key)
    if waiter is not None and waiter.delivered_at is None:
        del document.waiters[step_key]


def _clear_stops(document: Document, now: datetime) -> None:
    """Clear latches and an elapsed deadline, so that the retried run is not stopped at once (STP-6)."""
    control = document.control
    if control is None:
        return
    elapsed = control.timeout_at is not None and control.timeout_at <= now
    document.control = replace(
        control,
        timeout_at=None if elapsed else control.timeout_at,
        cancelled_at=None,
        cancel_reason=None,
        timed_out_at=None,
        timeout_reason=None,
    )
