"""procrastinate: jobs through its asynchronous worker."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from time import perf_counter

from procrastinate import App, PsycopgConnector

from benchmarks.results import Sample
from benchmarks.workload import WrongAnswerError

STEP = (
    "one job without output: deferred with all others in one call, fetched, run and marked as succeeded by an"
    " asynchronous worker"
)
CONNECTIONS = 10


@asynccontextmanager
async def engine(url: str, concurrency: int) -> AsyncIterator[Callable[[int], Awaitable[Sample]]]:
    logging.getLogger("procrastinate").setLevel(logging.ERROR)
    app = App(connector=PsycopgConnector(conninfo=url, min_size=CONNECTIONS, max_size=CONNECTIONS))

    async def step(order: int) -> None:
        return None

    task = app.task(name="step", pass_context=False)(step)
    async with app.open_async():
        await app.schema_manager.apply_schema_async()

        async def succeeded() -> int:
            return sum(int(one["succeeded"]) for one in await app.job_manager.list_queues_async())

        async def work(amount: int) -> Sample:
            before = await succeeded()
            began = perf_counter()
            await task.batch_defer_async(*({"order": number} for number in range(amount)))
            await app.run_worker_async(concurrency=concurrency, wait=False, install_signal_handlers=False)
            seconds = perf_counter() - began
            done = await succeeded() - before
            if done != amount:
                raise WrongAnswerError(f"{done} jobs of {amount} succeeded")
            return Sample(amount, rate=amount / seconds)

        yield work
