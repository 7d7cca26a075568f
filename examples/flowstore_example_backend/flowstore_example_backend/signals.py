"""Signal waiters and deliveries (SIG)."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from uuid import UUID

from flowstore_core import ConflictError, FlowSignalWaiter, SignalDeliveryResult, SignalDeliveryStatus
from flowstore_example_backend.document import Document
from flowstore_example_backend.folder import Folder

NOT_FOUND = SignalDeliveryResult(status=SignalDeliveryStatus.NOT_FOUND, step_key=None, delivered_at=None)


class Signals(Folder):
    async def register_waiter(
        self,
        run_id: UUID,
        step_key: str,
        signal_name: str,
        *,
        expires_at: datetime | None = None,
    ) -> None:
        def register(document: Document) -> None:
            document.existing_run(run_id)
            waiter = document.waiters.get(step_key)
            if waiter is None:
                waiter = FlowSignalWaiter(
                    run_id=run_id,
                    step_key=step_key,
                    signal_name=signal_name,
                    created_at=self._now(),
                    expires_at=expires_at,
                    delivered_at=None,
                    payload_json=None,
                    expired_at=None,
                )
            elif waiter.delivered_at is not None and waiter.signal_name != signal_name:
                raise ConflictError(
                    f"step {step_key!r} of run {run_id} was delivered under another signal name; "
                    "remove_waiter first, then register again",
                    run_id=run_id,
                    step_key=step_key,
                )
            document.waiters[step_key] = replace(waiter, signal_name=signal_name, expires_at=expires_at)

        await self._change(run_id, register)

    async def deliver_signal(
        self,
        run_id: UUID,
        signal_name: str,
        payload_json: str,
        *,
        delivery_id: str | None = None,
    ) -> SignalDeliveryResult:
        def deliver(document: Document) -> SignalDeliveryResult:
            if document.run is None:
                return NOT_FOUND
            if delivery_id is not None and delivery_id in document.deliveries:
                return document.deliveries[delivery_id]
            waiters = sorted(
                (w for w in document.waiters.values() if w.signal_name == signal_name),
                key=lambda waiter: (waiter.created_at, waiter.step_key),
            )
            for waiter in waiters:
                if waiter.delivered_at is None and not document.run.status.is_terminal:
                    now = self._now()
                    document.waiters[waiter.step_key] = replace(
                        waiter, delivered_at=now, payload_json=payload_json
                    )
                    delivered = SignalDeliveryResult(
                        status=SignalDeliveryStatus.DELIVERED, step_key=waiter.step_key, delivered_at=now
                    )
                    if delivery_id is not None:
                        document.deliveries[delivery_id] = delivered
                    return delivered
            for waiter in waiters:
                if waiter.delivered_at is not None:
                    return SignalDeliveryResult(
                        status=SignalDeliveryStatus.ALREADY_DELIVERED,
                        step_key=waiter.step_key,
                        delivered_at=waiter.delivered_at,
                    )
            return NOT_FOUND

        return await self._change(run_id, deliver)

    async def get_waiter(self, run_id: UUID, step_key: str) -> FlowSignalWaiter | None:
        return (self._documents.get(run_id) or Document()).waiters.get(step_key)

    async def remove_waiter(self, run_id: UUID, step_key: str) -> FlowSignalWaiter | None:
        def remove(document: Document) -> FlowSignalWaiter | None:
            return document.waiters.pop(step_key, None)

        return await self._change(run_id, remove)
