"""Connections to the server: requests are sent once, and errors say whether one can have had an effect."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import suppress
from hashlib import sha1
from pathlib import Path
from typing import Any

from hiredis import pack_command
from redis.asyncio import Connection as DriverConnection
from redis.asyncio import SSLConnection
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)

from flowstore_documents import MaybeApplied, NotApplied
from flowstore_redis.server import SECTIONS, SETTINGS, ServerFacts
from flowstore_redis.settings import Settings

FULL = "the memory of Redis is full: raise maxmemory, then delete old runs with flowstore cleanup"
REPLICA = "the server is a replica"
CLOSED = "the store was closed"
_REFUSED: dict[type[RedisError], tuple[str, bool]] = {
    BusyLoadingError: ("Redis is loading its data", True),
    ReadOnlyError: (REPLICA, True),
    OutOfMemoryError: (FULL, False),
    NoPermissionError: ("the user lacks a permission", False),
    AuthenticationError: ("Redis refuses the user or the password", False),
}
"""Replies to a request that has had no effect, and whether it may succeed soon."""
_REFUSED_CODES = {
    "BUSY": ("Redis is busy with a script", True),
    "NOREPLICAS": ("too few replicas are connected (min-replicas-to-write)", True),
    "MASTERDOWN": (REPLICA, True),
    "MISCONF": ("Redis cannot write to its disk: see its log", False),
    "WRONGTYPE": ("another program uses the keys of the prefix", False),
}
"""The same for replies that the driver has no class for, by their first word."""


class Script:
    """A script of this package."""

    def __init__(self, name: str) -> None:
        self.text = Path(__file__).with_name(name).read_bytes()
        self.sha = sha1(self.text, usedforsecurity=False).hexdigest()


class Connection:
    """The connections of one store to its server."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._free: list[DriverConnection] = []
        self._used: set[DriverConnection] = set()
        self._is_closed = False
        self.facts: ServerFacts | None = None
        """Of the server of the newest connection."""
        self.must_be_durable = False
        """Whether a server that does not sync every write is refused."""

    async def run(self, script: Script, keys: tuple[str, ...], *arguments: bytes | str | int) -> Any:
        """Run a script. Raises NotApplied or MaybeApplied."""
        rest = (len(keys), *keys, *arguments)
        try:
            return await self.send("EVALSHA", script.sha, *rest)
        except NoScriptError:  # The server has not seen it since its start, and has done nothing.
            return await self.send("EVAL", script.text, *rest)

    async def send(self, *command: bytes | str | int) -> Any:
        """Send a command once. Raises NotApplied, MaybeApplied or NoScriptError."""
        connection = await self._acquire()
        try:
            async with asyncio.timeout(self.settings.request_timeout):
                # The driver packs in Python, which takes seven times as long.
                packed = pack_command(command)  # type: ignore[arg-type]  # Its stub has one argument.
                await connection.send_packed_command(packed)
                return await connection.read_response()
        except NoScriptError:
            raise
        except ReadOnlyError as error:
            await connection.disconnect(nowait=True)  # The next one may lead to another server.
            raise _refused(error) or MaybeApplied from None
        except (RedisError, OSError) as error:
            raise _refused(error) or MaybeApplied from None
        finally:
            self._used.discard(connection)
            if connection.is_connected:
                self._free.append(connection)

    async def subscribe(self, channel: str) -> AsyncIterator[bytes]:
        """Yield b"" when the subscription is established, then the messages. NotApplied when it breaks."""
        connection = await self._acquire()
        is_silent = False
        try:
            await connection.send_command("SUBSCRIBE", channel)
            while True:
                reply = await connection.read_response(timeout=self.settings.request_timeout)
                if reply is not None:
                    is_silent = False
                    if reply[0] != b"pong":
                        yield reply[2] if reply[0] == b"message" else b""
                elif is_silent:
                    raise NotApplied("Redis has become silent", retry=True)
                else:
                    is_silent = True
                    await connection.send_command("PING")
        except (RedisError, OSError) as error:
            raise _refused(error) or NotApplied("the subscription has ended", retry=True) from None
        finally:
            self._used.discard(connection)
            await connection.disconnect(nowait=True)

    async def aclose(self) -> None:
        self._is_closed = True
        for connection in [*self._free, *self._used]:
            with suppress(RedisError, OSError):
                await connection.disconnect()
        self._free.clear()

    # Connections

    async def _acquire(self) -> DriverConnection:
        """A connection to a checked server, on which nothing has been sent. Raises NotApplied."""
        if self._is_closed:
            raise NotApplied(CLOSED, retry=False)
        connection = self._free.pop() if self._free else self._new()
        self._used.add(connection)
        is_ready = False
        try:
            async with asyncio.timeout(self.settings.connect_timeout):
                if connection.is_connected and await connection.can_read():
                    # The server has closed it.
                    await connection.disconnect(nowait=True)
                if not connection.is_connected:
                    await connection.connect()  # type: ignore[no-untyped-call]
                    await self._check(connection)
            if self._is_closed:
                raise NotApplied(CLOSED, retry=False)
            is_ready = True
        except (RedisError, OSError) as error:
            raise _unreachable(error) from None
        finally:
            if not is_ready:
                self._used.discard(connection)
                await connection.disconnect(nowait=True)
        return connection

    def _new(self) -> DriverConnection:
        settings = self.settings
        common: dict[str, Any] = {
            "host": settings.host,
            "port": settings.port,
            "db": settings.database,
            "username": settings.user or None,
            "password": settings.password or None,
            "socket_connect_timeout": settings.connect_timeout,
            "socket_timeout": None,  # ``send`` has its own.
            "socket_keepalive": True,
            "protocol": 2,
            # A connection made without a client neither repeats requests nor checks its health with others.
        }
        if not settings.has_tls:
            return DriverConnection(**common)
        files = settings.files
        return SSLConnection(
            ssl_ca_certs=files.get("cacert"),
            ssl_certfile=files.get("cert"),
            ssl_keyfile=files.get("key"),
            **common,
        )

    async def _check(self, connection: DriverConnection) -> None:
        """Refuse a server that cannot keep what the store promises: another may answer after a fail-over."""
        self.facts = facts = await _ask_server(connection)
        if facts.is_replica:
            raise NotApplied(REPLICA, retry=True)
        if facts.problem is not None:
            raise NotApplied(facts.problem, retry=False)
        if self.must_be_durable and not facts.is_durable:
            reason = "the server no longer syncs every write (appendonly yes, appendfsync always)"
            raise NotApplied(reason, retry=facts.log_begins)


async def _ask_server(connection: DriverConnection) -> ServerFacts:
    """Raises RedisError."""
    await connection.send_command("INFO", *SECTIONS)
    lines = (await connection.read_response()).decode().splitlines()
    info = dict(line.split(":", 1) for line in lines if ":" in line)
    await connection.send_command("CONFIG", "GET", *SETTINGS)
    try:
        reply = [part.decode() for part in await connection.read_response()]
    except ResponseError:  # Servers as a service, and users without the permission.
        return ServerFacts(info, None)
    return ServerFacts(info, dict(zip(reply[::2], reply[1::2], strict=True)))


def _refused(error: Exception) -> NotApplied | None:
    """The error of a request that has had no effect; None if it may have had one."""
    for kind, (reason, retry) in _REFUSED.items():
        if isinstance(error, kind):
            return NotApplied(reason, retry=retry)
    if isinstance(error, ResponseError):
        found = _REFUSED_CODES.get(str(error).partition(" ")[0])
        if found is not None:
            return NotApplied(found[0], retry=found[1])
    return None


def _unreachable(error: Exception) -> NotApplied:
    if isinstance(error.__context__, ssl.SSLError):
        reason = "the TLS handshake with Redis fails: check cacert, cert and key"
        return NotApplied(reason, retry=False)
    return _refused(error) or NotApplied("Redis cannot be reached", retry=True)
