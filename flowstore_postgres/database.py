"""The pool, the retries, and the two ways a write reaches PostgreSQL.

``Database.statement`` sends one statement that is a transaction of its own; ``Database.transaction``
runs several. Both know what to do when the connection breaks under way: nothing is guessed. A lost
statement is looked for by the token it would have written, a lost COMMIT by the token that its
transaction noted, and either only once the server can no longer act on what was sent (CON-3).
"""

from __future__ import annotations

import asyncio
import logging
import random
from asyncio import get_running_loop
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeVar

import asyncpg

from flowstore_core import (
    FlowStoreError,
    OutcomeUnknownError,
    StoreUnavailableError,
)
from flowstore_core.instrumentation import NO_OBSERVERS, Observers, Resolution
from flowstore_core.shielding import ShieldedTasks
from flowstore_core.timeseries import LATEST
from flowstore_postgres.acknowledgements import (
    NOTE_COMMIT,
    Doubt,
    Look,
    Lost,
    LostCommit,
    report_lost,
    settle,
    was_committed,
)
from flowstore_postgres.batched import Batched
from flowstore_postgres.batches import Batches
from flowstore_postgres.completion import Completion
from flowstore_postgres.connection import Connection, Peer, Transaction
from flowstore_postgres.errors import (
    FINAL,
    LOST,
    UNREACHABLE,
    Retry,
    describe,
    unreadable_url,
)
from flowstore_postgres.migrate import Settings
from flowstore_postgres.reading import Reading
from flowstore_postgres.repeating import Repeating

T = TypeVar("T")

log = logging.getLogger("flowstore_postgres")

CLOSE_SECONDS = 5.0
ARRIVAL_SECONDS = 5.0
"""A statement that reaches the server later than this after it was sent has no effect (CON-3)."""

# As in INP-3: a lease never ends later.
LATEST_SQL = f"'{LATEST.isoformat()}'::timestamptz"
# A duration travels as a number of these. The driver would send a timedelta as an interval of days, and the
# server adds days in the time zone of the session, where one of them may have 23 or 25 hours.
MICROSECOND_SQL = "interval '1 microsecond'"
MICROSECOND = timedelta(microseconds=1)

# Behind a pooler the role's defaults apply.
BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED"
COMMIT = "COMMIT"
ROLLBACK = "ROLLBACK"


def fill_in(statement: str, quoted_schema: str) -> str:
    """Replace ``{latest}``, ``{microsecond}`` and ``{schema}`` in a statement."""
    known = statement.replace("{latest}", LATEST_SQL).replace("{microsecond}", MICROSECOND_SQL)
    # The name of the schema comes last, because it may contain braces.
    return known.replace("{schema}", quoted_schema)


def in_microseconds(duration: timedelta) -> int:
    """A duration as statements get it, to multiply ``{microsecond}`` by."""
    return duration // MICROSECOND


class Database:
    """One store's way to PostgreSQL; every noun class goes through it."""

    def __init__(
        self,
        settings: Settings,
        pool: Any,
        clock: Callable[[], datetime] | None,
        observers: Observers = NO_OBSERVERS,
    ) -> None:
        self.observers: Observers = observers
        self._settings = settings
        self._pool = pool
        self._clock = clock
        self._statements: dict[str, str] = {}
        self._arrival = min(ARRIVAL_SECONDS, settings.statement_timeout)
        # What a write leaves behind, to be found by: unlikely ever to come again. Seeded by the system, and
        # far cheaper than asking the system for each.
        self.new_token: Callable[[], int] = partial(random.Random().getrandbits, 63)
        self._loop = get_running_loop()
        self._repeating = Repeating(settings.retry_timeout, observers)
        self._in_flight = ShieldedTasks()
        self._batches = Batches(
            self,
            pool_size=settings.pool_size,
            patience=settings.acquire_timeout,
            pgbouncer=settings.pgbouncer,
        )
        self.completion = Completion(self, patience=settings.acquire_timeout)
        self.reading = Reading(self, patience=settings.acquire_timeout)

    def within(self, seconds: float) -> float:
        """So many seconds, or what is left to a call that has failed and goes on trying."""
        return self._repeating.within(seconds)

    def client_timeout(self) -> float:
        """How long a statement that is sent now is waited for."""
        return self.within(self._settings.client_timeout)

    def now(self) -> datetime | None:
        """The virtual clock's time; None where the server's clock decides."""
        return None if self._clock is None else self._clock()

    def sql(self, statement: str) -> str:
        """A statement with the schema's quoted name, the last moment of all and a microsecond in place."""
        known = self._statements.get(statement)
        if known is None:
            known = self._statements[statement] = fill_in(statement, self._settings.quoted_schema)
        return known

    async def run(
        self,
        operation: Coroutine[Any, Any, T],
        give_back: Callable[[T | OutcomeUnknownError], Awaitable[None]] | None = None,
    ) -> T:
        return await self._in_flight.run(operation, give_back)

    async def read(self, statement: str, *arguments: object) -> Sequence[Any]:
        """The rows of one SELECT: one snapshot. Repeated freely when the connection breaks."""
        return await self.run(self.retrying(lambda: self._read(statement, arguments), "read"))

    async def read_row(self, statement: str, *arguments: object) -> Any:
        rows = await self.read(statement, *arguments)
        return rows[0] if rows else None

    async def _read(self, statement: str, arguments: tuple[object, ...]) -> Sequence[Any]:
        async with self.connection() as connection:
            try:
                rows: Sequence[Any] = await connection.fetch(
                    self.sql(statement), *arguments, timeout=self.client_timeout()
                )
            except LOST as error:
                self.drop(connection)
                raise Retry(describe(error)) from None
            return rows

    async def statement(
        self,
        operation: str,
        statement: str,
        *arguments: object,
        look: Look | None,
        give_back: Callable[[Any], Awaitable[None]] | None = None,
    ) -> Any:
        """Run one writing statement, a transaction of its own, and return its one row.

        ``statement`` gets ``arguments`` as $3 and up, behind the not-after time ($1) and the virtual
        now ($2, or NULL); it must have no effect once the first is over, and answer ``in_time`` with
        its row. ``look`` is a SELECT and its arguments: it finds the token that the statement would
        have written, and its row is then the answer to a call whose acknowledgement was lost. None
        where saying it again gives the true answer by itself.
        """
        return await self.run(self._statement(operation, statement, arguments, look), give_back)

    async def _statement(
        self,
        operation: str,
        statement: str,
        arguments: tuple[object, ...],
        look: Look | None,
    ) -> Any:
        doubt = Doubt(operation, look)

        async def attempt() -> Any:
            async with self.connection() as connection:
                if doubt and (found := await doubt.resolve(self, connection)) is not None:
                    return found
                peer = connection.peer
                sent, not_after = self.not_after(peer)
                try:
                    row = await connection.fetchrow(
                        self.sql(statement),
                        not_after,
                        self.now(),
                        *arguments,
                        timeout=self.client_timeout(),
                    )
                except LOST as error:
                    self.drop(connection)
                    doubt.lose(self.lost(peer, sent))
                    raise Retry(describe(error)) from None
                if not row["in_time"]:
                    # Our idea of the server's clock is off; a new connection brings a better one.
                    self.drop(connection)
                    raise Retry(StoreUnavailableError("the statement reached PostgreSQL too late"))
                await doubt.end(self, connection)
                return row

        try:
            return await self.retrying(attempt, operation)
        except FlowStoreError:
            if doubt:
                report_lost(self.observers, operation, Resolution.UNKNOWN)
                raise OutcomeUnknownError(operation) from None
            raise

    def write(
        self,
        batched: Batched,
        row: tuple[Any, ...],
        give_back: Callable[[Any], Awaitable[None]] | None = None,
    ) -> Coroutine[Any, Any, Any]:
        """Write one row together with what others write at this moment; awaited, it gives the answer.

        When the caller is cancelled, ``give_back`` gets the answer, or the OutcomeUnknownError that it
        ended with.
        """
        return self._batches.call(batched, row, give_back)

    def unacknowledged(self, error: OutcomeUnknownError) -> Sequence[Lost]:
        """The statements on which an unknown outcome of ``write`` depends."""
        return self._batches.unacknowledged(error)

    def not_after(self, peer: Peer) -> tuple[float, datetime]:
        """The event loop's time, and the server's from which on a statement sent now has no effect."""
        sent = self._loop.time()
        return sent, datetime.fromtimestamp(sent + self._arrival + peer.clock_offset, tz=UTC)

    def lost(self, peer: Peer, sent: float) -> Lost:
        """What arrived in time may run for as long as the server lets it."""
        return Lost(peer, sent + self._arrival + self._settings.statement_timeout)

    async def transaction(
        self,
        operation: str,
        work: Callable[[Transaction], Awaitable[T]],
        give_back: Callable[[T | OutcomeUnknownError], Awaitable[None]] | None = None,
    ) -> T:
        """Run ``work`` in one transaction at READ COMMITTED and commit it.

        An error of our own rolls back and is raised. Serialization failures, deadlocks and a
        connection lost before COMMIT are retried; a lost COMMIT is resolved by what the transaction noted.
        """

        async def attempt() -> T:
            async with self.connection() as connection:
                return await self._transaction(connection, operation, work)

        return await self.run(self.retrying(attempt, operation), give_back)

    async def _transaction(
        self, connection: Connection, operation: str, work: Callable[[Transaction], Awaitable[T]]
    ) -> T:
        # Taken now: a connection that breaks forgets them.
        peer, number, token = connection.peer, connection.number, self.new_token()
        transaction = Transaction(connection, self.sql, self.now, self.client_timeout)
        try:
            await transaction.execute(BEGIN)
            try:
                result = await work(transaction)
                xid = (await transaction.row(NOTE_COMMIT, number, token))[0]
            except (FlowStoreError, asyncpg.PostgresError) as error:
                if isinstance(error, LOST):
                    raise
                await transaction.execute(ROLLBACK)
                raise
        except LOST as error:
            # COMMIT was never sent, so the server rolls back.
            self.drop(connection)
            raise Retry(describe(error)) from None
        except asyncio.CancelledError:
            self.drop(connection)
            raise
        try:
            answer = await transaction.execute(COMMIT)
        except LOST:
            self.drop(connection)
            if await was_committed(self, LostCommit(peer, number, token, xid), operation):
                return result
            raise Retry(StoreUnavailableError("PostgreSQL rolled the transaction back")) from None
        except asyncio.CancelledError:
            self.drop(connection)
            raise
        if answer != COMMIT:
            raise Retry(StoreUnavailableError("PostgreSQL rolled the transaction back"))
        return result

    async def ask(self, connection: Connection, statement: str, *arguments: object) -> Any:
        """The first row of a look that is repeated whatever it fails from: what happened is to be known."""
        try:
            return await connection.fetchrow(self.sql(statement), *arguments, timeout=self.client_timeout())
        except LOST as error:
            self.drop(connection)
            raise Retry(describe(error)) from None
        except asyncpg.PostgresError as error:
            raise Retry(describe(error)) from None

    def retrying(
        self, attempt: Callable[[], Awaitable[T]], operation: str, *, failed: bool = False
    ) -> Coroutine[Any, Any, T]:
        """Repeat what is known not to have happened; see Repeating."""
        return self._repeating.repeat(attempt, operation, failed=failed)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A connection for one piece of work."""
        connection = await self.acquire()
        try:
            yield connection
        finally:
            await self.release(connection)

    async def acquire(self) -> Connection:
        """A connection that was open a moment ago; Retry when none can be had."""
        try:
            # acquire(timeout=) bounds the waiting; a timeout of fetch would not.
            connection: Connection = await self._pool.acquire(
                timeout=self.within(self._settings.acquire_timeout)
            )
        except TimeoutError:
            error = StoreUnavailableError(
                f"no connection within {self._settings.acquire_timeout:g} s; "
                "raise pool_size or acquire_timeout, or send fewer calls at once"
            )
            if not self._repeating.under_way():
                raise error from None
            # Whoever has to look what became of a call does not give up before the time is up.
            raise Retry(error) from None
        except FINAL as raised:
            raise describe(raised) from None
        except UNREACHABLE as error:
            raise Retry(describe(error)) from None
        except ValueError:
            raise unreadable_url() from None
        except asyncpg.InterfaceError as error:
            raise describe(error) from None
        if connection.is_closed():
            await self.release(connection)
            raise Retry(StoreUnavailableError("the connection was closed"))
        return connection

    async def release(self, connection: Connection) -> None:
        try:
            await self._pool.release(connection)
        except LOST:
            # The pool closes those that it has used up; what the call has got is right all the same.
            log.debug("a connection broke when it was given back")

    @staticmethod
    def is_usable(connection: Connection) -> bool:
        try:
            return not connection.is_closed()
        except asyncpg.InterfaceError:
            # The pool noticed that it broke and has let go of it already.
            return False

    @staticmethod
    def drop(connection: Connection) -> None:
        """Close a connection at once: what it is doing is not known."""
        try:
            connection.terminate()
        except asyncpg.InterfaceError:
            # The pool noticed that it broke and has let go of it already.
            log.debug("a broken connection was gone before it was dropped")

    async def give_back(self, statement: str, *arguments: object, lost: Sequence[Lost] = ()) -> None:
        """Undo the effect of a cancelled call (CON-4).

        The statement may be repeated; it returns a row if it undid something, and nothing follows that.
        If it did not, it is repeated once none of the ``lost`` statements can take effect any more.
        """

        async def attempt() -> bool:
            async with self.connection() as connection:
                return await self.ask(connection, statement, *arguments) is not None

        async def settled_attempt() -> None:
            async with self.connection() as connection:
                await settle(self, connection, lost)
                await self.ask(connection, statement, *arguments)

        if not await self.retrying(attempt, "give_back") and lost:
            over = max((one.over for one in lost if one.peer.started is None), default=0.0)
            # Without a connection, and however much longer than retry_timeout that is.
            await asyncio.sleep(max(over - self._loop.time(), 0.0))
            await self.retrying(settled_attempt, "give_back")

    async def on_connection(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Run what may be repeated from its beginning, such as migrating, on one connection."""

        async def attempt() -> T:
            async with self.connection() as connection:
                try:
                    return await work(connection)
                except LOST as error:
                    self.drop(connection)
                    raise Retry(describe(error)) from None

        return await self.run(self.retrying(attempt, "open"))

    async def ping(self) -> None:
        await self.read("SELECT 1")

    async def aclose(self) -> None:
        await asyncio.gather(self.completion.aclose(CLOSE_SECONDS), self.reading.aclose(CLOSE_SECONDS))
        await self._batches.aclose(CLOSE_SECONDS)
        await self._in_flight.drain(CLOSE_SECONDS)
        try:
            # close() can hang for ever on a half-open peer.
            await asyncio.wait_for(self._pool.close(), CLOSE_SECONDS)
        except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            self._pool.terminate()
