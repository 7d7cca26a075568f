"""Steps that nothing else will resume (STP-8)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from uuid import UUID

from flowstore_core import StalledStep, StepStatus
from flowstore_documents import keys
from flowstore_documents.access import Access, finish_intents
from flowstore_documents.codec import decode
from flowstore_documents.documents import StepDocument
from flowstore_documents.space import Range
from flowstore_documents.transactions import Transaction


class Recovery(Access):
    async def get_stalled_steps(
        self, *, as_of: datetime | None = None, take: int = 100
    ) -> Sequence[StalledStep]:
        async def read(tx: Transaction) -> Sequence[StalledStep]:
            await finish_intents(tx)
            at = await tx.now() if as_of is None else as_of
            found = []
            async for level in queue_levels(tx):
                due = Range(level, level + keys.after_time(at), take, keys_only=True)
                found += [keys.parse_queued_step(key)[1:] for key, _ in await tx.scan(due)]
            first = sorted(found)[:take]
            steps = await read_steps(tx, [(run_id, step_key) for _, run_id, step_key in first])
            return tuple(
                StalledStep(
                    run_id=run_id,
                    step_key=step_key,
                    status=step.status or StepStatus.PENDING,
                    reason=stall[0],
                    since=stall[1],
                )
                for (run_id, step_key), step in steps.items()
                if (stall := step.stall()) is not None and stall[1] <= at
            )

        return await self._read("get_stalled_steps", read)


async def queue_levels(tx: Transaction) -> AsyncIterator[bytes]:
    """The prefix of every queue and priority that has a step."""
    start = keys.QUEUES
    while True:
        page = (await tx.read((), [Range(start, keys.end_of(keys.QUEUES), 1, keys_only=True)])).pages[0]
        if not page.items:
            return
        level = keys.parse_queued_step(page.items[0][0])[0]
        yield level
        start = keys.end_of(level)


async def read_steps(
    tx: Transaction, wanted: Sequence[tuple[UUID, str]]
) -> dict[tuple[UUID, str], StepDocument]:
    """The steps that exist, in the order given."""
    found = {}
    for start in range(0, len(wanted), 500):
        some = wanted[start : start + 500]
        view = await tx.read([keys.step(run_id, step_key) for run_id, step_key in some], expect=False)
        for run_id, step_key in some:
            value = view.found.get(keys.step(run_id, step_key))
            if value is not None:
                found[run_id, step_key] = decode(StepDocument, value.value)
    return found
