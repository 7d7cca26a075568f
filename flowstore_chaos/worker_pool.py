"""Worker processes of a scenario, controlled by lines of JSON on their standard input and output."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from flowstore_core import FlowStore, open_store


class WorkerPool:
    """Processes of ``python -m module``, each with its own store. An asynchronous context manager."""

    def __init__(
        self,
        module: str,
        size: int,
        *,
        url: str,
        mutant: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._command = [sys.executable, "-m", module, url, *["mutant"] * mutant]
        self._size = size
        self._environment = environment
        self.workers: list[asyncio.subprocess.Process] = []

    async def __aenter__(self) -> WorkerPool:
        for _ in range(self._size):
            self.workers.append(await self._start())
        # The first reply reports that the store is open.
        await self._receive_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        for worker in self.workers:
            assert worker.stdin is not None
            worker.stdin.close()
        for worker in self.workers:
            await worker.wait()

    async def _start(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=self._environment,
            limit=1 << 22,
        )

    async def request(self, message: object) -> list[Any]:
        """Send one request to every worker, and wait for all replies."""
        return await self.request_each([message] * len(self.workers))

    async def request_each(self, messages: Sequence[object]) -> list[Any]:
        """Send each worker its own request, and wait for all replies."""
        for worker, message in zip(self.workers, messages, strict=True):
            self.send(worker, message)
        return await self._receive_all()

    def send(self, worker: asyncio.subprocess.Process, message: object) -> None:
        """Send a request to one worker without waiting for the reply."""
        assert worker.stdin is not None
        worker.stdin.write(json.dumps(message).encode() + b"\n")

    async def receive(self, worker: asyncio.subprocess.Process) -> Any:
        """The next reply of one worker. Raises WorkerExitedError if the worker exited instead."""
        assert worker.stdout is not None
        text = await worker.stdout.readline()
        if not text:
            raise WorkerExitedError(
                f"process {worker.pid} exited with code {await worker.wait()}; see its standard error above"
            )
        return json.loads(text)

    async def replace(self, worker: asyncio.subprocess.Process) -> None:
        """Start a new worker in place of a killed one."""
        assert worker.stdin is not None
        worker.stdin.close()
        await worker.wait()
        replacement = await self._start()
        self.workers[self.workers.index(worker)] = replacement
        await self.receive(replacement)

    async def _receive_all(self) -> list[Any]:
        return list(await asyncio.gather(*(self.receive(worker) for worker in self.workers)))


class WorkerExitedError(Exception):
    """A worker exited before it replied."""


def serve_pool(
    handle: Callable[[Any, Any], Awaitable[object]], mutant: Callable[[FlowStore], object] | None = None
) -> None:
    """Run the main loop of a worker; ``handle`` takes the store, or its mutant, and a request."""

    async def serve() -> None:
        async with open_store(sys.argv[1]) as opened:
            store: object = mutant(opened) if is_mutant() and mutant else opened
            await serve_requests(lambda request: handle(store, request))

    asyncio.run(serve())


async def serve_requests(handle: Callable[[Any], Awaitable[object]]) -> None:
    """Reply to requests until end of file; for workers that open stores themselves."""
    send_to_parent("ready")
    while text := await asyncio.to_thread(sys.stdin.readline):
        send_to_parent(await handle(json.loads(text)))


def is_mutant() -> bool:
    """Whether this worker runs the mutant."""
    return "mutant" in sys.argv[2:]


def send_to_parent(message: object) -> None:
    """Send a reply to the parent, which may wait for more than one."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()
