"""Steps that nothing else will resume (STP-8)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from uuid import UUID

from flowstore_core import StalledStep, StepStatus
from flowstore_documents import keys
from flowstore_documents.access import Access, finish_intents, groups_of
from flowstore_documents.codec import decode
from flowstore_documents.documents import StepDocument
from flowstore_documents.space import Range
from flowstore_documents.transactions import Transaction

LEVELS = 50
"""Number of queues and priorities that are read at once."""


class Recovery(Access):
    async def get_stalled_steps(
        self, *, as_of: datetime | None = None, take: int = 100
    ) -> Sequence[StalledStep]:
        async def read(tx: Transaction) -> Sequence[StalledStep]:
            await finish_intents(tx)
            at = await tx.now() if as_of is None else as_of
            levels = [level async for level in queue_levels(tx)]
            due = [Range(level, level + keys.after_time(at), take, keys_only=True) for level in levels]
            found = []
            for start in range(0, len(due), LEVELS):
                await tx.read_ahead((), due[start : start + LEVELS])
                for one in due[start : start + LEVELS]:
                    found += [keys.parse_queued_step(key)[1:] for key, _ in await tx.scan(one)]
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


def queue_levels(tx: Transaction) -> AsyncIterator[bytes]:
    """The prefix of every queue and priority that has a step."""
    return groups_of(tx, keys.QUEUES, lambda key: keys.parse_queued_step(key)[0])


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
