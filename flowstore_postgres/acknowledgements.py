"""What became of a write whose acknowledgement was lost (CON-3).

Nothing is guessed: the server is asked, and only once it can no longer act on what was sent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Any

from flowstore_core import FlowStoreError, OutcomeUnknownError, StoreUnavailableError
from flowstore_core.instrumentation import Observers, Resolution
from flowstore_postgres.connection import Connection, Peer
from flowstore_postgres.errors import Retry

if TYPE_CHECKING:
    from flowstore_postgres.database import Database

log = logging.getLogger("flowstore_postgres")

Look = tuple[str, *tuple[object, ...]]
"""A SELECT and its arguments."""

# A lost statement can take effect only as long as the process that got it lives.
TERMINATE_BACKEND = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = $1 AND backend_start = $2
"""
TERMINATE_TRANSACTION = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_xid::text = $1
"""
# The id of the transaction finds it while it lives; pg_stat_activity shows its low 32 bits. It must not be
# asked what became of the transaction: a crash forgets ids, and others get them.
NOTE_COMMIT = """
INSERT INTO {schema}.commits (connection, token) VALUES ($1, $2)
ON CONFLICT (connection) DO UPDATE SET token = excluded.token, noted_at = clock_timestamp()
RETURNING (pg_current_xact_id()::text::numeric % 4294967296)::text
"""
FIND_COMMIT = "SELECT true FROM {schema}.commits WHERE connection = $1 AND token = $2"


@dataclass(frozen=True, slots=True)
class Lost:
    """A statement that was sent and not answered."""

    peer: Peer
    over: float
    """From this time of the event loop on it cannot take effect any more."""


async def settle(database: Database, connection: Connection, lost: Sequence[Lost]) -> None:
    """Raise Retry while an unacknowledged statement can still take effect (CON-3).

    The wait is the caller's, without the connection: other calls need it, and the compensation of
    cancelled calls does.
    """
    loop = asyncio.get_running_loop()
    for one in lost:
        if one.peer.started is not None:
            # A visible process is not believed to be over because its time is: if it waits for a standby,
            # it has committed, and the commit becomes visible whenever that wait ends.
            if await database.ask(connection, TERMINATE_BACKEND, one.peer.pid, one.peer.started) is not None:
                raise Retry(StoreUnavailableError("an unacknowledged statement is still running"))
        elif loop.time() < one.over:
            raise Retry(
                StoreUnavailableError("an unacknowledged statement can still take effect"), fence=one.over
            )


@dataclass(slots=True)
class Doubt:
    """What is not known of a statement that one call sends, again if need be; false while nothing is.

    ``look`` finds what the statement would have written; None where saying it again gives the true
    answer by itself.
    """

    operation: str
    look: Look | None
    lost: list[Lost] = field(default_factory=list)
    shaken: bool = False
    """Whether a reply was lost at all."""
    happened: bool = False
    """Whether it is known to have happened, and not yet to last."""

    def __bool__(self) -> bool:
        return bool(self.lost) or self.happened

    def lose(self, lost: Lost) -> None:
        self.lost.append(lost)
        self.shaken = True

    async def resolve(self, database: Database, connection: Connection) -> Any:
        """What the statement has written, as look finds it; None where it has to be said again."""
        # Found is final. Not found is final only when nothing can take effect any more.
        found = await self._find(database, connection)
        if found is None:
            await settle(database, connection, self.lost)
            found = await self._find(database, connection)
        self.lost.clear()
        self.happened = found is not None
        gone = Resolution.REPEATED if self.look is None else Resolution.DID_NOT_HAPPEN
        report_lost(database.observers, self.operation, Resolution.HAPPENED if self.happened else gone)
        if self.happened:
            await confirm(database, connection)
        return found

    async def end(self, database: Database, connection: Connection) -> None:
        """The statement was answered: make sure that what it did lasts."""
        if self.shaken:
            self.happened = True
            await confirm(database, connection)

    async def _find(self, database: Database, connection: Connection) -> Any:
        return None if self.look is None else await database.ask(connection, *self.look)


@dataclass(frozen=True, slots=True)
class LostCommit:
    """A COMMIT that was sent and not answered, and what its transaction has noted."""

    peer: Peer
    connection: int
    token: int
    xid: str


async def was_committed(database: Database, commit: LostCommit, operation: str) -> bool:
    """What became of a transaction whose COMMIT got no answer."""

    async def ask() -> bool:
        async with database.connection() as connection:
            noted = (FIND_COMMIT, commit.connection, commit.token)
            found = await database.ask(connection, *noted)
            if found is None:
                # Not found is final only when it can no longer be committed.
                if commit.peer.started is not None:
                    await settle(database, connection, [Lost(commit.peer, inf)])
                elif await database.ask(connection, TERMINATE_TRANSACTION, commit.xid) is not None:
                    raise Retry(StoreUnavailableError("a transaction is still in progress"))
                found = await database.ask(connection, *noted)
            if found is not None:
                await confirm(database, connection)
            return found is not None

    try:
        committed = await database.retrying(ask, operation, failed=True)
    except FlowStoreError:
        report_lost(database.observers, operation, Resolution.UNKNOWN)
        raise OutcomeUnknownError(operation) from None
    report_lost(
        database.observers, operation, Resolution.HAPPENED if committed else Resolution.DID_NOT_HAPPEN
    )
    return committed


async def confirm(database: Database, connection: Connection) -> None:
    """Return once what this connection sees is as durable as any commit of the server.

    A commit can be seen before a synchronous standby has it: when its wait was broken off, as settle
    does. A commit of our own behind it waits for both.
    """
    await database.ask(connection, NOTE_COMMIT, connection.number, database.new_token())


def report_lost(observers: Observers, operation: str, resolution: Resolution, calls: int = 1) -> None:
    """Say what became of calls whose acknowledgement was lost."""
    if not calls:
        return
    log.warning(
        "the acknowledgement of %d %s was lost: %s",
        calls,
        operation,
        resolution,
        extra={
            "flowstore.operation": operation,
            "flowstore.calls": calls,
            "flowstore.resolution": resolution.value,
        },
    )
    if observers:
        observers.outcome_unknown(operation, resolution, calls)
