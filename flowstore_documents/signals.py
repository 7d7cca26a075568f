"""Waiters and deliveries (SIG)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from msgspec.structs import replace

from flowstore_core import (
    BufferedSignal,
    ConflictError,
    FlowSignalWaiter,
    SignalDeliveryResult,
    SignalDeliveryStatus,
)
from flowstore_core.signals import MAX_BUFFERED_SIGNALS, buffer_is_full
from flowstore_documents import keys
from flowstore_documents.access import Access
from flowstore_documents.codec import decode, encode
from flowstore_documents.documents import BufferedDocument, DeliveryDocument, MailboxDocument, Waiter
from flowstore_documents.run_state import RunState, change_run, read_run
from flowstore_documents.transactions import Changed, Transaction

_EMPTY = encode(MailboxDocument())
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
            # Buffering a signal changes the mailbox, so none of this name comes before the commit.
            run = await change_run(tx, run_id, [step_key], more=[keys.mailbox(run_id)])
            run.check_stored()
            step = run.step(step_key)
            waiter = step.waiter
            if waiter is None:
                step.waiter = await _take_buffered(tx, run, Waiter(signal_name, await tx.now(), expires_at))
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
            step.waiter = replace(waiter, signal_name=signal_name, expires_at=expires_at)
            if waiter.delivered_at is None:
                step.waiter = await _take_buffered(tx, run, step.waiter)

        await self._write("register_waiter", register)

    async def deliver_signal(
        self,
        run_id: UUID,
        signal_name: str,
        payload_json: str,
        *,
        delivery_id: str | None = None,
        buffer: bool = False,
    ) -> SignalDeliveryResult:
        tick, mailbox = keys.signal_tick(run_id, signal_name), keys.mailbox(run_id)

        async def deliver(tx: Transaction) -> SignalDeliveryResult:
            more = [tick]
            remembered = None if delivery_id is None else keys.delivery(run_id, delivery_id)
            if remembered is not None:
                more.append(remembered)
            if buffer:
                more.append(mailbox)
            undelivered = keys.waiters_of_signal(run_id, signal_name, delivered=False)
            oldest = keys.prefix_range(undelivered, 1, keys_only=True)
            run = await change_run(tx, run_id, more=more, ahead=[oldest])
            if run.run is None:
                return _NOT_FOUND
            first = None if remembered is None else run.value(remembered)
            if first is not None:
                return _result(decode(DeliveryDocument, first))
            # The tick changes with every waiter of this name, so the oldest one is still the oldest.
            step_key = await _oldest(tx, run_id, signal_name, delivered=False)
            if run.is_terminal or (step_key is None and not buffer):
                return await _already_delivered(tx, run_id, signal_name)
            if step_key is None:
                await _buffer(tx, run, signal_name, payload_json)
                document = DeliveryDocument(SignalDeliveryStatus.BUFFERED)
            else:
                await run.load_steps([step_key])
                step = run.step(step_key)
                if step.waiter is None:
                    raise Changed  # Without snapshots: it was removed after the first read.
                now = await tx.now()
                step.waiter = replace(step.waiter, delivered_at=now, payload_json=tx.text(payload_json))
                document = DeliveryDocument(SignalDeliveryStatus.DELIVERED, step_key, now)
            if remembered is not None:
                tx.put(remembered, encode(document))
            return _result(document)

        return await self._write("deliver_signal", deliver, hot_key=mailbox if buffer else tick)

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
            step = run.step(step_key)
            waiter = step.waiter
            if waiter is not None and waiter.delivered_at is None and waiter.expired_at is None:
                now = await tx.now()
                if waiter.expires_at is not None and waiter.expires_at <= now:
                    step.waiter = replace(waiter, expired_at=now)
            return await _record(tx, run_id, step_key, step.waiter)

        return await self._write("expire_waiter", expire)

    async def get_waiters(self, run_id: UUID) -> Sequence[FlowSignalWaiter]:
        async def read(tx: Transaction) -> Sequence[FlowSignalWaiter]:
            run = await read_run(tx, run_id, ahead=[keys.prefix_range(keys.steps(run_id))])
            await run.load_all_steps()
            return await waiter_records(tx, run)

        return await self._read("get_waiters", read)

    async def get_buffered_signals(self, run_id: UUID) -> Sequence[BufferedSignal]:
        async def read(tx: Transaction) -> Sequence[BufferedSignal]:
            buffered = keys.prefix_range(keys.all_buffered(run_id))
            run = await read_run(tx, run_id, more=[keys.mailbox(run_id)], ahead=[buffered])
            return () if run.run is None else await buffered_signals(tx, run_id)

        return await self._read("get_buffered_signals", read)


async def _buffer(tx: Transaction, run: RunState, signal_name: str, payload_json: str) -> None:
    """Store a payload for the next waiter of a name; ConflictError at the limit (MBX-2)."""
    key = keys.mailbox(run.run_id)
    mailbox = decode(MailboxDocument, run.value(key) or _EMPTY)
    if mailbox.count >= MAX_BUFFERED_SIGNALS:
        raise buffer_is_full(run.run_id)
    mailbox.count += 1
    mailbox.last += 1
    document = BufferedDocument(tx.text(payload_json), await tx.now())
    tx.put(keys.buffered(run.run_id, signal_name, mailbox.last), encode(document))
    tx.put(key, encode(mailbox))


async def _take_buffered(tx: Transaction, run: RunState, waiter: Waiter) -> Waiter:
    """Deliver the oldest buffered payload of its name, if there is one, to an undelivered waiter (MBX-1)."""
    key = keys.mailbox(run.run_id)
    mailbox = decode(MailboxDocument, run.value(key) or _EMPTY)
    if not mailbox.count:
        return waiter
    prefix = keys.buffered_of_signal(run.run_id, waiter.signal_name)
    for oldest, found in await tx.scan(keys.prefix_range(prefix, 1)):
        mailbox.count -= 1
        tx.delete(oldest)
        tx.put(key, encode(mailbox))
        # The waiter takes the pieces of a long payload over.
        payload = decode(BufferedDocument, found.value).payload_json
        return replace(waiter, delivered_at=await tx.now(), payload_json=payload)
    return waiter


async def buffered_signals(tx: Transaction, run_id: UUID) -> tuple[BufferedSignal, ...]:
    """The buffered signals of a run, the oldest first."""
    found = [
        (*keys.parse_buffered(run_id, key), decode(BufferedDocument, value.value))
        for key, value in await tx.scan(keys.prefix_range(keys.all_buffered(run_id)))
    ]
    text = await tx.read_texts(run_id, [document.payload_json for _, _, document in found])
    return tuple(
        BufferedSignal(
            run_id=run_id,
            signal_name=signal_name,
            payload_json=text(document.payload_json) or "",
            buffered_at=document.buffered_at,
        )
        for _, signal_name, document in sorted(found, key=lambda one: one[0])
    )


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


async def waiter_records(tx: Transaction, run: RunState) -> tuple[FlowSignalWaiter, ...]:
    """The waiters of the steps that were read, ordered by step_key."""
    records = [await _record(tx, run.run_id, key, step.waiter) for key, step in sorted(run.steps.items())]
    return tuple(record for record in records if record is not None)


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
