"""A proxy between stores and one member that injects faults, for conformance checks.

It relays whole frames of HTTP/2 without TLS. A request is a gRPC message with a transaction that does
something; its reply ends with a frame that ends its stream.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import NamedTuple

from google.protobuf.message import DecodeError

from flowstore_core import ConfigurationError, StoreConfig
from flowstore_core.backend import FaultKind, FaultProxy, ProxyOutageInjector, ProxyRelay, Streams
from flowstore_core.urls import parse_url
from flowstore_etcd.connection import NO_SPACE
from flowstore_etcd.etcd_pb2 import TxnRequest
from flowstore_etcd.settings import read_settings

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 7, 8
END_STREAM, END_HEADERS = 0x1, 0x4
CANCEL = 8
MAX_FRAME = 16_384
TIMEOUTS = {"connect_timeout": "1", "request_timeout": "20", "retry_timeout": "1"}
"""A request may be held for some seconds, and etcd drops one whose time is over."""
SHORT_TIMEOUTS = {"connect_timeout": "1", "request_timeout": "0.5", "retry_timeout": "0.3"}


def _header(name: bytes, value: bytes) -> bytes:
    """A header of HTTP/2 that is not compressed."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


FULL_REPLY = (
    _header(b":status", b"200")
    + _header(b"content-type", b"application/grpc")
    + _header(b"grpc-status", b"8")
    + _header(b"grpc-message", NO_SPACE.encode())
)
"""The headers with which a member refuses a transaction because its database is full."""


class _Frame(NamedTuple):
    type: int
    flags: int
    stream: int
    payload: bytes

    def encode(self) -> bytes:
        head = struct.pack("!IBI", len(self.payload) << 8 | self.type, self.flags, self.stream)
        return head + self.payload


class _Relay(ProxyRelay):
    def __init__(self, proxy: FaultProxy, client: Streams, server: Streams) -> None:
        super().__init__(proxy, client, server)
        self._lost: set[int] = set()
        """The streams whose replies are to be lost."""

    async def relay_requests(self) -> None:
        """Relay frames to etcd, the data of a message in one piece."""
        if self.proxy.is_isolated:
            return
        client_in, server_out = self.client[0], self.server[1]
        server_out.write(await client_in.readexactly(len(PREFACE)))
        messages: dict[int, bytes] = {}
        while True:
            frame = await _read_frame(client_in)
            if not await self.proxy.passes():
                return
            if frame.type == DATA and frame.payload:
                message = messages.pop(frame.stream, b"") + frame.payload
                if len(message) < 5 or len(message) < 5 + int.from_bytes(message[1:5]):
                    messages[frame.stream] = message
                    continue
                fault = self.proxy.take_fault(*_possible_faults(message[5:]))
                if fault is FaultKind.HOLD:
                    held = frame._replace(payload=message, flags=frame.flags | END_STREAM)
                    self.proxy.hold(b"".join(_split(held)), self.server)
                    return
                if fault in (FaultKind.REFUSE, FaultKind.FAIL):
                    # To etcd the client has given up.
                    server_out.write(_frame(RST_STREAM, frame.stream, CANCEL))
                    self._refuse(frame.stream, len(message), fault)
                    continue
                if fault is FaultKind.LOSE_REPLY:
                    self._lost.add(frame.stream)
                server_out.writelines(_split(frame._replace(payload=message)))
            else:
                server_out.write(frame.encode())
            await server_out.drain()

    def _refuse(self, stream: int, size: int, fault: FaultKind) -> None:
        if fault is FaultKind.FAIL:
            reply = _Frame(HEADERS, END_STREAM | END_HEADERS, stream, FULL_REPLY).encode()
            # etcd does not confirm the data, because it has not received it.
            reply += _frame(WINDOW_UPDATE, 0, size)
        else:
            # To the client etcd has stopped before this request, so it may send it again; gRPC does so by
            # itself unless its retries are switched off.
            reply = _frame(GOAWAY, 0, max(stream - 2, 0), 0)
        self.client[1].write(reply)

    async def relay_replies(self) -> None:
        client_out = self.client[1]
        while True:
            frame = await _read_frame(self.server[0])
            if frame.stream not in self._lost:
                client_out.write(frame.encode())
                await client_out.drain()
            elif frame.flags & END_STREAM:
                return

    @staticmethod
    async def read_reply(request: bytes, server_in: asyncio.StreamReader) -> None:
        stream = int.from_bytes(request[5:9])
        frame = await _read_frame(server_in)
        while frame.stream != stream or not frame.flags & END_STREAM:
            frame = await _read_frame(server_in)


def _possible_faults(message: bytes) -> Iterable[FaultKind]:
    """The faults that a message can have: a read can only be refused, and one of another kind has none."""
    try:
        operations = TxnRequest.FromString(message).success
    except DecodeError:
        return ()
    if any(not operation.HasField("request_range") for operation in operations):
        return FaultKind
    return (FaultKind.REFUSE,) if operations else ()


def _split(message: _Frame) -> Iterable[bytes]:
    """A message as frames that etcd accepts: of up to 16 KiB."""
    starts = range(0, len(message.payload), MAX_FRAME)
    for start in starts:
        flags = message.flags if start == starts[-1] else 0
        piece = message.payload[start : start + MAX_FRAME]
        yield _Frame(DATA, flags, message.stream, piece).encode()


def _frame(kind: int, stream: int, *numbers: int) -> bytes:
    return _Frame(kind, 0, stream, struct.pack(f"!{len(numbers)}I", *numbers)).encode()


async def _read_frame(stream: asyncio.StreamReader) -> _Frame:
    size_and_type, flags, number = struct.unpack("!IBI", await stream.readexactly(9))
    return _Frame(size_and_type & 0xFF, flags, number, await stream.readexactly(size_and_type >> 8))


@asynccontextmanager
async def inject_faults(url: str) -> AsyncIterator[FaultProxy]:
    """See FaultInjectable. The stores use the first member of the URL. Raises ConfigurationError for TLS."""
    parts = parse_url(url)
    settings = read_settings(StoreConfig.from_url(url))
    if settings.credentials is not None:
        raise ConfigurationError("faults cannot be injected into TLS connections")
    host, _, port = settings.addresses[0].rpartition(":")
    proxy = FaultProxy(lambda: asyncio.open_connection(host.strip("[]"), int(port)), _Relay)
    async with proxy.serve() as (proxy_host, proxy_port):
        url = parts.with_hosts(f"{proxy_host}:{proxy_port}")
        proxy.url = parse_url(url).with_more_options(TIMEOUTS)
        yield proxy


def no_lock() -> AbstractAsyncContextManager[None]:
    raise ConfigurationError("etcd has no locks for which writes wait")


@asynccontextmanager
async def inject_outages(url: str) -> AsyncIterator[ProxyOutageInjector]:
    """See OutageInjectable. Raises ConfigurationError like ``inject_faults``."""
    async with inject_faults(url) as proxy:
        parts = parse_url(proxy.url)
        yield ProxyOutageInjector(proxy, parts.with_more_options(SHORT_TIMEOUTS), no_lock)
