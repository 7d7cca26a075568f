"""The worker processes of a replay: start, kill and replace them, as a supervisor would."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SHUTDOWN_TIMEOUT = 5.0
"""Seconds that workers get to exit, at each of the three stages of ``WorkerPool.shutdown``."""

STDERR_TAIL = 20
"""How many lines of a worker's standard error are kept."""


@dataclass(eq=False, slots=True, kw_only=True)
class Worker:
    """A worker process, and the tail of its standard error."""

    name: str
    process: Process
    stderr_tail: deque[str]
    stderr_reader: asyncio.Task[None]

    @property
    def last_line(self) -> str:
        """The last line of standard error, or the exit code if there is none."""
        return self.stderr_tail[-1] if self.stderr_tail else f"exit code {self.process.returncode}"


# -P: modules in the working directory must not shadow installed ones.
PROGRAM = ("-P", "-m", "flowstore_replay.worker")


class WorkerPool:
    """The processes that this pool started; it never signals any other."""

    def __init__(self, config: Mapping[str, Any], *, program: Sequence[str] = PROGRAM) -> None:
        """``config`` is sent to every worker, with the worker's name added.

        ``program`` holds the arguments of the Python interpreter.
        """
        self._config = dict(config)
        self._program = tuple(program)
        self._started = 0
        self.workers: list[Worker] = []

    async def start(self) -> Worker:
        """Start one more worker."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *self._program,
            stdin=PIPE,
            stdout=DEVNULL,
            stderr=PIPE,
            # In its own process group: the terminal's Ctrl-C reaches only the parent, which ends its workers.
            process_group=0,
        )
        self._started += 1
        tail: deque[str] = deque(maxlen=STDERR_TAIL)
        worker = Worker(
            name=f"worker-{self._started} (pid {process.pid})",
            process=process,
            stderr_tail=tail,
            stderr_reader=asyncio.create_task(_read_stderr(process, tail)),
        )
        self.workers.append(worker)
        assert process.stdin is not None
        # reap_exited() reports a worker that is already dead.
        with contextlib.suppress(ConnectionError):
            process.stdin.write(json.dumps({**self._config, "name": worker.name}).encode() + b"\n")
            await process.stdin.drain()
        return worker

    async def kill(self, worker: Worker) -> None:
        """Send SIGKILL: no handler runs, nothing is flushed, no claim is released."""
        with contextlib.suppress(ProcessLookupError):
            worker.process.kill()
        await self._reap(worker)

    async def reap_exited(self) -> list[Worker]:
        """Remove and return the workers that have exited without a kill since the last call."""
        exited = [worker for worker in self.workers if worker.process.returncode is not None]
        for worker in exited:
            await self._reap(worker)
        return exited

    async def shutdown(self) -> None:
        """End all workers: close their standard input, then send SIGTERM, then SIGKILL."""
        for worker in self.workers:
            assert worker.process.stdin is not None
            worker.process.stdin.close()
        await self._wait(SHUTDOWN_TIMEOUT)
        for send in (Process.terminate, Process.kill):
            for worker in self.workers:
                if worker.process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        send(worker.process)
            await self._wait(SHUTDOWN_TIMEOUT)
        for worker in list(self.workers):
            await self._reap(worker)

    async def _wait(self, seconds: float) -> None:
        alive = [worker.process.wait() for worker in self.workers if worker.process.returncode is None]
        if alive:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.gather(*alive), seconds)

    async def _reap(self, worker: Worker) -> None:
        await worker.process.wait()
        await worker.stderr_reader
        if worker.process.stdin is not None:
            worker.process.stdin.close()
        self.workers.remove(worker)


async def _read_stderr(process: Process, tail: deque[str]) -> None:
    assert process.stderr is not None
    async for line in process.stderr:
        if text := line.decode(errors="replace").strip():
            tail.append(text)
