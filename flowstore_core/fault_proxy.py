"""A proxy between stores and one server that loses, delays and refuses requests, for conformance checks.

FaultProxy has the faults and outages. A backend derives from ProxyRelay, which relays the messages of its
protocol, without TLS.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from enum import Enum
from typing import NamedTuple, TypeAlias

LOOPBACK = "127.0.0.1"

Streams: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class FaultKind(Enum):
    """What happens to a request; the value is a description."""

    LOSE_REPLY = "the reply is lost"
    HOLD = "the request is held"
    REFUSE = "the request is refused, with an error that permits a retry"
    FAIL = "the request fails, as all later writes do"


class ArmedFault(NamedTuple):
    """A fault, and the number of requests before the one that it affects."""

    kind: FaultKind
    skip: int
    isolates: bool = False


class _HeldRequest(NamedTuple):
    request: bytes
    server: Streams
    relay_ended: asyncio.Event


class FaultProxy:
    """Implements FaultInjector, WriteFailureInjector, and the interruptions of an OutageInjector."""

    def __init__(self, connect: Callable[[], Awaitable[Streams]], relay: type[ProxyRelay]) -> None:
        """``connect`` opens a connection to the server."""
        self.url = ""
        """Set by the backend once the proxy has a port."""
        self._connect = connect
        self._relay_class = relay
        self._armed: ArmedFault | None = None
        self._has_injected = False
        self._is_passable = asyncio.Event()
        self._is_passable.set()
        self._silence: asyncio.Event | None = None
        """Set at the end of a silence; None if there is none."""
        self._refuses = False
        self._held: _HeldRequest | None = None
        self._relay_ends: dict[asyncio.StreamWriter, asyncio.Event] = {}
        """The connections to the server that a relay uses, with an event that is set at the relay's end."""
        self._relays: set[asyncio.Task[None]] = set()
        self._clients: set[asyncio.StreamWriter] = set()

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[tuple[str, int]]:
        """Accept connections in this context, on a free port of loopback. Yields host and port."""
        server = await asyncio.start_server(self._accept, LOOPBACK, 0)
        try:
            yield LOOPBACK, server.sockets[0].getsockname()[1]
        finally:
            server.close()
            self.disarm()
            for task in self._relays:
                task.cancel()
            await asyncio.gather(*self._relays, return_exceptions=True)
            await self.release_request()

    # Faults

    def lose_reply(self, *, skip: int = 0, isolates: bool = False) -> None:
        self._arm(ArmedFault(FaultKind.LOSE_REPLY, skip, isolates))

    def hold_request(self, *, skip: int = 0) -> None:
        self._arm(ArmedFault(FaultKind.HOLD, skip))

    def refuse_request(self, *, skip: int = 0) -> None:
        self._arm(ArmedFault(FaultKind.REFUSE, skip))

    def fail(self, *, skip: int = 0) -> None:
        self._arm(ArmedFault(FaultKind.FAIL, skip))

    def _arm(self, fault: ArmedFault) -> None:
        self._armed, self._has_injected = fault, False

    def disarm(self) -> bool:
        self._armed = None
        self._is_passable.set()
        return self._has_injected

    def stop(self) -> bool:
        return self.disarm()

    async def release_request(self) -> None:
        if (held := self._held) is None:
            return
        request, server, relay_ended = held
        # Until then the relay reads from this connection too.
        await relay_ended.wait()
        if self._held is not held:
            return
        self._held = None
        # The server may have ended the connection meanwhile.
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            server[1].write(request)
            await server[1].drain()
            await self._relay_class.read_reply(request, server[0])
        server[1].close()

    # Outages

    @asynccontextmanager
    async def silence(self) -> AsyncIterator[None]:
        """Relay no requests, and end the connections afterwards."""
        self._silence = asyncio.Event()
        try:
            yield
        finally:
            self._silence.set()
            self._silence = None

    @asynccontextmanager
    async def refuse_connections(self) -> AsyncIterator[None]:
        """End the connections and every new one."""
        self._refuses = True
        for client_out in self._clients:
            client_out.transport.abort()
        try:
            yield
        finally:
            self._refuses = False

    # For the relays

    @property
    def is_isolated(self) -> bool:
        """Whether no request may pass until ``disarm``."""
        return not self._is_passable.is_set()

    async def passes(self) -> bool:
        """Wait while no request may pass. False if the connection ends, after a silence."""
        await self._is_passable.wait()
        if self._silence is None:
            return True
        await self._silence.wait()
        return False

    def take_fault(self, *possible: FaultKind) -> FaultKind | None:
        """The fault of the next request, which then counts as injected, if it is one of those possible."""
        armed = self._armed
        if armed is None or armed.kind not in possible:
            return None
        if armed.skip:
            self._armed = armed._replace(skip=armed.skip - 1)
            return None
        self._has_injected = True
        if armed.kind is not FaultKind.FAIL:
            self._armed = None
        if armed.isolates:
            self._is_passable.clear()
        return armed.kind

    def hold(self, request: bytes, server: Streams) -> None:
        """Keep a request for ``release_request``, and its connection to the server."""
        if self._held is not None:
            self._held.server[1].close()
        self._held = _HeldRequest(request, server, self._relay_ends[server[1]])

    # Connections

    async def _accept(self, client_in: asyncio.StreamReader, client_out: asyncio.StreamWriter) -> None:
        # The callback of asyncio's server must not be cancelled.
        relay = asyncio.ensure_future(self._relay((client_in, client_out)))
        self._relays.add(relay)
        relay.add_done_callback(self._relays.discard)
        await asyncio.wait({relay})

    async def _relay(self, client: Streams) -> None:
        client_out = client[1]
        self._clients.add(client_out)
        try:
            if self._silence is not None:
                await self._silence.wait()
            elif not self._refuses:
                server = await self._connect()
                ended = self._relay_ends[server[1]] = asyncio.Event()
                try:
                    await self._relay_class(self, client, server).run()
                    client_out.transport.abort()
                finally:
                    del self._relay_ends[server[1]]
                    ended.set()
                    if self._held is None or self._held.server is not server:
                        server[1].close()
        except (OSError, asyncio.IncompleteReadError):
            pass  # The client or the server has closed its connection.
        finally:
            self._clients.discard(client_out)
            client_out.close()


class ProxyOutageInjector:
    """Implements OutageInjector with a proxy."""

    def __init__(
        self, proxy: FaultProxy, url: str, lock: Callable[[], AbstractAsyncContextManager[None]]
    ) -> None:
        """``url`` leads to the proxy, with short timeouts; see OutageInjector for ``lock``."""
        self.url = url
        self.lock = lock
        self.interruptions: Mapping[str, Callable[[], AbstractAsyncContextManager[None]]] = {
            "the server does not answer": proxy.silence,
            "the server cannot be reached": proxy.refuse_connections,
        }


class ProxyRelay(ABC):
    """One connection of a client and the one to its server."""

    def __init__(self, proxy: FaultProxy, client: Streams, server: Streams) -> None:
        self.proxy = proxy
        self.client = client
        self.server = server

    @abstractmethod
    async def relay_requests(self) -> None:
        """Relay the messages of the client; return to reset the connection.

        Calls ``proxy.passes`` before each request, and ``proxy.take_fault`` if the request can have one.
        """

    @abstractmethod
    async def relay_replies(self) -> None:
        """Relay the messages of the server; return, in place of a reply that is to be lost."""

    @staticmethod
    @abstractmethod
    async def read_reply(request: bytes, server_in: asyncio.StreamReader) -> None:
        """Read the whole reply to a request that was held."""

    async def run(self) -> None:
        both = asyncio.create_task(self.relay_requests()), asyncio.create_task(self.relay_replies())
        try:
            done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)
