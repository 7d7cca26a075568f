"""Run control: cancellation, time-outs, deadlines, idempotency keys and the atomic trigger (CTL, IDM)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol
from uuid import UUID

from flowstore_core.queues import StepRequest
from flowstore_core.redaction import redacted_repr
from flowstore_core.runs import FlowRunRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowRunControlRecord:
    """The control record of a run: its trigger, its deadline and its two latches."""

    __repr__ = redacted_repr

    run_id: UUID
    flow_id: UUID
    trigger_key: str
    idempotency_key: str | None
    timeout_at: datetime | None
    cancel_requested: bool
    """True once either latch is set (CTL-2)."""
    cancel_reason: str | None
    """From the user's cancel if set, else from the time-out."""
    cancel_requested_at: datetime | None
    """From the user's cancel if set, else from the time-out."""
    timed_out_at: datetime | None
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class TriggerResult:
    """The run of a trigger, and whether this call started it (IDM-3)."""

    run: FlowRunRecord
    created: bool


class RunControls(Protocol):
    """The control record and its cancel and time-out latches."""

    async def configure_run(
        self,
        run_id: UUID,
        flow_id: UUID,
        trigger_key: str,
        *,
        idempotency_key: str | None = None,
        timeout_at: datetime | None = None,
    ) -> None:
        """Create or overwrite the control record, None included (CTL-1).

        Keeps created_at and both latches. Registers no key. May be called before start_run.
        """
        ...

    async def get_run_control(self, run_id: UUID) -> FlowRunControlRecord | None:
        """The control record; None if there is none."""
        ...

    async def get_run_controls(self, run_ids: Collection[UUID]) -> Mapping[UUID, FlowRunControlRecord]:
        """The control records of several runs, at one moment, by run_id, read-only (CTL-1).

        At most 1,000 ids in a call. A run without a control record is left out; the others have the order of
        ``run_ids``.
        """
        ...

    async def request_cancel(self, run_id: UUID, reason: str | None = None) -> bool:
        """Set the user's cancel latch; True for the one call that set it (CTL-2).

        Creates the control record if only the run exists; False if neither exists.
        """
        ...

    async def mark_timed_out(
        self, run_id: UUID, reason: str | None = None, *, as_of: datetime | None = None
    ) -> bool:
        """Set the time-out latch; True for the one call that set it (CTL-2).

        With ``as_of``, only if timeout_at <= as_of. False if there is no control record.
        """
        ...


class IdempotencyKeys(Protocol):
    """Idempotency keys of runs. Scope: (flow_id, trigger_key, idempotency_key), compared exactly (IDM-1)."""

    async def find_run_id_by_idempotency_key(
        self, flow_id: UUID, trigger_key: str, idempotency_key: str
    ) -> UUID | None:
        """The run_id that the key is registered for; None if the key is free."""
        ...

    async def try_register_idempotency_key(
        self, flow_id: UUID, trigger_key: str, idempotency_key: str, run_id: UUID
    ) -> bool:
        """Register the key; exactly one of all concurrent run_ids wins, also when repeated (IDM-2)."""
        ...


class Trigger(Protocol):
    """Capability TRIGGER: idempotency key, control record and run in one transaction."""

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
        tags: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
        timeout_at: datetime | None = None,
        dispatch: Sequence[StepRequest] = (),
    ) -> TriggerResult:
        """Register the key and store the control record and the run, all or nothing (IDM-3).

        With ``dispatch`` (capability QUEUES) the same transaction dispatches these steps of the new run.
        A registered key returns its run and created=False. If that run never started, it is started under
        the registered run_id, with created=True: no crash leaves a key that blocks its triggers. With
        created=True the run has ``tags`` (capability TAGS); with created=False they are ignored (TAG-1).

        Raises RunAlreadyExistsError, registering nothing, if run_id exists and the key is new or absent.
        """
        ...


class Deadlines(Protocol):
    """Capability DEADLINES: finding the runs to stop."""

    async def get_runs_to_stop(
        self, *, as_of: datetime | None = None, take: int = 100
    ) -> Sequence[FlowRunRecord]:
        """Running runs whose deadline has passed or whose cancellation was requested (CTL-3).

        A deadline has passed if it is at or before ``as_of`` (None: the store's now), latched or not.
        Ordered by (timeout_at, run_id), runs without a deadline last.
        """
        ...

    async def extend_deadline(self, run_id: UUID, timeout_at: datetime) -> bool:
        """Set a new deadline, clear the time-out latch and keep a user's cancel (CTL-3).

        False if there is no control record.
        """
        ...
