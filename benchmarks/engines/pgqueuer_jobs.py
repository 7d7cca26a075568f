"""pgqueuer: jobs through its QueueManager, in batches."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from time import perf_counter

import asyncpg
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgPoolDriver
from pgqueuer.domain.types import QueueExecutionMode
from pgqueuer.models import Job
from pgqueuer.queries import Queries

from benchmarks.results import Sample
from benchmarks.workload import INPUT, WrongAnswerError

STEP = (
    "one job without output: enqueued with all others in one call, picked in batches of half the concurrency "
    "by the worker's dequeue, run, and logged as successful in batches"
)
CONNECTIONS = 10


@asynccontextmanager
async def engine(url: str, concurrency: int) -> AsyncIterator[Callable[[int], Awaitable[Sample]]]:
    logging.getLogger("pgqueuer").setLevel(logging.ERROR)
    async with asyncpg.create_pool(url, min_size=CONNECTIONS, max_size=CONNECTIONS) as pool:
        await Queries(AsyncpgPoolDriver(pool)).install()

        async def work(amount: int) -> Sample:
            done = 0

            async def step(job: Job) -> None:
                nonlocal done
                done += 1

            queue = PgQueuer(AsyncpgPoolDriver(pool))
            queue.entrypoint("step")(step)
            queries = Queries(AsyncpgPoolDriver(pool))
            began = perf_counter()
            await queries.enqueue(["step"] * amount, [INPUT.encode()] * amount, [0] * amount)
            await queue.qm.run(
                batch_size=max(1, concurrency // 2),
                max_concurrent_tasks=max(2, concurrency),
                mode=QueueExecutionMode.drain,
            )
            seconds = perf_counter() - began
            left = sum(one.count for one in await queries.queue_size())
            if done != amount or left:
                raise WrongAnswerError(f"{done} jobs of {amount} were run, {left} are left")
            return Sample(amount, rate=amount / seconds)

        yield work
