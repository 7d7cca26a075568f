"""More at once than the conformance suite's races dare to ask of any backend (CON-1, CON-2)."""

from __future__ import annotations

import asyncio
import threading

from flowstore_core import FlowStore, open_store
from tests.calls import FLOW, new_run, together
from tests.conftest import OpenAnother


async def test_con_1_several_event_loops_in_several_threads(store: FlowStore, namespace: str) -> None:
    run_id = await new_run(store)
    keys = [f"step {n}" for n in range(30)]
    won: dict[int, list[str]] = {}
    numbers: list[int] = []
    barrier = threading.Barrier(4)

    async def work(thread: int) -> None:
        async with open_store(namespace) as own:
            await asyncio.to_thread(barrier.wait)
            answers = await together(own.try_claim_step(run_id, key, owner=str(thread)) for key in keys)
            won[thread] = [key for key, answer in zip(keys, answers, strict=True) if answer]
            numbers.extend([await own.record_step_start(run_id, "shared", "http") for _ in range(10)])

    await together(asyncio.to_thread(asyncio.run, work(thread)) for thread in range(4))
    assert sorted(key for mine in won.values() for key in mine) == sorted(keys)
    assert {c.step_key: c.owner for c in await store.get_step_claims(run_id)} == {
        key: str(thread) for thread, mine in won.items() for key in mine
    }
    assert sorted(numbers) == list(range(1, 41))


async def test_con_2_hot_spots_are_survived(store: FlowStore, open_another: OpenAnother) -> None:
    stores = [store, await open_another(), await open_another()]
    run_id = await new_run(store)

    async def hammer(number: int) -> None:
        one = stores[number % 3]
        for turn in range(6):
            await one.save_output(run_id, "out", f"{number} {turn}")
            await one.append_event(run_id, f"{number}")
            await one.try_claim_step(run_id, "poll")
            await one.record_step_start(run_id, "poll", "http")
            await one.release_step_claim(run_id, "poll")
            await one.register_waiter(run_id, "poll", "go")
            await one.deliver_signal(run_id, "go", "{}")
            await one.configure_run(run_id, FLOW, f"trigger {number}")
            await one.get_run_detail(run_id)

    # No call gives up: what the store retries by itself is enough.
    await together(hammer(number) for number in range(12))
    events = await store.get_run_events(run_id)
    assert [event.sequence for event in events] == list(range(1, 73))
    detail = await store.get_run_detail(run_id)
    assert detail is not None
    assert [attempt.attempt for attempt in detail.steps[0].attempts] == list(range(1, 73))
