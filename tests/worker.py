"""A worker process with one store, which a test controls through pipes.

Run as a program, this module reads pickled commands from stdin and writes pickled replies to stdout. The
first reply is "ready"; each later one is the result or the error of the store.
"""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any

from flowstore_core import FlowStore, FlowStoreError, open_store

Call = tuple[str, dict[str, Any]]


class Worker:
    """Controls a worker process. Errors of the store are returned, not raised."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parent.parent,
            # Ctrl-C interrupts only the test run, which then closes the pipe.
            start_new_session=True,
        )
        self._ready = False

    def _send(self, *command: Any) -> None:
        assert self._process.stdin is not None
        pickle.dump(command, self._process.stdin)
        self._process.stdin.flush()

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        if not self._ready:
            assert pickle.load(self._process.stdout) == "ready"
            self._ready = True
        return pickle.load(self._process.stdout)

    async def send(self, *command: Any) -> None:
        """Send a command without waiting for its reply."""
        await asyncio.to_thread(self._send, *command)

    async def receive(self) -> Any:
        """Return the next reply. Raises EOFError if the process has exited."""
        return await asyncio.to_thread(self._receive)

    async def request(self, *command: Any) -> Any:
        await self.send(*command)
        return await self.receive()

    def kill(self) -> None:
        """Kill the process with SIGKILL."""
        self._process.kill()
        self._process.communicate()

    def stop(self) -> None:
        """Close stdin, so that the process closes its store and exits."""
        self._process.communicate(timeout=60)


class WorkerPool:
    """Workers shared by many tests, because a process is slow to start."""

    def __init__(self) -> None:
        self._workers: list[Worker] = []

    def get(self, count: int) -> list[Worker]:
        # Processes start concurrently.
        self._workers += [Worker() for _ in range(count - len(self._workers))]
        return self._workers[:count]

    def stop(self) -> None:
        for worker in self._workers:
            worker.stop()


async def _outcome(call: Awaitable[Any]) -> Any:
    try:
        return await call
    except FlowStoreError as error:
        return error


async def _call_concurrently(store: FlowStore, calls: Sequence[Call]) -> list[Any]:
    return list(await asyncio.gather(*(_outcome(getattr(store, name)(**given)) for name, given in calls)))


async def _serve() -> None:
    def reply(value: Any) -> None:
        pickle.dump(value, sys.stdout.buffer)
        sys.stdout.buffer.flush()

    reply("ready")
    opened: Any = None
    store: Any = None
    prepared: Sequence[Call] = ()
    while True:
        try:
            command, *rest = await asyncio.to_thread(pickle.load, sys.stdin.buffer)
        except EOFError:
            break
        if command == "open":
            url, now = rest
            clock = None if now is None else (lambda moment=now: moment)
            opened = open_store(url, clock=clock)
            try:
                store = await opened.__aenter__()
            except FlowStoreError as error:
                opened = None
                reply(error)
            else:
                reply(None)
        elif command == "prepare":
            (prepared,) = rest
            reply(None)
        elif command == "go":
            reply(await _call_concurrently(store, prepared))
        elif command == "close":
            await opened.__aexit__(None, None, None)
            opened = store = None
            reply(None)
    if opened is not None:
        await opened.__aexit__(None, None, None)


if __name__ == "__main__":
    asyncio.run(_serve())
