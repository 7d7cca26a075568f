"""Processes that a line works with: asked all at once, by lines of JSON on their standard input."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from flowstore_core import FlowStore, open_store


class Crew:
    """Processes of ``python -m module``, each with a store of its own, until the context is left."""

    def __init__(
        self,
        module: str,
        size: int,
        *,
        url: str,
        broken: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._command = [sys.executable, "-m", module, url, *["broken"] * broken]
        self._size = size
        self._environment = environment
        self.members: list[asyncio.subprocess.Process] = []

    async def __aenter__(self) -> Crew:
        for _ in range(self._size):
            self.members.append(await self._start())
        # Their first line says that their store is open.
        await self._answers()
        return self

    async def __aexit__(self, *_: object) -> None:
        for member in self.members:
            assert member.stdin is not None
            member.stdin.close()
        for member in self.members:
            await member.wait()

    async def _start(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=self._environment,
            limit=1 << 22,
        )

    async def ask(self, what: object) -> list[Any]:
        """Send every process one request, and wait for all of the answers."""
        return await self.ask_each([what] * len(self.members))

    async def ask_each(self, requests: Sequence[object]) -> list[Any]:
        """Send each process a request of its own, and wait for all of the answers."""
        for member, what in zip(self.members, requests, strict=True):
            self.tell(member, what)
        return await self._answers()

    def tell(self, member: asyncio.subprocess.Process, what: object) -> None:
        """Send one process a request, and do not wait for its answer."""
        assert member.stdin is not None
        member.stdin.write(json.dumps(what).encode() + b"\n")

    async def answer(self, member: asyncio.subprocess.Process) -> Any:
        """One process's answer. Raises EndedError if it ended instead."""
        assert member.stdout is not None
        text = await member.stdout.readline()
        if not text:
            raise EndedError(f"process {member.pid} ended with code {await member.wait()}; see above")
        return json.loads(text)

    async def replace(self, member: asyncio.subprocess.Process) -> None:
        """Another process in the place of one that was killed."""
        assert member.stdin is not None
        member.stdin.close()
        await member.wait()
        following = await self._start()
        self.members[self.members.index(member)] = following
        await self.answer(following)

    async def _answers(self) -> list[Any]:
        return list(await asyncio.gather(*(self.answer(member) for member in self.members)))


class EndedError(Exception):
    """A process ended where it was to answer."""


def serve_crew(
    answer: Callable[[Any, Any], Awaitable[object]], broken: Callable[[FlowStore], object] | None = None
) -> None:
    """Main program of such a process: ``answer`` gets the store, or its broken variant, and the request."""

    async def serve() -> None:
        async with open_store(sys.argv[1]) as opened:
            store: object = broken(opened) if is_broken() and broken else opened
            await serve_requests(lambda asked: answer(store, asked))

    asyncio.run(serve())


async def serve_requests(answer: Callable[[Any], Awaitable[object]]) -> None:
    """Answer every request until the parent has no more; for a process that opens stores itself."""
    tell("ready")
    while text := await asyncio.to_thread(sys.stdin.readline):
        tell(await answer(json.loads(text)))


def is_broken() -> bool:
    """Whether this process is to be part of a broken variant."""
    return "broken" in sys.argv[2:]


def tell(what: object) -> None:
    """Answer the parent; more than once if it waits for more than one answer."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()
