"""The connections that are reserved for batches, with their prepared statements and timeouts."""

from __future__ import annotations

import asyncio
from typing import Any

from flowstore_postgres.connection import Connection
from flowstore_postgres.errors import CONNECTION_LOST_ERRORS, RetryableError, describe
from flowstore_postgres.pool import ConnectionPool

TIMEOUT_CHECK_SECONDS = 0.25

# A plan that was made while the tables were small must not be kept while they grow. With these settings rows
# are found by key, one after another, in the order of the parameters. That plan suits any number of rows,
# so it is made once; otherwise PostgreSQL plans each small batch anew. The lock_timeout, in milliseconds,
# is for batch_writer.FIND_UNLOCKED_RUNS.
INDEX_ONLY_SETTINGS = """
SET enable_seqscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off; SET enable_material = off;
SET plan_cache_mode = force_generic_plan; SET lock_timeout = 100
"""


# For claim_next_steps, whose plan may be made while table pending is empty. Ranges of an index are read in
# its order, without a sort, and other rows are found by their key or ctid, one after another.
CLAIM_SETTINGS = """
SET enable_seqscan = off; SET enable_bitmapscan = off; SET enable_sort = off; SET enable_hashjoin = off;
SET enable_mergejoin = off; SET enable_material = off; SET plan_cache_mode = force_generic_plan
"""


class PreparedConnection:
    """A connection for batches, with its prepared statements."""

    __slots__ = ("connection", "deadline", "notes", "prepared", "process")

    def __init__(self, connection: Connection, prepared: dict[str, Any] | None) -> None:
        self.connection = connection
        # Copied, because a connection that breaks loses them.
        self.process = connection.process
        self.notes = connection.notes
        self.prepared = prepared
        """The prepared statements by their text; None on a connection that is not kept."""
        self.deadline = 0.0
        """The event loop's time at which the reply to the current statement is overdue."""


class PreparedConnections:
    """The connections for the batches of one store."""

    def __init__(
        self,
        pool: ConnectionPool,
        *,
        keep: bool,
        index_only_plans: bool,
        settings: str = INDEX_ONLY_SETTINGS,
    ) -> None:
        self._pool = pool
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._keep = keep
        self._index_only_plans = index_only_plans
        self._free: list[PreparedConnection] = []
        self._busy: set[PreparedConnection] = set()
        self._timeout_check: asyncio.TimerHandle | None = None

    def try_acquire(self) -> PreparedConnection | None:
        """A kept connection, if one is free and usable."""
        if self._free and self._pool.is_usable(self._free[-1].connection):
            return self._free.pop()
        return None

    async def fetchrow(self, prepared: PreparedConnection, sql: str, *arguments: object) -> Any:
        """The first row of a statement, or None. The statement is prepared once for each kept connection."""
        prepared.deadline = self._loop.time() + self._pool.client_timeout()
        self._busy.add(prepared)
        if self._timeout_check is None:
            self._timeout_check = self._loop.call_later(TIMEOUT_CHECK_SECONDS, self._check_timeouts)
        try:
            if prepared.prepared is None:
                return await prepared.connection.fetchrow(self._pool.sql(sql), *arguments)
            statement = prepared.prepared.get(sql)
            if statement is None:
                statement = await prepared.connection.prepare(self._pool.sql(sql))
                prepared.prepared[sql] = statement
            return await statement.fetchrow(*arguments)
        except AttributeError:
            if self._pool.is_usable(prepared.connection):
                raise
            # Discarded after the reply to the preparation arrived: asyncpg did not send the statement.
            raise RetryableError(describe(ConnectionResetError())) from None
        finally:
            self._busy.discard(prepared)

    def _check_timeouts(self) -> None:
        """Discard the connections whose reply is overdue.

        One periodic check for all: a timeout for each statement costs a good part of its sending.
        """
        self._timeout_check = None
        for prepared in self._busy:
            if self._loop.time() > prepared.deadline:
                self._pool.discard(prepared.connection)
        if self._busy:
            self._timeout_check = self._loop.call_later(TIMEOUT_CHECK_SECONDS, self._check_timeouts)

    async def acquire(self, *, contended: bool) -> PreparedConnection:
        """A connection. Contended batches get one that is not kept: they may wait for locks for long."""
        while self._free and not contended:
            prepared = self._free.pop()
            if self._pool.is_usable(prepared.connection):
                return prepared
            await self._pool.release(prepared.connection)
        connection = await self._pool.acquire()
        if contended or not self._index_only_plans:
            return PreparedConnection(connection, None)
        prepared = PreparedConnection(connection, {})
        try:
            await connection.execute(self._settings, timeout=self._pool.client_timeout())
        except BaseException as error:
            # Also if the call was cancelled: nobody knows which settings are in effect.
            self._pool.discard(connection)
            await self._pool.release(connection)
            if isinstance(error, CONNECTION_LOST_ERRORS):
                raise RetryableError(describe(error)) from None
            raise
        return prepared

    async def release(self, prepared: PreparedConnection, *, keep: bool) -> None:
        if keep and self._keep and self._pool.is_usable(prepared.connection):
            self._free.append(prepared)
        else:
            await self._pool.release(prepared.connection)

    async def aclose(self) -> None:
        """Release every connection."""
        if self._timeout_check is not None:
            self._timeout_check.cancel()
        for prepared in self._busy:
            # Its statement waits for a server that does not reply.
            self._pool.discard(prepared.connection)
        while self._free:
            connection = self._free.pop().connection
            if self._index_only_plans:
                # The settings must not leak into the pool.
                self._pool.discard(connection)
            await self._pool.release(connection)
