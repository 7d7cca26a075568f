"""EVT-1: the event log of a run."""

from __future__ import annotations

import asyncio
from uuid import uuid4

import pytest

from flowstore_core import Capability, FlowEventRecord, FlowStore
from tests.conftest import OpenAnother
from tests.contract.scenes import new_run, together
from tests.virtual_clock import VirtualClock

pytestmark = pytest.mark.needs(Capability.EVENTS)


async def test_evt_1_an_event_is_appended_with_its_sequence(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    first = clock()
    assert await store.append_event(run_id, "started") == 1
    second = clock.advance(seconds=1)
    assert await store.append_event(run_id, "charged", step_key="charge", message="10 €") == 2
    assert await store.get_run_events(run_id) == (
        FlowEventRecord(
            sequence=1, run_id=run_id, timestamp=first, event_type="started", step_key=None, message=None
        ),
        FlowEventRecord(
            sequence=2,
            run_id=run_id,
            timestamp=second,
            event_type="charged",
            step_key="charge",
            message="10 €",
        ),
    )


async def test_evt_1_sequences_are_per_run_and_by_commit_not_by_clock(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id, other = await new_run(store), await new_run(store)
    for number in range(1, 4):
        assert await store.append_event(run_id, f"event {number}") == number
        clock.advance(seconds=-1)
    assert await store.append_event(other, "event") == 1
    assert [e.event_type for e in await store.get_run_events(run_id)] == ["event 1", "event 2", "event 3"]


async def test_evt_1_after_and_take(store: FlowStore) -> None:
    run_id = await new_run(store)
    for number in range(1, 8):
        await store.append_event(run_id, f"event {number}")

    async def sequences(**arguments: int) -> list[int]:
        return [event.sequence for event in await store.get_run_events(run_id, **arguments)]

    assert await sequences() == [1, 2, 3, 4, 5, 6, 7]
    assert await sequences(after=5) == [6, 7]
    assert await sequences(after=7) == []
    assert await sequences(after=2**63 - 1) == []
    assert await sequences(take=0) == []
    assert await sequences(after=2, take=3) == [3, 4, 5]


async def test_evt_1_at_most_200_unless_asked_for_more(store: FlowStore) -> None:
    run_id = await new_run(store)
    await together(store.append_event(run_id, f"event {number}") for number in range(205))
    assert [e.sequence for e in await store.get_run_events(run_id)] == list(range(1, 201))
    assert len(await store.get_run_events(run_id, take=1000)) == 205


async def test_evt_1_sequences_rise_under_concurrency(store: FlowStore, open_another: OpenAnother) -> None:
    stores = [store, await open_another(), await open_another()]
    run_id = await new_run(store)
    sequences = await together(stores[n % 3].append_event(run_id, f"event {n}") for n in range(40))
    assert sorted(sequences) == list(range(1, 41))
    events = await store.get_run_events(run_id)
    assert [e.event_type for e in events] == [f"event {sequences.index(s)}" for s in range(1, 41)]


async def test_evt_1_no_event_appears_below_one_already_read(
    store: FlowStore, open_another: OpenAnother
) -> None:
    writers = [store, await open_another(), await open_another()]
    reader = await open_another()
    run_id = await new_run(store)
    total = 90

    async def write(n: int) -> None:
        for number in range(total // 3):
            await writers[n].append_event(run_id, f"{n} {number}")

    async def follow() -> list[str]:
        seen: list[str] = []
        last = 0
        while len(seen) < total:
            for event in await reader.get_run_events(run_id, after=last):
                assert event.sequence > last
                last = event.sequence
                seen.append(event.event_type)
            await asyncio.sleep(0)
        return seen

    following = asyncio.create_task(follow())
    await together(write(n) for n in range(3))
    # Who follows by the last sequence misses nothing.
    assert sorted(await following) == sorted(
        f"{n} {number}" for n in range(3) for number in range(total // 3)
    )


async def test_evt_1_events_of_an_unknown_run_are_empty(store: FlowStore) -> None:
    assert await store.get_run_events(uuid4()) == ()
