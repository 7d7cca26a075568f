"""A connection that knows its peer, and the transaction that the noun files work in."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import asyncpg

from flowstore_postgres.sessions import PIN_MORE, READ_DEFAULTS, WATCHED, check_session

IDENTIFY = """
SELECT pg_backend_pid() AS pid, clock_timestamp() AS now,
       (SELECT backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()) AS started, {more}
"""
IDENTIFY_AND_PIN = IDENTIFY.replace("{more}", PIN_MORE)
# Behind PgBouncer a setting would go to whoever gets the server process next.
IDENTIFY_POOLED = IDENTIFY.replace("{more}", READ_DEFAULTS)

# asyncio has as much memory ready for each answer as it may at most be long, and for its own 256 KiB the
# allocator asks the system each time and gives it back. So much comes from the heap.
RECEIVE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Peer:
    """The server process behind a connection."""

    pid: int
    started: datetime | None
    clock_offset: float
    """The server's clock, in seconds since the epoch, minus the event loop's."""


class Connection(asyncpg.Connection):  # type: ignore[misc]
    """asyncpg's connection with what we must know when it breaks."""

    peer: Peer
    number: int
    """What the connection's row in the table commits goes by."""
    defaults: Mapping[str, str]
    """The settings of the session that could not be pinned."""

    async def identify(self, *, behind_pgbouncer: bool) -> None:
        """Learn who serves the connection, and how far the server's clock is from ours; pin what can be.

        Raises ConfigurationError for a session in which the contract cannot be kept.
        """
        loop = asyncio.get_running_loop()
        asked = loop.time()
        try:
            row = await self.fetchrow(IDENTIFY_POOLED if behind_pgbouncer else IDENTIFY_AND_PIN)
            check_session(row)
        except (Exception, asyncio.CancelledError):
            # The pool would close it politely, and wait for ever on a peer that has gone silent.
            self.terminate()
            raise
        middle = (asked + loop.time()) / 2
        # Behind PgBouncer the next statement may have another peer, which must not be terminated.
        started = None if behind_pgbouncer else row["started"]
        self.peer = Peer(row["pid"], started, row["now"].timestamp() - middle)
        self.number = random.getrandbits(63)
        self.defaults = {name: row[name] for name in WATCHED} if behind_pgbouncer else {}
        # Not part of any interface, and nothing but speed depends on it.
        transport: Any = getattr(self, "_transport", None)
        if hasattr(transport, "max_size"):
            transport.max_size = RECEIVE_BYTES


class Transaction:
    """A transaction under way."""

    def __init__(
        self,
        connection: Connection,
        sql: Callable[[str], str],
        now: Callable[[], datetime | None],
        timeout: Callable[[], float],
    ) -> None:
        self._connection = connection
        self._sql = sql
        self._now = now
        self._timeout = timeout

    @property
    def now(self) -> datetime | None:
        """The virtual clock's time; None where the server's clock decides."""
        return self._now()

    async def row(self, statement: str, *arguments: object) -> Any:
        """The first row, or None."""
        return await self._connection.fetchrow(self._sql(statement), *arguments, timeout=self._timeout())

    async def rows(self, statement: str, *arguments: object) -> Sequence[Any]:
        found: Sequence[Any] = await self._connection.fetch(
            self._sql(statement), *arguments, timeout=self._timeout()
        )
        return found

    async def execute(self, statement: str, *arguments: object) -> str:
        """Run it and return the command tag."""
        tag: str = await self._connection.execute(self._sql(statement), *arguments, timeout=self._timeout())
        return tag
