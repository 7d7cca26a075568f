"""flowstore: a minimal crash-safe worker loop on the store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from time import perf_counter
from uuid import UUID

from benchmarks.results import Sample
from benchmarks.workload import INPUT, OUTPUT, STEPS_PER_RUN, StoreRecords, WrongAnswerError
from flowstore_core import FlowStore, RunStatus, StepStatus, new_claim_token, new_run_id, open_store

STEP = (
    "one step of a run of eight: recorded in the dispatch ledger and annotated, claimed with an owner and a "
    "lease, started with its input, run, completed with its output; the run is completed after its "
    "last step. Runs are started beforehand"
)
LEASE = timedelta(seconds=30)


@asynccontextmanager
async def engine(url: str, concurrency: int) -> AsyncIterator[Callable[[int], Awaitable[Sample]]]:
    async with open_store(url) as store:
        records = StoreRecords(store)

        async def work(amount: int) -> Sample:
            run_ids = [new_run_id() for _ in range(-(-amount // STEPS_PER_RUN))]
            await records.add_runs(run_ids)
            source = iter(run_ids)
            began = perf_counter()
            await asyncio.gather(*(_worker(store, source) for _ in range(concurrency)))
            seconds = perf_counter() - began
            done = await records.count_completed(run_ids)
            if done != len(run_ids) * STEPS_PER_RUN:
                raise WrongAnswerError(f"{done} steps of {len(run_ids)} runs were completed")
            return Sample(done, rate=done / seconds)

        yield work


async def _worker(store: FlowStore, source: Iterator[UUID]) -> None:
    for run_id in source:
        for number in range(STEPS_PER_RUN):
            key, owner = f"step-{number}", new_claim_token()
            await store.try_record_dispatch(run_id, key)
            await store.annotate_dispatch(run_id, key, "job-4711")
            if not await store.try_claim_step(run_id, key, owner=owner, lease=LEASE):
                raise WrongAnswerError("a step of our own run was claimed by another")
            attempt = await store.record_step_start(run_id, key, "task", input_json=INPUT, owner=owner)
            output = await _step()
            await store.record_step_complete(
                run_id, key, StepStatus.SUCCEEDED, output_json=output, attempt=attempt
            )
        await store.complete_run(run_id, RunStatus.SUCCEEDED)


async def _step() -> str:
    return OUTPUT
