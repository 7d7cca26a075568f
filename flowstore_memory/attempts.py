"""The records of steps and attempts, and the archive of earlier attempts."""

from __future__ import annotations

from datetime import datetime

from flowstore_core import FlowStepAttemptRecord, FlowStepRecord, StepStatus
from flowstore_core.steps import superseded_by
from flowstore_memory.state import RunState, StepState


def step_records(run: RunState) -> tuple[FlowStepRecord, ...]:
    """All visible steps, ordered by start of the first attempt, then key (QRY-3)."""
    records = [
        step_record(run, key, step, step.status) for key, step in run.steps.items() if step.status is not None
    ]
    return tuple(sorted(records, key=lambda record: (record.started_at, record.step_key)))


def step_record(run: RunState, step_key: str, step: StepState, status: StepStatus) -> FlowStepRecord:
    attempts = all_attempts(run, step_key, step)
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


def all_attempts(run: RunState, step_key: str, step: StepState) -> tuple[FlowStepAttemptRecord, ...]:
    """All attempts of a step key, by number; those of a reset step too."""
    earlier = run.earlier.get(step_key, ())
    if step.status is None or step.reopened:
        return tuple(earlier)
    return (*earlier, _attempt_record(run, step_key, step, step.status))


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


def archive_attempt(run: RunState, step_key: str, step: StepState, now: datetime) -> None:
    """Close the newest attempt and copy it to the earlier ones, unless it is there already.

    Only the newest attempt of a step can be open (STP-1).
    """
    if step.status is None or step.reopened:
        return
    if step.completed_at is None:
        step.close(StepStatus.FAILED, None, superseded_by(step.attempt + 1), now)
    run.earlier.setdefault(step_key, []).append(_attempt_record(run, step_key, step, step.status))


def start_attempt(
    run: RunState,
    step_key: str,
    step: StepState,
    step_type: str,
    input_json: str | None,
    job_id: str | None,
    owner: str | None,
    now: datetime,
) -> None:
    """Open the next attempt; an open one is closed (STP-1)."""
    if step.attempt:
        archive_attempt(run, step_key, step, now)
    step.start(step_type, input_json, job_id, now)
    step.started_owner = owner


def skip_step(
    run: RunState, step_key: str, step: StepState, step_type: str, reason: str | None, now: datetime
) -> None:
    """Record one attempt that starts and ends Skipped (STP-5)."""
    archive_attempt(run, step_key, step, now)
    step.start(step_type, None, None, now)
    step.close(StepStatus.SKIPPED, None, reason, now)
    run.steps[step_key] = step
