"""The stores of benchmarks.queues, their worker processes, and sleeping runs in them."""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from benchmarks.copies import Copy
from benchmarks.growth_stores import Copier, Open
from benchmarks.queue_worker import QUEUES, WORK, request
from benchmarks.workload import FLOW, WrongAnswerError
from flowstore_core import FlowStore, StepRequest, new_run_id

TOGETHER = 256
"""Runs that are triggered concurrently."""
MAX_LINE = 2**24
SLEEP = timedelta(days=3650)


@dataclass(frozen=True, slots=True)
class QueueStore:
    """A new, open store, and direct access to its database."""

    url: str
    store: FlowStore
    copy: Copier
    hold_snapshot: Callable[[], AbstractAsyncContextManager[None]]
    """Holds a snapshot of the database open."""
    count_queries: Callable[[datetime], Awaitable[int]] | None
    """The number of sessions that have sent a query since that time; None: no figure of this backend."""
    processor_clock: Callable[[], Awaitable[Callable[[], float]]]
    """A clock of this process's processor time and, on Linux, of the server's for the store, in seconds."""


@dataclass(frozen=True, slots=True)
class Backend:
    name: str
    opener: Open
    url_of: Callable[[str], str]
    """The URL of a store by its name."""
    hold_snapshot: Callable[[str], AbstractAsyncContextManager[None]]
    count_queries: Callable[[datetime], Awaitable[int]] | None
    processor_clock: Callable[[str], Awaitable[Callable[[], float]]]

    async def open(self, stack: AsyncExitStack, name: str) -> QueueStore:
        opened = await self.opener(stack, name)
        return QueueStore(
            self.url_of(name),
            opened.store,
            opened.copy,
            lambda: self.hold_snapshot(name),
            self.count_queries,
            lambda: self.processor_clock(name),
        )


class Worker:
    """A process of benchmarks.queue_worker."""

    def __init__(self, process: Process) -> None:
        self._process = process

    async def read(self) -> dict[str, Any]:
        """The next line that the process prints."""
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError("a worker process failed; see above")
        found: dict[str, Any] = json.loads(line)
        return found

    async def ask(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        return await self.read()


@asynccontextmanager
async def start_worker(role: str, at: QueueStore, limit: int = 1) -> AsyncIterator[Worker]:
    command = [sys.executable, "-m", "benchmarks.queue_worker", role, at.url, str(limit)]
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, limit=MAX_LINE)
    try:
        worker = Worker(process)
        await worker.read()
        yield worker
        assert process.stdin is not None
        process.stdin.close()
        if await process.wait():
            raise RuntimeError("a worker process failed; see above")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def trigger(store: FlowStore, step: StepRequest) -> UUID:
    run_id = new_run_id()
    await store.trigger_run(FLOW, "bench", run_id, "manual", dispatch=[step])
    return run_id


async def trigger_runs(store: FlowStore, amount: int, step: StepRequest) -> None:
    for start in range(0, amount, TOGETHER):
        await asyncio.gather(*(trigger(store, step) for _ in range(min(TOGETHER, amount - start))))


async def add_sleeping_runs(at: QueueStore, amount: int) -> None:
    """Copy a run whose only step is due in ten years, and verify the copies through the store."""
    model_id = await trigger(at.store, request(WORK, due_at=datetime.now(UTC) + SLEEP))
    model = await at.store.get_run_detail(model_id)
    assert model is not None
    await at.copy(
        [
            Copy(new_run_id(), model, 0, model.started_at - timedelta(milliseconds=number), timedelta())
            for number in range(amount - 1)
        ]
    )
    (queue,) = await at.store.get_queues()
    if (queue.scheduled, queue.ready) != (amount, 0):
        raise WrongAnswerError(f"sleeping steps: expected {amount}, found {queue}")


async def count_ready(store: FlowStore) -> int:
    return sum(queue.ready for queue in await store.get_queues() if queue.queue in QUEUES)
