"""Archives as arguments of calls: with every kind of state, with other ids, without owners of one store."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from flowstore_conformance.claim_tokens import comparable_owner
from flowstore_core import (
    ArchivedControl,
    ArchivedDelivery,
    ArchivedKey,
    ArchivedStep,
    BufferedSignal,
    EndedStep,
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

AT = datetime(2001, 3, 14, 12, 0, 0, 123_456, UTC)
LATER = AT + timedelta(hours=1)
"""The times in full_archive, long ago: a later export does not change the ends of its claims."""
_FLOW = UUID("f10a0000-0000-4000-8000-000000000001")

Change = Callable[[Any], Any]
"""Returns the replacement of an id or a text, or the same value."""


def with_changed_values(value: Any, change: Change) -> Any:
    """An archive, or a part of one, in which each id and each text is replaced."""
    if isinstance(value, tuple):
        return tuple(with_changed_values(item, change) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            field.name: with_changed_values(getattr(value, field.name), change)
            for field in dataclasses.fields(value)
        }
        return dataclasses.replace(value, **fields)
    return change(value) if isinstance(value, (UUID, str)) else value


def under_another_id(archive: RunArchive, run_id: UUID) -> RunArchive:
    """The same run under another id."""
    old = archive.run.run_id
    changed: RunArchive = with_changed_values(archive, lambda value: run_id if value == old else value)
    return changed


def ids_in(value: Any) -> list[UUID]:
    """The ids in an argument of a call: the argument itself, or those of an archive or of ended steps."""
    found = [value] if isinstance(value, UUID) else []
    if isinstance(value, Sequence):
        found += [each.run_id for each in value if isinstance(each, EndedStep)]
    if isinstance(value, RunArchive):

        def note(each: Any) -> Any:
            found.extend([each] if isinstance(each, UUID) else [])
            return each

        with_changed_values(value, note)
    return found


def with_queues(archive: RunArchive, change: Callable[[str], str]) -> RunArchive:
    """The archive with other queues."""
    steps = []
    for step in archive.steps:
        dispatch = step.dispatch
        if dispatch is not None and dispatch.queue is not None:
            dispatch = dataclasses.replace(dispatch, queue=change(dispatch.queue))
        steps.append(dataclasses.replace(step, dispatch=dispatch))
    return dataclasses.replace(archive, steps=tuple(steps))


def with_known_owners(archive: RunArchive, owner: str) -> RunArchive:
    """The archive with another owner in place of those that claim_next_steps made, which differ by store."""
    steps = []
    for step in archive.steps:
        claim = step.claim
        if claim is not None and comparable_owner(claim.owner) != claim.owner:
            claim = dataclasses.replace(claim, owner=owner)
        started = step.started_owner
        if started is not None and comparable_owner(started) != started:
            started = owner
        steps.append(dataclasses.replace(step, claim=claim, started_owner=started))
    return dataclasses.replace(archive, steps=tuple(steps))


def new_archive(run_id: UUID, flow_id: UUID, started_at: datetime) -> RunArchive:
    """An archive of a run that has only been started."""
    return RunArchive(
        run=FlowRunRecord(
            run_id=run_id,
            flow_id=flow_id,
            flow_name="Flow",
            status=RunStatus.RUNNING,
            trigger_key="t",
            trigger_data=None,
            job_id=None,
            started_at=started_at,
            completed_at=None,
            source_run_id=None,
        )
    )


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
            started_at=AT + timedelta(seconds=number),
            completed_at=None if status is StepStatus.RUNNING else LATER,
            **{**fields, **given},
        )

    failed = attempt("charge", 1, StepStatus.FAILED, error_message="no")
    claim = StepClaim(run_id=run_id, step_key="charge", owner="me", claimed_at=AT, expires_at=LATER)
    dispatch = StepDispatch(
        run_id=run_id,
        step_key="charge",
        dispatched_at=AT,
        due_at=LATER,
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
        created_at=AT,
        expires_at=LATER,
        delivered_at=None,
        payload_json=None,
        expired_at=None,
    )
    early = BufferedSignal(run_id=run_id, signal_name="early", payload_json="1", buffered_at=AT)
    event = FlowEventRecord(
        sequence=1, run_id=run_id, timestamp=AT, event_type="e", step_key="charge", message="m"
    )
    return RunArchive(
        run=FlowRunRecord(
            run_id=run_id,
            flow_id=_FLOW,
            flow_name="orders",
            status=RunStatus.RUNNING,
            trigger_key="manual",
            trigger_data="{ }",
            tags=(("customer", "7"), ("é", "x")),
            job_id="job 0",
            started_at=AT,
            completed_at=None,
            source_run_id=UUID(int=7),
        ),
        control=ArchivedControl(
            run_id=run_id,
            flow_id=_FLOW,
            trigger_key="manual",
            idempotency_key="key",
            timeout_at=LATER,
            cancel_requested_at=AT,
            cancel_reason="enough",
            timed_out_at=LATER,
            timed_out_reason="late",
            created_at=AT,
        ),
        idempotency_keys=tuple(
            ArchivedKey(
                flow_id=_FLOW, trigger_key="manual", idempotency_key=f"{name} of {run_id}", created_at=AT
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
            ArchivedStep(
                run_id=run_id, step_key="held", claim=dataclasses.replace(claim, step_key="held", owner=None)
            ),
            ArchivedStep(
                run_id=run_id,
                step_key="poll",
                status=StepStatus.PENDING,
                rescheduled=True,
                attempts=(attempt("poll", 1, StepStatus.PENDING, output_json="[1]"),),
                dispatch=StepDispatch(
                    run_id=run_id, step_key="poll", dispatched_at=AT, due_at=None, job_id=None
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
            dataclasses.replace(waiter, step_key="wait expired", expired_at=LATER),
            dataclasses.replace(waiter, step_key="wait on", delivered_at=LATER, payload_json="{ }"),
        ),
        deliveries=(
            ArchivedDelivery(delivery_id="d", step_key="wait on", delivered_at=LATER),
            ArchivedDelivery(delivery_id="early"),
        ),
        buffered=(
            early,
            dataclasses.replace(early, signal_name="stop", payload_json=""),
            dataclasses.replace(early, payload_json="2"),
        ),
        outputs=(("a", "1"), ("b", "")),
        events=(event, dataclasses.replace(event, sequence=2, step_key=None, message=None)),
    )


def archive_source(archive: RunArchive, names: Mapping[UUID, str]) -> str:
    """The archive as a Python expression. ``names`` maps ids to expressions."""
    text = archive.to_json()
    source = repr(text)
    for number, name in names.items():
        for shown, made in ((str(number), f"str({name})"), (number.hex, f"{name}.hex")):
            if shown in text:
                source += f".replace({shown!r}, {made})"
    return f"RunArchive.from_json({source})"
