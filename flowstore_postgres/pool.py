"""The connections of one store, with the clock, the deadlines and the retries of its statements."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any

import asyncpg

from flowstore_core import StoreUnavailableError
from flowstore_core.instrumentation import Observers
from flowstore_core.shielding import ShieldedTasks
from flowstore_postgres.connection import Connection, ServerProcess
from flowstore_postgres.errors import (
    CONNECTION_LOST_ERRORS,
    PERMANENT_ERRORS,
    UNREACHABLE_ERRORS,
    RetryableError,
    describe,
    invalid_url,
)
from flowstore_postgres.retry_loop import RetryLoop
from flowstore_postgres.settings import Settings
from flowstore_postgres.sql_placeholders import fill_in

log = logging.getLogger("flowstore_postgres")

MAX_TRANSIT_SECONDS = 5.0
"""A statement that reaches the server later than this after it was sent has no effect (CON-3)."""

IDLE_SECONDS = 60.0
"""A connection that no call used for one to two times this long goes back to the driver's pool."""
MAX_USES = 1000
"""So many uses of connections later, one goes back to the driver's pool, which replaces worn-out ones."""


class ConnectionPool:
    """asyncpg's pool with the errors, deadlines and tokens of this package.

    ``retries`` retries failed operations; ``shielded`` holds the calls that continue when they are cancelled.
    """

    def __init__(
        self,
        settings: Settings,
        driver_pool: Any,
        clock: Callable[[], datetime] | None,
        observers: Observers,
    ) -> None:
        self.observers: Observers = observers
        self.retries = RetryLoop(settings.retry_timeout, observers)
        self.shielded = ShieldedTasks()
        # A write stores a random token, by which a probe finds it. The generator is seeded by the system and
        # far cheaper than the system's own.
        self.new_token: Callable[[], int] = partial(random.Random().getrandbits, 63)
        self._settings = settings
        self._driver_pool = driver_pool
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._statements: dict[str, str] = {}
        self._max_transit = min(MAX_TRANSIT_SECONDS, settings.statement_timeout)
        # The driver's pool needs three tasks to acquire and release a connection, which cost more than a
        # short statement. So a free connection is kept here, unless a call waits for the driver's pool.
        self._idle: list[Connection] = []
        """Free connections, the one used last at the end."""
        self._unused = 0
        """How many of them, from the start, no call has used since the last check."""
        self._uses = 0
        self._waiting = 0
        """The number of calls that wait for the driver's pool."""
        self._idle_check: asyncio.TimerHandle | None = None
        self._closing = False

    def now(self) -> datetime | None:
        """The virtual clock's time; None where the server's clock decides."""
        return None if self._clock is None else self._clock()

    def sql(self, statement: str) -> str:
        """A statement with its placeholders replaced; cached."""
        filled = self._statements.get(statement)
        if filled is None:
            filled = self._statements[statement] = fill_in(statement, self._settings.quoted_schema)
        return filled

    # Deadlines

    def client_timeout(self) -> float:
        """The time, in seconds, to wait for the reply to a statement that is sent now."""
        return self.retries.remaining(self._settings.client_timeout)

    def deadline(self, process: ServerProcess) -> tuple[float, datetime]:
        """The event loop's time, and the server's time after which a statement sent now has no effect."""
        sent = self._loop.time()
        return sent, datetime.fromtimestamp(sent + self._max_transit + process.clock_skew, tz=UTC)

    def expires_at(self, sent: float) -> float:
        """The event loop's time from which an unacknowledged statement can no longer take effect.

        One that reached the server before its deadline executes until statement_timeout at most.
        """
        return sent + self._max_transit + self._settings.statement_timeout

    # Connections

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A connection that is released at the end."""
        connection = await self.acquire()
        try:
            yield connection
        finally:
            await self.release(connection)

    async def acquire(self) -> Connection:
        """Return a connection that was open a moment ago.

        Raises RetryableError when the server cannot be reached, and StoreUnavailableError when no connection
        becomes free within acquire_timeout.
        """
        while self._idle:
            connection = self._idle.pop()
            self._unused = min(self._unused, len(self._idle))
            if self.is_usable(connection):
                return connection
            await self._return(connection)
        self._waiting += 1
        try:
            return await self._acquire_from_driver()
        finally:
            self._waiting -= 1

    async def _acquire_from_driver(self) -> Connection:
        try:
            # acquire(timeout=) bounds the wait for a connection; a timeout of fetch would not.
            connection: Connection = await self._driver_pool.acquire(
                timeout=self.retries.remaining(self._settings.acquire_timeout)
            )
        except TimeoutError:
            error = StoreUnavailableError(
                f"no connection within {self._settings.acquire_timeout:g} s; "
                "raise pool_size or acquire_timeout, or send fewer calls at once"
            )
            if not self.retries.is_retrying():
                raise error from None
            # A call that probes for its outcome keeps trying until its deadline.
            raise RetryableError(error) from None
        except PERMANENT_ERRORS as raised:
            raise describe(raised) from None
        except UNREACHABLE_ERRORS as error:
            raise RetryableError(describe(error)) from None
        except ValueError:
            raise invalid_url() from None
        except asyncpg.InterfaceError as error:
            raise describe(error) from None
        if not self.is_usable(connection):
            await self._return(connection)
            raise RetryableError(StoreUnavailableError("the connection was closed"))
        return connection

    async def release(self, connection: Connection) -> None:
        """Make a connection free for the next call."""
        self._uses += 1
        # The driver rolls back a transaction that a failed call has left open.
        is_clean = self.is_usable(connection) and not connection.is_in_transaction()
        if self._waiting or self._closing or not is_clean or self._uses % MAX_USES == 0:
            await self._return(connection)
            return
        self._idle.append(connection)
        if self._idle_check is None:
            self._idle_check = self._loop.call_later(IDLE_SECONDS, self._return_unused)

    def _return_unused(self) -> None:
        """Give the connections that no call has used since the last check back to the driver's pool."""
        self._idle_check = None
        for connection in self._idle[: self._unused]:
            self.shielded.start(self._return(connection))
        del self._idle[: self._unused]
        self._unused = len(self._idle)
        if self._idle:
            self._idle_check = self._loop.call_later(IDLE_SECONDS, self._return_unused)

    async def _return(self, connection: Connection) -> None:
        try:
            await self._driver_pool.release(connection)
        except CONNECTION_LOST_ERRORS:
            # The result that the connection delivered before is valid.
            log.debug("a connection broke while it was released")

    @staticmethod
    def is_usable(connection: Connection) -> bool:
        try:
            return not connection.is_closed()
        except asyncpg.InterfaceError:
            # The pool noticed that it broke and has released it already.
            return False

    @staticmethod
    def discard(connection: Connection) -> None:
        """Close a connection at once, because the state of its statement is unknown."""
        try:
            connection.terminate()
        except asyncpg.InterfaceError:
            # The pool noticed that it broke and has released it already.
            log.debug("a broken connection was gone before it was discarded")

    async def probe(self, connection: Connection, statement: str, *arguments: object) -> Any:
        """The first row of a statement that is retried after any error, because its result is needed."""
        try:
            return await connection.fetchrow(self.sql(statement), *arguments, timeout=self.client_timeout())
        except CONNECTION_LOST_ERRORS as error:
            self.discard(connection)
            raise RetryableError(describe(error)) from None
        except asyncpg.PostgresError as error:
            raise RetryableError(describe(error)) from None

    async def aclose(self, seconds: float) -> None:
        """Close every connection, by force after ``seconds``."""
        self._closing = True
        if self._idle_check is not None:
            self._idle_check.cancel()
        try:
            # Both can hang on a half-open peer: close() forever, and the driver's pool waits for the end of a
            # statement that was cancelled before it takes the connection back.
            async with asyncio.timeout(seconds):
                while self._idle:
                    await self._return(self._idle.pop())
                await self._driver_pool.close()
        except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            self._driver_pool.terminate()
