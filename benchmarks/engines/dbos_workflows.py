"""DBOS: concurrent workflows of eight steps."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any

from dbos import DBOS

from benchmarks.results import Sample
from benchmarks.workload import INPUT, OUTPUT, STEPS_PER_RUN, WrongAnswerError

STEP = (
    "one step of a workflow of eight: run, its output stored. Starting the workflow and storing its result "
    "belong to the time; workflows run in this process, as without a queue"
)
POOL = 20


async def _step(text: str) -> str:
    return OUTPUT


@asynccontextmanager
async def engine(url: str, concurrency: int) -> AsyncIterator[Callable[[int], Awaitable[Sample]]]:
    database_url = url.replace("postgresql://", "postgresql+psycopg://", 1)
    config: Any = {
        "name": "benchmark",
        "system_database_url": database_url,
        "sys_db_pool_size": POOL,
        "log_level": "ERROR",
        "run_admin_server": False,
    }
    DBOS(config=config)
    step: Any = DBOS.step(name="step")(_step)

    async def flow(order: str) -> int:
        for _ in range(STEPS_PER_RUN):
            await step(order)
        return STEPS_PER_RUN

    workflow: Any = DBOS.workflow(name="flow")(flow)
    DBOS.launch()

    async def worker(source: Iterator[int], done: list[int]) -> None:
        for _ in source:
            handle = await DBOS.start_workflow_async(workflow, INPUT)
            done.append(await handle.get_result())

    async def succeeded() -> int:
        return len(await DBOS.list_workflows_async(status="SUCCESS", load_input=False, load_output=False))

    async def work(amount: int) -> Sample:
        before = await succeeded()
        workflows = -(-amount // STEPS_PER_RUN)
        source = iter(range(workflows))
        done: list[int] = []
        began = perf_counter()
        await asyncio.gather(*(worker(source, done) for _ in range(concurrency)))
        seconds = perf_counter() - began
        if await succeeded() - before != workflows or sum(done) != workflows * STEPS_PER_RUN:
            raise WrongAnswerError(f"{len(done)} workflows of {workflows} succeeded")
        return Sample(sum(done), rate=sum(done) / seconds)

    try:
        yield work
    finally:
        await asyncio.to_thread(DBOS.destroy, destroy_registry=True)
