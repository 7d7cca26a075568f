"""The proxy of the fault injectors, with a protocol of lines."""

from __future__ import annotations

import asyncio

from flowstore_core.backend import FaultKind, FaultProxy, ProxyRelay

held = asyncio.Event()


class LineRelay(ProxyRelay):
    async def relay_requests(self) -> None:
        while await self.proxy.passes():
            line = await self.client[0].readuntil()
            if self.proxy.take_fault(FaultKind.HOLD) is not None:
                self.proxy.hold(line, self.server)
                held.set()
                return
            self.server[1].write(line)

    async def relay_replies(self) -> None:
        while True:
            self.client[1].write(await self.server[0].readuntil())

    @staticmethod
    async def read_reply(request: bytes, server_in: asyncio.StreamReader) -> None:
        assert await server_in.readuntil() == request


async def test_a_request_that_is_released_at_once_reaches_the_server() -> None:
    """The relay of the connection has not ended yet when the request is released."""
    received: list[bytes] = []
    opened: list[asyncio.StreamWriter] = []

    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        opened.append(writer)
        return reader, writer

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened.append(writer)
        while line := await reader.readline():
            received.append(line)
            writer.write(line)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    proxy = FaultProxy(connect, LineRelay)
    async with server, proxy.serve() as address, asyncio.timeout(60):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"first\n")
        assert await reader.readline() == b"first\n"
        held.clear()
        proxy.hold_request()
        writer.write(b"second\n")
        await held.wait()
        assert proxy.disarm()
        await proxy.release_request()
        assert received == [b"first\n", b"second\n"]
        writer.close()
        for one in (writer, *opened):
            await one.wait_closed()
