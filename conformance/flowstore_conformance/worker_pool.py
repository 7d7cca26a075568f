"""A pool of worker processes, and a runner that runs races over them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from flowstore_conformance import skewed_worker
from flowstore_conformance.child_processes import start_file, start_module
from flowstore_conformance.context import CheckContext, ContractViolation, Inconclusive, VirtualClock
from flowstore_conformance.races import (
    ClientResult,
    ClientTask,
    Phase,
    Race,
    RaceRun,
    Topology,
    assemble,
    phases_of,
)
from flowstore_conformance.watchdog import Hang, Hung
from flowstore_conformance.wire import pack, pack_task, read_line, unpack_result, write_line
from flowstore_core import StoreUnavailableError

START_SECONDS = 60.0
HEAD_START = 0.002
"""Seconds between the start command and the start time, so that every process receives it in time."""
END_SECONDS = 10.0


class Worker:
    """One worker process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._loop = asyncio.get_running_loop()
        self._stdin = process.stdin
        self._stdout = process.stdout
        self._awaits_reply = False
        """Whether a request has no reply yet."""

    async def request(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a message and return the reply.

        Raises Hung if a call in the process does not end, and Inconclusive if the process died.
        """
        self._awaits_reply = True
        try:
            self._stdin.write(write_line(message))
            await self._stdin.drain()
            line = await self._stdout.readline()
        except ConnectionError:
            line = b""
        if not line:
            raise Inconclusive("a worker process died; the reason is on stderr")
        self._awaits_reply = False
        answer = read_line(line)
        if "hung" in answer:
            raise Hung(Hang.from_json(answer["hung"]))
        return answer

    async def end(self) -> None:
        """Close the store and end the process; kill it if it is busy or does not end in time."""
        if asyncio.get_running_loop() is not self._loop:
            # Killed when its own loop was abandoned.
            return
        self._stdin.close()
        if self._awaits_reply and self._process.returncode is None:
            self._process.kill()
        try:
            async with asyncio.timeout(END_SECONDS):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


class WorkerProcesses:
    """Worker processes that several checks use one after another, because starting one takes long."""

    def __init__(self) -> None:
        self._idle: list[Worker] = []
        self._one_user = asyncio.Lock()

    @asynccontextmanager
    async def use(self, count: int) -> AsyncIterator[Sequence[Worker]]:
        """Wait until no other check uses the processes, and yield ``count`` of them without a store.

        They end if the block raises; otherwise their stores close, and the next block gets them.
        """
        async with self._one_user:
            workers: list[Worker] = []
            try:
                while len(workers) < count:
                    # One by one, so that started processes end if a later one fails to start.
                    workers.append(
                        self._idle.pop()
                        if self._idle
                        else Worker(await start_module("flowstore_conformance.worker"))
                    )
                yield workers
                await asyncio.gather(*(worker.request({"close": True}) for worker in workers))
            except BaseException:
                await asyncio.gather(*(worker.end() for worker in workers))
                raise
            self._idle += workers

    async def aclose(self) -> None:
        """End the processes."""
        workers, self._idle = self._idle, []
        await asyncio.gather(*(worker.end() for worker in workers))


@asynccontextmanager
async def open_worker_pool(context: CheckContext, count: int) -> AsyncIterator[ProcessRunner]:
    """Use worker processes, each with a store on the context's namespace.

    Raises ContractViolation if a process cannot open the store.
    """
    processes = context.processes or WorkerProcesses()
    try:
        async with processes.use(count) as workers:
            if refused := await _open_stores(context, workers, virtual_clock=context.clock is not None):
                raise _violation(refused)
            yield ProcessRunner(workers, context.clock)
    finally:
        if processes is not context.processes:
            await processes.aclose()


async def _open_stores(
    context: CheckContext, workers: Sequence[Worker], *, virtual_clock: bool
) -> str | None:
    """Open a store in each process. Returns the error of one that cannot open it or read from it."""
    order = {"open": context.url, "clock": virtual_clock, "limit": context.call_seconds}
    try:
        # A worker reports hanging calls itself; this limit covers the start of Python.
        async with asyncio.timeout(START_SECONDS + context.call_seconds):
            answers = await asyncio.gather(*(worker.request(order) for worker in workers))
    except TimeoutError:
        raise Inconclusive(f"no worker process started within {START_SECONDS:.0f} s") from None
    return next((answer["refused"] for answer in answers if "refused" in answer), None)


def _violation(refused: str) -> ContractViolation:
    message = f"another process could not open the store and read from it: {refused}"
    return ContractViolation(message, clause="CON-6")


class Unavailable(Exception):  # noqa: N818 - an outcome that a check may allow
    """A process got StoreUnavailableError."""


@asynccontextmanager
async def open_skewed_process(context: CheckContext, skew: timedelta) -> AsyncIterator[ProcessRunner]:
    """Start a process whose clock is wrong by ``skew``, with a store that has no virtual clock.

    Raises Unavailable if the store is unavailable to the process, and ContractViolation if the process
    cannot open it for another reason.
    """
    process = await start_file(skewed_worker.__file__, str(skew.total_seconds()))
    async with open_process(context, process) as runner:
        yield runner


@asynccontextmanager
async def open_process(
    context: CheckContext, process: asyncio.subprocess.Process
) -> AsyncIterator[ProcessRunner]:
    """Use one worker process, which ends with the block, with a store on its own clock."""
    worker = Worker(process)
    try:
        refused = await _open_stores(context, [worker], virtual_clock=False)
        if refused is not None:
            raise Unavailable if refused.startswith(StoreUnavailableError.__name__) else _violation(refused)
        yield ProcessRunner([worker], None)
        await worker.request({"close": True})
    finally:
        await worker.end()


class ProcessRunner:
    """Runs races over processes; the clients of a race are spread over all of them."""

    def __init__(self, workers: Sequence[Worker], clock: VirtualClock | None) -> None:
        self._workers = workers
        self._clock = clock
        self.topology = Topology(len(workers), processes=True)

    async def run(self, races: Sequence[Race]) -> list[RaceRun]:
        done = []
        for phase in phases_of(races):
            if self._clock is not None:
                self._clock.advance(phase.clock_advance)
            done.append(await self._phase(phase))
        return assemble(races, done, one_loop=False)

    async def _phase(self, phase: Phase) -> list[ClientResult]:
        now = self._clock.now if self._clock is not None else datetime.now(UTC)
        # Round-robin over the processes, each race starting at a different one.
        assignments: list[list[ClientTask]] = [[] for _ in self._workers]
        for client_task in phase.client_tasks:
            assignments[(client_task.race + client_task.client) % len(assignments)].append(client_task)
        orders = [
            {"now": pack(now), "tasks": [pack_task(client_task) for client_task in assigned]}
            for assigned in assignments
        ]
        await asyncio.gather(*(w.request(order) for w, order in zip(self._workers, orders, strict=True)))
        at = time.monotonic() + HEAD_START
        answers = await asyncio.gather(*(worker.request({"at": at}) for worker in self._workers))
        return [
            unpack_result(packed, client_task.client, now)
            for assigned, answer in zip(assignments, answers, strict=True)
            for client_task, packed in zip(assigned, answer["done"], strict=True)
        ]
