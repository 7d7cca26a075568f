"""Signal waiters and deliveries: exactly one delivery per waiter (SIG)."""

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
    """A step that waits for a signal, and the payload once it came."""

    __repr__ = redacted_repr

    run_id: UUID
    step_key: str
    signal_name: str
    created_at: datetime
    expires_at: datetime | None
    """The store itself does not act on it; expire_waiter does (SIG-4)."""
    delivered_at: datetime | None
    payload_json: str | None
    expired_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalDeliveryResult:
    """What became of one delivery."""

    status: SignalDeliveryStatus
    step_key: str | None
    """Of the waiter that got it, or had got it; None when NOT_FOUND."""
    delivered_at: datetime | None


class Signals(Protocol):
    """Registering waiters and delivering to them."""

    async def register_waiter(
        self,
        run_id: UUID,
        step_key: str,
        signal_name: str,
        *,
        expires_at: datetime | None = None,
    ) -> None:
        """Let a step wait for a signal (SIG-1).

        Again on the same key it updates signal_name and expires_at and keeps created_at and any
        delivered payload. Allowed on a terminal run (RUN-4).

        Raises RunNotFoundError; ConflictError for another signal_name on a delivered waiter, and for
        any registering on an expired one: remove it first.
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
        """Give the payload to the oldest waiter that is neither delivered nor expired (SIG-2).

        Oldest by created_at, then step_key; exactly one delivery per waiter. With none left but one
        delivered: ALREADY_DELIVERED, naming the oldest delivered. NOT_FOUND only if at that moment no
        waiter matches; on a terminal run an undelivered waiter does not match, and nothing changes
        (SIG-3). A ``delivery_id`` that was DELIVERED before returns the first result, for as long as
        the run is stored, on a terminal run too.
        """
        ...

    async def get_waiter(self, run_id: UUID, step_key: str) -> FlowSignalWaiter | None:
        """The waiter of a step; None if there is none."""
        ...

    async def remove_waiter(self, run_id: UUID, step_key: str) -> FlowSignalWaiter | None:
        """Remove the waiter and return it, payload included; None if there was none (SIG-4)."""
        ...


class SignalWaiters(Protocol):
    """Capability WAITERS: ending a wait, and seeing who waits."""

    async def expire_waiter(self, run_id: UUID, step_key: str) -> FlowSignalWaiter | None:
        """Close an undelivered waiter that is past its expires_at, and return it as it then is (SIG-4).

        Delivered or expired, one of the two, for ever. A waiter that is not due is returned unchanged;
        None if there is none.
        """
        ...

    async def get_waiters(self, run_id: UUID) -> Sequence[FlowSignalWaiter]:
        """The waiters of a run by step_key."""
        ...
