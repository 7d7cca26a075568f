"""Latches, deadlines, idempotency keys and the atomic trigger."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from uuid import UUID

from flowstore_conformance.model.requests import Requests
from flowstore_conformance.model.runs import Runs
from flowstore_conformance.model.state import Control
from flowstore_core import FlowRunControlRecord, FlowRunRecord, RunStatus, StepRequest, TriggerResult


class Controls(Runs, Requests):
    """Control records, latches, deadlines, idempotency keys and the trigger."""

    def configure_run(
        self,
        run_id: UUID,
        flow_id: UUID,
        trigger_key: str,
        *,
        idempotency_key: str | None = None,
        timeout_at: datetime | None = None,
    ) -> None:
        """Create or overwrite the control record, keeping created_at and both latches (CTL-1)."""
        run = self.at(run_id)
        old = run.control
        run.control = Control(
            flow_id=flow_id,
            trigger_key=trigger_key,
            idempotency_key=idempotency_key,
            timeout_at=timeout_at,
            created_at=self.now if old is None else old.created_at,
            cancelled=None if old is None else old.cancelled,
            timed_out=None if old is None else old.timed_out,
        )

    def get_run_control(self, run_id: UUID) -> FlowRunControlRecord | None:
        """Return the control record; the user's cancel takes precedence over the time-out (CTL-2)."""
        control = self.get(run_id).control
        if control is None:
            return None
        latch = control.cancelled or control.timed_out
        return FlowRunControlRecord(
            run_id=run_id,
            flow_id=control.flow_id,
            trigger_key=control.trigger_key,
            idempotency_key=control.idempotency_key,
            timeout_at=control.timeout_at,
            cancel_requested=latch is not None,
            cancel_reason=None if latch is None else latch[1],
            cancel_requested_at=None if latch is None else latch[0],
            timed_out_at=None if control.timed_out is None else control.timed_out[0],
            created_at=control.created_at,
        )

    def get_run_controls(self, run_ids: Collection[UUID]) -> Mapping[UUID, FlowRunControlRecord]:
        """Return the control records that exist, in the order of the ids (CTL-1)."""
        found = {run_id: self.get_run_control(run_id) for run_id in run_ids}
        return {run_id: control for run_id, control in found.items() if control is not None}

    def request_cancel(self, run_id: UUID, reason: str | None = None) -> bool:
        """Set the cancel latch once, creating the control record of a stored run (CTL-2)."""
        run = self.get(run_id)
        if run.control is None and run.record is not None:
            self.configure_run(run_id, run.record.flow_id, run.record.trigger_key)
        if run.control is None or run.control.cancelled is not None:
            return False
        run.control = replace(run.control, cancelled=(self.now, reason))
        return True

    def mark_timed_out(
        self, run_id: UUID, reason: str | None = None, *, as_of: datetime | None = None
    ) -> bool:
        """Set the time-out latch once; with ``as_of``, only if the deadline has passed by then (CTL-2)."""
        run = self.get(run_id)
        if run.control is None or run.control.timed_out is not None:
            return False
        if as_of is not None and (run.control.timeout_at is None or run.control.timeout_at > as_of):
            return False
        run.control = replace(run.control, timed_out=(self.now, reason))
        return True

    def find_run_id_by_idempotency_key(
        self, flow_id: UUID, trigger_key: str, idempotency_key: str
    ) -> UUID | None:
        """Return the run that holds the key (IDM-1, IDM-2)."""
        found = self.state.keys.get((flow_id, trigger_key, idempotency_key))
        return None if found is None else found[0]

    def try_register_idempotency_key(
        self, flow_id: UUID, trigger_key: str, idempotency_key: str, run_id: UUID
    ) -> bool:
        """Register the key for the first run; True again for the same run (IDM-2)."""
        scope = (flow_id, trigger_key, idempotency_key)
        return self.state.keys.setdefault(scope, (run_id, self.now))[0] == run_id

    def trigger_run(
        self,
        flow_id: UUID,
        flow_name: str,
        run_id: UUID,
        trigger_key: str,
        *,
        trigger_data: str | None = None,
        job_id: str | None = None,
        source_run_id: UUID | None = None,
        tags: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
        timeout_at: datetime | None = None,
        dispatch: Sequence[StepRequest] = (),
    ) -> TriggerResult:
        """Register the key, start the run and write its control record as one atomic act (IDM-3)."""
        holder = None
        if idempotency_key is not None:
            holder = self.find_run_id_by_idempotency_key(flow_id, trigger_key, idempotency_key)
        chosen = run_id if holder is None else holder
        existing = self.get(chosen).record
        if holder is not None and existing is not None:
            return TriggerResult(run=existing, created=False)
        # Raises before registering anything if the id is already stored (IDM-3).
        record = self.start_run(
            flow_id,
            flow_name,
            chosen,
            trigger_key,
            trigger_data=trigger_data,
            job_id=job_id,
            source_run_id=source_run_id,
            tags=tags,
        )
        if idempotency_key is not None:
            self.try_register_idempotency_key(flow_id, trigger_key, idempotency_key, chosen)
        self.configure_run(
            chosen, flow_id, trigger_key, idempotency_key=idempotency_key, timeout_at=timeout_at
        )
        self.settle(chosen, self.at(chosen), dispatch)
        return TriggerResult(run=record, created=True)

    def get_runs_to_stop(
        self, *, as_of: datetime | None = None, take: int = 100
    ) -> tuple[FlowRunRecord, ...]:
        """List the Running runs past their deadline or with a set latch, by timeout_at and run_id (CTL-3)."""
        as_of = self.now if as_of is None else as_of
        found = []
        for run_id, run in self.state.runs.items():
            control = run.control
            if run.record is None or run.record.status is not RunStatus.RUNNING or control is None:
                continue
            due = control.timeout_at is not None and control.timeout_at <= as_of
            if due or control.cancelled is not None or control.timed_out is not None:
                order = (control.timeout_at is None, control.timeout_at or as_of, run_id.bytes)
                found.append((order, run.record))
        return tuple(record for _, record in sorted(found, key=lambda pair: pair[0])[:take])

    def extend_deadline(self, run_id: UUID, timeout_at: datetime) -> bool:
        """Set a new deadline and clear the time-out latch, keeping a user's cancel (CTL-3)."""
        run = self.get(run_id)
        if run.control is None:
            return False
        run.control = replace(run.control, timeout_at=timeout_at, timed_out=None)
        return True
