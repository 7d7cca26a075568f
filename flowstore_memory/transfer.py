"""Exporting and importing whole runs (XFR)."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from flowstore_core import (
    ArchivedControl,
    ArchivedDelivery,
    ArchivedKey,
    ArchivedStep,
    ConflictError,
    RunAlreadyExistsError,
    RunArchive,
    SignalDeliveryResult,
    SignalDeliveryStatus,
    StepClaim,
    StepDispatch,
)
from flowstore_core.transfer import is_same_run, step_at_export
from flowstore_memory.attempts import all_attempts
from flowstore_memory.queue_index import index_run
from flowstore_memory.runs import run_record
from flowstore_memory.signals import waiter_record
from flowstore_memory.state import (
    ControlState,
    Namespace,
    OpenNamespace,
    QueuedDispatch,
    RunState,
    StepState,
    WaiterState,
)


class Transfer(OpenNamespace):
    async def export_run(self, run_id: UUID) -> RunArchive | None:
        return self._export(run_id)

    async def import_run(self, archive: RunArchive) -> bool:
        namespace, run_id = self._namespace, archive.run.run_id
        if (stored := self._export(run_id)) is not None:
            if is_same_run(stored, archive):
                return False
            raise RunAlreadyExistsError(run_id)
        keys = {(one.flow_id, one.trigger_key, one.idempotency_key): one for one in archive.idempotency_keys}
        if any(key in namespace.keys and namespace.keys[key].run_id != run_id for key in keys):
            raise ConflictError(
                f"an idempotency key of run {run_id} is registered to another run", run_id=run_id
            )
        namespace.delete_keys(run_id)
        for key, one in keys.items():
            namespace.register(key, run_id, one.created_at)
        namespace.controls.pop(run_id, None)
        if archive.control is not None:
            namespace.controls[run_id] = _control_state(archive.control)
        run = self._runs[run_id.int] = _run_state(archive)
        index_run(namespace, run)
        return True

    def _export(self, run_id: UUID) -> RunArchive | None:
        run = self._runs.get(run_id.int)
        if run is None:
            return None
        now = self._now()
        steps = (_archived_step(run, key, step, now) for key, step in sorted(run.steps.items()))
        return RunArchive(
            run=run_record(run),
            control=_archived_control(run_id, self._namespace.controls.get(run_id)),
            idempotency_keys=_archived_keys(self._namespace, run_id),
            steps=tuple(step for step in steps if step is not None),
            waiters=tuple(waiter_record(run_id, key, waiter) for key, waiter in sorted(run.waiters.items())),
            deliveries=tuple(
                ArchivedDelivery(
                    delivery_id=delivery_id, step_key=result.step_key, delivered_at=result.delivered_at
                )
                for delivery_id, result in sorted(run.deliveries.items())
            ),
            buffered=tuple(run.buffered),
            outputs=tuple(sorted(run.outputs.items())),
            events=tuple(run.events),
        )


# Exporting


def _archived_step(run: RunState, step_key: str, step: StepState, now: datetime) -> ArchivedStep | None:
    """A step key; None if nothing is left of it."""
    claim = dispatch = None
    if step.claimed_at is not None:
        claim = StepClaim(
            run_id=run.run_id,
            step_key=step_key,
            owner=step.owner,
            claimed_at=step.claimed_at,
            expires_at=step.expires_at,
        )
    if step.dispatched_at is not None:
        queued = step.queued
        dispatch = StepDispatch(
            run_id=run.run_id,
            step_key=step_key,
            dispatched_at=step.dispatched_at,
            due_at=step.due_at,
            job_id=step.queue_job_id,
            queue=queued.queue if queued else None,
            priority=queued.priority if queued else 0,
            step_type=queued.step_type if queued else None,
            input_json=queued.input_json if queued else None,
        )
    archived = ArchivedStep(
        run_id=run.run_id,
        step_key=step_key,
        status=step.status,
        reopened=step.reopened,
        rescheduled=step.rescheduled,
        started_owner=step.started_owner,
        attempts=all_attempts(run, step_key, step),
        claim=claim,
        dispatch=dispatch,
    )
    return step_at_export(archived, now)


def _archived_control(run_id: UUID, control: ControlState | None) -> ArchivedControl | None:
    if control is None:
        return None
    return ArchivedControl(
        run_id=run_id,
        flow_id=control.flow_id,
        trigger_key=control.trigger_key,
        idempotency_key=control.idempotency_key,
        timeout_at=control.timeout_at,
        cancel_requested_at=control.cancelled_at,
        cancel_reason=control.cancel_reason,
        timed_out_at=control.timed_out_at,
        timed_out_reason=control.timeout_reason,
        created_at=control.created_at,
    )


def _archived_keys(namespace: Namespace, run_id: UUID) -> tuple[ArchivedKey, ...]:
    keys = sorted(namespace.keys_of.get(run_id, ()), key=lambda key: (key[0].bytes, *key[1:]))
    return tuple(
        ArchivedKey(
            flow_id=key[0],
            trigger_key=key[1],
            idempotency_key=key[2],
            created_at=namespace.keys[key].created_at,
        )
        for key in keys
    )


# Importing


def _run_state(archive: RunArchive) -> RunState:
    run = archive.run
    state = RunState(
        run_id=run.run_id,
        flow_id=run.flow_id,
        flow_name=run.flow_name,
        trigger_key=run.trigger_key,
        trigger_data=run.trigger_data,
        job_id=run.job_id,
        source_run_id=run.source_run_id,
        tags=run.tags,
        started_at=run.started_at,
        status=run.status,
        completed_at=run.completed_at,
        outputs=dict(archive.outputs),
        events=list(archive.events),
        buffered=list(archive.buffered),
    )
    for step in archive.steps:
        _restore_step(state, step)
    for waiter in archive.waiters:
        state.waiters[waiter.step_key] = WaiterState(
            signal_name=waiter.signal_name,
            created_at=waiter.created_at,
            expires_at=waiter.expires_at,
            delivered_at=waiter.delivered_at,
            payload_json=waiter.payload_json,
            expired_at=waiter.expired_at,
        )
    for delivery in archive.deliveries:
        state.deliveries[delivery.delivery_id] = SignalDeliveryResult(
            status=(
                SignalDeliveryStatus.BUFFERED if delivery.step_key is None else SignalDeliveryStatus.DELIVERED
            ),
            step_key=delivery.step_key,
            delivered_at=delivery.delivered_at,
        )
    return state


def _restore_step(run: RunState, step: ArchivedStep) -> None:
    state = run.steps[step.step_key] = StepState(
        status=step.status,
        reopened=step.reopened,
        started_owner=step.started_owner,
        rescheduled=step.rescheduled,
    )
    earlier = list(step.attempts)
    if step.attempts:
        newest = step.attempts[-1]
        state.attempt = newest.attempt
        state.step_type, state.job_id = newest.step_type, newest.job_id
        state.input_json, state.output_json = newest.input_json, newest.output_json
        state.error_message = newest.error_message
        state.started_at, state.completed_at = newest.started_at, newest.completed_at
        if step.status is not None and not step.reopened:
            del earlier[-1]
    if earlier:
        run.earlier[step.step_key] = earlier
    if step.claim is not None:
        state.claimed_at, state.owner = step.claim.claimed_at, step.claim.owner
        state.expires_at = step.claim.expires_at
    if (dispatch := step.dispatch) is not None:
        queued = None
        if dispatch.queue is not None and dispatch.step_type is not None:
            queued = QueuedDispatch(
                dispatch.queue, dispatch.priority, dispatch.step_type, dispatch.input_json
            )
        state.dispatch(dispatch.dispatched_at, dispatch.due_at, queued)
        state.queue_job_id = dispatch.job_id


def _control_state(control: ArchivedControl) -> ControlState:
    return ControlState(
        flow_id=control.flow_id,
        trigger_key=control.trigger_key,
        idempotency_key=control.idempotency_key,
        timeout_at=control.timeout_at,
        created_at=control.created_at,
        cancelled_at=control.cancel_requested_at,
        cancel_reason=control.cancel_reason,
        timed_out_at=control.timed_out_at,
        timeout_reason=control.timed_out_reason,
    )
