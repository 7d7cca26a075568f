"""The event log of a run (EVT-1)."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from flowstore_core import FlowEventRecord
from flowstore_documents import keys
from flowstore_documents.access import Access
from flowstore_documents.codec import decode, encode
from flowstore_documents.documents import EventDocument
from flowstore_documents.run_state import change_run, read_run
from flowstore_documents.space import Range
from flowstore_documents.transactions import Transaction


class Events(Access):
    async def append_event(
        self,
        run_id: UUID,
        event_type: str,
        *,
        step_key: str | None = None,
        message: str | None = None,
    ) -> int:
        last = keys.last_event(run_id)

        async def append(tx: Transaction) -> int:
            run = await change_run(tx, run_id, more=[last])
            run.check_stored()
            sequence = int(run.value(last) or b"0") + 1
            event = EventDocument(await tx.now(), event_type, step_key, tx.text(message))
            tx.put(last, str(sequence).encode())
            tx.put(keys.event(run_id, sequence), encode(event))
            return sequence

        return await self._write("append_event", append, hot_key=last)

    async def get_run_events(
        self, run_id: UUID, *, after: int = 0, take: int = 200
    ) -> Sequence[FlowEventRecord]:
        async def read(tx: Transaction) -> Sequence[FlowEventRecord]:
            wanted = Range(keys.event(run_id, after + 1), keys.end_of(keys.events(run_id)), take)
            await read_run(tx, run_id, ahead=[wanted])
            return await read_events(tx, run_id, wanted)

        return await self._read("get_run_events", read)


async def read_events(tx: Transaction, run_id: UUID, wanted: Range) -> tuple[FlowEventRecord, ...]:
    """The events in a range of their keys."""
    events = [
        (int.from_bytes(key[-8:]), decode(EventDocument, value.value)) for key, value in await tx.scan(wanted)
    ]
    text = await tx.read_texts(run_id, [event.message for _, event in events])
    return tuple(
        FlowEventRecord(
            sequence=sequence,
            run_id=run_id,
            timestamp=event.timestamp,
            event_type=event.event_type,
            step_key=event.step_key,
            message=text(event.message),
        )
        for sequence, event in events
    )
