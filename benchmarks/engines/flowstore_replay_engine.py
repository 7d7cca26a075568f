"""flowstore: the reference engine with empty work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from time import perf_counter
from uuid import UUID

from benchmarks.peer_workers import start_workers
from benchmarks.results import Sample
from benchmarks.workload import CHUNK, OUTPUT, STEPS_PER_RUN, StoreRecords, WrongAnswerError
from flowstore_core import FlowStore, new_run_id, open_store
from flowstore_replay import Engine, Requests, Task, Workflow
from flowstore_replay.engine import StepContext

STEP = (
    "one step of a run of eight, one after another, by one worker of flowstore_replay that does as many "
    "steps at once as the concurrency says: claimed with an owner and a lease, started with its input, run, "
    "and completed with its output, the input of the next step, which is dispatched in the same transaction; "
    "the last step completes the run. Runs are triggered beforehand, each with its first step dispatched"
)
LEASE = timedelta(seconds=30)
QUEUE = "chain"
LOOK_INTERVAL = 0.01
"""Seconds between two looks for runs in progress."""
CHAIN = Workflow(
    name="chain",
    tasks=tuple(
        Task(
            key=f"step-{number}",
            name="task",
            parents=(f"step-{number - 1}",) if number else (),
            seconds=0.0,
        )
        for number in range(STEPS_PER_RUN)
    ),
)


CHAIN_REQUESTS = Requests(CHAIN, QUEUE)


Work = Callable[[int], Awaitable[Sample]]
"""Does a number of steps, which is rounded up to whole runs."""


@asynccontextmanager
async def engine(url: str, concurrency: int, processes: int = 1) -> AsyncIterator[Work]:
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(open_store(url))
        records = StoreRecords(store)
        workers = None
        if processes > 1:
            workers = await stack.enter_async_context(start_workers(__name__, url, concurrency, processes))

        async def work(amount: int) -> Sample:
            run_ids = [new_run_id() for _ in range(-(-amount // STEPS_PER_RUN))]
            step = _Step(len(run_ids) * STEPS_PER_RUN)
            await _trigger(store, run_ids)
            began = perf_counter()
            if workers is None:
                running = asyncio.create_task(_engine(store, step, concurrency).run())
                await step.all_done.wait()
            else:
                workers.tell()
            while await store.get_active_runs(take=1):  # noqa: ASYNC110 - one look at all runs
                await asyncio.sleep(LOOK_INTERVAL)
            seconds = perf_counter() - began
            if workers is None:
                running.cancel()
                await asyncio.wait({running})
            else:
                await workers.stop()
            done = await records.count_completed(run_ids)
            if done != len(run_ids) * STEPS_PER_RUN:
                raise WrongAnswerError(f"{done} steps of {len(run_ids)} runs were completed")
            return Sample(done, rate=done / seconds)

        yield work


@asynccontextmanager
async def worker(url: str, concurrency: int) -> AsyncIterator[Callable[[Awaitable[object]], Awaitable[int]]]:
    """One worker process, which works until it is told to stop."""
    async with open_store(url) as store:

        async def work(stopped: Awaitable[object]) -> int:
            step = _Step()
            running = asyncio.create_task(_engine(store, step, concurrency).run())
            await stopped
            running.cancel()
            await asyncio.wait({running})
            return step.done

        yield work


def _engine(store: FlowStore, step: _Step, concurrency: int) -> Engine:
    return Engine(store, CHAIN, step, queue=QUEUE, name="worker", lease=LEASE, concurrency=concurrency)


async def _trigger(store: FlowStore, run_ids: Sequence[UUID]) -> None:
    for start in range(0, len(run_ids), CHUNK):
        triggers = (
            store.trigger_run(CHAIN.flow_id, CHAIN.name, run_id, "bench", dispatch=CHAIN_REQUESTS.roots)
            for run_id in run_ids[start : start + CHUNK]
        )
        await asyncio.gather(*triggers)


class _Step:
    """The work of each step; it counts them."""

    def __init__(self, amount: int | None = None) -> None:
        self.done = 0
        self._amount = amount
        self.all_done = asyncio.Event()

    async def __call__(self, context: StepContext) -> str:
        self.done += 1
        if self.done == self._amount:
            self.all_done.set()
        return OUTPUT
