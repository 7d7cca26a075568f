"""flowstore: the reference engine with empty work."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from time import perf_counter

from benchmarks.results import Sample
from benchmarks.workload import OUTPUT, STEPS_PER_RUN, StoreRecords, WrongAnswerError
from flowstore_core import new_run_id, open_store
from flowstore_replay import Engine, Task, Workflow
from flowstore_replay.engine import StepContext

STEP = (
    "one step of a run of eight, one after another, by one worker of flowstore_replay that does as many "
    "steps at once as the concurrency says: recorded in the dispatch ledger, claimed with an owner and a "
    "lease, started with its input, run, completed with its output, the input of the next step; the run is "
    "completed after its last step. Runs are started beforehand"
)
LEASE = timedelta(seconds=30)
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


@asynccontextmanager
async def engine(url: str, concurrency: int) -> AsyncIterator[Callable[[int], Awaitable[Sample]]]:
    async with open_store(url) as store:
        records = StoreRecords(store)

        async def work(amount: int) -> Sample:
            run_ids = [new_run_id() for _ in range(-(-amount // STEPS_PER_RUN))]
            await records.add_runs(run_ids)
            worker = Engine(store, CHAIN, _step, name="worker", lease=LEASE, concurrency=concurrency)
            began = perf_counter()
            await worker.run(run_ids)
            seconds = perf_counter() - began
            done = await records.count_completed(run_ids)
            left = {run.run_id for run in await store.get_active_runs()}
            if done != len(run_ids) * STEPS_PER_RUN or left:
                raise WrongAnswerError(f"{done} steps of {len(run_ids)} runs were completed")
            return Sample(done, rate=done / seconds)

        yield work


async def _step(context: StepContext) -> str:
    return OUTPUT
