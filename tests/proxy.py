"""A TCP proxy in front of PostgreSQL that loses what it is told to lose."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import Enum
from urllib.parse import parse_qs, urlsplit


class Fault(Enum):
    REPLY_LOST = "the server acts on the message, its reply is cut off"
    REQUEST_LOST = "the message never reaches the server, the connection is cut"
    REQUEST_LATE = "the connection is cut towards the client, and the message arrives later"


class Proxy:
    """Counts the client's messages once armed, and strikes at the n-th."""

    def __init__(self, socket: str, delay: float) -> None:
        self._socket = socket
        self._delay = delay
        self._strike_at = 0
        self._fault = Fault.REPLY_LOST
        self._servers: set[asyncio.StreamWriter] = set()
        self._late: set[asyncio.Task[None]] = set()
        self.port = 0
        self.messages = 0
        self.struck = False

    def arm(self, strike_at: int, fault: Fault) -> None:
        self.messages, self.struck = 0, False
        self._strike_at, self._fault = strike_at, fault

    def disarm(self) -> None:
        self._strike_at = 0

    async def settle(self) -> None:
        """Wait until late messages have arrived."""
        await asyncio.gather(*self._late)

    async def serve(self, client_in: asyncio.StreamReader, client_out: asyncio.StreamWriter) -> None:
        server_in, server_out = await asyncio.open_unix_connection(self._socket)
        self._servers.add(server_out)
        losing = asyncio.Event()
        back = asyncio.create_task(_pump_back(server_in, client_out, losing))
        try:
            while data := await client_in.read(1 << 20):
                self.messages += 1
                if self._strike_at and self.messages == self._strike_at:
                    self.struck, self._strike_at = True, 0
                    losing.set()
                    if self._fault is Fault.REPLY_LOST:
                        server_out.write(data)
                        # The pump ends with the first byte of the reply, which it keeps to itself.
                        await back
                    elif self._fault is Fault.REQUEST_LATE:
                        late = asyncio.create_task(self._deliver_late(server_out, data))
                        self._late.add(late)
                        client_out.transport.abort()
                        return
                    client_out.transport.abort()
                    break
                server_out.write(data)
                await server_out.drain()
        except ConnectionError:
            pass
        finally:
            if not (self._fault is Fault.REQUEST_LATE and losing.is_set()):
                server_out.close()
            client_out.close()
            back.cancel()

    async def _deliver_late(self, server_out: asyncio.StreamWriter, data: bytes) -> None:
        await asyncio.sleep(self._delay)
        try:
            server_out.write(data)
            await server_out.drain()
            await asyncio.sleep(0.05)
        except ConnectionError:
            pass
        server_out.close()


async def _pump_back(
    server_in: asyncio.StreamReader, client_out: asyncio.StreamWriter, losing: asyncio.Event
) -> None:
    try:
        while data := await server_in.read(1 << 20):
            if losing.is_set():
                return
            client_out.write(data)
            await client_out.drain()
        client_out.close()
    except ConnectionError:
        pass


@asynccontextmanager
async def proxy_before(url: str, *, delay: float = 0.2) -> AsyncIterator[tuple[Proxy, str]]:
    """A proxy before the server of a URL whose host is a socket folder, and the URL that goes through it."""
    query = parse_qs(urlsplit(url).query)
    proxy = Proxy(f"{query['host'][0]}/.s.PGSQL.5432", delay)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    through = f"postgresql://postgres@127.0.0.1:{port}/postgres?sslmode=disable&schema={query['schema'][0]}"
    try:
        yield proxy, through
    finally:
        server.close()
        await proxy.settle()
