"""Run control: cancel, time-out, deadlines, idempotency keys and the atomic trigger (CTL, IDM)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol
from uuid import UUID

from flowstore_core.redaction import redacted_repr
from flowstore_core.runs import FlowRunRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowRunControlRecord:
    """What was asked of a run beside its work."""

    __repr__ = redacted_repr

    run_id: UUID
    flow_id: UUID
    trigger_key: str
    idempotency_key: str | None
    timeout_at: datetime | None
    cancel_requested: bool
    """True once either latch is set (CTL-2)."""
    cancel_reason: str | None
    """The user's, else the time-out's."""
    cancel_requested_at: datetime | None
    """The user's, else the time-out's."""
    timed_out_at: datetime | None
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class TriggerResult:
    """The run a trigger led to, and whether this call started it (IDM-3)."""

    run: FlowRunRecord
    created: bool


class RunControls(Protocol):
    """Cancel and time-out latches."""

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

        Keeps created_at and both latches and registers no key; it may come before start_run.
        """
        ...

    async def get_run_control(self, run_id: UUID) -> FlowRunControlRecord | None:
        """The control record; None if there is none."""
        ...

    async def request_cancel(self, run_id: UUID, reason: str | None = None) -> bool:
        """Set the user's cancel latch; True for the one call that set it (CTL-2).

        On an existing run without a control record it creates one; False if there is neither.
        """
        ...

    async def mark_timed_out(
        self, run_id: UUID, reason: str | None = None, *, as_of: datetime | None = None
    ) -> bool:
        """Set the time-out latch; True for the one call that set it (CTL-2).

        With ``as_of`` only if timeout_at <= as_of. False where there is no control record.
        """
        ...


class IdempotencyKeys(Protocol):
    """Who started the run of a key. Scope: (flow_id, trigger_key, idempotency_key), exact (IDM-1)."""

    async def find_run_id_by_idempotency_key(
        self, flow_id: UUID, trigger_key: str, idempotency_key: str
    ) -> UUID | None:
        """The run_id that won the key; None if it is free."""
        ...

    async def try_register_idempotency_key(
        self, flow_id: UUID, trigger_key: str, idempotency_key: str, run_id: UUID
    ) -> bool:
        """Register the key; exactly one run_id of all concurrent ones wins, and wins again (IDM-2)."""
        ...


class Trigger(Protocol):
    """Capability TRIGGER: key, control record and run in one transaction."""

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
        idempotency_key: str | None = None,
        timeout_at: datetime | None = None,
    ) -> TriggerResult:
        """Register the key, the control record and the run, all or nothing (IDM-3).

        A taken key gives the existing run and created=False; if that run never started it is started
        under the registered run_id with created=True. No crash leaves a key that swallows triggers.

        Raises RunAlreadyExistsError, registering nothing, when run_id exists under a new key or
        without one.
        """
        ...


class Deadlines(Protocol):
    """Capability DEADLINES: which runs to stop."""

    async def get_runs_to_stop(
        self, *, as_of: datetime | None = None, take: int = 100
    ) -> Sequence[FlowRunRecord]:
        """Running runs that are past their deadline or asked to cancel (CTL-3).

        A deadline counts at or before ``as_of`` (None: the store's now), latched or not. By
        (timeout_at, run_id), those without deadline last.
        """
        ...

    async def extend_deadline(self, run_id: UUID, timeout_at: datetime) -> bool:
        """Set a new deadline, undo the time-out latch, keep a user's cancel (CTL-3).

        True where there is a control record.
        """
        ...
