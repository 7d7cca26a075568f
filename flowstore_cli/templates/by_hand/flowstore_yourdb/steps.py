"""Steps and their attempts (STP)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from types import MappingProxyType
from uuid import UUID

from flowstore_core import (
    ClaimLostError,
    FlowStepAttemptRecord,
    FlowStepRecord,
    RunCompletedError,
    StaleAttemptError,
    StepAlreadyCompletedError,
    StepNotFoundError,
    StepStatus,
)
from flowstore_core.backend import superseded_by

from flowstore_yourdb.data import OpenData, Step


class Steps(OpenData):
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
        run = self._run(run_id)
        if run.record.status.is_terminal:
            raise RunCompletedError(run_id, step_key)
        step = run.steps.get(step_key, Step())
        if step.status in (StepStatus.SUCCEEDED, StepStatus.SKIPPED):
            raise StepAlreadyCompletedError(run_id, step_key)
        if owner is not None:
            if step.claim is None or step.claim.owner != owner:
                raise ClaimLostError(run_id, step_key)
            if step.started_owner == owner and step.status is StepStatus.RUNNING:
                return len(step.attempts)
        now, number = self._now(), len(step.attempts) + 1
        close_superseded(step, now)
        attempt = FlowStepAttemptRecord(
            run_id=run_id,
            step_key=step_key,
            attempt=number,
            step_type=step_type,
            status=StepStatus.RUNNING,
            input_json=input_json,
            output_json=None,
            error_message=None,
            job_id=job_id,
            started_at=now,
            completed_at=None,
        )
        step.attempts.append(attempt)
        step.started_owner = owner
        run.steps[step_key] = step
        return number

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
        step = self._run(run_id).steps.get(step_key)
        if step is None or step.status is None:
            raise StepNotFoundError(run_id, step_key)
        last = step.attempts[-1]
        if attempt not in (None, last.attempt):
            raise StaleAttemptError(run_id, step_key, attempt, last.attempt)
        if owner is not None and step.started_owner != owner:
            raise ClaimLostError(run_id, step_key)
        if last.completed_at is None:
            step.attempts[-1] = replace(
                last,
                status=status,
                output_json=output_json,
                error_message=error_message,
                completed_at=self._now(),
            )
        elif (last.status, last.output_json, last.error_message) != (status, output_json, error_message):
            raise StepAlreadyCompletedError(run_id, step_key, last.attempt)

    async def get_step(self, run_id: UUID, step_key: str) -> FlowStepRecord | None:
        step = self._steps(run_id).get(step_key)
        return None if step is None or step.status is None else step_record(run_id, step_key, step)

    async def get_step_statuses(self, run_id: UUID) -> Mapping[str, StepStatus]:
        steps = self._steps(run_id).items()
        return MappingProxyType({key: step.status for key, step in steps if step.status is not None})


def close_superseded(step: Step, now: datetime) -> None:
    """Close an open attempt, because the next one begins: at most one is open (STP-1)."""
    if step.attempts and step.attempts[-1].completed_at is None:
        step.attempts[-1] = replace(
            step.attempts[-1],
            status=StepStatus.FAILED,
            error_message=superseded_by(len(step.attempts) + 1),
            completed_at=now,
        )


def step_record(run_id: UUID, step_key: str, step: Step) -> FlowStepRecord:
    """The record of a step that has started."""
    last = step.attempts[-1]
    return FlowStepRecord(
        run_id=run_id,
        step_key=step_key,
        step_type=last.step_type,
        status=last.status,
        input_json=last.input_json,
        output_json=last.output_json,
        error_message=last.error_message,
        job_id=last.job_id,
        started_at=step.attempts[0].started_at,
        completed_at=last.completed_at if last.status.is_terminal else None,
        attempt_count=len(step.attempts),
        attempts=tuple(step.attempts),
    )
