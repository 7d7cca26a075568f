"""Control records, latches, deadlines, idempotency keys and the atomic trigger (CTL, IDM)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from uuid import UUID

from flowstore_core import (
    FlowRunControlRecord,
    FlowRunRecord,
    RunAlreadyExistsError,
    RunStatus,
    StepRequest,
    TriggerResult,
)
from flowstore_core.tags import NO_TAGS
from flowstore_core.timeseries import LATEST
from flowstore_memory.requests import settle_requests
from flowstore_memory.runs import run_record
from flowstore_memory.state import ControlState, Key, Namespace, OpenNamespace, RunState


class Controls(OpenNamespace):
    async def configure_run(
        self,
        run_id: UUID,
        flow_id: UUID,
        trigger_key: str,
        *,
        idempotency_key: str | None = None,
        timeout_at: datetime | None = None,
    ) -> None:
        _configure(self._namespace, run_id, flow_id, trigger_key, idempotency_key, timeout_at, self._now())

    async def get_run_control(self, run_id: UUID) -> FlowRunControlRecord | None:
        control = self._namespace.controls.get(run_id)
        return None if control is None else _control_record(run_id, control)

    async def get_run_controls(self, run_ids: Collection[UUID]) -> Mapping[UUID, FlowRunControlRecord]:
        controls = self._namespace.controls
        return MappingProxyType(
            {run_id: _control_record(run_id, controls[run_id]) for run_id in run_ids if run_id in controls}
        )

    async def request_cancel(self, run_id: UUID, reason: str | None = None) -> bool:
        now = self._now()
        control = self._namespace.controls.get(run_id)
        if control is None:
            run = self._runs.get(run_id.int)
            if run is None:
                return False
            control = ControlState(run.flow_id, run.trigger_key, None, None, now)
            self._namespace.controls[run_id] = control
        elif control.cancelled_at is not None:
            return False
        control.cancelled_at = now
        control.cancel_reason = reason
        return True

    async def mark_timed_out(
        self, run_id: UUID, reason: str | None = None, *, as_of: datetime | None = None
    ) -> bool:
        control = self._namespace.controls.get(run_id)
        if control is None or control.timed_out_at is not None:
            return False
        if as_of is not None and (control.timeout_at is None or control.timeout_at > as_of):
            return False
        control.timed_out_at = self._now()
        control.timeout_reason = reason
        return True

    async def find_run_id_by_idempotency_key(
        self, flow_id: UUID, trigger_key: str, idempotency_key: str
    ) -> UUID | None:
        registered = self._namespace.keys.get((flow_id, trigger_key, idempotency_key))
        return None if registered is None else registered.run_id

    async def try_register_idempotency_key(
        self, flow_id: UUID, trigger_key: str, idempotency_key: str, run_id: UUID
    ) -> bool:
        key: Key = (flow_id, trigger_key, idempotency_key)
        registered = self._namespace.keys.get(key)
        if registered is not None:
            return registered.run_id == run_id
        self._namespace.register(key, run_id, self._now())
        return True

    async def trigger_run(
        self,
        flow_id: UUID,
        flow_name: str,
        run_id: UUID,
        trigger_key: str,
        *,
        trigger_data: str | None = None,
        job_id: str | None = None,
        source_run_id: UUID | None = None,
        tags: Mapping[str, str] = NO_TAGS,
        idempotency_key: str | None = None,
        timeout_at: datetime | None = None,
        dispatch: Sequence[StepRequest] = (),
    ) -> TriggerResult:
        now = self._now()
        key: Key | None = None if idempotency_key is None else (flow_id, trigger_key, idempotency_key)
        registered = None if key is None else self._namespace.keys.get(key)
        if registered is not None:
            run_id = registered.run_id
            run = self._runs.get(run_id.int)
            if run is not None:
                return TriggerResult(run=run_record(run), created=False)
        elif run_id.int in self._runs:
            raise RunAlreadyExistsError(run_id)
        elif key is not None:
            self._namespace.register(key, run_id, now)
        _configure(self._namespace, run_id, flow_id, trigger_key, idempotency_key, timeout_at, now)
        run = RunState(run_id, flow_id, flow_name, trigger_key, trigger_data, job_id, source_run_id, now)
        if tags:
            run.tags = tuple(tags.items())
        self._runs[run_id.int] = run
        settle_requests(self._namespace, run, dispatch, now)
        return TriggerResult(run=run_record(run), created=True)

    async def get_runs_to_stop(
        self, *, as_of: datetime | None = None, take: int = 100
    ) -> Sequence[FlowRunRecord]:
        at = self._now() if as_of is None else as_of
        found = [
            # Runs without a deadline come last; LATEST only makes the tuples comparable.
            (control.timeout_at is None, control.timeout_at or LATEST, run_id)
            for run_id, control in self._namespace.controls.items()
            if _must_stop(control, at)
            and (run := self._runs.get(run_id.int)) is not None
            and run.status is RunStatus.RUNNING
        ]
        return tuple(run_record(self._runs[run_id.int]) for _, _, run_id in sorted(found)[:take])

    async def extend_deadline(self, run_id: UUID, timeout_at: datetime) -> bool:
        control = self._namespace.controls.get(run_id)
        if control is None:
            return False
        control.timeout_at = timeout_at
        control.timed_out_at = control.timeout_reason = None
        return True


def _configure(
    namespace: Namespace,
    run_id: UUID,
    flow_id: UUID,
    trigger_key: str,
    idempotency_key: str | None,
    timeout_at: datetime | None,
    now: datetime,
) -> None:
    control = namespace.controls.get(run_id)
    if control is None:
        namespace.controls[run_id] = ControlState(flow_id, trigger_key, idempotency_key, timeout_at, now)
    else:
        control.flow_id = flow_id
        control.trigger_key = trigger_key
        control.idempotency_key = idempotency_key
        control.timeout_at = timeout_at


def _must_stop(control: ControlState, at: datetime) -> bool:
    if control.is_stopped:
        return True
    return control.timeout_at is not None and control.timeout_at <= at


def _control_record(run_id: UUID, control: ControlState) -> FlowRunControlRecord:
    by_user = control.cancelled_at is not None
    return FlowRunControlRecord(
        run_id=run_id,
        flow_id=control.flow_id,
        trigger_key=control.trigger_key,
        idempotency_key=control.idempotency_key,
        timeout_at=control.timeout_at,
        cancel_requested=control.is_stopped,
        cancel_reason=control.cancel_reason if by_user else control.timeout_reason,
        cancel_requested_at=control.cancelled_at if by_user else control.timed_out_at,
        timed_out_at=control.timed_out_at,
        created_at=control.created_at,
    )
