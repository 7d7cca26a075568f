"""Signals: waiters and deliveries, exactly one delivery per waiter (SIG)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol
from uuid import UUID

from flowstore_core.errors import ConflictError
from flowstore_core.redaction import redacted_repr
from flowstore_core.status import SignalDeliveryStatus

MAX_BUFFERED_SIGNALS = 1_000
"""Maximum number of buffered payloads of one run (MBX-2)."""


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
    """The waiter that gets or already got the payload; None for NOT_FOUND and BUFFERED."""
    delivered_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferedSignal:
    """A payload that came before its waiter; the next waiter of the name takes it (MBX-1)."""

    __repr__ = redacted_repr

    run_id: UUID
    signal_name: str
    payload_json: str
    buffered_at: datetime


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
        delivered payload. Allowed on a terminal run (RUN-4). A waiter that is new, or gets another
        signal_name, takes the oldest buffered payload of that name in the same transaction (MBX-1);
        get_waiter then shows it as delivered.

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
        buffer: bool = False,
    ) -> SignalDeliveryResult:
        """Deliver the payload to the oldest waiter that is neither delivered nor expired (SIG-2).

        Oldest by created_at, then step_key; exactly one delivery per waiter. If only delivered waiters are
        left, the result is ALREADY_DELIVERED and names the oldest of them. NOT_FOUND only if no waiter
        matches at that moment; on a terminal run an undelivered waiter does not match, and nothing changes
        (SIG-3). A ``delivery_id`` that was DELIVERED returns the first result again as long as the run is
        stored, also on a terminal run.

        With ``buffer`` (MAILBOX), a Running run without such a waiter keeps the payload for the next waiter
        of the name, first in, first out: the result is BUFFERED (MBX-1). The delivery_id is remembered as for
        DELIVERED; without one, a repeated call buffers another payload (MBX-2).

        Raises ConflictError, changing nothing, if the run has 1,000 buffered payloads.
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


class Mailbox(Protocol):
    """Capability MAILBOX: signals that come before their waiters. See also ``buffer`` of deliver_signal."""

    async def get_buffered_signals(self, run_id: UUID) -> Sequence[BufferedSignal]:
        """The payloads that no waiter has taken, in the order in which they were buffered (MBX-1)."""
        ...


def buffer_is_full(run_id: UUID) -> ConflictError:
    """The error of a delivery that would exceed MAX_BUFFERED_SIGNALS (MBX-2)."""
    message = f"run {run_id} has {MAX_BUFFERED_SIGNALS:,} buffered signals that no step has waited for"
    return ConflictError(message, run_id=run_id)
