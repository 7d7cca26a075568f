"""A proxy between stores and one member that injects faults, for conformance checks.

It relays whole frames of HTTP/2 without TLS. A request is a gRPC message with a transaction that does
something; its reply ends with a frame that ends its stream.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from enum import Enum
from typing import NamedTuple

from google.protobuf.message import DecodeError

from flowstore_core import ConfigurationError
from flowstore_core.urls import StoreUrl, parse_url
from flowstore_etcd.etcd_pb2 import TxnRequest
from flowstore_etcd.settings import read_addresses

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, RST_STREAM, GOAWAY = 0, 3, 7
END_STREAM = 0x1
CANCEL = 8
TIMEOUTS = {"connect_timeout": "1", "request_timeout": "20", "retry_timeout": "1"}
"""A request may be held for some seconds, and etcd drops one whose time is over."""


class _Kind(Enum):
    LOSE_REPLY = "lose the reply"
    HOLD = "hold the request"
    REFUSE = "refuse the request"


class _ArmedFault(NamedTuple):
    kind: _Kind
    skip: int
    isolates: bool = False


class _Frame(NamedTuple):
    type: int
    flags: int
    stream: int
    payload: bytes

    def encode(self) -> bytes:
        head = struct.pack("!IBI", len(self.payload) << 8 | self.type, self.flags, self.stream)
        return head + self.payload


class MemberFaultInjector:
    """Implements FaultInjector; see flowstore_core.backend."""

    def __init__(self, host: str, port: int) -> None:
        self.url = ""
        self._server = host, port
        self._armed: _ArmedFault | None = None
        self._has_injected = False
        self._is_isolated = False
        self._held: tuple[_Frame, Streams] | None = None
        self._relays: set[asyncio.Task[None]] = set()
        self._clients: set[asyncio.StreamWriter] = set()

    def lose_reply(self, *, skip: int = 0, isolates: bool = False) -> None:
        self._arm(_ArmedFault(_Kind.LOSE_REPLY, skip, isolates))

    def hold_request(self, *, skip: int = 0) -> None:
        self._arm(_ArmedFault(_Kind.HOLD, skip))

    def refuse_request(self, *, skip: int = 0) -> None:
        self._arm(_ArmedFault(_Kind.REFUSE, skip))

    def _arm(self, fault: _ArmedFault) -> None:
        self._armed, self._has_injected = fault, False

    def disarm(self) -> bool:
        self._armed, self._is_isolated = None, False
        return self._has_injected

    async def release_request(self) -> None:
        if self._held is None:
            return
        (request, (server_in, server_out)), self._held = self._held, None
        # etcd may have ended the connection meanwhile.
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            server_out.write(request.encode())
            await server_out.drain()
            frame = await _read_frame(server_in)
            while frame.stream != request.stream or not frame.flags & END_STREAM:
                frame = await _read_frame(server_in)
        server_out.close()

    async def serve(self, client_in: asyncio.StreamReader, client_out: asyncio.StreamWriter) -> None:
        """Relay one connection of a client."""
        task = asyncio.current_task()
        assert task is not None
        self._relays.add(task)
        self._clients.add(client_out)
        try:
            if not self._is_isolated:
                await self._relay(client_in, client_out)
        except (OSError, asyncio.IncompleteReadError):
            pass  # The client or etcd has closed its connection.
        finally:
            self._relays.discard(task)
            self._clients.discard(client_out)
            client_out.transport.abort()

    async def _relay(self, client_in: asyncio.StreamReader, client_out: asyncio.StreamWriter) -> None:
        server = await asyncio.open_connection(*self._server)
        lost: set[int] = set()
        both = (
            asyncio.create_task(self._relay_requests(client_in, client_out, server, lost)),
            asyncio.create_task(self._relay_replies(server[0], client_out, lost)),
        )
        try:
            done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)
            if self._held is None or self._held[1] is not server:
                server[1].close()

    async def _relay_requests(
        self,
        client_in: asyncio.StreamReader,
        client_out: asyncio.StreamWriter,
        server: Streams,
        lost: set[int],
    ) -> None:
        """Relay frames to etcd, the data of a message in one piece; return when the connection breaks."""
        server_out = server[1]
        server_out.write(await client_in.readexactly(len(PREFACE)))
        messages: dict[int, bytes] = {}
        while True:
            frame = await _read_frame(client_in)
            if frame.type == DATA and frame.payload:
                message = messages.pop(frame.stream, b"") + frame.payload
                if len(message) < 5 or len(message) < 5 + int.from_bytes(message[1:5]):
                    messages[frame.stream] = message
                    continue
                fault = self._take_fault(message[5:])
                if fault is _Kind.HOLD:
                    frame = frame._replace(payload=message, flags=frame.flags | END_STREAM)
                    self._held = frame, server
                    return
                if fault is _Kind.REFUSE:
                    # To etcd the client has given up. To the client etcd has stopped before this request, so
                    # it may send it again; gRPC does so by itself unless its retries are switched off.
                    server_out.write(_frame(RST_STREAM, frame.stream, CANCEL))
                    client_out.write(_frame(GOAWAY, 0, max(frame.stream - 2, 0), 0))
                    continue
                if fault is _Kind.LOSE_REPLY:
                    lost.add(frame.stream)
                # etcd accepts frames of up to 16 KiB.
                pieces = [message[at : at + 16_384] for at in range(0, len(message), 16_384)]
                for piece in pieces[:-1]:
                    server_out.write(_Frame(DATA, 0, frame.stream, piece).encode())
                frame = frame._replace(payload=pieces[-1])
            server_out.write(frame.encode())
            await server_out.drain()

    async def _relay_replies(
        self, server_in: asyncio.StreamReader, client_out: asyncio.StreamWriter, lost: set[int]
    ) -> None:
        while True:
            frame = await _read_frame(server_in)
            if frame.stream not in lost:
                client_out.write(frame.encode())
                await client_out.drain()
            elif frame.flags & END_STREAM:
                return

    def _take_fault(self, message: bytes) -> _Kind | None:
        """The fault for this message, which then counts as injected."""
        if self._armed is None:
            return None
        try:
            operations = TxnRequest.FromString(message).success
        except DecodeError:
            return None  # Another kind of message.
        is_commit = any(not operation.HasField("request_range") for operation in operations)
        if not operations or not (is_commit or self._armed.kind is _Kind.REFUSE):
            return None
        if self._armed.skip:
            self._armed = self._armed._replace(skip=self._armed.skip - 1)
            return None
        taken, self._armed = self._armed, None
        self._has_injected, self._is_isolated = True, taken.isolates
        if taken.kind is _Kind.HOLD and self._held is not None:
            self._held[1][1].close()
            self._held = None
        return taken.kind

    async def aclose(self) -> None:
        self.disarm()
        for client_out in self._clients:
            client_out.transport.abort()
        await asyncio.gather(*self._relays)
        await self.release_request()


def _frame(kind: int, stream: int, *numbers: int) -> bytes:
    return _Frame(kind, 0, stream, struct.pack(f"!{len(numbers)}I", *numbers)).encode()


async def _read_frame(stream: asyncio.StreamReader) -> _Frame:
    size_and_type, flags, number = struct.unpack("!IBI", await stream.readexactly(9))
    return _Frame(size_and_type & 0xFF, flags, number, await stream.readexactly(size_and_type >> 8))


@asynccontextmanager
async def inject_faults(url: str) -> AsyncIterator[MemberFaultInjector]:
    """See FaultInjectable. The stores use the first member of the URL. Raises ConfigurationError for TLS."""
    parts = parse_url(url)
    if {"tls", "cacert"} & parts.options.keys():
        raise ConfigurationError("faults cannot be injected into TLS connections")
    host, _, port = read_addresses(parts)[0].rpartition(":")
    injector = MemberFaultInjector(host.strip("[]"), int(port))
    server = await asyncio.start_server(injector.serve, "127.0.0.1", 0)
    injector.url = _url_at(parts, f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    try:
        yield injector
    finally:
        server.close()
        await injector.aclose()


def _url_at(parts: StoreUrl, address: str) -> str:
    location, _, _ = parts.text.partition("?")
    authority, _, path = location.partition("://")[2].partition("/")
    login, at, _ = authority.rpartition("@")
    url = parse_url(f"{parts.scheme}://{login}{at}{address}/{path}")
    return url.with_options({**parts.options, **TIMEOUTS})
