"""A TCP proxy in front of PostgreSQL that loses what it is told to lose, and counts what it really lost.

It reads enough of the protocol to know where a request ends, which statement it runs and whether the
reply says that it is done; so a reply is lost whole, and only once the server has given it.
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
    """What becomes of a message; its value says it in words."""

    REPLY_LOST = "the server acts on the message, its reply is cut off"
    REQUEST_LOST = "the message never reaches the server, the connection is cut"
    REQUEST_LATE = "the connection is cut towards the client, and the message arrives later"
    RESET = "half of the message reaches the server, then both ends are reset"
    BLACK_HOLE = "from the message on nothing is carried, and the connection stays open"
    HALF_REPLY = "half of the reply is carried and nothing after it, and the connection stays open"


HOLES = (Fault.BLACK_HOLE, Fault.HALF_REPLY)
"""Those that the client notices by a time-out alone."""
CUTS = tuple(fault for fault in Fault if fault not in HOLES)


class Aim(Enum):
    """Which messages are struck."""

    ANY = "any"
    COMMIT = "those that commit a write, and are answered"
    CONNECT = "the first of a connection"


@dataclass(slots=True)
class _Order:
    fault: Fault
    aim: Aim
    skip: int
    """So many that it is aimed at pass first."""
    left: int


class Proxy:
    """Carries messages, and strikes at those that it is armed for."""

    def __init__(self, connect: Connect, delay: float = 0.2) -> None:
        self._connect = connect
        self._delay = delay
        self._order: _Order | None = None
        self._healed = asyncio.Event()
        self._links: set[_Link] = set()
        self._late: set[asyncio.Task[None]] = set()
        self.port = 0
        self.messages = 0
        """Of clients, since it was armed last."""
        self.landed: Counter[Fault] = Counter()
        """Messages in flight that were struck since it was armed last."""
        self.broken_in_flight = 0
        """Requests under way whose connection the server itself broke, since it was armed last."""
        self.most_clients = 0
        """The most connections that clients have had at once."""

    @property
    def struck(self) -> bool:
        return bool(self.landed)

    @property
    def clients(self) -> int:
        """Connections that clients hold now."""
        return sum(not link.client_gone for link in self._links)

    def arm(self, strike_at: int, fault: Fault, *, aim: Aim = Aim.ANY, exact_times: int = 1) -> None:
        """Strike at the n-th message from now on, and at those after it, so many times; 0 never strikes."""
        self.messages, self.broken_in_flight = 0, 0
        self.landed = Counter()
        self._healed = asyncio.Event()
        self._order = _Order(fault, aim, strike_at - 1, exact_times) if strike_at else None

    def disarm(self) -> None:
        self._order = None

    def heal(self) -> None:
        """Disarm it, and end the connections that carry nothing any more."""
        self._order = None
        self._healed.set()

    def cut(self) -> None:
        """End every connection that is idle, as a firewall does that has forgotten it."""
        for link in self._links:
            if link.started and not link.asked:
                link.client_out.transport.abort()

    async def settle(self) -> None:
        """Wait until late messages have arrived."""
        await asyncio.gather(*self._late)

    async def serve(self, client_in: asyncio.StreamReader, client_out: asyncio.StreamWriter) -> None:
        link = _Link(client_out)
        self._links.add(link)
        self.most_clients = max(self.most_clients, self.clients)
        try:
            await self._carry(link, client_in)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._links.discard(link)
            client_out.close()
            if link.back is not None:
                link.back.cancel()
            if link.server_out is not None and not link.late:
                link.server_out.close()

    async def aclose(self) -> None:
        self.heal()
        await self.settle()
        for link in self._links:
            link.client_out.transport.abort()
            if link.server_out is not None:
                link.server_out.transport.abort()

    async def _carry(self, link: _Link, client_in: asyncio.StreamReader) -> None:
        while request := await _read_request(client_in, first=not link.started):
            is_cancelling = link.note_request(request)
            fault = None
            if not is_cancelling:
                self.messages += 1
                fault = self._fault_for(link)
            link.first = False
            if fault is Fault.BLACK_HOLE:
                self.landed[fault] += 1
                await self._swallow(link, client_in)
                return
            if link.server_out is None:
                try:
                    server_in, link.server_out = await self._connect()
                except OSError:
                    client_out = link.client_out
                    client_out.transport.abort()
                    return
                link.back = asyncio.create_task(self._pump_back(link, server_in))
            if fault is Fault.REQUEST_LOST:
                self.landed[fault] += 1
                link.client_out.transport.abort()
                return
            if fault is Fault.RESET:
                self.landed[fault] += 1
                link.server_out.write(request[: len(request) // 2])
                await link.server_out.drain()
                link.server_out.transport.abort()
                link.client_out.transport.abort()
                return
            if fault is Fault.REQUEST_LATE:
                self.landed[fault] += 1
                link.late = True
                self._late.add(asyncio.create_task(self._deliver_late(link.server_out, request)))
                link.client_out.transport.abort()
                return
            link.losing = fault
            link.asked = True
            link.server_out.write(request)
            await link.server_out.drain()
            if fault is not None and link.back is not None:
                # Nothing else comes until it is answered; the pump decides.
                await asyncio.wait(
                    {link.back, reply := asyncio.ensure_future(link.answered.wait())},
                    return_when=asyncio.FIRST_COMPLETED,
                )
                reply.cancel()
                if link.swallowing:
                    await self._swallow(link, client_in)
                    return
                if link.back.done():
                    return
        link.client_gone = True

    def _fault_for(self, link: _Link) -> Fault | None:
        """The fault that the request gets, if it is one that is aimed at."""
        order = self._order
        if order is None:
            return None
        if order.aim is Aim.CONNECT and not link.first:
            return None
        if order.aim is Aim.COMMIT and (link.first or not link.writes):
            return None
        if order.skip > 0:
            order.skip -= 1
            return None
        order.left -= 1
        if order.left <= 0:
            self._order = None
        link.order = order
        return order.fault

    async def _swallow(self, link: _Link, client_in: asyncio.StreamReader) -> None:
        """Carry nothing any more; the server is not told when the client goes."""
        healed = asyncio.ensure_future(self._healed.wait())
        reading = asyncio.ensure_future(_read_to_end(client_in))
        await asyncio.wait({healed, reading}, return_when=asyncio.FIRST_COMPLETED)
        if reading.done():
            link.client_gone = True
            link.client_out.close()
            await healed
        reading.cancel()
        link.client_out.transport.abort()

    async def _deliver_late(self, server_out: asyncio.StreamWriter, data: bytes) -> None:
        await asyncio.sleep(self._delay)
        try:
            server_out.write(data)
            await server_out.drain()
            await asyncio.sleep(0.05)
        except ConnectionError:
            pass
        server_out.close()

    async def _pump_back(self, link: _Link, server_in: asyncio.StreamReader) -> None:
        with suppress(ConnectionError):
            while data := await server_in.read(1 << 20):
                done = link.note_reply(data)
                if link.losing is not None:
                    # Whether it is lost is seen when it is whole.
                    if done and not self._lose_reply(link):
                        return
                    continue
                link.client_out.write(data)
                await link.client_out.drain()
        if link.asked and not link.greeting:
            self.broken_in_flight += 1
        if link.losing is None:
            link.client_out.close()
        else:
            link.client_out.transport.abort()

    def _lose_reply(self, link: _Link) -> bool:
        """A reply is whole and was to be lost; False when its connection has ended."""
        order, fault, reply = link.order, link.losing, link.reply
        if order is None or fault is None:
            raise RuntimeError("a reply is withheld that nobody wanted to be lost")
        link.losing = link.order = None
        if order.aim is Aim.COMMIT and not link.committed:
            # It failed, or was a statement within a transaction: the next one, then.
            if self._order is None or self._order is order:
                order.left += 1
                self._order = order
            link.client_out.write(reply)
            link.answered.set()
            return True
        self.landed[fault] += 1
        if fault is Fault.HALF_REPLY:
            link.client_out.write(reply[: len(reply) // 2])
            link.swallowing = True
            link.answered.set()
            return True
        link.client_out.transport.abort()
        if link.server_out is not None:
            link.server_out.close()
        return False


_WRITES = re.compile(rb"\b(INSERT|UPDATE|DELETE)\b")


class _Link:
    """One client's connection, and the one to the server that is made for it."""

    def __init__(self, client_out: asyncio.StreamWriter) -> None:
        self.client_out = client_out
        self.server_out: asyncio.StreamWriter | None = None
        self.back: asyncio.Task[None] | None = None
        self.order: _Order | None = None
        self.losing: Fault | None = None
        self.answered = asyncio.Event()
        self.first, self.started = True, False
        self.asked = False
        """A request is under way."""
        self.greeting = False
        """It is the first of the connection, which a server that is starting refuses."""
        self.writes = False
        """It is COMMIT, or a statement that writes."""
        self.committed = False
        """Its reply says that it is done, and that no transaction is open."""
        self.swallowing = self.late = self.client_gone = False
        self.reply = b""
        self._parsed = 0
        self._statements: dict[bytes, bytes] = {}
        self._completed = self._described = False

    def note_request(self, request: bytes) -> bool:
        """Remember what is asked; True when it asks that another connection's statement be cancelled."""
        self.reply, self._parsed, self._completed, self.committed = b"", 0, False, False
        self.answered.clear()
        self.greeting = not self.started
        if self.greeting:
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
        self.writes = text == b"COMMIT" or _WRITES.search(text) is not None
        return False

    def note_reply(self, data: bytes) -> bool:
        """Read on in the reply; True when it is whole."""
        self.reply += data
        while self._parsed + 5 <= len(self.reply):
            kind = self.reply[self._parsed : self._parsed + 1]
            (length,) = struct.unpack_from("!i", self.reply, self._parsed + 1)
            end = self._parsed + 1 + length
            if end > len(self.reply):
                return False
            if kind in (b"C", b"s"):
                # The latter where one row was asked for: it is done all the same.
                self._completed = True
            elif kind == b"E":
                self._completed = False
            if kind == b"Z" or (self._described and kind in (b"T", b"n", b"E")):
                self.committed = self._completed and self.reply[end - 1 : end] == b"I"
                self.asked = False
                return True
            self._parsed = end
        return False


async def _read_request(client_in: asyncio.StreamReader, *, first: bool) -> bytes:
    """Everything up to where the client waits for the server; empty when the client has gone."""
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
        # Sync, Query, Terminate, Flush, an answer about passwords, the end of a COPY.
        if head[:1] in b"SQXHpcf":
            return request


async def _read_to_end(client_in: asyncio.StreamReader) -> None:
    with suppress(ConnectionError):
        while await client_in.read(1 << 16):
            pass


@asynccontextmanager
async def serve_proxy(connect: Connect, *, delay: float = 0.2) -> AsyncIterator[Proxy]:
    """A proxy that listens on a free port of loopback."""
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
    """A proxy before a server that listens on a port of loopback, now or later."""
    async with serve_proxy(lambda: asyncio.open_connection("127.0.0.1", port), delay=delay) as proxy:
        yield proxy


@asynccontextmanager
async def proxy_before(url: str, *, delay: float = 0.2) -> AsyncIterator[tuple[Proxy, str]]:
    """A proxy before the server of a URL whose host is a socket folder, and the URL that goes through it."""
    options = parse_url(url).options
    socket = f"{options['host']}/.s.PGSQL.5432"
    async with serve_proxy(lambda: asyncio.open_unix_connection(socket), delay=delay) as proxy:
        through = (
            f"postgresql://postgres@127.0.0.1:{proxy.port}/postgres?sslmode=disable"
            f"&schema={options['schema']}"
        )
        yield proxy, through
