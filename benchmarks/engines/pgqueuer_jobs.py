"""pgqueuer: jobs through its QueueManager, in batches."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from time import perf_counter

import asyncpg
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgPoolDriver
from pgqueuer.domain.types import QueueExecutionMode
from pgqueuer.models import Job
from pgqueuer.queries import Queries

from benchmarks.peer_workers import start_workers
from benchmarks.results import Sample
from benchmarks.workload import INPUT, WrongAnswerError

STEP = (
    "one job without output: enqueued with all others in one call, picked in batches of half the concurrency "
    "by the worker's dequeue, run, and logged as successful in batches"
)
CONNECTIONS = 10


@asynccontextmanager
async def engine(
    url: str, concurrency: int, processes: int = 1
) -> AsyncIterator[Callable[[int], Awaitable[Sample]]]:
    logging.getLogger("pgqueuer").setLevel(logging.ERROR)
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(_open_pool(url))
        queries = Queries(AsyncpgPoolDriver(pool))
        await queries.install()
        workers = None
        if processes > 1:
            workers = await stack.enter_async_context(start_workers(__name__, url, concurrency, processes))

        async def work(amount: int) -> Sample:
            began = perf_counter()
            await queries.enqueue(["step"] * amount, [INPUT.encode()] * amount, [0] * amount)
            if workers is None:
                done = await _drain(pool, concurrency)
            else:
                workers.tell()
                done = await workers.stop()
            seconds = perf_counter() - began
            left = sum(one.count for one in await queries.queue_size())
            if done != amount or left:
                raise WrongAnswerError(f"{done} jobs of {amount} were run, {left} are left")
            return Sample(amount, rate=amount / seconds)

        yield work


@asynccontextmanager
async def worker(url: str, concurrency: int) -> AsyncIterator[Callable[[Awaitable[object]], Awaitable[int]]]:
    """One worker process, which works until the queue is empty."""
    logging.getLogger("pgqueuer").setLevel(logging.ERROR)
    async with _open_pool(url) as pool:

        async def work(stopped: Awaitable[object]) -> int:
            done = await _drain(pool, concurrency)
            await stopped
            return done

        yield work


def _open_pool(url: str) -> asyncpg.Pool:
    return asyncpg.create_pool(url, min_size=CONNECTIONS, max_size=CONNECTIONS)


async def _drain(pool: asyncpg.Pool, concurrency: int) -> int:
    """Run jobs until the queue is empty, and return their number."""
    done = 0

    async def step(job: Job) -> None:
        nonlocal done
        done += 1

    queue = PgQueuer(AsyncpgPoolDriver(pool))
    queue.entrypoint("step")(step)
    await queue.qm.run(
        batch_size=max(1, concurrency // 2),
        max_concurrent_tasks=max(2, concurrency),
        mode=QueueExecutionMode.drain,
    )
    return done
