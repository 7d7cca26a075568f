"""Signal waiters and deliveries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from uuid import UUID

from flowstore_conformance.model.state import Base, Run
from flowstore_core import (
    BufferedSignal,
    ConflictError,
    FlowSignalWaiter,
    SignalDeliveryResult,
    SignalDeliveryStatus,
)

MAX_BUFFERED = 1_000
"""The maximum number of buffered payloads of a run (MBX-2)."""


class Signals(Base):
    """Signal waiters and deliveries."""

    def register_waiter(
        self, run_id: UUID, step_key: str, signal_name: str, *, expires_at: datetime | None = None
    ) -> None:
        """Create or update the waiter of a step (SIG-1); it may take a buffered payload (MBX-1)."""
        run, _ = self.require(run_id)
        old = run.waiters.get(step_key)
        if old is None:
            waiter = FlowSignalWaiter(
                run_id=run_id,
                step_key=step_key,
                signal_name=signal_name,
                created_at=self.now,
                expires_at=expires_at,
                delivered_at=None,
                payload_json=None,
                expired_at=None,
            )
        else:
            renamed = old.delivered_at is not None and old.signal_name != signal_name
            if renamed or old.expired_at is not None:
                raise ConflictError("the waiter is over; remove it first", run_id=run_id, step_key=step_key)
            waiter = replace(old, signal_name=signal_name, expires_at=expires_at)
        named = [one for one in run.buffered if one.signal_name == signal_name]
        if named and waiter.delivered_at is None:
            waiter = replace(waiter, delivered_at=self.now, payload_json=named[0].payload_json)
            first = run.buffered.index(named[0])
            run.buffered = run.buffered[:first] + run.buffered[first + 1 :]
        run.waiters[step_key] = waiter

    def deliver_signal(
        self,
        run_id: UUID,
        signal_name: str,
        payload_json: str,
        *,
        delivery_id: str | None = None,
        buffer: bool = False,
    ) -> SignalDeliveryResult:
        """Deliver the payload to the oldest open waiter of that name, or buffer it (SIG-2, SIG-3, MBX-1)."""
        run = self.get(run_id)
        if run.record is None:
            return _not_found()
        if delivery_id is not None and delivery_id in run.deliveries:
            return run.deliveries[delivery_id]
        waiter = _oldest(run, signal_name, lambda one: one.delivered_at is None and one.expired_at is None)
        if run.record.status.is_terminal or (waiter is None and not buffer):
            before = _oldest(run, signal_name, lambda one: one.delivered_at is not None)
            if before is None:
                return _not_found()
            return SignalDeliveryResult(
                status=SignalDeliveryStatus.ALREADY_DELIVERED,
                step_key=before.step_key,
                delivered_at=before.delivered_at,
            )
        if waiter is None:
            if len(run.buffered) >= MAX_BUFFERED:
                raise ConflictError("the run has too many buffered signals", run_id=run_id)
            buffered = BufferedSignal(
                run_id=run_id, signal_name=signal_name, payload_json=payload_json, buffered_at=self.now
            )
            run.buffered = (*run.buffered, buffered)
            result = SignalDeliveryResult(
                status=SignalDeliveryStatus.BUFFERED, step_key=None, delivered_at=None
            )
        else:
            run.waiters[waiter.step_key] = replace(waiter, delivered_at=self.now, payload_json=payload_json)
            result = SignalDeliveryResult(
                status=SignalDeliveryStatus.DELIVERED, step_key=waiter.step_key, delivered_at=self.now
            )
        if delivery_id is not None:
            run.deliveries[delivery_id] = result
        return result

    def get_waiter(self, run_id: UUID, step_key: str) -> FlowSignalWaiter | None:
        """Return the waiter of a step, else None (UNK)."""
        return self.get(run_id).waiters.get(step_key)

    def get_waiters(self, run_id: UUID) -> tuple[FlowSignalWaiter, ...]:
        """List the waiters of a run by step_key (QRY-1)."""
        waiters = self.get(run_id).waiters
        return tuple(waiters[key] for key in sorted(waiters))

    def get_buffered_signals(self, run_id: UUID) -> tuple[BufferedSignal, ...]:
        """List the buffered payloads that no waiter has taken, oldest first (MBX-1)."""
        return self.get(run_id).buffered

    def remove_waiter(self, run_id: UUID, step_key: str) -> FlowSignalWaiter | None:
        """Remove the waiter and return it (SIG-4)."""
        return self.get(run_id).waiters.pop(step_key, None)

    def expire_waiter(self, run_id: UUID, step_key: str) -> FlowSignalWaiter | None:
        """Expire an undelivered waiter whose expires_at has passed, and return the waiter (SIG-4)."""
        run = self.get(run_id)
        waiter = run.waiters.get(step_key)
        if waiter is None:
            return None
        due = waiter.expires_at is not None and waiter.expires_at <= self.now
        if due and waiter.delivered_at is None and waiter.expired_at is None:
            run.waiters[step_key] = replace(waiter, expired_at=self.now)
        return run.waiters[step_key]


def _not_found() -> SignalDeliveryResult:
    return SignalDeliveryResult(status=SignalDeliveryStatus.NOT_FOUND, step_key=None, delivered_at=None)


def _oldest(
    run: Run, signal_name: str, wanted: Callable[[FlowSignalWaiter], bool]
) -> FlowSignalWaiter | None:
    """The oldest waiter of that name by created_at, then step_key, among the eligible ones (SIG-2)."""
    named = [
        waiter for waiter in run.waiters.values() if waiter.signal_name == signal_name and wanted(waiter)
    ]
    return min(named, key=lambda waiter: (waiter.created_at, waiter.step_key), default=None)
