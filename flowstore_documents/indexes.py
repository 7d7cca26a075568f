"""The index entries of a document: pure functions, so a change replaces the old entries by the new ones."""

from __future__ import annotations

from uuid import UUID

from flowstore_core import StepStatus
from flowstore_core.tags import RunTags
from flowstore_documents import keys
from flowstore_documents.documents import ControlDocument, RunDocument, StepDocument


def run_entries(run_id: UUID, run: RunDocument | None) -> set[bytes]:
    """The entries of a stored run."""
    if run is None:
        return set()
    if run.is_deleted:
        return {keys.intent(run_id)}
    position = keys.position(run.started_at, run_id)
    entries = {
        keys.runs_of() + position,
        keys.runs_of(run.flow_id) + position,
        keys.runs_of(None, run.status) + position,
        keys.runs_of(run.flow_id, run.status) + position,
    }
    if run.source_run_id is not None:
        entries.add(keys.derived_runs(run.source_run_id) + position)
    if run.completed_at is not None:
        entries.add(keys.completed_run(run.status, run.completed_at, run_id))
    if run.intent is not None:
        entries.add(keys.intent(run_id))
    return entries


def tag_entries(run_id: UUID, run: RunDocument | None, tags: RunTags) -> set[bytes]:
    """The entries of a stored run by its tags."""
    if run is None or run.is_deleted:
        return set()
    position = keys.position(run.started_at, run_id)
    return {keys.runs_with_tag(key, value) + position for key, value in tags}


def control_entries(run_id: UUID, run: RunDocument | None, control: ControlDocument | None) -> set[bytes]:
    """The entry of a Running run that has a deadline or a latch (CTL-3)."""
    if run is None or run.is_terminal or control is None:
        return set()
    if control.timeout_at is None and not control.is_stopped:
        return set()
    return {keys.deadline(control.timeout_at, run_id, latched=control.is_stopped)}


def step_entries(run_id: UUID, run: RunDocument | None, step_key: str, step: StepDocument) -> set[bytes]:
    """The entries of a step. Only those of a Running run are in the queues."""
    entries = set()
    if step.is_open:
        entries.add(keys.open_mark(run_id, step_key))
    if step.status is StepStatus.FAILED:
        entries.add(keys.failed_mark(run_id, step_key))
    waiter = step.waiter
    if waiter is not None and waiter.expired_at is None:
        entries.add(
            keys.waiter_of_signal(
                run_id,
                waiter.signal_name,
                waiter.created_at,
                step_key,
                delivered=waiter.delivered_at is not None,
            )
        )
    if run is not None and not run.is_terminal:
        entries |= queue_entries(run_id, step_key, step)
    return entries


def queue_entries(run_id: UUID, step_key: str, step: StepDocument) -> set[bytes]:
    """The entry of a step by the time at which it is ready, or stalled."""
    dispatch = step.dispatch
    if dispatch is not None and dispatch.queue is not None:
        if step.is_terminal:
            return set()
        return {keys.queued_step(dispatch.queue, dispatch.priority, step.ready_at, run_id, step_key)}
    if step.ready_at is None:
        return set()
    return {keys.queued_step("", 0, step.ready_at, run_id, step_key)}
