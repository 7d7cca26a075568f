"""A proxy between stores and their server that injects faults and outages, for conformance checks.

It relays whole messages of the protocol without TLS. A request is a Query or an Execute with all messages up
to the one that the client waits for; its reply ends with ReadyForQuery.
"""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from flowstore_core import ConfigurationError
from flowstore_core.fault_proxy import FaultKind, FaultProxy, ProxyOutageInjector, ProxyRelay, Streams
from flowstore_core.urls import parse_url
from flowstore_postgres.failover import read_hosts
from flowstore_postgres.migrate import lock_rows

ENDS_REQUEST = b"SQXHpcf"
"""Types of the messages that a client waits after: Sync, Query, Terminate, Flush, passwords, ends of COPY."""
READY_FOR_QUERY = b"Z"
IDLE = b"I"
DEFAULT_PORT = 5432

COMMIT = b"COMMIT\0"
REFUSAL = b"DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = 'deadlock_detected'; END $$\0"
"""A request in place of a refused one: an open transaction fails and waits for its ROLLBACK, as after a
deadlock."""
REFUSAL_OF_COMMIT = b"ROLLBACK; " + REFUSAL
"""In place of a refused COMMIT, which leaves no transaction open, whether it succeeds or fails."""
SHORT_TIMEOUTS = {
    "acquire_timeout": "10",
    "connect_timeout": "1",
    "retry_timeout": "0.3",
    "statement_timeout": "0.5",
}


class _Relay(ProxyRelay):
    def __init__(self, proxy: FaultProxy, client: Streams, server: Streams) -> None:
        super().__init__(proxy, client, server)
        self._status = b""
        """Of the last ReadyForQuery: I when idle, T or E in a transaction; empty before the first."""
        self._loses_reply = False

    async def relay_requests(self) -> None:
        client_in, server_out = self.client[0], self.server[1]
        start = await client_in.readexactly(8)
        (size,) = struct.unpack_from("!i", start)
        server_out.write(start + await client_in.readexactly(size - len(start)))
        while True:
            request, types = b"", b""
            while types[-1:] not in ENDS_REQUEST or not types:
                message = await _read_message(client_in)
                request, types = request + message, types + message[:1]
            executes = self._status and (b"Q" in types or b"E" in types)
            if not await self.proxy.passes():
                return
            possible = [FaultKind.LOSE_REPLY, FaultKind.REFUSE]
            if self._status == IDLE:
                possible.append(FaultKind.HOLD)
            fault = self.proxy.take_fault(*possible) if executes else None
            if fault is FaultKind.HOLD:
                self.proxy.hold(request, self.server)
                return
            if fault is FaultKind.REFUSE:
                refusal = REFUSAL_OF_COMMIT if request.endswith(COMMIT) else REFUSAL
                request = b"Q" + struct.pack("!i", 4 + len(refusal)) + refusal
            self._loses_reply = fault is FaultKind.LOSE_REPLY
            server_out.write(request)
            await server_out.drain()

    async def relay_replies(self) -> None:
        client_out = self.client[1]
        while True:
            message = await _read_message(self.server[0])
            is_ready = message[:1] == READY_FOR_QUERY
            if not self._loses_reply:
                client_out.write(message)
                await client_out.drain()
            elif is_ready:
                return
            if is_ready:
                self._status = message[-1:]

    @staticmethod
    async def read_reply(request: bytes, server_in: asyncio.StreamReader) -> None:
        while (await _read_message(server_in))[:1] != READY_FOR_QUERY:
            pass


async def _read_message(stream: asyncio.StreamReader) -> bytes:
    head = await stream.readexactly(5)
    (size,) = struct.unpack_from("!i", head, 1)
    return head + await stream.readexactly(size - 4)


@asynccontextmanager
async def inject_faults(url: str) -> AsyncIterator[FaultProxy]:
    """See FaultInjectable. Raises ConfigurationError for a URL that demands TLS or names no host."""
    parts = parse_url(url)
    if parts.options.get("sslmode") in ("require", "verify-ca", "verify-full"):
        raise ConfigurationError("faults cannot be injected into TLS connections; use sslmode=prefer")
    hosts = read_hosts(url, parts.options)
    if not hosts:
        raise ConfigurationError("faults can be injected only if the URL names the host of the server")
    host, port = hosts[0][0], hosts[0][1] or int(os.environ.get("PGPORT") or DEFAULT_PORT)

    async def connect() -> Streams:
        if host.startswith("/"):
            return await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        return await asyncio.open_connection(host, port)

    proxy = FaultProxy(connect, _Relay)
    async with proxy.serve() as (proxy_host, proxy_port):
        options = {"host": proxy_host, "port": str(proxy_port), "sslmode": "disable"}
        proxy.url = parts.with_more_options(options)
        yield proxy


@asynccontextmanager
async def inject_outages(url: str) -> AsyncIterator[ProxyOutageInjector]:
    """See OutageInjectable. Raises ConfigurationError like ``inject_faults``."""
    async with inject_faults(url) as proxy:
        parts = parse_url(proxy.url)
        through_proxy = parts.with_more_options(SHORT_TIMEOUTS)
        yield ProxyOutageInjector(proxy, through_proxy, lambda: lock_rows(url))
