"""Resolution of writes whose acknowledgement was lost (CON-3).

A write stores a token: in the row that it writes if that row keeps it, otherwise in a note, a row of table
commits. After a lost reply the server is probed for that token. A token that is not found proves nothing
until the server can no longer execute the statement, so ``fence`` comes before the last probe.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

from flowstore_core import FlowStoreError, OutcomeUnknownError, StoreUnavailableError
from flowstore_core.instrumentation import Observers, Resolution
from flowstore_postgres.connection import Connection, Note, ServerProcess
from flowstore_postgres.errors import RetryableError, describe
from flowstore_postgres.pool import ConnectionPool

log = logging.getLogger("flowstore_postgres")

ProbeQuery = tuple[str, *tuple[object, ...]]
"""A SELECT and its arguments."""

# An unacknowledged statement can take effect only while its server process lives.
TERMINATE_BACKEND = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = $1 AND backend_start = $2
"""
TERMINATE_TRANSACTION = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_xid::text = $1
"""
# A transaction stores it: whoever finds it afterwards knows that the transaction was committed.
NOTE = """
INSERT INTO {schema}.commits (connection, token) VALUES ($1, $2)
ON CONFLICT (connection) DO UPDATE SET token = excluded.token, noted_at = clock_timestamp()"""
# The transaction's id finds it while it is open; pg_stat_activity shows the low 32 bits. The id must not be
# used to read the transaction's status: a crash forgets ids, and other transactions get them.
NOTE_COMMIT = f"""{NOTE}
RETURNING (pg_current_xact_id()::text::numeric % 4294967296)::text AS xid
"""
FIND_NOTE = "SELECT run_ids, step_keys FROM {schema}.commits WHERE connection = $1 AND token = $2"


@dataclass(frozen=True, slots=True)
class UnackedStatement:
    """A statement that was sent and whose reply was lost."""

    process: ServerProcess
    expires_at: float
    """The event loop's time from which it can no longer take effect."""
    note: Note | None = None
    """The note that it stores."""


async def fence(pool: ConnectionPool, connection: Connection, unacked: Sequence[UnackedStatement]) -> None:
    """Raise RetryableError while an unacknowledged statement can still take effect (CON-3).

    The caller waits, without the connection: other calls need it, and so do compensations.
    """
    loop = asyncio.get_running_loop()
    for statement in unacked:
        process = statement.process
        if process.started is not None:
            # expires_at does not apply to a visible process: if it waits for a standby, it has committed, and
            # the commit becomes visible at any later time.
            if await terminate(pool, connection, process):
                raise RetryableError(StoreUnavailableError("an unacknowledged statement is still running"))
        elif loop.time() < statement.expires_at:
            raise RetryableError(
                StoreUnavailableError("an unacknowledged statement can still take effect"),
                resolvable_at=statement.expires_at,
            )


async def terminate(pool: ConnectionPool, connection: Connection, process: ServerProcess) -> bool:
    """Terminate a server process whose client is gone. False if it is not running, or behind PgBouncer."""
    if process.started is None:
        return False
    return await pool.probe(connection, TERMINATE_BACKEND, process.pid, process.started) is not None


@dataclass(slots=True)
class OutcomeResolver:
    """Tracks whether one statement, sent once or several times, took effect; true while that is unknown.

    ``probe`` finds the row that the statement would have written. It is None where a second execution
    returns the correct result.
    """

    operation: str
    probe: ProbeQuery | None
    unacked: list[UnackedStatement] = field(default_factory=list)
    had_loss: bool = False
    """Whether any reply was lost."""
    confirmed_applied: bool = False
    """Whether it is known to have taken effect, though not yet to be durable."""

    def __bool__(self) -> bool:
        return bool(self.unacked) or self.confirmed_applied

    def record_loss(self, unacked: UnackedStatement) -> None:
        self.unacked.append(unacked)
        self.had_loss = True

    async def resolve(self, pool: ConnectionPool, connection: Connection) -> Any:
        """The row that the probe finds; None where the statement must be sent again."""
        # A found row is final. A missing row is final only behind the fence.
        found = await self._find(pool, connection)
        if found is None:
            await fence(pool, connection, self.unacked)
            found = await self._find(pool, connection)
        self.unacked.clear()
        self.confirmed_applied = found is not None
        not_found = Resolution.REPEATED if self.probe is None else Resolution.DID_NOT_HAPPEN
        report_resolution(
            pool.observers, self.operation, Resolution.HAPPENED if self.confirmed_applied else not_found
        )
        if self.confirmed_applied:
            await ensure_durable(pool, connection)
        return found

    async def finish(self, pool: ConnectionPool, connection: Connection) -> None:
        """Make the effect of a statement durable once its reply has arrived."""
        if self.had_loss:
            self.confirmed_applied = True
            await ensure_durable(pool, connection)

    async def _find(self, pool: ConnectionPool, connection: Connection) -> Any:
        return None if self.probe is None else await pool.probe(connection, *self.probe)


@dataclass(frozen=True, slots=True)
class UnackedCommit:
    """A COMMIT that was sent and whose reply was lost, with the note that its transaction stored."""

    process: ServerProcess
    note: Note
    xid: str | None
    """The result of NOTE_COMMIT; None if the COMMIT was sent with it."""


async def resolve_commit(pool: ConnectionPool, commit: UnackedCommit, operation: str) -> bool:
    """Whether a transaction whose COMMIT was not acknowledged was committed."""

    async def attempt() -> bool:
        async with pool.connection() as connection:
            found = await pool.probe(connection, FIND_NOTE, *commit.note)
            if found is None:
                # A missing row is final only once the transaction can no longer be committed.
                if commit.process.started is not None:
                    await fence(pool, connection, [UnackedStatement(commit.process, inf)])
                elif await pool.probe(connection, TERMINATE_TRANSACTION, commit.xid) is not None:
                    raise RetryableError(StoreUnavailableError("a transaction is still in progress"))
                found = await pool.probe(connection, FIND_NOTE, *commit.note)
            if found is not None:
                await ensure_durable(pool, connection)
            return found is not None

    try:
        committed = await pool.retries.run(attempt, operation, failed=True)
    except FlowStoreError:
        report_resolution(pool.observers, operation, Resolution.UNKNOWN)
        raise OutcomeUnknownError(operation) from None
    report_resolution(
        pool.observers, operation, Resolution.HAPPENED if committed else Resolution.DID_NOT_HAPPEN
    )
    return committed


async def ensure_durable(pool: ConnectionPool, connection: Connection) -> None:
    """Return once everything that this connection sees is as durable as any commit of the server.

    A commit whose wait for a synchronous standby was interrupted, as ``fence`` does, is visible before the
    standby has it. A later commit of our own waits for both.
    """
    if not pool.is_usable(connection):
        raise RetryableError(describe(ConnectionResetError()))
    await pool.probe(connection, NOTE_COMMIT, *connection.notes.next())


def report_resolution(observers: Observers, operation: str, resolution: Resolution, calls: int = 1) -> None:
    """Log and report how calls with a lost acknowledgement were resolved."""
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
