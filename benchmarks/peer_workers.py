"""Worker processes of benchmarks.peers: ``python -m benchmarks.peer_workers ENGINE URL CONCURRENCY``.

A worker prints a line once it is connected. For each line on stdin it begins to work, with the next line it
stops, and it prints the number of steps that it has done. It ends at end of file.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager


class Workers:
    """Worker processes of one engine that share its work."""

    def __init__(self, processes: list[Process]) -> None:
        self._processes = processes

    def tell(self) -> None:
        """Send a line to each of them."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(b"\n")

    async def read(self) -> list[str]:
        """The next line of each of them."""
        lines = []
        for process in self._processes:
            assert process.stdout is not None
            line = await process.stdout.readline()
            if not line:
                raise RuntimeError("a worker process failed; see above")
            lines.append(line.decode().strip())
        return lines

    async def stop(self) -> int:
        """Let them stop, and return the number of steps that they have done."""
        self.tell()
        return sum(map(int, await self.read()))


@asynccontextmanager
async def start_workers(engine: str, url: str, concurrency: int, processes: int) -> AsyncIterator[Workers]:
    """Worker processes of an engine, each with its own connections and the same number of steps at once."""
    started: list[Process] = []
    command = [sys.executable, "-m", "benchmarks.peer_workers", engine, url, str(concurrency)]
    try:
        for _ in range(processes):
            started.append(await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE))  # noqa: PERF401 - a failure stops those before it
        workers = Workers(started)
        await workers.read()
        yield workers
        for process in started:
            assert process.stdin is not None
            process.stdin.close()
            if await process.wait():
                raise RuntimeError("a worker process failed; see above")
    finally:
        for process in started:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def main(engine: str, url: str, concurrency: int) -> None:
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    async with AsyncExitStack() as stack:
        module = importlib.import_module(engine)
        work = await stack.enter_async_context(module.worker(url, concurrency))
        print("ready", flush=True)  # noqa: T201 - for the parent process
        while await lines.readline():
            print(await work(lines.readline()), flush=True)  # noqa: T201


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
