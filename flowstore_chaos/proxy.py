"""A TCP proxy in front of PostgreSQL that injects faults into messages and counts those that took effect.

It parses the protocol to find the end of a request, its statement, and whether the reply reports success.
So a reply is lost as a whole, after the server has sent it.
"""

from __future__ import annotations

import asyncio
import re
import struct
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from enum import Enum

from flowstore_core.urls import parse_url

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect = Callable[[], Awaitable[Streams]]


class Fault(Enum):
    """A fault of a message; the value is its description."""

    REPLY_LOST = "the server executes the request, its reply is lost and the connection cut"
    REQUEST_LOST = "the request never reaches the server, the connection is cut"
    REQUEST_LATE = "the client's connection is cut, the request reaches the server later"
    RESET = "half of the request reaches the server, then both connections are reset"
    BLACK_HOLE = "nothing is forwarded from this request on, the connection stays open"
    HALF_REPLY = "half of the reply is forwarded and nothing after it, the connection stays open"


HANGS = (Fault.BLACK_HOLE, Fault.HALF_REPLY)
"""Faults that a client detects only by a timeout."""
DISCONNECTS = tuple(fault for fault in Fault if fault not in HANGS)


class MessageMatch(Enum):
    """The requests that a fault applies to."""

    ANY = "any"
    COMMIT = "successful commits of writes"
    CONNECT = "the first request of a connection"


@dataclass(slots=True)
class _ArmedFault:
    fault: Fault
    match: MessageMatch
    skip: int
    """Number of matching requests to forward first."""
    remaining: int


class Proxy:
    """Forwards messages, and injects the armed fault into matching ones."""

    def __init__(self, connect: Connect, delay: float = 0.2) -> None:
        self._connect = connect
        self._delay = delay
        self._armed: _ArmedFault | None = None
        self._healed = asyncio.Event()
        self._sessions: set[_Session] = set()
        self._delayed: set[asyncio.Task[None]] = set()
        self.port = 0
        self.messages = 0
        """Number of requests since the last ``arm``."""
        self.injected: Counter[Fault] = Counter()
        """Faults injected since the last ``arm``."""
        self.broken_in_flight = 0
        """Number of requests whose connection the server broke, since the last ``arm``."""
        self.max_clients = 0
        """Maximum number of concurrent client connections."""

    @property
    def has_injected(self) -> bool:
        return bool(self.injected)

    @property
    def clients(self) -> int:
        """Number of open client connections."""
        return sum(not session.client_gone for session in self._sessions)

    def arm(
        self, at_message: int, fault: Fault, *, match: MessageMatch = MessageMatch.ANY, times: int = 1
    ) -> None:
        """Inject a fault from the n-th matching request on, ``times`` times; 0 injects none."""
        self.messages, self.broken_in_flight = 0, 0
        self.injected = Counter()
        self._healed = asyncio.Event()
        self._armed = _ArmedFault(fault, match, at_message - 1, times) if at_message else None

    def disarm(self) -> None:
        self._armed = None

    def heal(self) -> None:
        """Disarm, and close hanging connections."""
        self._armed = None
        self._healed.set()
        for session in self._listeners():
            if session.silent:
                session.client_out.transport.abort()

    def cut_listeners(self) -> int:
        """Reset the connections that listen for notifications, and return their number."""
        listeners = self._listeners()
        for session in listeners:
            session.client_out.transport.abort()
        return len(listeners)

    def silence_listeners(self) -> int:
        """Forward no more messages to the connections that listen for notifications, and return their number.

        The connections stay open until ``heal``, as when a firewall has dropped them.
        """
        listeners = self._listeners()
        for session in listeners:
            session.silent = True
        return len(listeners)

    def _listeners(self) -> list[_Session]:
        return [session for session in self._sessions if session.listens and not session.client_gone]

    def drop_idle(self) -> None:
        """Reset every idle connection, as a firewall does after its timeout."""
        for session in self._sessions:
            if session.started and not session.in_flight:
                session.client_out.transport.abort()

    async def settle(self) -> None:
        """Wait until delayed requests have been delivered."""
        await asyncio.gather(*self._delayed)

    async def serve(self, client_in: asyncio.StreamReader, client_out: asyncio.StreamWriter) -> None:
        session = _Session(client_out)
        self._sessions.add(session)
        self.max_clients = max(self.max_clients, self.clients)
        try:
            await self._forward(session, client_in)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._sessions.discard(session)
            client_out.close()
            if session.reply_forwarder is not None:
                session.reply_forwarder.cancel()
            if session.server_out is not None and not session.is_delayed:
                session.server_out.close()

    async def aclose(self) -> None:
        self.heal()
        await self.settle()
        for session in self._sessions:
            session.client_out.transport.abort()
            if session.server_out is not None:
                session.server_out.transport.abort()

    async def _forward(self, session: _Session, client_in: asyncio.StreamReader) -> None:
        while request := await _read_request(client_in, first=not session.started):
            is_cancelling = session.note_request(request)
            fault = None
            if not is_cancelling:
                self.messages += 1
                fault = self._next_fault(session)
            session.first = False
            if fault is Fault.BLACK_HOLE:
                self.injected[fault] += 1
                await self._hang(session, client_in)
                return
            if session.server_out is None:
                try:
                    server_in, session.server_out = await self._connect()
                except OSError:
                    client_out = session.client_out
                    client_out.transport.abort()
                    return
                session.reply_forwarder = asyncio.create_task(self._forward_replies(session, server_in))
            if fault is Fault.REQUEST_LOST:
                self.injected[fault] += 1
                session.client_out.transport.abort()
                return
            if fault is Fault.RESET:
                self.injected[fault] += 1
                session.server_out.write(request[: len(request) // 2])
                await session.server_out.drain()
                session.server_out.transport.abort()
                session.client_out.transport.abort()
                return
            if fault is Fault.REQUEST_LATE:
                self.injected[fault] += 1
                session.is_delayed = True
                self._delayed.add(asyncio.create_task(self._deliver_delayed(session.server_out, request)))
                session.client_out.transport.abort()
                return
            session.withheld = fault
            session.in_flight = True
            session.server_out.write(request)
            await session.server_out.drain()
            if fault is not None and session.reply_forwarder is not None:
                # The client waits for the reply; the reply forwarder decides.
                await asyncio.wait(
                    {session.reply_forwarder, reply := asyncio.ensure_future(session.answered.wait())},
                    return_when=asyncio.FIRST_COMPLETED,
                )
                reply.cancel()
                if session.hanging:
                    await self._hang(session, client_in)
                    return
                if session.reply_forwarder.done():
                    return
        session.client_gone = True

    def _next_fault(self, session: _Session) -> Fault | None:
        """The fault for this request, or None if it does not match."""
        armed = self._armed
        if armed is None:
            return None
        if armed.match is MessageMatch.CONNECT and not session.first:
            return None
        if armed.match is MessageMatch.COMMIT and (session.first or not session.writes):
            return None
        if armed.skip > 0:
            armed.skip -= 1
            return None
        armed.remaining -= 1
        if armed.remaining <= 0:
            self._armed = None
        session.armed = armed
        return armed.fault

    async def _hang(self, session: _Session, client_in: asyncio.StreamReader) -> None:
        """Forward nothing until healed; the server is not told when the client disconnects."""
        healed = asyncio.ensure_future(self._healed.wait())
        reading = asyncio.ensure_future(_read_to_end(client_in))
        await asyncio.wait({healed, reading}, return_when=asyncio.FIRST_COMPLETED)
        if reading.done():
            session.client_gone = True
            session.client_out.close()
            await healed
        reading.cancel()
        session.client_out.transport.abort()

    async def _deliver_delayed(self, server_out: asyncio.StreamWriter, data: bytes) -> None:
        await asyncio.sleep(self._delay)
        try:
            server_out.write(data)
            await server_out.drain()
            await asyncio.sleep(0.05)
        except ConnectionError:
            pass
        server_out.close()

    async def _forward_replies(self, session: _Session, server_in: asyncio.StreamReader) -> None:
        with suppress(ConnectionError):
            while data := await server_in.read(1 << 20):
                done = session.note_reply(data)
                if session.silent:
                    continue
                if session.withheld is not None:
                    # Decide when the reply is complete.
                    if done and not self._withhold_reply(session):
                        return
                    continue
                session.client_out.write(data)
                await session.client_out.drain()
        if session.in_flight and not session.is_startup:
            self.broken_in_flight += 1
        if session.withheld is None:
            session.client_out.close()
        else:
            session.client_out.transport.abort()

    def _withhold_reply(self, session: _Session) -> bool:
        """Decide on a complete, withheld reply. False if the connection was closed."""
        armed, fault, reply = session.armed, session.withheld, session.reply
        if armed is None or fault is None:
            raise RuntimeError("a reply is withheld without an armed fault")
        session.withheld = session.armed = None
        if armed.match is MessageMatch.COMMIT and not session.committed:
            # Not a successful commit: inject the fault into the next one.
            if self._armed is None or self._armed is armed:
                armed.remaining += 1
                self._armed = armed
            session.client_out.write(reply)
            session.answered.set()
            return True
        self.injected[fault] += 1
        if fault is Fault.HALF_REPLY:
            session.client_out.write(reply[: len(reply) // 2])
            session.hanging = True
            session.answered.set()
            return True
        session.client_out.transport.abort()
        if session.server_out is not None:
            session.server_out.close()
        return False


_WRITES = re.compile(rb"\b(INSERT|UPDATE|DELETE)\b")


class _Session:
    """A client's connection and its connection to the server."""

    def __init__(self, client_out: asyncio.StreamWriter) -> None:
        self.client_out = client_out
        self.server_out: asyncio.StreamWriter | None = None
        self.reply_forwarder: asyncio.Task[None] | None = None
        self.armed: _ArmedFault | None = None
        self.withheld: Fault | None = None
        self.answered = asyncio.Event()
        self.first, self.started = True, False
        self.in_flight = False
        """Whether a request awaits its reply."""
        self.is_startup = False
        """Whether the request is the first of the connection, which a starting server refuses."""
        self.writes = False
        """Whether the request is a COMMIT or a writing statement."""
        self.committed = False
        """Whether the reply reports success and no open transaction."""
        self.hanging = self.is_delayed = self.client_gone = False
        self.listens = False
        """Whether the client has sent LISTEN."""
        self.silent = False
        """Whether nothing is forwarded to the client any more."""
        self.reply = b""
        self._parsed = 0
        self._statements: dict[bytes, bytes] = {}
        self._completed = self._described = False

    def note_request(self, request: bytes) -> bool:
        """Parse a request. True for a CancelRequest."""
        self.reply, self._parsed, self._completed, self.committed = b"", 0, False, False
        self.answered.clear()
        self.is_startup = not self.started
        if self.is_startup:
            self.started = True
            return request[4:8] == struct.pack("!i", 80877102)
        position, text, kind = 0, b"", b""
        while position < len(request):
            kind = request[position : position + 1]
            (length,) = struct.unpack_from("!i", request, position + 1)
            content = request[position + 5 : position + 1 + length]
            if kind == b"P":
                name, text, *_ = content.split(b"\0")
                self._statements[name] = text
            elif kind == b"B":
                text = self._statements.get(content.split(b"\0")[1], b"")
            elif kind == b"Q":
                text = content[:-1]
            position += 1 + length
        self._described = kind == b"H"
        self.listens = self.listens or text.startswith(b"LISTEN ")
        self.writes = text == b"COMMIT" or _WRITES.search(text) is not None
        return False

    def note_reply(self, data: bytes) -> bool:
        """Parse more of the reply. True when it is complete."""
        self.reply += data
        while self._parsed + 5 <= len(self.reply):
            kind = self.reply[self._parsed : self._parsed + 1]
            (length,) = struct.unpack_from("!i", self.reply, self._parsed + 1)
            end = self._parsed + 1 + length
            if end > len(self.reply):
                return False
            if kind in (b"C", b"s"):
                # CommandComplete, or PortalSuspended after a single row.
                self._completed = True
            elif kind == b"E":
                self._completed = False
            if kind == b"Z" or (self._described and kind in (b"T", b"n", b"E")):
                self.committed = self._completed and self.reply[end - 1 : end] == b"I"
                self.in_flight = False
                return True
            self._parsed = end
        return False


async def _read_request(client_in: asyncio.StreamReader, *, first: bool) -> bytes:
    """Read up to the message after which the client waits for a reply; empty at end of file."""
    if first:
        try:
            head = await client_in.readexactly(4)
        except asyncio.IncompleteReadError:
            return b""
        (length,) = struct.unpack("!i", head)
        return head + await client_in.readexactly(length - 4)
    request = b""
    while True:
        try:
            head = await client_in.readexactly(5)
        except asyncio.IncompleteReadError:
            return b""
        (length,) = struct.unpack_from("!i", head, 1)
        request += head + await client_in.readexactly(length - 4)
        # Sync, Query, Terminate, Flush, a password message, the end of a COPY.
        if head[:1] in b"SQXHpcf":
            return request


async def _read_to_end(client_in: asyncio.StreamReader) -> None:
    with suppress(ConnectionError):
        while await client_in.read(1 << 16):
            pass


@asynccontextmanager
async def serve_proxy(connect: Connect, *, delay: float = 0.2) -> AsyncIterator[Proxy]:
    """A proxy on a free port of loopback."""
    proxy = Proxy(connect, delay)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        await proxy.aclose()


@asynccontextmanager
async def proxy_before_port(port: int, *, delay: float = 0.2) -> AsyncIterator[Proxy]:
    """A proxy for a server on a port of loopback, which may start later."""
    async with serve_proxy(lambda: asyncio.open_connection("127.0.0.1", port), delay=delay) as proxy:
        yield proxy


@asynccontextmanager
async def proxy_before(url: str, *, delay: float = 0.2) -> AsyncIterator[tuple[Proxy, str]]:
    """A proxy for a server on a Unix socket, and the URL through the proxy."""
    options = parse_url(url).options
    socket = f"{options['host']}/.s.PGSQL.5432"
    async with serve_proxy(lambda: asyncio.open_unix_connection(socket), delay=delay) as proxy:
        through = (
            f"postgresql://postgres@127.0.0.1:{proxy.port}/postgres?sslmode=disable"
            f"&schema={options['schema']}"
        )
        yield proxy, through
