"""Opening under stress: many processes at once, a process that dies, a call that is cancelled (CON-6).

The conformance suite checks open stores, and opening within one process.
"""

from __future__ import annotations

import asyncio

import pytest

from flowstore_core import Capability, RunStatus, open_store
from tests.calls import new_run
from tests.virtual_clock import VirtualClock
from tests.worker import Call, Fleet, Worker


@pytest.mark.needs(Capability.MULTI_PROCESS)
async def test_con_6_twelve_processes_opening_a_new_store_at_once(
    namespace: str, clock: VirtualClock, fleet: Fleet
) -> None:
    workers = fleet.take(12)
    opened = await asyncio.gather(*(worker.ask("open", namespace, clock()) for worker in workers))
    assert opened == [None] * 12
    async with open_store(namespace, clock=clock) as store:
        run_id = await new_run(store)
        calls: list[Call] = [
            ("try_claim_step", {"run_id": run_id, "step_key": "a"}),
            ("append_event", {"run_id": run_id, "event_type": "opened"}),
        ]
        await asyncio.gather(*(worker.ask("prepare", calls) for worker in workers))
        answers = await asyncio.gather(*(worker.ask("go") for worker in workers))
        await asyncio.gather(*(worker.ask("close") for worker in workers))
        assert sum(claimed for claimed, _ in answers) == 1
        assert sorted(sequence for _, sequence in answers) == list(range(1, 13))


@pytest.mark.needs(Capability.DURABLE)
async def test_con_6_a_process_that_dies_while_it_opens_leaves_a_store_that_opens(
    namespace: str, clock: VirtualClock
) -> None:
    # Killed after a short delay: while starting, connecting, migrating or later.
    for acknowledged in (False, False, True):
        worker = Worker()
        try:
            await worker.send("open", namespace, clock())
            if acknowledged:
                assert await worker.receive() is None
        finally:
            worker.kill()
    async with open_store(namespace, clock=clock) as store:
        run_id = await new_run(store)
        assert await store.record_step_start(run_id, "charge", "http") == 1


async def test_con_4_opening_may_be_cancelled(namespace: str, clock: VirtualClock) -> None:
    before = asyncio.all_tasks()

    async def open_and_use() -> None:
        async with open_store(namespace, clock=clock) as store:
            await store.ping()

    # The first calls may be cancelled while they migrate.
    opening = [asyncio.create_task(open_and_use()) for _ in range(18)]
    for turns, task in enumerate(opening):
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
    answers = await asyncio.gather(*opening, return_exceptions=True)
    assert {type(answer) for answer in answers} <= {type(None), asyncio.CancelledError}
    async with open_store(namespace, clock=clock) as store:
        run_id = await new_run(store)
        assert await store.get_run_status(run_id) is RunStatus.RUNNING
    assert asyncio.all_tasks() == before


async def test_con_4_a_cancelled_close_has_ended_when_it_raises(namespace: str, clock: VirtualClock) -> None:
    before = asyncio.all_tasks()
    for turns in range(1, 12):
        opened = open_store(namespace, clock=clock)
        store = await opened.__aenter__()
        under_way = [asyncio.ensure_future(store.get_runs()) for _ in range(3)]
        closing = asyncio.ensure_future(opened.__aexit__(None, None, None))
        for _ in range(turns):
            await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait({closing})
        # The event loop may end at this moment and destroy running tasks.
        assert not closing.cancelled() or asyncio.all_tasks() - before <= set(under_way)
        await asyncio.gather(*under_way, return_exceptions=True)
    assert asyncio.all_tasks() == before
