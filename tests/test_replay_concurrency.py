"""Concurrent steps of the reference engine, and its requests."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest

from flowstore_core import (
    FlowStore,
    OutcomeUnknownError,
    RunStatus,
    StepStatus,
    StoreUnavailableError,
    new_run_id,
    open_store,
)
from flowstore_replay import Engine, Requests, Task, Workflow, WorkflowError, verify
from flowstore_replay.engine import StepContext
from flowstore_replay.work import output_of
from tests.test_replay_crashes import QUEUE, HookedStore, Killed, KilledStore, complete, diamond

LEASE = timedelta(minutes=5)
SHORT_LEASE = timedelta(seconds=0.3)
"""For tests in which an engine takes over steps of a killed one."""


def chain(length: int) -> Workflow:
    """step-0 -> step-1 -> ..."""
    parents = [(), *((f"step-{number}",) for number in range(length - 1))]
    tasks = (
        Task(key=f"step-{number}", name="test", parents=parents[number], seconds=0)
        for number in range(length)
    )
    return Workflow(name="chain", tasks=tuple(tasks))


@pytest.fixture
async def store() -> AsyncIterator[FlowStore]:
    async with open_store("memory://") as opened:
        yield opened


async def start(store: FlowStore, workflow: Workflow, runs: int) -> list[UUID]:
    run_ids = [new_run_id() for _ in range(runs)]
    for run_id in run_ids:
        roots = Requests(workflow, QUEUE).roots
        await store.trigger_run(workflow.flow_id, workflow.name, run_id, "test", dispatch=roots)
    return run_ids


class Work:
    """Work that counts concurrent steps."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.done: list[tuple[UUID, str]] = []
        self.five_are_done = asyncio.Event()
        self.running = self.max_running = 0

    async def __call__(self, context: StepContext) -> str:
        self.running += 1
        self.max_running = max(self.max_running, self.running)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.running -= 1
        self.done.append((context.run_id, context.task.key))
        if len(self.done) == 5:
            self.five_are_done.set()
        return output_of(context.task, context.inputs)


def engine(
    store: Any, workflow: Workflow, work: Work, concurrency: int, name: str = "one", lease: timedelta = LEASE
) -> Engine:
    return Engine(store, workflow, work, queue=QUEUE, name=name, lease=lease, concurrency=concurrency)


async def assert_succeeded(store: FlowStore, workflow: Workflow, run_ids: list[UUID]) -> None:
    summary = await verify(store, workflow, run_ids)
    assert summary.ok, [check for check in summary.checks if not check.ok]


class ConcurrentWork(Work):
    """Work that waits until ``size`` steps are in progress at the same time."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size
        self._is_complete = asyncio.Event()

    async def __call__(self, context: StepContext) -> str:
        if self.running + 1 == self._size:
            self._is_complete.set()
        self.running += 1
        await self._is_complete.wait()
        self.running -= 1
        return await super().__call__(context)


async def test_concurrent_steps_run_once_each(store: FlowStore) -> None:
    workflow, work = diamond(), ConcurrentWork(8)
    run_ids = await start(store, workflow, 12)
    await complete(engine(store, workflow, work, 8), store, run_ids)
    assert work.max_running == 8
    assert len(work.done) == len(set(work.done)) == 60
    await assert_succeeded(store, workflow, run_ids)


async def test_steps_of_one_run_run_concurrently(store: FlowStore) -> None:
    tasks = tuple(Task(key=f"step-{number}", name="test", parents=(), seconds=0) for number in range(6))
    workflow, work = Workflow(name="wide", tasks=tasks), ConcurrentWork(2)
    run_ids = await start(store, workflow, 1)
    await complete(engine(store, workflow, work, 6), store, run_ids)
    await assert_succeeded(store, workflow, run_ids)


async def test_an_engine_ends_although_its_work_swallows_the_cancellation_and_may_run_again(
    store: FlowStore,
) -> None:
    tasks = tuple(Task(key=f"step-{number}", name="test", parents=(), seconds=0) for number in range(6))
    workflow, working = Workflow(name="wide", tasks=tasks), asyncio.Event()

    class Stubborn(Work):
        started = 0

        async def __call__(self, context: StepContext) -> str:
            self.started += 1
            if self.started <= 2:
                try:
                    if self.started == 2:
                        working.set()
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    return output_of(context.task, context.inputs)
            return await super().__call__(context)

    work = Stubborn()
    one = engine(store, workflow, work, 2, lease=SHORT_LEASE)
    run_ids = await start(store, workflow, 1)
    async with asyncio.timeout(60):
        running = asyncio.create_task(one.run())
        await working.wait()
        running.cancel()
        await asyncio.wait({running})
        assert work.started == 2
        await complete(one, store, run_ids)
    await assert_succeeded(store, workflow, run_ids)


async def test_work_that_has_ended_may_cancel_its_task(store: FlowStore) -> None:
    workflow, workers = chain(1), []

    class Recording(Work):
        async def __call__(self, context: StepContext) -> str:
            workers.append(asyncio.current_task())
            return await super().__call__(context)

    one = engine(store, workflow, Recording(), 2)
    run_ids = await start(store, workflow, 1)
    running = asyncio.create_task(one.run())
    async with asyncio.timeout(60):
        await store.wait_for_run(run_ids[0], timeout=LEASE)
        # The worker is idle: the result of its step has been recorded.
        workers[0].cancel()
        run_ids += await start(store, workflow, 1)
        ended = asyncio.ensure_future(store.wait_for_run(run_ids[1], timeout=LEASE))
        await asyncio.wait({ended, running}, return_when=asyncio.FIRST_COMPLETED)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    await assert_succeeded(store, workflow, run_ids)


async def test_one_task_does_all_work_that_does_not_wait(store: FlowStore) -> None:
    workflow, tasks = chain(3), set()

    class Recording(Work):
        async def __call__(self, context: StepContext) -> str:
            tasks.add(asyncio.current_task())
            return output_of(context.task, context.inputs)

    run_ids = await start(store, workflow, 50)
    await complete(engine(store, workflow, Recording(), 50), store, run_ids)
    await assert_succeeded(store, workflow, run_ids)
    # The first one wakes a second one, in case the work waits.
    assert len(tasks) <= 2


async def test_a_step_costs_one_claim_and_one_advance(store: FlowStore) -> None:
    workflow = chain(20)
    run_ids = await start(store, workflow, 1)
    names: list[str] = []

    class Recording(HookedStore):
        async def before(self, name: str) -> None:
            names.append(name)

    await complete(engine(Recording(store), workflow, Work(), 1), store, run_ids)
    assert names.count("advance_runs") == 20
    assert set(names) == {"claim_next_steps", "advance_runs", "wait_for_steps", "get_runs_to_stop"}
    await assert_succeeded(store, workflow, run_ids)


async def test_two_engines_share_a_queue(store: FlowStore) -> None:
    tasks = tuple(Task(key=f"step-{number}", name="test", parents=(), seconds=0) for number in range(8))
    workflow, work = Workflow(name="wide", tasks=tasks), ConcurrentWork(8)
    run_ids = await start(store, workflow, 1)
    # Neither engine may claim more steps than it has slots: all eight have to run at once.
    engines = [engine(store, workflow, work, 4, name) for name in ("one", "two")]
    await asyncio.gather(*(complete(each, store, run_ids) for each in engines))
    await assert_succeeded(store, workflow, run_ids)


def test_a_workflow_that_exceeds_the_limits_of_the_store_is_refused() -> None:
    tasks = [Task(key="first", name="test", parents=(), seconds=0)]
    tasks += [Task(key=f"step-{n}", name="test", parents=("first",), seconds=0) for n in range(1001)]
    with pytest.raises(WorkflowError, match="step 'first' makes 1,001 steps possible"):
        Requests(Workflow(name="wide", tasks=tuple(tasks)), QUEUE)


@pytest.mark.parametrize("seed", range(8))
async def test_runs_of_killed_engines_with_several_slots_are_completed(store: FlowStore, seed: int) -> None:
    rng = random.Random(seed)
    workflow, work = diamond(), Work()
    run_ids = await start(store, workflow, 6)

    class Interleaved(KilledStore):
        async def before(self, name: str) -> None:
            for _ in range(rng.randint(0, 3)):
                await asyncio.sleep(0)
            await super().before(name)

    stores = [Interleaved(store, rng.randint(5, 120)) for _ in range(3)]
    engines = [
        engine(each, workflow, work, 4, f"engine-{number}", SHORT_LEASE) for number, each in enumerate(stores)
    ]

    async def run(each: Engine) -> None:
        with contextlib.suppress(Killed):
            await complete(each, store, run_ids)

    await asyncio.gather(*map(run, engines))
    await complete(engine(store, workflow, work, 4, "last", SHORT_LEASE), store, run_ids)
    await assert_succeeded(store, workflow, run_ids)


@pytest.mark.parametrize("seed", range(4))
async def test_runs_succeed_on_an_intermittent_store(
    store: FlowStore, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr("flowstore_replay.retry.RETRY_INTERVAL", 0.005)

    class Flaky(HookedStore):
        async def before(self, name: str) -> None:
            if rng.random() < 0.1:
                raise StoreUnavailableError("not now")

        async def after(self, name: str) -> None:
            if rng.random() < 0.1:
                raise OutcomeUnknownError(name)

    workflow = diamond()
    run_ids = await start(store, workflow, 4)
    await complete(engine(Flaky(store), workflow, Work(), 3, lease=SHORT_LEASE), store, run_ids)
    await assert_succeeded(store, workflow, run_ids)


async def test_a_cancel_takes_effect_between_short_steps(store: FlowStore) -> None:
    workflow, work = chain(10_000), Work(0.001)
    run_ids = await start(store, workflow, 1)
    running = asyncio.create_task(complete(engine(store, workflow, work, 2), store, run_ids))
    await work.five_are_done.wait()
    await store.request_cancel(run_ids[0], "changed my mind")
    await asyncio.wait_for(running, 100)
    assert await store.get_run_status(run_ids[0]) is RunStatus.CANCELLED
    assert len(work.done) < 10_000


async def test_a_concurrently_reopened_step_is_executed_again(store: FlowStore) -> None:
    workflow, work = chain(400), Work(0.002)
    run_ids = await start(store, workflow, 1)
    running = asyncio.create_task(complete(engine(store, workflow, work, 1), store, run_ids))
    await work.five_are_done.wait()
    await store.retry_step(run_ids[0], "step-0", dispatch=Requests(workflow, QUEUE).roots)
    await running
    assert work.done.count((run_ids[0], "step-0")) == 2
    statuses = await store.get_step_statuses(run_ids[0])
    assert set(statuses.values()) == {StepStatus.SUCCEEDED}


async def test_an_error_in_one_slot_stops_all_slots(store: FlowStore) -> None:
    class Broken(Work):
        async def __call__(self, context: StepContext) -> str:
            if context.task.key == "left":
                raise RuntimeError("a defect")
            return await super().__call__(context)

    workflow = diamond()
    run_ids = await start(store, workflow, 3)
    with pytest.raises(RuntimeError, match="a defect"):
        await complete(engine(store, workflow, Broken(), 3), store, run_ids)
    assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
