"""Processes that a line works with: asked all at once, by lines of JSON on their standard input."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from flowstore_core import FlowStore, open_store


class Crew:
    """Processes of ``python -m module``, each with a store of its own, until the context is left."""

    def __init__(self, module: str, size: int, *, url: str, broken: bool = False) -> None:
        self._command = [sys.executable, "-m", module, url, *["broken"] * broken]
        self._size = size
        self.members: list[asyncio.subprocess.Process] = []

    async def __aenter__(self) -> Crew:
        for _ in range(self._size):
            self.members.append(
                await asyncio.create_subprocess_exec(
                    *self._command,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    limit=1 << 22,
                )
            )
        # Their first line says that their store is open.
        await self._answers()
        return self

    async def __aexit__(self, *_: object) -> None:
        for member in self.members:
            assert member.stdin is not None
            member.stdin.close()
        for member in self.members:
            await member.wait()

    async def ask(self, what: object) -> list[Any]:
        """Send every process one request, and wait for all of the answers."""
        return await self.ask_each([what] * len(self.members))

    async def ask_each(self, requests: Sequence[object]) -> list[Any]:
        """Send each process a request of its own, and wait for all of the answers."""
        for member, what in zip(self.members, requests, strict=True):
            assert member.stdin is not None
            member.stdin.write(json.dumps(what).encode() + b"\n")
        return await self._answers()

    async def _answers(self) -> list[Any]:
        return list(await asyncio.gather(*(self._answer(member) for member in self.members)))

    async def _answer(self, member: asyncio.subprocess.Process) -> Any:
        assert member.stdout is not None
        text = await member.stdout.readline()
        if not text:
            raise RuntimeError(f"process {member.pid} ended with code {await member.wait()}; see above")
        return json.loads(text)


def serve_crew(
    answer: Callable[[Any, Any], Awaitable[object]], broken: Callable[[FlowStore], object] | None = None
) -> None:
    """Main program of such a process: ``answer`` gets the store, or its broken variant, and the request."""
    asyncio.run(_serve(answer, broken, sys.argv[1], "broken" in sys.argv[2:]))


async def _serve(
    answer: Callable[[Any, Any], Awaitable[object]],
    broken: Callable[[FlowStore], object] | None,
    url: str,
    is_broken: bool,
) -> None:
    async with open_store(url) as opened:
        store: object = broken(opened) if is_broken and broken else opened
        _tell("ready")
        while text := await asyncio.to_thread(sys.stdin.readline):
            _tell(await answer(store, json.loads(text)))


def _tell(what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()
