"""The end of the event log of a run."""

from __future__ import annotations

from uuid import UUID

from flowstore_core.events import FlowEventRecord
from flowstore_core.store import FlowStore
from flowstore_core.validation import MAX_INT64


async def last_events(store: FlowStore, run_id: UUID, most: int) -> list[FlowEventRecord]:
    """The newest events of a run, at most ``most``.

    The store reads forwards only, so this searches for the end: of n events it reads about
    2 log2(n / most) besides the returned ones.
    """
    take = min(most, store.limits.page_size)
    events = list(await store.get_run_events(run_id, take=take))
    if len(events) < take:
        return events
    # Event ``low`` exists, and none after ``high``.
    low = events[-1].sequence
    high = min(2 * low, MAX_INT64)
    while found := await store.get_run_events(run_id, after=high, take=1):
        low = found[-1].sequence
        high = min(2 * low, MAX_INT64)
    while low < high:
        middle = (low + high) // 2
        if found := await store.get_run_events(run_id, after=middle, take=1):
            low = found[-1].sequence
        else:
            high = middle
    window = most
    while True:
        events = []
        after = max(low - window, 0)
        while page := await store.get_run_events(run_id, after=after, take=store.limits.page_size):
            events += page
            after = page[-1].sequence
        if len(events) >= most or window >= low:
            return events[-most:]
        # The sequence has gaps.
        window *= 2
