"""Queues on the document toolkit: what claims read, and how the claims of one store share it (QUE-2)."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection, Sequence
from contextlib import AsyncExitStack
from datetime import datetime, timedelta
from uuid import UUID

import pytest

from flowstore_core import ClaimedStep, RunStatus, StoreUnavailableError
from flowstore_documents import DocumentStore, Range, View, ready_steps
from flowstore_documents.memory_space import Fault, MemoryData, MemorySpace
from tests.calls import new_run
from tests.documents_backend.stores import CountingSpace, open_on
from tests.virtual_clock import VirtualClock

LEASE = timedelta(hours=1)


@pytest.fixture
def data() -> MemoryData:
    return MemoryData()


def step_keys(*, count: int) -> list[str]:
    return [f"step {number:04}" for number in range(count)]


async def fill(store: DocumentStore, queue: str, *, count: int) -> UUID:
    """Dispatch steps of a new run to a queue."""
    run_id = await new_run(store)
    for key in step_keys(count=count):
        await store.try_record_dispatch(run_id, key, queue=queue, step_type="http")
    return run_id


def keys_of(claimed: Sequence[ClaimedStep]) -> list[str]:
    return [step.step_key for step in claimed]


class VisitingSpace(MemorySpace):
    """Counts the ranges that are read, and the keys in all of them, whatever their limits."""

    ranges: int = 0
    visited: int = 0

    async def read(
        self, keys: Collection[bytes], ranges: Sequence[Range] = (), *, at: object | None = None
    ) -> View:
        self.ranges += len(ranges)
        counted = [Range(one.start, one.end, 0, count=True) for one in ranges]
        for page in (await super().read((), counted)).pages:
            self.visited += page.count or 0
        return await super().read(keys, ranges, at=at)


async def test_a_claim_costs_the_same_in_a_queue_of_any_length(data: MemoryData) -> None:
    space = VisitingSpace(data)
    async with open_on(space) as store:
        run_id = await new_run(store)
        for key in step_keys(count=3_000):
            await store.try_record_dispatch(run_id, key, queue="long", step_type="http")
        space.visited = 0
        claimed = [await store.claim_next_steps(["long"], lease=LEASE) for _ in range(400)]
    assert [step.step_key for (step,) in claimed] == step_keys(count=400)
    # At most twice all steps, and 500 steps for each claim.
    assert space.visited < 2 * 3_000 + 400 * 500


@pytest.fixture
def short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ready_steps, "LONG_QUEUE", 50)
    monkeypatch.setattr(ready_steps, "WINDOW", 25)
    monkeypatch.setattr(ready_steps, "COUNTED", 4)


@pytest.mark.usefixtures("short_windows")
async def test_a_queue_that_was_long_is_read_as_one_range_again(data: MemoryData) -> None:
    space = VisitingSpace(data)
    async with open_on(space) as store:

        async def claim() -> list[str]:
            return [step.step_key for step in await store.claim_next_steps(["jobs"], lease=LEASE)]

        run_id = await new_run(store)
        for key in step_keys(count=100):
            await store.try_record_dispatch(run_id, key, queue="jobs", step_type="http")
        assert [await claim() for _ in range(100)] == [[key] for key in step_keys(count=100)]
        # The steps of an ended run are in no queue.
        await store.complete_run(run_id, RunStatus.SUCCEEDED)
        for _ in range(30):
            assert await claim() == []
        space.ranges = 0
        for _ in range(10):
            assert await claim() == []
    # One, and that of the intents; each priority is a range of a long queue.
    assert space.ranges == 10 * 2


@pytest.mark.usefixtures("short_windows")
async def test_a_window_that_grows_is_replaced(data: MemoryData) -> None:
    """Steps that are due earlier than the window's last one enter it."""
    space, clock = VisitingSpace(data), VirtualClock()
    async with open_on(space, clock=clock) as store:
        run_id = await new_run(store)
        later = clock.now + timedelta(days=1)
        for number in range(60):
            await store.try_record_dispatch(
                run_id, f"later {number}", queue="long", step_type="http", due_at=later
            )
        assert await store.claim_next_steps(["long"], lease=LEASE) == ()
        for key in step_keys(count=300):
            await store.try_record_dispatch(run_id, key, queue="long", step_type="http")
        space.visited = 0
        claimed = [await store.claim_next_steps(["long"], lease=LEASE) for _ in range(100)]
    assert [step.step_key for (step,) in claimed] == step_keys(count=100)
    # Without a new window each claim visits the 325 steps of the old one.
    assert space.visited < 100 * 325 / 2


@pytest.mark.usefixtures("short_windows")
async def test_each_of_several_queues_that_are_polled_in_turn_has_a_window(data: MemoryData) -> None:
    space = VisitingSpace(data)
    async with open_on(space) as store:
        run_id = await new_run(store)
        for key in step_keys(count=300):
            await store.try_record_dispatch(run_id, key, queue="long", step_type="http")
        for number in range(220):
            if number == 200:
                space.visited = 0
            assert await store.claim_next_steps(["empty"], lease=LEASE) == ()
            assert len(await store.claim_next_steps(["long"], lease=LEASE)) == 1
    # Without a window each of 20 claims visits all 300 steps.
    assert space.visited < 20 * 300 / 2


@pytest.mark.parametrize("snapshots", [True, False])
async def test_claims_from_windows_of_long_queues_keep_their_order(
    data: MemoryData, monkeypatch: pytest.MonkeyPatch, snapshots: bool
) -> None:
    monkeypatch.setattr(ready_steps, "SHORT_QUEUE", 1)
    monkeypatch.setattr(ready_steps, "LONG_QUEUE", 5)
    monkeypatch.setattr(ready_steps, "WINDOW", 3)
    monkeypatch.setattr(ready_steps, "COUNTED", 4)
    rng = random.Random(5)
    clock = VirtualClock()
    async with AsyncExitStack() as stack:
        stores = [
            await stack.enter_async_context(open_on(MemorySpace(data, snapshots=snapshots), clock=clock))
            for _ in range(2)
        ]
        run_id = await new_run(stores[0])
        waiting: dict[str, tuple[int, datetime, str]] = {}
        for number in range(600):
            store = rng.choice(stores)
            if rng.random() < (0.8 if number < 300 else 0.2):
                key, priority = f"{number:04}", rng.choice([0, 0, 0, 7])
                due_at = clock.now + timedelta(seconds=rng.randrange(-50, 5))
                await store.try_record_dispatch(
                    run_id, key, queue="long", step_type="http", priority=priority, due_at=due_at
                )
                waiting[key] = -priority, due_at, key
            else:
                limit = rng.choice([1, 1, 4])
                claimed = await store.claim_next_steps(["long"], lease=LEASE, limit=limit)
                ready = sorted(found for found in waiting.values() if found[1] <= clock.now)[:limit]
                assert [step.step_key for step in claimed] == [key for _, _, key in ready]
                for step in claimed:
                    del waiting[step.step_key]
            clock.advance(seconds=rng.random())


async def test_concurrent_claims_of_a_queue_share_what_they_read(data: MemoryData) -> None:
    space = VisitingSpace(data)
    async with open_on(space) as store:
        await fill(store, "jobs", count=60)
        space.visited = 0
        calls = [store.claim_next_steps(["jobs"], lease=LEASE) for _ in range(64)]
        claimed = await asyncio.gather(*calls)
    # In the order of the calls; the last four find no step.
    assert [keys_of(one) for one in claimed] == [*([key] for key in step_keys(count=60)), *([[]] * 4)]
    assert space.visited < 64 * 5


async def test_claims_that_share_a_read_get_as_many_steps_as_each_asked_for(
    data: MemoryData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ready_steps, "MAX_TOGETHER", 10)
    limits = [1, 12, 3, 7, 4, 1]
    async with open_on(MemorySpace(data)) as store:
        await fill(store, "jobs", count=26)
        calls = [store.claim_next_steps(["jobs"], lease=LEASE, limit=limit) for limit in limits]
        claimed = await asyncio.gather(*calls)
    assert list(map(len, claimed)) == [1, 12, 3, 7, 3, 0]
    assert [key for one in claimed for key in keys_of(one)] == step_keys(count=26)


async def test_concurrent_claims_of_overlapping_queues_leave_no_ready_step(data: MemoryData) -> None:
    async with open_on(MemorySpace(data)) as store:
        await fill(store, "first", count=40)
        await fill(store, "second", count=40)
        calls = [
            store.claim_next_steps(queues, lease=LEASE)
            for _ in range(40)
            for queues in (["first", "second"], ["second", "first"])
        ]
        claimed = await asyncio.gather(*calls)
        assert list(map(len, claimed)) == [1] * 80
        assert len({(step.run_id, step.step_key) for (step,) in claimed}) == 80


@pytest.mark.parametrize("loops", range(0, 24, 3))
async def test_a_cancelled_claim_keeps_no_step_from_the_others(data: MemoryData, loops: int) -> None:
    async with open_on(MemorySpace(data)) as store:
        await fill(store, "jobs", count=20)
        calls = [asyncio.create_task(store.claim_next_steps(["jobs"], lease=LEASE)) for _ in range(20)]
        for _ in range(loops):
            await asyncio.sleep(0)
        for call in calls[::2]:
            call.cancel()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        claimed = [key for one in outcomes if not isinstance(one, BaseException) for key in keys_of(one)]
        # A cancelled call gives its step back in the background.
        async with asyncio.timeout(60):
            while len(claimed) < 20:
                claimed += keys_of(await store.claim_next_steps(["jobs"], lease=LEASE, limit=20))
    assert sorted(claimed) == step_keys(count=20)


async def test_claims_that_wait_for_each_other_end_with_the_retries(data: MemoryData) -> None:
    """While the space cannot be reached, a hundred claims of one queue take not longer than one."""
    space = CountingSpace(data)
    async with open_on(space, retry_timeout=1.0) as store:
        await fill(store, "jobs", count=3)
        space.arm(Fault.NOT_APPLIED, isolates=True)
        async with asyncio.timeout(30):
            calls = [store.claim_next_steps(["jobs"], lease=LEASE) for _ in range(100)]
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {StoreUnavailableError}
        space.disarm()
        assert len(await store.claim_next_steps(["jobs"], lease=LEASE, limit=9)) == 3
