"""Archives for checks: one with every kind of state, and some that no operations could have made (XFR-4)."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from flowstore_core import (
    ArchivedControl,
    ArchivedDelivery,
    ArchivedKey,
    ArchivedStep,
    FlowEventRecord,
    FlowRunRecord,
    FlowSignalWaiter,
    FlowStepAttemptRecord,
    RunArchive,
    RunStatus,
    StepClaim,
    StepDispatch,
    StepStatus,
)

_AT = datetime(2001, 3, 14, 12, 0, 0, 123_456, UTC)
_LATER = _AT + timedelta(hours=1)
_FLOW = UUID("f10a0000-0000-4000-8000-000000000001")


def full_archive(run_id: UUID) -> RunArchive:
    """A Running run with every kind of state."""

    def attempt(step_key: str, number: int, status: StepStatus, **given: Any) -> FlowStepAttemptRecord:
        fields = {"input_json": "{ }", "output_json": None, "error_message": None, "job_id": "job 1"}
        return FlowStepAttemptRecord(
            run_id=run_id,
            step_key=step_key,
            attempt=number,
            step_type="http",
            status=status,
            started_at=_AT + timedelta(seconds=number),
            completed_at=None if status is StepStatus.RUNNING else _LATER,
            **{**fields, **given},
        )

    failed = attempt("charge", 1, StepStatus.FAILED, error_message="no")
    claim = StepClaim(run_id=run_id, step_key="charge", owner="me", claimed_at=_AT, expires_at=_LATER)
    dispatch = StepDispatch(
        run_id=run_id,
        step_key="charge",
        dispatched_at=_AT,
        due_at=_LATER,
        job_id="job 2",
        queue="mail",
        priority=9,
        step_type="http",
        input_json="{ }",
    )
    waiter = FlowSignalWaiter(
        run_id=run_id,
        step_key="wait",
        signal_name="go",
        created_at=_AT,
        expires_at=_LATER,
        delivered_at=None,
        payload_json=None,
        expired_at=None,
    )
    event = FlowEventRecord(
        sequence=1, run_id=run_id, timestamp=_AT, event_type="e", step_key="charge", message="m"
    )
    return RunArchive(
        run=FlowRunRecord(
            run_id=run_id,
            flow_id=_FLOW,
            flow_name="orders",
            status=RunStatus.RUNNING,
            trigger_key="manual",
            trigger_data="{ }",
            job_id="job 0",
            started_at=_AT,
            completed_at=None,
            source_run_id=UUID(int=7),
        ),
        control=ArchivedControl(
            run_id=run_id,
            flow_id=_FLOW,
            trigger_key="manual",
            idempotency_key="key",
            timeout_at=_LATER,
            cancel_requested_at=_AT,
            cancel_reason="enough",
            timed_out_at=_LATER,
            timed_out_reason="late",
            created_at=_AT,
        ),
        idempotency_keys=tuple(
            ArchivedKey(
                flow_id=_FLOW, trigger_key="manual", idempotency_key=f"{name} of {run_id}", created_at=_AT
            )
            for name in ("key", "more")
        ),
        steps=(
            ArchivedStep(
                run_id=run_id,
                step_key="charge",
                status=StepStatus.RUNNING,
                started_owner="me",
                attempts=(failed, attempt("charge", 2, StepStatus.RUNNING)),
                claim=claim,
                dispatch=dispatch,
            ),
            ArchivedStep(run_id=run_id, step_key="held", claim=replace(claim, step_key="held", owner=None)),
            ArchivedStep(
                run_id=run_id,
                step_key="poll",
                status=StepStatus.PENDING,
                rescheduled=True,
                attempts=(attempt("poll", 1, StepStatus.PENDING, output_json="[1]"),),
                dispatch=StepDispatch(
                    run_id=run_id, step_key="poll", dispatched_at=_AT, due_at=None, job_id=None
                ),
            ),
            ArchivedStep(
                run_id=run_id,
                step_key="reset",
                attempts=(attempt("reset", 1, StepStatus.SKIPPED, error_message="not needed"),),
            ),
            ArchivedStep(
                run_id=run_id,
                step_key="retried",
                status=StepStatus.PENDING,
                reopened=True,
                rescheduled=True,
                attempts=(attempt("retried", 1, StepStatus.FAILED, error_message="no"),),
            ),
        ),
        waiters=(
            waiter,
            replace(waiter, step_key="wait expired", expired_at=_LATER),
            replace(waiter, step_key="wait on", delivered_at=_LATER, payload_json="{ }"),
        ),
        deliveries=(ArchivedDelivery(delivery_id="d", step_key="wait on", delivered_at=_LATER),),
        outputs=(("a", "1"), ("b", "")),
        events=(event, replace(event, sequence=2, step_key=None, message=None)),
    )


def _changed(record: Any, **given: Any) -> Any:
    """The record with values of any type."""
    return replace(record, **given)


def impossible_archives(run_id: UUID) -> list[Any]:
    """Values that import_run refuses, each with one mistake."""
    archive = full_archive(run_id)
    run, control = archive.run, archive.control
    assert control is not None
    keys, deliveries, events = archive.idempotency_keys, archive.deliveries, archive.events
    waiting, expired, delivered = archive.waiters
    _, held, poll, reset, retried = archive.steps

    def with_run(**given: Any) -> Any:
        return _changed(archive, run=_changed(run, **given))

    def with_control(**given: Any) -> Any:
        return _changed(archive, control=_changed(control, **given))

    def with_step(step: ArchivedStep, **given: Any) -> Any:
        changed = _changed(step, **given)
        return _changed(archive, steps=tuple(changed if one is step else one for one in archive.steps))

    def with_attempt(step: ArchivedStep, **given: Any) -> Any:
        return with_step(step, attempts=(*step.attempts[:-1], _changed(step.attempts[-1], **given)))

    charge = archive.steps[0]
    first, second = charge.attempts
    claim, dispatch = charge.claim, charge.dispatch
    assert claim is not None
    assert dispatch is not None
    other = UUID(int=9)
    waiters = archive.waiters
    return [
        *("archive", b"{}", 1, True, [], object(), archive.to_json(), {"run": run}, run),
        # Values out of their limits, at each depth.
        *(with_run(**{name: value}) for name in ("run_id", "flow_id") for value in (None, str(other), 1)),
        *(with_run(flow_name=value) for value in (None, "", "x" * 257, "a\0", "\ud800", 1)),
        *(with_run(trigger_data=value) for value in (1, "a\0", "\ud800", "x" * (16 * 1024 * 1024 + 1))),
        *(with_run(job_id=value) for value in ("", "x" * 1025, 1)),
        *(with_run(started_at=value) for value in (None, 1, datetime(2026, 3, 14), datetime.max)),  # noqa: DTZ001, DTZ901
        *(with_run(status=value) for value in (None, "running", "Pending", StepStatus.SKIPPED)),
        *(with_control(created_at=value) for value in (None, datetime.max.replace(tzinfo=UTC))),
        _changed(archive, run=None),
        _changed(archive, control=run),
        *(_changed(archive, steps=value) for value in (None, list(archive.steps), (None,), ("charge",))),
        *(_changed(archive, outputs=value) for value in ({"a": "1"}, (("a",),), (("a", None),), ((1, "1"),))),
        *(_changed(archive, outputs=((value, "1"),)) for value in ("", "x" * 257, "a\0")),
        *(with_attempt(charge, attempt=value) for value in (None, 0, True, 2**63, "2")),
        *(with_step(charge, reopened=value) for value in (None, 0, "False")),
        *(with_step(charge, claim=_changed(claim, owner=value)) for value in ("", "x" * 257, 1)),
        *(with_step(charge, dispatch=_changed(dispatch, priority=value)) for value in (-1, 10, True, None)),
        # Runs that no operations could have made.
        with_run(completed_at=_LATER),
        with_run(status=RunStatus.FAILED),
        with_control(run_id=other),
        with_control(cancel_requested_at=None),
        with_control(timed_out_at=None),
        _changed(archive, idempotency_keys=(*keys, keys[0])),
        _changed(archive, steps=(*archive.steps, charge)),
        with_step(charge, run_id=other),
        with_step(held, claim=None),
        with_step(held, reopened=True),
        with_step(held, rescheduled=True),
        with_step(held, started_owner="me"),
        with_step(held, status=StepStatus.PENDING),
        with_step(charge, status=StepStatus.PENDING),
        with_step(charge, status=None, started_owner=None),
        with_step(charge, attempts=(second,)),
        with_step(charge, attempts=(second, first)),
        with_step(charge, attempts=(first,)),
        with_step(charge, rescheduled=True),
        with_step(charge, claim=_changed(claim, step_key="ship")),
        with_step(charge, claim=_changed(claim, run_id=other)),
        with_step(charge, dispatch=_changed(dispatch, run_id=other)),
        with_step(charge, dispatch=_changed(dispatch, step_key="ship")),
        with_step(charge, dispatch=_changed(dispatch, step_type=None)),
        with_step(charge, dispatch=_changed(dispatch, queue=None)),
        with_attempt(charge, attempt=3),
        with_attempt(charge, run_id=other),
        with_attempt(charge, step_key="ship"),
        with_attempt(charge, completed_at=_LATER),
        with_attempt(reset, status=StepStatus.RUNNING, completed_at=None),
        with_attempt(retried, status=StepStatus.RUNNING, completed_at=None),
        with_attempt(retried, status=StepStatus.PENDING),
        with_attempt(poll, completed_at=None),
        with_step(retried, status=StepStatus.FAILED),
        with_step(retried, started_owner="me"),
        with_step(poll, status=StepStatus.SUCCEEDED),
        _changed(archive, waiters=(*waiters, waiting)),
        _changed(archive, waiters=(_changed(waiting, run_id=other),)),
        _changed(archive, waiters=(_changed(waiting, payload_json="{ }"),)),
        _changed(archive, waiters=(_changed(delivered, payload_json=None),)),
        _changed(archive, waiters=(_changed(delivered, expired_at=_LATER),)),
        _changed(archive, waiters=(_changed(expired, expires_at=None),)),
        _changed(archive, deliveries=(*deliveries, deliveries[0])),
        _changed(archive, outputs=(("a", "1"), ("a", "2"))),
        _changed(archive, events=events[1:]),
        _changed(archive, events=(events[0], _changed(events[1], sequence=3))),
        _changed(archive, events=(_changed(events[0], run_id=other),)),
    ]
