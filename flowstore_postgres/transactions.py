"""Transactions of several statements, with retries and the resolution of a lost COMMIT."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import Any, TypeVar
from uuid import UUID

import asyncpg

from flowstore_core import FlowStoreError, OutcomeUnknownError, RunStatus, StoreUnavailableError
from flowstore_postgres.commit_resolution import (
    NOTE,
    NOTE_COMMIT,
    UnackedCommit,
    resolve_commit,
    terminate,
)
from flowstore_postgres.connection import Connection, Note, ServerProcess
from flowstore_postgres.errors import CONNECTION_LOST_ERRORS, RetryableError, describe
from flowstore_postgres.pool import ConnectionPool

T = TypeVar("T")

# Explicit, because the role's defaults apply behind a pooler.
BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED"
# For statements over arrays that no plan can execute without their keys, such as ADVANCE_STEPS: index scans
# take half the time of bitmap scans.
BEGIN_BY_KEY = f"""{BEGIN};
SET LOCAL enable_seqscan = off; SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off;
SET LOCAL enable_bitmapscan = off; SET LOCAL enable_material = off;
SET LOCAL plan_cache_mode = force_generic_plan; SET LOCAL jit = off"""
# For other statements over arrays, whose plans must suit tables of any size; see prepared_connections.py.
# Table pending is empty whenever no work is left, and a plan from such a moment would read all of it for each
# row. So only bitmap scans are allowed, which need the key.
INDEX_ONLY = """
SET LOCAL enable_bitmapscan = on; SET LOCAL enable_indexscan = off; SET LOCAL enable_indexonlyscan = off"""
BEGIN_INDEX_ONLY = f"{BEGIN_BY_KEY};{INDEX_ONLY}"
# For a statement that reads ranges of indexes in their order. Its plan is made anew each time. Behind a
# pooler jit may be on: before PostgreSQL 18 the costs of such a plan are so high that the server would
# compile it, which takes seconds.
BEGIN_READ_BY_INDEX = f"""{BEGIN} READ ONLY;
SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off; SET LOCAL enable_hashjoin = off;
SET LOCAL enable_mergejoin = off; SET LOCAL enable_material = off;
SET LOCAL plan_cache_mode = force_custom_plan; SET LOCAL jit = off"""
# Does the work of LOCK_RUN and NOTE_COMMIT in one round trip.
LOCK_RUN_AND_NOTE_COMMIT = f"""
WITH noted AS ({NOTE_COMMIT})
SELECT xid, (SELECT status FROM {{schema}}.runs WHERE run_id = $3 FOR UPDATE) AS status FROM noted
"""
COMMIT = "COMMIT"
ROLLBACK = "ROLLBACK"


class Transaction:
    """An open transaction, as the noun files use it."""

    def __init__(
        self,
        connection: Connection,
        sql: Callable[[str], str],
        now: Callable[[], datetime | None],
        timeout: Callable[[], float],
        note: Note,
    ) -> None:
        self._connection = connection
        self._sql = sql
        self._now = now
        self._timeout = timeout
        self._note = note
        self.xid: str | None = None
        """The result of NOTE_COMMIT, once it has been executed; ``commit`` executes it otherwise."""
        self.run_status: RunStatus | None = None
        """The status of the run that Transactions.run locked; None without such a run."""

    @property
    def now(self) -> datetime | None:
        """The virtual clock's time; None where the server's clock decides."""
        return self._now()

    async def row(self, statement: str, *arguments: object) -> Any:
        """The first row, or None."""
        return await self._connection.fetchrow(self._sql(statement), *arguments, timeout=self._timeout())

    async def row_and_note(self, statement: str, *arguments: object) -> Any:
        """The row of a first statement that includes NOTE_COMMIT; it gets ``arguments`` from $3 on."""
        row = await self.row(statement, *self._note, *arguments)
        self.xid = row["xid"]
        return row

    async def rows(self, statement: str, *arguments: object) -> Sequence[Any]:
        found: Sequence[Any] = await self._connection.fetch(
            self._sql(statement), *arguments, timeout=self._timeout()
        )
        return found

    async def execute(self, statement: str, *arguments: object) -> str:
        """Execute a statement and return its command tag."""
        tag: str = await self._connection.execute(self._sql(statement), *arguments, timeout=self._timeout())
        return tag

    async def commit(self) -> str:
        """Commit in one round trip, and return the command tag."""
        statements = COMMIT
        if self.xid is None:
            # Only a query without parameters may have several statements.
            numbers = "({}, {})".format(*self._note)
            statements = f"{self._sql(NOTE).replace('($1, $2)', numbers)};{COMMIT}"
        tag: str = await self._connection.execute(statements, timeout=self._timeout())
        return tag


def affected_rows(tag: str) -> int:
    """The number of rows that a statement with this command tag changed."""
    return int(tag.rpartition(" ")[2])


class Transactions:
    """Runs the transactions of one store."""

    def __init__(self, pool: ConnectionPool) -> None:
        self._pool = pool

    async def run(
        self,
        operation: str,
        work: Callable[[Transaction], Awaitable[T]],
        on_abandoned: Callable[[T | OutcomeUnknownError], Awaitable[None]] | None = None,
        *,
        begin: str = BEGIN,
        lock_run: UUID | None = None,
    ) -> T:
        """Call ``work`` in one transaction at READ COMMITTED and commit it.

        ``lock_run`` is a run that the transaction locks first against every other operation on it.

        A FlowStoreError rolls back and is raised. Serialization failures, deadlocks and a connection that
        is lost before COMMIT are retried. A lost COMMIT is resolved by the token that the transaction stored.
        """

        lost: list[ServerProcess] = []

        async def attempt() -> T:
            async with self._pool.connection() as connection:
                # Read now: a connection that breaks loses them.
                process, note = connection.process, connection.notes.next()
                while lost:
                    # The server may not have noticed yet; its locks would block this attempt.
                    await terminate(self._pool, connection, lost[-1])
                    lost.pop()
                return await self._attempt(connection, process, note, operation, work, lost, begin, lock_run)

        return await self._pool.shielded.run(self._pool.retries.run(attempt, operation), on_abandoned)

    async def _attempt(
        self,
        connection: Connection,
        process: ServerProcess,
        note: Note,
        operation: str,
        work: Callable[[Transaction], Awaitable[T]],
        lost: list[ServerProcess],
        begin: str,
        lock_run: UUID | None,
    ) -> T:
        """Run one transaction. Adds the process of a connection that breaks before COMMIT to ``lost``."""
        pool = self._pool
        transaction = Transaction(connection, pool.sql, pool.now, pool.client_timeout, note)
        try:
            await transaction.execute(begin)
            try:
                if lock_run is not None:
                    _, status = await transaction.row_and_note(LOCK_RUN_AND_NOTE_COMMIT, lock_run)
                    transaction.run_status = None if status is None else RunStatus(status)
                result = await work(transaction)
                if transaction.xid is None and process.started is None:
                    # Behind PgBouncer only this id finds the transaction while it is open.
                    (transaction.xid,) = await transaction.row(NOTE_COMMIT, *note)
            except (FlowStoreError, RetryableError, asyncpg.PostgresError) as error:
                if isinstance(error, CONNECTION_LOST_ERRORS):
                    raise
                await transaction.execute(ROLLBACK)
                raise
        except CONNECTION_LOST_ERRORS as error:
            # COMMIT was never sent, so the server rolls back.
            pool.discard(connection)
            lost.append(process)
            raise RetryableError(describe(error)) from None
        except asyncio.CancelledError:
            pool.discard(connection)
            raise
        try:
            tag = await transaction.commit()
        except CONNECTION_LOST_ERRORS:
            pool.discard(connection)
            if await resolve_commit(pool, UnackedCommit(process, note, transaction.xid), operation):
                return result
            raise RetryableError(StoreUnavailableError("PostgreSQL rolled the transaction back")) from None
        except asyncpg.PostgresError:
            # Either statement was refused. The transaction may still be open.
            pool.discard(connection)
            lost.append(process)
            raise
        except asyncio.CancelledError:
            pool.discard(connection)
            raise
        if tag != COMMIT:
            raise RetryableError(StoreUnavailableError("PostgreSQL rolled the transaction back"))
        return result
