"""The ways a noun file reads and writes: ``read``, ``statement``, ``write`` and ``transaction``.

``statement`` sends one statement in autocommit mode, ``write`` a row that shares a statement with concurrent
calls, ``transaction`` several statements. Each handles a connection that breaks: a write stores a token, and
the server is probed for it once the lost statement can no longer take effect (CON-3).

A store has several Batchers: for writes, contended writes, advances of runs, completions of runs, imports of
runs, and reads of runs. The waits of one must not delay the others: a contended write waits for a lock, a
completion for four round trips, and completions and reads for a connection of the pool, while writes keep
their own connections.
docs/performance.md has the measurement.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from functools import partial
from typing import Any, TypeVar
from uuid import UUID

import asyncpg

from flowstore_core import FlowStoreError, OutcomeUnknownError, StoreUnavailableError
from flowstore_core.instrumentation import NO_OBSERVERS, Observers, Resolution
from flowstore_postgres.advances import RunAdvancer
from flowstore_postgres.batch_statement import BatchStatement, Row
from flowstore_postgres.batch_writer import BatchWriter
from flowstore_postgres.commit_resolution import (
    OutcomeResolver,
    ProbeQuery,
    UnackedStatement,
    fence,
    report_resolution,
)
from flowstore_postgres.connection import Connection, ServerProcess
from flowstore_postgres.errors import CONNECTION_LOST_ERRORS, RetryableError, describe
from flowstore_postgres.pool import ConnectionPool
from flowstore_postgres.prepared_connections import CLAIM_SETTINGS, PreparedConnections
from flowstore_postgres.run_completion import RunCompleter
from flowstore_postgres.settings import Settings
from flowstore_postgres.shared_reads import SharedReads
from flowstore_postgres.shared_transactions import SharedTransactions
from flowstore_postgres.transactions import (
    BEGIN,
    BEGIN_INDEX_ONLY,
    BEGIN_READ_BY_INDEX,
    COMMIT,
    Transaction,
    Transactions,
)

T = TypeVar("T")
FetchRow = Callable[..., Awaitable[Any]]

CLOSE_SECONDS = 5.0
MIN_POOL_TO_KEEP = 4
"""The least pool_size with which a connection is kept for claims, besides those for batches."""


class Database:
    """One store's access to PostgreSQL; every noun class uses it."""

    def __init__(
        self,
        settings: Settings,
        driver_pool: Any,
        clock: Callable[[], datetime] | None,
        observers: Observers = NO_OBSERVERS,
    ) -> None:
        self.pool = ConnectionPool(settings, driver_pool, clock, observers)
        self.now: Callable[[], datetime | None] = self.pool.now
        self.new_token: Callable[[], int] = self.pool.new_token
        self._loop = asyncio.get_running_loop()
        self._transactions = Transactions(self.pool)
        self._batch_writer = BatchWriter(
            self.pool,
            pool_size=settings.pool_size,
            queue_timeout=settings.acquire_timeout,
            pgbouncer=settings.pgbouncer,
        )
        # A small pool's connections are needed by other calls too.
        keep = settings.pool_size >= MIN_POOL_TO_KEEP
        self._index_only_connections = PreparedConnections(
            self.pool, keep=keep, index_only_plans=keep and not settings.pgbouncer, settings=CLAIM_SETTINGS
        )
        self.run_advancer = RunAdvancer(self._transactions, queue_timeout=settings.acquire_timeout)
        self.run_completer = RunCompleter(self._transactions, queue_timeout=settings.acquire_timeout)
        self.shared_reads = SharedReads(self.read, queue_timeout=settings.acquire_timeout)
        self.shared_transactions = SharedTransactions(
            self._transactions, queue_timeout=settings.acquire_timeout
        )

    async def read(self, sql: str, *arguments: object) -> Sequence[Any]:
        """The rows of one SELECT, from one snapshot. Retried when the connection breaks."""
        pool = self.pool
        return await pool.shielded.run(pool.retries.run(lambda: self._read(sql, arguments), "read"))

    async def read_by_index(self, sql: str, *arguments: object) -> Sequence[Any]:
        """As ``read``, with a plan that finds rows by index whatever the statistics say."""
        pool = self.pool
        return await pool.shielded.run(
            pool.retries.run(lambda: self._read(sql, arguments, begin=BEGIN_READ_BY_INDEX), "read")
        )

    async def read_row(self, sql: str, *arguments: object) -> Any:
        rows = await self.read(sql, *arguments)
        return rows[0] if rows else None

    async def _read(self, sql: str, arguments: tuple[object, ...], begin: str | None = None) -> Sequence[Any]:
        pool = self.pool
        async with pool.connection() as connection:
            try:
                if begin is not None:
                    await connection.execute(begin, timeout=pool.client_timeout())
                rows: Sequence[Any] = await connection.fetch(
                    pool.sql(sql), *arguments, timeout=pool.client_timeout()
                )
                if begin is not None:
                    await connection.execute(COMMIT, timeout=pool.client_timeout())
            except CONNECTION_LOST_ERRORS as error:
                pool.discard(connection)
                raise RetryableError(describe(error)) from None
            except BaseException:
                if begin is not None:
                    # An open transaction must not get into the pool.
                    pool.discard(connection)
                raise
            return rows

    async def statement(
        self,
        operation: str,
        sql: str,
        *arguments: object,
        probe: ProbeQuery | None,
        on_abandoned: Callable[[Any], Awaitable[None]] | None = None,
        index_only: bool = False,
    ) -> Any:
        """Execute one writing statement in autocommit mode and return its one row.

        The statement gets the deadline ($1), the virtual now or NULL ($2), and ``arguments`` from $3 on. It
        must have no effect after the deadline, and returns one row with column ``before_deadline``.
        ``probe`` finds the token that the statement would have written; its row is the result of a call whose
        acknowledgement was lost. It is None where a second execution returns the correct result.

        ``index_only`` is for a large statement whose plan must suit tables of any size: it runs on a
        connection that is kept for such statements, with CLAIM_SETTINGS, and its plan is made once.
        """
        work = self._statement(operation, sql, arguments, probe, index_only)
        return await self.pool.shielded.run(work, on_abandoned)

    async def _statement(
        self,
        operation: str,
        sql: str,
        arguments: tuple[object, ...],
        probe: ProbeQuery | None,
        index_only: bool,
    ) -> Any:
        pool = self.pool
        resolver = OutcomeResolver(operation, probe)

        async def attempt() -> Any:
            async with self._connection(index_only) as (connection, process, fetchrow):
                if resolver and (found := await resolver.resolve(pool, connection)) is not None:
                    return found
                sent, deadline = pool.deadline(process)
                try:
                    row = await fetchrow(sql, deadline, pool.now(), *arguments)
                except asyncpg.InvalidCachedStatementError as error:
                    # The tables were altered since; a new connection prepares its statements again.
                    pool.discard(connection)
                    raise RetryableError(describe(error)) from None
                except CONNECTION_LOST_ERRORS as error:
                    pool.discard(connection)
                    resolver.record_loss(UnackedStatement(process, pool.expires_at(sent)))
                    raise RetryableError(describe(error)) from None
                if not row["before_deadline"]:
                    # The measured clock skew is wrong; a new connection measures it again.
                    pool.discard(connection)
                    raise RetryableError(StoreUnavailableError("the statement reached PostgreSQL too late"))
                await resolver.finish(pool, connection)
                return row

        try:
            return await pool.retries.run(attempt, operation)
        except FlowStoreError:
            if resolver:
                report_resolution(pool.observers, operation, Resolution.UNKNOWN)
                raise OutcomeUnknownError(operation) from None
            raise

    @asynccontextmanager
    async def _connection(
        self, index_only: bool
    ) -> AsyncIterator[tuple[Connection, ServerProcess, FetchRow]]:
        """A connection for one statement, its server process, and the function that sends the statement."""
        pool, kept = self.pool, self._index_only_connections
        if not index_only:

            async def fetchrow(sql: str, *arguments: object) -> Any:
                return await connection.fetchrow(pool.sql(sql), *arguments, timeout=pool.client_timeout())

            async with pool.connection() as connection:
                # Read now: a connection that breaks loses its process.
                yield connection, connection.process, fetchrow
            return
        prepared = await kept.acquire(contended=False)
        try:
            yield prepared.connection, prepared.process, partial(kept.fetchrow, prepared)
        except asyncio.CancelledError:
            pool.discard(prepared.connection)
            raise
        finally:
            await kept.release(prepared, keep=True)

    def write(
        self,
        statement: BatchStatement,
        row: Row,
        on_abandoned: Callable[[Any], Awaitable[None]] | None = None,
    ) -> Coroutine[Any, Any, Any]:
        """Write one row, batched with concurrent calls; the coroutine returns its result.

        When the caller is cancelled, ``on_abandoned`` gets the result, or the OutcomeUnknownError that the
        call ended with.
        """
        return self._batch_writer.submit(statement, row, on_abandoned)

    def unacked_statements(self, error: OutcomeUnknownError) -> Sequence[UnackedStatement]:
        """The statements on which an unknown outcome of ``write`` depends."""
        return self._batch_writer.unacked_statements(error)

    def transaction(
        self,
        operation: str,
        work: Callable[[Transaction], Awaitable[T]],
        on_abandoned: Callable[[T | OutcomeUnknownError], Awaitable[None]] | None = None,
        *,
        lock_run: UUID | None = None,
        index_only: bool = False,
    ) -> Coroutine[Any, Any, T]:
        """Call ``work`` in one transaction; see Transactions.run and BEGIN_INDEX_ONLY."""
        begin = BEGIN_INDEX_ONLY if index_only else BEGIN
        return self._transactions.run(operation, work, on_abandoned, begin=begin, lock_run=lock_run)

    async def compensate(
        self, sql: str, *arguments: object, unacked: Sequence[UnackedStatement] = ()
    ) -> None:
        """Undo the effect of a cancelled call (CON-4).

        The statement must be idempotent and return a row if it undid something. If it did not, it is
        executed again once none of the ``unacked`` statements can take effect any more.
        """
        pool = self.pool

        async def attempt() -> bool:
            async with pool.connection() as connection:
                return await pool.probe(connection, sql, *arguments) is not None

        async def fenced_attempt() -> None:
            async with pool.connection() as connection:
                await fence(pool, connection, unacked)
                await pool.probe(connection, sql, *arguments)

        if not await pool.retries.run(attempt, "compensate") and unacked:
            expires_at = max((one.expires_at for one in unacked if one.process.started is None), default=0.0)
            # Without a connection, and even beyond retry_timeout.
            await asyncio.sleep(max(expires_at - self._loop.time(), 0.0))
            await pool.retries.run(fenced_attempt, "compensate")

    async def with_connection(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Call ``work`` with one connection; it is retried from its beginning, as a migration may be."""
        pool = self.pool

        async def attempt() -> T:
            async with pool.connection() as connection:
                try:
                    return await work(connection)
                except CONNECTION_LOST_ERRORS as error:
                    pool.discard(connection)
                    raise RetryableError(describe(error)) from None

        return await pool.shielded.run(pool.retries.run(attempt, "open"))

    async def ping(self) -> None:
        await self.read("SELECT 1")

    async def aclose(self) -> None:
        await asyncio.gather(
            self.run_advancer.aclose(CLOSE_SECONDS),
            self.run_completer.aclose(CLOSE_SECONDS),
            self.shared_reads.aclose(CLOSE_SECONDS),
            self.shared_transactions.aclose(CLOSE_SECONDS),
        )
        await self._batch_writer.aclose(CLOSE_SECONDS)
        await self.pool.shielded.drain(CLOSE_SECONDS)
        await self._index_only_connections.aclose()
        await self.pool.aclose(CLOSE_SECONDS)
