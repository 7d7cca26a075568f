"""The key-value server: requests and replies are pickled tuples, each after its length.

A request is (namespace, method, arguments); a reply is its result, or the exception that it raised.
"""

from __future__ import annotations

import asyncio
import pickle
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from flowstore_documents.memory_space import MemoryData, MemorySpace


async def read_message(stream: asyncio.StreamReader) -> Any:
    """Read the next message. Raises IncompleteReadError at the end of the connection."""
    size = int.from_bytes(await stream.readexactly(4))
    return pickle.loads(await stream.readexactly(size))


def encode_message(message: Any) -> bytes:
    data = pickle.dumps(message)
    return len(data).to_bytes(4) + data


class Server:
    """Serves the spaces of all namespaces, from the memory of this process."""

    def __init__(self) -> None:
        self._namespaces: defaultdict[str, MemoryData] = defaultdict(MemoryData)
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def serve(self, stream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections[task] = writer
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                namespace, method, arguments = await read_message(stream)
                writer.write(encode_message(await self._reply(namespace, method, arguments)))
                await writer.drain()
        writer.close()
        del self._connections[task]

    async def aclose(self) -> None:
        for writer in self._connections.values():
            writer.close()
        await asyncio.gather(*self._connections)

    async def _reply(self, namespace: str, method: str, arguments: tuple[Any, ...]) -> Any:
        if method == "drop":
            return self._namespaces.pop(namespace, None) and None
        space = MemorySpace(self._namespaces[namespace])
        try:
            if method == "read":
                keys, ranges, at = arguments
                return await space.read(keys, ranges, at=at)
            return await getattr(space, method)(*arguments)
        except Exception as error:  # noqa: BLE001 - the client raises it
            return error


@asynccontextmanager
async def serve() -> AsyncIterator[int]:
    """Serve on a free port of loopback."""
    server = Server()
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        listener.close()
        await server.aclose()
