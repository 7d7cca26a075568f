"""Exporting and importing runs."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

from flowstore_conformance.model.state import Base, Control, Run, Step
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
)


class Transfer(Base):
    """Exporting and importing runs."""

    def export_run(self, run_id: UUID) -> RunArchive | None:
        """Return everything that belongs to a run; claims on open steps end now (XFR-2)."""
        run = self.get(run_id)
        if run.record is None:
            return None
        keys = (
            ArchivedKey(flow_id=scope[0], trigger_key=scope[1], idempotency_key=scope[2], created_at=created)
            for scope, (holder, created) in self.state.keys.items()
            if holder == run_id
        )
        return RunArchive(
            run=run.record,
            control=_archive_control(run_id, run.control),
            idempotency_keys=tuple(
                sorted(keys, key=lambda one: (one.flow_id.bytes, one.trigger_key, one.idempotency_key))
            ),
            steps=tuple(
                self._archive_step(run_id, key, step)
                for key, step in sorted(run.steps.items())
                if step.attempts or step.claim or step.dispatch
            ),
            waiters=tuple(waiter for _, waiter in sorted(run.waiters.items())),
            deliveries=tuple(
                ArchivedDelivery(delivery_id=number, step_key=one.step_key, delivered_at=one.delivered_at)
                for number, one in sorted(run.deliveries.items())
            ),
            buffered=run.buffered,
            outputs=tuple(sorted(run.outputs.items())),
            events=run.events,
        )

    def import_run(self, archive: RunArchive) -> bool:
        """Store an archived run whose id and keys are free; False if the same run is stored (XFR-3)."""
        run_id = archive.run.run_id
        stored = self.export_run(run_id)
        if stored is not None:
            if _without_ends(stored) != _without_ends(archive):
                raise RunAlreadyExistsError(run_id)
            return False
        keys = {(one.flow_id, one.trigger_key, one.idempotency_key): one for one in archive.idempotency_keys}
        if any(self.state.keys.get(scope, (run_id,))[0] != run_id for scope in keys):
            raise ConflictError("a key is registered to another run", run_id=run_id)
        self.state.keys = {scope: key for scope, key in self.state.keys.items() if key[0] != run_id}
        self.state.keys.update({scope: (run_id, one.created_at) for scope, one in keys.items()})
        self.state.runs[run_id] = Run(
            record=archive.run,
            control=_restore_control(archive.control),
            steps={step.step_key: _restore_step(step) for step in archive.steps},
            waiters={waiter.step_key: waiter for waiter in archive.waiters},
            deliveries={
                one.delivery_id: SignalDeliveryResult(
                    status=(
                        SignalDeliveryStatus.BUFFERED
                        if one.step_key is None
                        else SignalDeliveryStatus.DELIVERED
                    ),
                    step_key=one.step_key,
                    delivered_at=one.delivered_at,
                )
                for one in archive.deliveries
            },
            outputs=dict(archive.outputs),
            events=archive.events,
            buffered=archive.buffered,
        )
        return True

    def _archive_step(self, run_id: UUID, step_key: str, step: Step) -> ArchivedStep:
        claim = step.claim
        if claim is not None and not step.is_terminal:
            ends = [at for at in (claim.expires_at, self.now) if at is not None]
            claim = replace(claim, expires_at=min(ends))
        return ArchivedStep(
            run_id=run_id,
            step_key=step_key,
            status=step.status,
            reopened=step.reopened,
            rescheduled=step.rescheduled,
            started_owner=None if step.started_under is None else step.started_under.owner,
            attempts=step.attempts,
            claim=claim,
            dispatch=step.dispatch,
        )


def _restore_step(step: ArchivedStep) -> Step:
    started_under = None
    if step.started_owner is not None:
        # A claim of the same owner is that of the start: a newer claim clears the owner that started (STP-3).
        is_held = step.claim is not None and step.claim.owner == step.started_owner
        started_under = (
            step.claim
            if is_held
            else StepClaim(
                run_id=step.run_id,
                step_key=step.step_key,
                owner=step.started_owner,
                claimed_at=step.attempts[-1].started_at,
                expires_at=None,
            )
        )
    return Step(
        status=step.status,
        attempts=step.attempts,
        reopened=step.reopened,
        rescheduled=step.rescheduled,
        claim=step.claim,
        started_under=started_under,
        dispatch=step.dispatch,
    )


def _archive_control(run_id: UUID, control: Control | None) -> ArchivedControl | None:
    if control is None:
        return None
    cancel_requested_at, cancel_reason = control.cancelled or (None, None)
    timed_out_at, timed_out_reason = control.timed_out or (None, None)
    return ArchivedControl(
        run_id=run_id,
        flow_id=control.flow_id,
        trigger_key=control.trigger_key,
        idempotency_key=control.idempotency_key,
        timeout_at=control.timeout_at,
        cancel_requested_at=cancel_requested_at,
        cancel_reason=cancel_reason,
        timed_out_at=timed_out_at,
        timed_out_reason=timed_out_reason,
        created_at=control.created_at,
    )


def _restore_control(control: ArchivedControl | None) -> Control | None:
    if control is None:
        return None
    cancelled = timed_out = None
    if control.cancel_requested_at is not None:
        cancelled = (control.cancel_requested_at, control.cancel_reason)
    if control.timed_out_at is not None:
        timed_out = (control.timed_out_at, control.timed_out_reason)
    return Control(
        flow_id=control.flow_id,
        trigger_key=control.trigger_key,
        idempotency_key=control.idempotency_key,
        timeout_at=control.timeout_at,
        created_at=control.created_at,
        cancelled=cancelled,
        timed_out=timed_out,
    )


def _without_ends(archive: RunArchive) -> RunArchive:
    """The archive without the ends of claims on open steps, which depend on the export (XFR-3)."""
    steps = []
    for step in archive.steps:
        is_terminal = step.status is not None and step.status.is_terminal
        if step.claim is not None and not is_terminal:
            step = replace(step, claim=replace(step.claim, expires_at=None))
        steps.append(step)
    return replace(archive, steps=tuple(steps))
