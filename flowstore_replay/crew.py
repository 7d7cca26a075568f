"""The worker processes of a replay: starting, killing and replacing them, the way a supervisor would."""

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

PATIENCE = 5.0
"""Seconds that workers get to end in good order before they are made to."""


@dataclass(eq=False, slots=True, kw_only=True)
class Worker:
    """A process that was started, and the last of what it said."""

    name: str
    process: Process
    said: deque[str]
    listening: asyncio.Task[None]

    @property
    def last_words(self) -> str:
        return self.said[-1] if self.said else f"exit code {self.process.returncode}"


# -P: modules of the working directory are not to stand in for installed ones.
PROGRAM = ("-P", "-m", "flowstore_replay.worker")


class Crew:
    """Processes that this one started; it never touches any other."""

    def __init__(self, orders: Mapping[str, Any], *, program: Sequence[str] = PROGRAM) -> None:
        """``orders`` are what every worker is told; each gets a name of its own besides.

        ``program`` is what Python runs, for workers that do something besides.
        """
        self._orders = dict(orders)
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
            # A group of its own: the terminal's Ctrl-C reaches the parent alone, which ends its workers.
            process_group=0,
        )
        self._started += 1
        said: deque[str] = deque(maxlen=20)
        worker = Worker(
            name=f"worker-{self._started} (pid {process.pid})",
            process=process,
            said=said,
            listening=asyncio.create_task(_listen(process, said)),
        )
        self.workers.append(worker)
        assert process.stdin is not None
        # One that is dead already is noticed by ended().
        with contextlib.suppress(ConnectionError):
            process.stdin.write(json.dumps({**self._orders, "name": worker.name}).encode() + b"\n")
            await process.stdin.drain()
        return worker

    async def kill(self, worker: Worker) -> None:
        """SIGKILL: no handler runs, nothing is flushed, nothing is given back."""
        with contextlib.suppress(ProcessLookupError):
            worker.process.kill()
        await self._bury(worker)

    async def ended(self) -> list[Worker]:
        """The workers that ended by themselves since this was asked last."""
        gone = [worker for worker in self.workers if worker.process.returncode is not None]
        for worker in gone:
            await self._bury(worker)
        return gone

    async def end(self) -> None:
        """End all that are left: by the end of their input, then SIGTERM, then SIGKILL."""
        for worker in self.workers:
            assert worker.process.stdin is not None
            worker.process.stdin.close()
        await self._wait(PATIENCE)
        for send in (Process.terminate, Process.kill):
            for worker in self.workers:
                if worker.process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        send(worker.process)
            await self._wait(PATIENCE)
        for worker in list(self.workers):
            await self._bury(worker)

    async def _wait(self, seconds: float) -> None:
        alive = [worker.process.wait() for worker in self.workers if worker.process.returncode is None]
        if alive:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.gather(*alive), seconds)

    async def _bury(self, worker: Worker) -> None:
        await worker.process.wait()
        await worker.listening
        if worker.process.stdin is not None:
            worker.process.stdin.close()
        self.workers.remove(worker)


async def _listen(process: Process, said: deque[str]) -> None:
    assert process.stderr is not None
    async for line in process.stderr:
        if text := line.decode(errors="replace").strip():
            said.append(text)
