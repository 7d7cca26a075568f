"""Contention beyond the races of the conformance suite (CON-1, CON-2)."""

from __future__ import annotations

import asyncio
import threading

from flowstore_core import FlowStore, open_store
from tests.calls import FLOW, new_run, together
from tests.conftest import OpenSecondStore


async def test_con_1_event_loops_in_several_threads_share_a_store(store: FlowStore, namespace: str) -> None:
    run_id = await new_run(store)
    keys = [f"step {n}" for n in range(30)]
    claimed: dict[int, list[str]] = {}
    numbers: list[int] = []
    barrier = threading.Barrier(4)

    async def work(thread: int) -> None:
        async with open_store(namespace) as thread_store:
            await asyncio.to_thread(barrier.wait)
            results = await together(
                thread_store.try_claim_step(run_id, key, owner=str(thread)) for key in keys
            )
            claimed[thread] = [key for key, result in zip(keys, results, strict=True) if result]
            numbers.extend(
                [await thread_store.record_step_start(run_id, "shared", "http") for _ in range(10)]
            )

    await together(asyncio.to_thread(asyncio.run, work(thread)) for thread in range(4))
    assert sorted(key for claims in claimed.values() for key in claims) == sorted(keys)
    assert {c.step_key: c.owner for c in await store.get_step_claims(run_id)} == {
        key: str(thread) for thread, claims in claimed.items() for key in claims
    }
    assert sorted(numbers) == list(range(1, 41))


async def test_con_2_concurrent_writes_of_one_run_all_succeed(
    store: FlowStore, open_second_store: OpenSecondStore
) -> None:
    stores = [store, await open_second_store(), await open_second_store()]
    run_id = await new_run(store)

    async def write(number: int) -> None:
        own_store = stores[number % 3]
        for round_ in range(6):
            await own_store.save_output(run_id, "out", f"{number} {round_}")
            await own_store.append_event(run_id, f"{number}")
            await own_store.try_claim_step(run_id, "poll")
            await own_store.record_step_start(run_id, "poll", "http")
            await own_store.release_step_claim(run_id, "poll")
            await own_store.register_waiter(run_id, "poll", "go")
            await own_store.deliver_signal(run_id, "go", "{}")
            await own_store.configure_run(run_id, FLOW, f"trigger {number}")
            await own_store.get_run_detail(run_id)

    # No call fails: the store retries conflicts.
    await together(write(number) for number in range(12))
    events = await store.get_run_events(run_id)
    assert [event.sequence for event in events] == list(range(1, 73))
    detail = await store.get_run_detail(run_id)
    assert detail is not None
    assert [attempt.attempt for attempt in detail.steps[0].attempts] == list(range(1, 73))
