"""Opening under stress: many processes, a killed process, cancelled calls (CON-6).

The conformance suite checks open stores, and opening within one process.
"""

from __future__ import annotations

import asyncio

import pytest

from flowstore_core import Capability, RunStatus, open_store
from tests.calls import new_run
from tests.virtual_clock import VirtualClock
from tests.worker import Call, Worker, WorkerPool


@pytest.mark.needs(Capability.MULTI_PROCESS)
async def test_con_6_twelve_processes_open_a_new_store_concurrently(
    namespace: str, clock: VirtualClock, worker_pool: WorkerPool
) -> None:
    workers = worker_pool.get(12)
    opened = await asyncio.gather(*(worker.request("open", namespace, clock()) for worker in workers))
    assert opened == [None] * 12
    async with open_store(namespace, clock=clock) as store:
        run_id = await new_run(store)
        calls: list[Call] = [
            ("try_claim_step", {"run_id": run_id, "step_key": "a"}),
            ("append_event", {"run_id": run_id, "event_type": "opened"}),
        ]
        await asyncio.gather(*(worker.request("prepare", calls) for worker in workers))
        results = await asyncio.gather(*(worker.request("go") for worker in workers))
        await asyncio.gather(*(worker.request("close") for worker in workers))
        assert sum(claimed for claimed, _ in results) == 1
        assert sorted(sequence for _, sequence in results) == list(range(1, 13))


@pytest.mark.needs(Capability.DURABLE)
async def test_con_6_a_store_opens_after_a_process_was_killed_while_opening(
    namespace: str, clock: VirtualClock
) -> None:
    # The process is killed while it starts, connects or migrates, or later.
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
    for yields, task in enumerate(opening):
        for _ in range(yields):
            await asyncio.sleep(0)
        task.cancel()
    results = await asyncio.gather(*opening, return_exceptions=True)
    assert {type(result) for result in results} <= {type(None), asyncio.CancelledError}
    async with open_store(namespace, clock=clock) as store:
        run_id = await new_run(store)
        assert await store.get_run_status(run_id) is RunStatus.RUNNING
    assert asyncio.all_tasks() == before


async def test_con_4_a_cancelled_close_finishes_before_it_raises(namespace: str, clock: VirtualClock) -> None:
    before = asyncio.all_tasks()
    for yields in range(1, 12):
        opened = open_store(namespace, clock=clock)
        store = await opened.__aenter__()
        pending = [asyncio.ensure_future(store.get_runs()) for _ in range(3)]
        closing = asyncio.ensure_future(opened.__aexit__(None, None, None))
        for _ in range(yields):
            await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait({closing})
        # The event loop may end at this moment and destroy running tasks.
        assert not closing.cancelled() or asyncio.all_tasks() - before <= set(pending)
        await asyncio.gather(*pending, return_exceptions=True)
    assert asyncio.all_tasks() == before
