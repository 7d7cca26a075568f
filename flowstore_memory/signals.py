"""Waiters and deliveries (SIG)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from flowstore_core import (
    BufferedSignal,
    ConflictError,
    FlowSignalWaiter,
    SignalDeliveryResult,
    SignalDeliveryStatus,
)
from flowstore_core.signals import MAX_BUFFERED_SIGNALS, buffer_is_full
from flowstore_core.status import TERMINAL_RUN_STATUSES
from flowstore_memory.queue_index import index_step
from flowstore_memory.state import OpenNamespace, RunState, WaiterState

_NOT_FOUND = SignalDeliveryResult(status=SignalDeliveryStatus.NOT_FOUND, step_key=None, delivered_at=None)
_BUFFERED = SignalDeliveryResult(status=SignalDeliveryStatus.BUFFERED, step_key=None, delivered_at=None)


class Signals(OpenNamespace):
    async def register_waiter(
        self,
        run_id: UUID,
        step_key: str,
        signal_name: str,
        *,
        expires_at: datetime | None = None,
    ) -> None:
        run = self._runs[run_id.int]
        waiter = run.waiters.get(step_key)
        if waiter is None:
            now = self._now()
            run.waiters[step_key] = waiter = WaiterState(signal_name, now, expires_at)
            _take_buffered(run, waiter, now)
            return
        if waiter.expired_at is not None:
            raise ConflictError(
                f"the waiter of step {step_key!r} of run {run_id} has expired; remove it first",
                run_id=run_id,
                step_key=step_key,
            )
        if waiter.delivered_at is not None and waiter.signal_name != signal_name:
            raise ConflictError(
                f"the waiter of step {step_key!r} of run {run_id} was delivered under another signal name; "
                "remove it first",
                run_id=run_id,
                step_key=step_key,
            )
        waiter.signal_name = signal_name
        waiter.expires_at = expires_at
        _take_buffered(run, waiter, self._now())
        self._index_step(run, step_key)

    async def deliver_signal(
        self,
        run_id: UUID,
        signal_name: str,
        payload_json: str,
        *,
        delivery_id: str | None = None,
        buffer: bool = False,
    ) -> SignalDeliveryResult:
        run = self._runs.get(run_id.int)
        if run is None:
            return _NOT_FOUND
        if delivery_id is not None and delivery_id in run.deliveries:
            return run.deliveries[delivery_id]
        matching = [
            (waiter.created_at, key, waiter)
            for key, waiter in run.waiters.items()
            if waiter.signal_name == signal_name and waiter.expired_at is None
        ]
        # Step keys are distinct, so min() never compares two waiters.
        waiting = min((found for found in matching if found[2].delivered_at is None), default=None)
        if run.status in TERMINAL_RUN_STATUSES or (waiting is None and not buffer):
            delivered = (found for found in matching if found[2].delivered_at is not None)
            return _already_delivered(min(delivered, default=None))
        if waiting is None:
            if len(run.buffered) >= MAX_BUFFERED_SIGNALS:
                raise buffer_is_full(run_id)
            run.buffered.append(
                BufferedSignal(
                    run_id=run_id,
                    signal_name=signal_name,
                    payload_json=payload_json,
                    buffered_at=self._now(),
                )
            )
            result = _BUFFERED
        else:
            _, step_key, waiter = waiting
            waiter.delivered_at = self._now()
            waiter.payload_json = payload_json
            self._index_step(run, step_key)
            result = SignalDeliveryResult(
                status=SignalDeliveryStatus.DELIVERED, step_key=step_key, delivered_at=waiter.delivered_at
            )
        if delivery_id is not None:
            run.deliveries[delivery_id] = result
        return result

    async def get_waiter(self, run_id: UUID, step_key: str) -> FlowSignalWaiter | None:
        return _find_record(self._runs.get(run_id.int), step_key)

    async def remove_waiter(self, run_id: UUID, step_key: str) -> FlowSignalWaiter | None:
        run = self._runs.get(run_id.int)
        removed = _find_record(run, step_key)
        if run is not None:
            run.waiters.pop(step_key, None)
            self._index_step(run, step_key)
        return removed

    async def expire_waiter(self, run_id: UUID, step_key: str) -> FlowSignalWaiter | None:
        run = self._runs.get(run_id.int)
        waiter = None if run is None else run.waiters.get(step_key)
        if waiter is not None and waiter.delivered_at is None and waiter.expired_at is None:
            now = self._now()
            if waiter.expires_at is not None and waiter.expires_at <= now:
                waiter.expired_at = now
        return _find_record(run, step_key)

    async def get_waiters(self, run_id: UUID) -> Sequence[FlowSignalWaiter]:
        run = self._runs.get(run_id.int)
        if run is None:
            return ()
        return tuple(waiter_record(run_id, key, waiter) for key, waiter in sorted(run.waiters.items()))

    async def get_buffered_signals(self, run_id: UUID) -> Sequence[BufferedSignal]:
        run = self._runs.get(run_id.int)
        return () if run is None else tuple(run.buffered)

    def _index_step(self, run: RunState, step_key: str) -> None:
        """Index the step after a change of its waiter."""
        step = run.steps.get(step_key)
        if step is not None:
            index_step(self._namespace, run, step_key, step)


def _take_buffered(run: RunState, waiter: WaiterState, now: datetime) -> None:
    """Deliver the oldest buffered payload of the name to the waiter, unless it is delivered (MBX-1)."""
    if waiter.delivered_at is not None:
        return
    for index, buffered in enumerate(run.buffered):
        if buffered.signal_name == waiter.signal_name:
            waiter.delivered_at, waiter.payload_json = now, buffered.payload_json
            del run.buffered[index]
            return


def _already_delivered(oldest: tuple[datetime, str, WaiterState] | None) -> SignalDeliveryResult:
    if oldest is None:
        return _NOT_FOUND
    return SignalDeliveryResult(
        status=SignalDeliveryStatus.ALREADY_DELIVERED,
        step_key=oldest[1],
        delivered_at=oldest[2].delivered_at,
    )


def _find_record(run: RunState | None, step_key: str) -> FlowSignalWaiter | None:
    waiter = None if run is None else run.waiters.get(step_key)
    return None if run is None or waiter is None else waiter_record(run.run_id, step_key, waiter)


def waiter_record(run_id: UUID, step_key: str, waiter: WaiterState) -> FlowSignalWaiter:
    return FlowSignalWaiter(
        run_id=run_id,
        step_key=step_key,
        signal_name=waiter.signal_name,
        created_at=waiter.created_at,
        expires_at=waiter.expires_at,
        delivered_at=waiter.delivered_at,
        payload_json=waiter.payload_json,
        expired_at=waiter.expired_at,
    )
