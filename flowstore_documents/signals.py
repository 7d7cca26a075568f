"""Waiters and deliveries (SIG)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from flowstore_core import ConflictError, FlowSignalWaiter, SignalDeliveryResult, SignalDeliveryStatus
from flowstore_documents import keys
from flowstore_documents.access import Access
from flowstore_documents.codec import decode, encode
from flowstore_documents.documents import DeliveryDocument, Waiter
from flowstore_documents.run_state import change_run, read_run
from flowstore_documents.transactions import Changed, Transaction

_NOT_FOUND = SignalDeliveryResult(status=SignalDeliveryStatus.NOT_FOUND, step_key=None, delivered_at=None)


class Signals(Access):
    async def register_waiter(
        self,
        run_id: UUID,
        step_key: str,
        signal_name: str,
        *,
        expires_at: datetime | None = None,
    ) -> None:
        async def register(tx: Transaction) -> None:
            run = await change_run(tx, run_id, [step_key])
            run.check_stored()
            step = run.step(step_key)
            waiter = step.waiter
            if waiter is None:
                step.waiter = Waiter(signal_name, await tx.now(), expires_at)
                return
            if waiter.expired_at is not None:
                raise ConflictError(
                    f"the waiter of step {step_key!r} of run {run_id} has expired; remove it first",
                    run_id=run_id,
                    step_key=step_key,
                )
            if waiter.delivered_at is not None and waiter.signal_name != signal_name:
                raise ConflictError(
                    f"the waiter of step {step_key!r} of run {run_id} was delivered under another signal "
                    "name; remove it first",
                    run_id=run_id,
                    step_key=step_key,
                )
            waiter.signal_name = signal_name
            waiter.expires_at = expires_at

        await self._write("register_waiter", register)

    async def deliver_signal(
        self,
        run_id: UUID,
        signal_name: str,
        payload_json: str,
        *,
        delivery_id: str | None = None,
    ) -> SignalDeliveryResult:
        async def deliver(tx: Transaction) -> SignalDeliveryResult:
            tick = keys.signal_tick(run_id, signal_name)
            remembered = None if delivery_id is None else keys.delivery(run_id, delivery_id)
            run = await change_run(tx, run_id, more=[tick] if remembered is None else [tick, remembered])
            if run.run is None:
                return _NOT_FOUND
            first = None if remembered is None else run.value(remembered)
            if first is not None:
                return _result(decode(DeliveryDocument, first))
            # The tick changes with every waiter of this name, so the oldest one is still the oldest.
            step_key = await _oldest(tx, run_id, signal_name, delivered=False)
            if step_key is None or run.is_terminal:
                return await _already_delivered(tx, run_id, signal_name)
            await run.load_steps([step_key])
            waiter = run.step(step_key).waiter
            if waiter is None:
                raise Changed  # Without snapshots: it was removed after the first read.
            waiter.delivered_at = await tx.now()
            waiter.payload_json = tx.text(payload_json)
            document = DeliveryDocument(SignalDeliveryStatus.DELIVERED, step_key, waiter.delivered_at)
            if remembered is not None:
                tx.put(remembered, encode(document))
            return _result(document)

        return await self._write("deliver_signal", deliver)

    async def get_waiter(self, run_id: UUID, step_key: str) -> FlowSignalWaiter | None:
        async def read(tx: Transaction) -> FlowSignalWaiter | None:
            run = await read_run(tx, run_id, [step_key])
            return await _record(tx, run_id, step_key, run.step(step_key).waiter)

        return await self._read("get_waiter", read)

    async def remove_waiter(self, run_id: UUID, step_key: str) -> FlowSignalWaiter | None:
        async def remove(tx: Transaction) -> FlowSignalWaiter | None:
            run = await change_run(tx, run_id, [step_key])
            removed = await _record(tx, run_id, step_key, run.step(step_key).waiter)
            run.step(step_key).waiter = None
            return removed

        return await self._write("remove_waiter", remove)

    async def expire_waiter(self, run_id: UUID, step_key: str) -> FlowSignalWaiter | None:
        async def expire(tx: Transaction) -> FlowSignalWaiter | None:
            run = await change_run(tx, run_id, [step_key])
            waiter = run.step(step_key).waiter
            if waiter is not None and waiter.delivered_at is None and waiter.expired_at is None:
                now = await tx.now()
                if waiter.expires_at is not None and waiter.expires_at <= now:
                    waiter.expired_at = now
            return await _record(tx, run_id, step_key, waiter)

        return await self._write("expire_waiter", expire)

    async def get_waiters(self, run_id: UUID) -> Sequence[FlowSignalWaiter]:
        async def read(tx: Transaction) -> Sequence[FlowSignalWaiter]:
            run = await read_run(tx, run_id)
            await run.load_all_steps()
            records = [await _record(tx, run_id, key, step.waiter) for key, step in sorted(run.steps.items())]
            return tuple(record for record in records if record is not None)

        return await self._read("get_waiters", read)


async def _oldest(tx: Transaction, run_id: UUID, signal_name: str, *, delivered: bool) -> str | None:
    """The step of the oldest waiter that is delivered, or is undelivered and not expired."""
    prefix = keys.waiters_of_signal(run_id, signal_name, delivered=delivered)
    found = await tx.scan(keys.prefix_range(prefix, 1, keys_only=True))
    return keys.parse_waiter_step(found[0][0], prefix) if found else None


async def _already_delivered(tx: Transaction, run_id: UUID, signal_name: str) -> SignalDeliveryResult:
    step_key = await _oldest(tx, run_id, signal_name, delivered=True)
    if step_key is None:
        return _NOT_FOUND
    run = await read_run(tx, run_id, [step_key])
    waiter = run.step(step_key).waiter
    return SignalDeliveryResult(
        status=SignalDeliveryStatus.ALREADY_DELIVERED,
        step_key=step_key,
        delivered_at=None if waiter is None else waiter.delivered_at,
    )


def _result(document: DeliveryDocument) -> SignalDeliveryResult:
    return SignalDeliveryResult(
        status=document.status, step_key=document.step_key, delivered_at=document.delivered_at
    )


async def _record(
    tx: Transaction, run_id: UUID, step_key: str, waiter: Waiter | None
) -> FlowSignalWaiter | None:
    if waiter is None:
        return None
    text = await tx.read_texts(run_id, [waiter.payload_json])
    return FlowSignalWaiter(
        run_id=run_id,
        step_key=step_key,
        signal_name=waiter.signal_name,
        created_at=waiter.created_at,
        expires_at=waiter.expires_at,
        delivered_at=waiter.delivered_at,
        payload_json=text(waiter.payload_json),
        expired_at=waiter.expired_at,
    )
