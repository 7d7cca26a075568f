"""A connection that knows the server process behind it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Set
from dataclasses import dataclass
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import asyncpg

from flowstore_postgres.session_settings import PIN_MORE, READ_DEFAULTS, WATCHED, check_session

HANDSHAKE = """
SELECT pg_backend_pid() AS pid, clock_timestamp() AS now,
       (SELECT backend_start FROM pg_stat_get_activity(pg_backend_pid())) AS started, {more}
"""
HANDSHAKE_AND_PIN = HANDSHAKE.replace("{more}", PIN_MORE)
# Behind PgBouncer a SET would apply to the next client of the server process.
HANDSHAKE_POOLED = HANDSHAKE.replace("{more}", READ_DEFAULTS)

# asyncio allocates a receive buffer of the maximum size for each read. With its default of 256 KiB the
# allocator maps and unmaps memory each time; buffers of this size come from the heap.
RECEIVE_BYTES = 64 * 1024

# A type with a smaller OID is built in: it is the same on every server.
FIRST_ASSIGNED_OID = 10_000
# bool[], smallint[], bigint[], timestamptz[], record[], uuid[] and jsonb[]: the types of this package's
# statements that asyncpg does not know.
ARRAY_TYPES = frozenset({1000, 1005, 1016, 1185, 2287, 2951, 3807})
_built_in_types: dict[int, Any] = {}
"""The definitions that asyncpg has read, by OID."""
_NAMED_STATEMENT = SimpleNamespace(name="built-in types")


Note = tuple[int, int]
"""The columns connection and token of a row of table commits, which proves that a transaction committed."""

NOTES_PER_ROW = 256
"""How often a row is used. While an old snapshot keeps its versions, each use visits all of them."""


class Notes:
    """The notes of one connection, each of which replaces the one before it."""

    def __init__(self) -> None:
        self._count = 0
        self._row = 0

    def next(self) -> Note:
        if self._count % NOTES_PER_ROW == 0:
            # Other generators repeat their numbers in forked processes, or after random.seed().
            self._row = random.SystemRandom().getrandbits(63)
        self._count += 1
        return self._row, self._count


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """The server process behind a connection."""

    pid: int
    started: datetime | None
    """None behind PgBouncer, where the next statement may reach another process."""
    clock_skew: float
    """The server's clock, in seconds since the epoch, minus the event loop's."""


class Connection(asyncpg.Connection):  # type: ignore[misc]
    """asyncpg's connection with the facts that are needed after it breaks."""

    process: ServerProcess
    notes: Notes
    defaults: Mapping[str, str]
    """The session settings that could not be pinned."""

    async def handshake(self, *, behind_pgbouncer: bool) -> None:
        """Read the server's process and clock, and pin the session settings where possible.

        Raises ConfigurationError for a session that cannot keep the contract.
        """
        loop = asyncio.get_running_loop()
        sent_at = loop.time()
        try:
            row = await self.fetchrow(HANDSHAKE_POOLED if behind_pgbouncer else HANDSHAKE_AND_PIN)
            check_session(row)
        except (Exception, asyncio.CancelledError):
            # The pool would close it gracefully, and wait forever for a silent peer.
            self.terminate()
            raise
        middle = (sent_at + loop.time()) / 2
        # Behind PgBouncer the process may serve another client by now, and must not be terminated.
        started = None if behind_pgbouncer else row["started"]
        self.process = ServerProcess(row["pid"], started, row["now"].timestamp() - middle)
        self.notes = Notes()
        self.defaults = {name: row[name] for name in WATCHED} if behind_pgbouncer else {}
        # A private attribute of asyncio's transport; without it only speed is lost.
        transport: Any = getattr(self, "_transport", None)
        if hasattr(transport, "max_size"):
            transport.max_size = RECEIVE_BYTES

    async def _introspect_types(self, typeoids: Set[int], timeout: float | None) -> tuple[Any, Any]:
        """Read the definitions of types that asyncpg does not know, such as uuid[], once for each process.

        asyncpg reads them for each connection, which costs the server more than the connect itself. This
        overrides a private method; if asyncpg stops calling it, only speed is lost.
        """
        is_built_in = max(typeoids) < FIRST_ASSIGNED_OID
        if is_built_in and typeoids <= _built_in_types.keys():
            # asyncpg prepares an unnamed statement again, unless the one that read the types has a name.
            return list(_built_in_types.values()), _NAMED_STATEMENT
        wanted = typeoids | ARRAY_TYPES if is_built_in else typeoids
        types, statement = await super()._introspect_types(wanted, timeout)
        if is_built_in:
            _built_in_types.update((one["oid"], one) for one in types)
        return types, statement
