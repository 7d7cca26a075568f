"""A proxy between stores and their server that injects faults and outages, for conformance checks.

It relays whole messages of the protocol without TLS. A request is a Query or an Execute with all messages up
to the one that the client waits for; its reply ends with ReadyForQuery.
"""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from enum import Enum
from typing import NamedTuple

from flowstore_core import ConfigurationError
from flowstore_core.urls import parse_url
from flowstore_postgres.failover import read_hosts
from flowstore_postgres.migrate import lock_rows

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

CANCEL_REQUEST = struct.pack("!i", 80877102)
ENDS_REQUEST = b"SQXHpcf"
"""Types of the messages that a client waits after: Sync, Query, Terminate, Flush, passwords, ends of COPY."""
READY_FOR_QUERY = b"Z"
IDLE = b"I"
DEFAULT_PORT = 5432


# A request in place of a refused one: it ends an open transaction, as a deadlock does.
REFUSAL = b"DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = 'deadlock_detected'; END $$\0"
SHORT_TIMEOUTS = {
    "acquire_timeout": "10",
    "connect_timeout": "1",
    "retry_timeout": "0.3",
    "statement_timeout": "0.5",
}


class _Kind(Enum):
    LOSE_REPLY = "lose the reply"
    HOLD = "hold the request"
    REFUSE = "refuse the request"


class _ArmedFault(NamedTuple):
    kind: _Kind
    skip: int
    isolates: bool = False


class ServerFaultInjector:
    """Implements FaultInjector; see flowstore_core.backend."""

    def __init__(self, connect: Callable[[], Awaitable[Streams]]) -> None:
        self.url = ""
        self._connect = connect
        self._armed: _ArmedFault | None = None
        self._has_injected = False
        self._held: tuple[bytes, Streams] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._clients: set[asyncio.StreamWriter] = set()
        self.silent: asyncio.Event | None = None
        """Set at the end of a silence; None if there is none."""
        self.refuses = False
        self.is_reachable = asyncio.Event()
        self.is_reachable.set()

    def lose_reply(self, *, skip: int = 0, isolates: bool = False) -> None:
        self._armed, self._has_injected = _ArmedFault(_Kind.LOSE_REPLY, skip, isolates), False

    def hold_request(self, *, skip: int = 0) -> None:
        self._armed, self._has_injected = _ArmedFault(_Kind.HOLD, skip), False

    def refuse_request(self, *, skip: int = 0) -> None:
        self._armed, self._has_injected = _ArmedFault(_Kind.REFUSE, skip), False

    @asynccontextmanager
    async def silence(self) -> AsyncIterator[None]:
        """Relay nothing, and end the connections afterwards."""
        self.silent = asyncio.Event()
        try:
            yield
        finally:
            self.silent.set()
            self.silent = None

    @asynccontextmanager
    async def refuse_connections(self) -> AsyncIterator[None]:
        """End the connections and every new one."""
        self.refuses = True
        for client_out in self._clients:
            client_out.transport.abort()
        try:
            yield
        finally:
            self.refuses = False

    def disarm(self) -> bool:
        self._armed = None
        self.is_reachable.set()
        return self._has_injected

    async def release_request(self) -> None:
        if self._held is None:
            return
        (request, (server_in, server_out)), self._held = self._held, None
        # The server may have ended the connection meanwhile.
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            server_out.write(request)
            await server_out.drain()
            while (await _read_message(server_in))[:1] != READY_FOR_QUERY:
                pass
        server_out.close()

    async def serve(self, client_in: asyncio.StreamReader, client_out: asyncio.StreamWriter) -> None:
        """Relay one connection of a client."""
        # The callback of asyncio's server must not be cancelled.
        relay = asyncio.ensure_future(self._relay(client_in, client_out))
        self._tasks.add(relay)
        relay.add_done_callback(self._tasks.discard)
        await asyncio.wait({relay})

    async def _relay(self, client_in: asyncio.StreamReader, client_out: asyncio.StreamWriter) -> None:
        self._clients.add(client_out)
        try:
            if self.silent is not None:
                await self.silent.wait()
            elif not self.refuses:
                await _Relay(self, client_in, client_out, await self._connect()).run()
        except (OSError, asyncio.IncompleteReadError):
            pass  # The client or the server has closed its connection.
        finally:
            self._clients.discard(client_out)
            client_out.close()

    async def aclose(self) -> None:
        self.disarm()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.release_request()

    def take_fault(self, *, is_idle: bool) -> _ArmedFault | None:
        """The fault for the next request, which then counts as injected. ``is_idle``: no open transaction."""
        if self._armed is None or not (is_idle or self._armed.kind is not _Kind.HOLD):
            return None
        if self._armed.skip:
            self._armed = self._armed._replace(skip=self._armed.skip - 1)
            return None
        taken, self._armed = self._armed, None
        if taken.isolates:
            self.is_reachable.clear()
        self._has_injected = self._has_injected or taken is not None
        return taken

    def hold(self, request: bytes, server: Streams) -> None:
        if self._held is not None:
            self._held[1][1].close()
        self._held = request, server


class _Relay:
    """One client connection and its server connection."""

    def __init__(
        self,
        injector: ServerFaultInjector,
        client_in: asyncio.StreamReader,
        client_out: asyncio.StreamWriter,
        server: Streams,
    ) -> None:
        self._injector = injector
        self._client_in, self._client_out = client_in, client_out
        self._server = server
        self._status = b""
        """Of the last ReadyForQuery: I when idle, T or E in a transaction; empty before the first."""
        self._loses_reply = self._holds_request = False

    async def run(self) -> None:
        server_out = self._server[1]
        replies = asyncio.create_task(self._relay_replies())
        requests: asyncio.Task[None] | None = None
        try:
            start = await self._client_in.readexactly(8)
            (size,) = struct.unpack_from("!i", start)
            server_out.write(start + await self._client_in.readexactly(size - len(start)))
            if start[4:] == CANCEL_REQUEST:
                await replies
                return
            requests = asyncio.create_task(self._relay_requests())
            await asyncio.wait({replies, requests}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            started = [task for task in (replies, requests) if task is not None]
            for task in started:
                task.cancel()
            await asyncio.gather(*started, return_exceptions=True)
            if not self._holds_request:
                server_out.close()

    async def _relay_requests(self) -> None:
        server_out = self._server[1]
        while True:
            request, types = b"", b""
            while types[-1:] not in ENDS_REQUEST or not types:
                message = await _read_message(self._client_in)
                request, types = request + message, types + message[:1]
            executes = self._status and (b"Q" in types or b"E" in types)
            await self._injector.is_reachable.wait()
            if (silent := self._injector.silent) is not None:
                await silent.wait()
                return
            fault = self._injector.take_fault(is_idle=self._status == IDLE) if executes else None
            if fault is not None and fault.kind is _Kind.HOLD:
                self._holds_request = True
                self._injector.hold(request, self._server)
                self._client_out.transport.abort()
                return
            if fault is not None and fault.kind is _Kind.REFUSE:
                request = b"Q" + struct.pack("!i", 4 + len(REFUSAL)) + REFUSAL
            self._loses_reply = fault is not None and fault.kind is _Kind.LOSE_REPLY
            server_out.write(request)
            await server_out.drain()

    async def _relay_replies(self) -> None:
        server_in = self._server[0]
        while True:
            message = await _read_message(server_in)
            is_ready = message[:1] == READY_FOR_QUERY
            if not self._loses_reply:
                self._client_out.write(message)
                await self._client_out.drain()
            elif is_ready:
                self._client_out.transport.abort()
                return
            if is_ready:
                self._status = message[-1:]


async def _read_message(stream: asyncio.StreamReader) -> bytes:
    head = await stream.readexactly(5)
    (size,) = struct.unpack_from("!i", head, 1)
    return head + await stream.readexactly(size - 4)


@asynccontextmanager
async def inject_faults(url: str) -> AsyncIterator[ServerFaultInjector]:
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

    injector = ServerFaultInjector(connect)
    server = await asyncio.start_server(injector.serve, "127.0.0.1", 0)
    injector_port = server.sockets[0].getsockname()[1]
    injector.url = parts.with_options(
        {**parts.options, "host": "127.0.0.1", "port": str(injector_port), "sslmode": "disable"}
    )
    try:
        yield injector
    finally:
        server.close()
        await injector.aclose()


class ServerOutageInjector:
    """Implements OutageInjector; see flowstore_core.backend."""

    def __init__(self, url: str, faults: ServerFaultInjector) -> None:
        self._direct_url = url
        parts = parse_url(faults.url)
        self.url = parts.with_options({**parts.options, **SHORT_TIMEOUTS})
        self.interruptions: Mapping[str, Callable[[], AbstractAsyncContextManager[None]]] = {
            "the server does not answer": faults.silence,
            "the server cannot be reached": faults.refuse_connections,
        }

    def lock(self) -> AbstractAsyncContextManager[None]:
        return lock_rows(self._direct_url)


@asynccontextmanager
async def inject_outages(url: str) -> AsyncIterator[ServerOutageInjector]:
    """See OutageInjectable. Raises ConfigurationError like ``inject_faults``."""
    async with inject_faults(url) as faults:
        yield ServerOutageInjector(url, faults)
