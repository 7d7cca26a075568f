"""Signals: waiters and deliveries, exactly one delivery per waiter (SIG)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol
from uuid import UUID

from flowstore_core.redaction import redacted_repr
from flowstore_core.status import SignalDeliveryStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowSignalWaiter:
    """The waiter of a step for a signal, with the payload once it is delivered."""

    __repr__ = redacted_repr

    run_id: UUID
    step_key: str
    signal_name: str
    created_at: datetime
    expires_at: datetime | None
    """Enforced by expire_waiter only, not by the store on its own (SIG-4)."""
    delivered_at: datetime | None
    payload_json: str | None
    expired_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalDeliveryResult:
    """The result of a deliver_signal call."""

    status: SignalDeliveryStatus
    step_key: str | None
    """The waiter that gets or already got the payload; None for NOT_FOUND."""
    delivered_at: datetime | None


class Signals(Protocol):
    """Operations that register waiters and deliver signals to them."""

    async def register_waiter(
        self,
        run_id: UUID,
        step_key: str,
        signal_name: str,
        *,
        expires_at: datetime | None = None,
    ) -> None:
        """Register a step as waiting for a signal (SIG-1).

        Repeated on the same key, it updates signal_name and expires_at and keeps created_at and any
        delivered payload. Allowed on a terminal run (RUN-4).

        Raises RunNotFoundError; ConflictError if a delivered waiter has a different signal_name, or if the
        waiter is expired: remove it first.
        """
        ...

    async def deliver_signal(
        self,
        run_id: UUID,
        signal_name: str,
        payload_json: str,
        *,
        delivery_id: str | None = None,
    ) -> SignalDeliveryResult:
        """Deliver the payload to the oldest waiter that is neither delivered nor expired (SIG-2).

        Oldest by created_at, then step_key; exactly one delivery per waiter. If only delivered waiters are
        left, the result is ALREADY_DELIVERED and names the oldest of them. NOT_FOUND only if no waiter
        matches at that moment; on a terminal run an undelivered waiter does not match, and nothing changes
        (SIG-3). A ``delivery_id`` that was DELIVERED returns the first result again as long as the run is
        stored, also on a terminal run.
        """
        ...

    async def get_waiter(self, run_id: UUID, step_key: str) -> FlowSignalWaiter | None:
        """The waiter of a step; None if there is none."""
        ...

    async def remove_waiter(self, run_id: UUID, step_key: str) -> FlowSignalWaiter | None:
        """Remove the waiter and return it with its payload; None if there was none (SIG-4)."""
        ...


class SignalWaiters(Protocol):
    """Capability WAITERS: expiring and listing waiters."""

    async def expire_waiter(self, run_id: UUID, step_key: str) -> FlowSignalWaiter | None:
        """Close an undelivered waiter whose expires_at has passed, and return its new state (SIG-4).

        A waiter is either delivered or expired, permanently. A waiter that is not due is returned
        unchanged; None if there is none.
        """
        ...

    async def get_waiters(self, run_id: UUID) -> Sequence[FlowSignalWaiter]:
        """The waiters of a run, ordered by step_key."""
        ...
