"""A proxy between stores and their server that injects faults, and a lock, for conformance checks.

It relays whole commands and replies of RESP 2 without TLS.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from flowstore_core import ConfigurationError, StoreConfig
from flowstore_core.backend import FaultKind, FaultProxy, ProxyOutageInjector, ProxyRelay, parse_url
from flowstore_documents import MaybeApplied, NotApplied
from flowstore_redis.connection import Connection
from flowstore_redis.settings import read_settings
from flowstore_redis.space import COMMIT

BUSY = b"-BUSY Redis is busy running a script\r\n"
"""The reply to a refused command, which permits a retry."""
FULL_DISK = b"-MISCONF Errors writing to the AOF file: No space left on device\r\n"
LOCK_MILLISECONDS = "10000"
"""A lock ends after this time, also if its process has died."""
SHORT_TIMEOUTS = {"connect_timeout": "1", "request_timeout": "0.5", "retry_timeout": "0.3"}


class _Relay(ProxyRelay):
    _loses_reply = False

    async def relay_requests(self) -> None:
        client, server = self.client, self.server
        while True:
            command = await _read_value(client[0])
            if not await self.proxy.passes():
                return
            fault = self.proxy.take_fault(*_possible_faults(command))
            if fault is FaultKind.HOLD:
                self.proxy.hold(command, server)
                return
            if fault in (FaultKind.REFUSE, FaultKind.FAIL):
                client[1].write(BUSY if fault is FaultKind.REFUSE else FULL_DISK)
                continue
            self._loses_reply = fault is FaultKind.LOSE_REPLY
            server[1].write(command)
            await server[1].drain()

    async def relay_replies(self) -> None:
        while True:
            reply = await _read_value(self.server[0])
            if self._loses_reply:
                return
            self.client[1].write(reply)
            await self.client[1].drain()

    @staticmethod
    async def read_reply(request: bytes, server_in: asyncio.StreamReader) -> None:
        await _read_value(server_in)


async def _read_value(stream: asyncio.StreamReader) -> bytes:
    """One value with all its parts; a command is an array too."""
    line = await stream.readuntil(b"\r\n")
    size = int(line[1:]) if line[:1] in b"$*" else 0
    if line[:1] == b"$" and size >= 0:
        return line + await stream.readexactly(size + 2)
    parts = [await _read_value(stream) for _ in range(size)] if line[:1] == b"*" else ()
    return b"".join([line, *parts])


def _possible_faults(command: bytes) -> Sequence[FaultKind]:
    """The faults that a command can have: a read can only be refused, and one without a script has none."""
    start = command[:100].upper()
    if b"\r\nEVAL" not in start:
        return ()
    is_commit = COMMIT.sha.encode() in command[:100] or COMMIT.text in command
    return tuple(FaultKind) if is_commit else (FaultKind.REFUSE,)


@asynccontextmanager
async def inject_faults(url: str) -> AsyncIterator[FaultProxy]:
    """See FaultInjectable. Raises ConfigurationError for TLS."""
    parts = parse_url(url)
    settings = read_settings(StoreConfig.from_url(url))
    if settings.has_tls:
        raise ConfigurationError("faults cannot be injected into TLS connections")
    proxy = FaultProxy(lambda: asyncio.open_connection(settings.host, settings.port), _Relay)
    async with proxy.serve() as (host, port):
        proxy.url = parse_url(parts.with_hosts(f"{host}:{port}")).with_more_options({"retry_timeout": "1"})
        yield proxy


@asynccontextmanager
async def pause_scripts(url: str) -> AsyncIterator[None]:
    """Let the server delay all scripts, of every client. Raises ConfigurationError if it refuses to."""
    connection = Connection(read_settings(StoreConfig.from_url(url)))
    try:
        await connection.send("CLIENT", "PAUSE", LOCK_MILLISECONDS, "WRITE")
        try:
            yield
        finally:
            await connection.send("CLIENT", "UNPAUSE")
    except (NotApplied, MaybeApplied) as error:
        raise ConfigurationError(f"the server does not delay writes: {error or 'no answer'}") from None
    finally:
        await connection.aclose()


@asynccontextmanager
async def inject_outages(url: str) -> AsyncIterator[ProxyOutageInjector]:
    """See OutageInjectable. Raises ConfigurationError like ``inject_faults``."""
    async with inject_faults(url) as proxy:
        through_proxy = parse_url(proxy.url).with_more_options(SHORT_TIMEOUTS)
        yield ProxyOutageInjector(proxy, through_proxy, lambda: pause_scripts(url))
