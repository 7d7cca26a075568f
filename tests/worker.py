"""A process of its own with one store in it, driven by a test over pipes.

Run as a program it reads pickled commands from stdin and writes pickled answers to stdout. The first
answer says that it is up; what it then answers is what its store answered.
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
    """The process, seen from a test; a result is returned, an error of the store too."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parent.parent,
            # A Ctrl-C at the terminal is for the test run, which then ends the pipe.
            start_new_session=True,
        )
        self._up = False

    def _send(self, *command: Any) -> None:
        assert self._process.stdin is not None
        pickle.dump(command, self._process.stdin)
        self._process.stdin.flush()

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        if not self._up:
            assert pickle.load(self._process.stdout) == "up"
            self._up = True
        return pickle.load(self._process.stdout)

    async def send(self, *command: Any) -> None:
        """Give a command without waiting for its answer."""
        await asyncio.to_thread(self._send, *command)

    async def receive(self) -> Any:
        """The next answer; EOFError when the process has died."""
        return await asyncio.to_thread(self._receive)

    async def ask(self, *command: Any) -> Any:
        await self.send(*command)
        return await self.receive()

    def kill(self) -> None:
        """SIGKILL: whatever it was doing, it does nothing more."""
        self._process.kill()
        self._process.communicate()

    def stop(self) -> None:
        """End it by ending its stdin; it closes its store first."""
        self._process.communicate(timeout=60)


class Fleet:
    """Workers that many tests share, because a process takes a while to start."""

    def __init__(self) -> None:
        self._workers: list[Worker] = []

    def take(self, count: int) -> list[Worker]:
        # Several at once start in the time of the slowest.
        self._workers += [Worker() for _ in range(count - len(self._workers))]
        return self._workers[:count]

    def stop(self) -> None:
        for worker in self._workers:
            worker.stop()


async def _answer(call: Awaitable[Any]) -> Any:
    try:
        return await call
    except FlowStoreError as error:
        return error


async def _at_once(store: FlowStore, calls: Sequence[Call]) -> list[Any]:
    return list(await asyncio.gather(*(_answer(getattr(store, name)(**given)) for name, given in calls)))


async def _serve() -> None:
    def say(answer: Any) -> None:
        pickle.dump(answer, sys.stdout.buffer)
        sys.stdout.buffer.flush()

    say("up")
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
                say(error)
            else:
                say(None)
        elif command == "prepare":
            (prepared,) = rest
            say(None)
        elif command == "go":
            say(await _at_once(store, prepared))
        elif command == "close":
            await opened.__aexit__(None, None, None)
            opened = store = None
            say(None)
    if opened is not None:
        await opened.__aexit__(None, None, None)


if __name__ == "__main__":
    asyncio.run(_serve())
