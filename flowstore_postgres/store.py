"""The PostgreSQL store, composed of its nouns, and the context that opens and closes it."""

from __future__ import annotations

import asyncio

import asyncpg

from flowstore_core import StoreConfig
from flowstore_core.shielding import run_to_completion
from flowstore_postgres.claims import Claims
from flowstore_postgres.connection import Connection
from flowstore_postgres.controls import Controls
from flowstore_postgres.database import Database
from flowstore_postgres.errors import map_errors
from flowstore_postgres.events import Events
from flowstore_postgres.migrate import check_schema
from flowstore_postgres.outputs import Outputs
from flowstore_postgres.pages import Pages
from flowstore_postgres.queues import CONCURRENT_CLAIMS, Queues
from flowstore_postgres.retention import Retention
from flowstore_postgres.retries import Retries
from flowstore_postgres.runs import Runs
from flowstore_postgres.session_settings import warn_of_defaults
from flowstore_postgres.settings import read_settings
from flowstore_postgres.signals import Signals
from flowstore_postgres.statistics import Statistics
from flowstore_postgres.steps import Steps


class PostgresStore(
    Runs, Pages, Steps, Retries, Claims, Queues, Controls, Signals, Outputs, Events, Retention, Statistics
):
    """The store. The file of each noun holds its statements and the methods that execute them."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._free_numbers = []
        self._claiming = asyncio.Semaphore(CONCURRENT_CLAIMS)

    async def ping(self) -> None:
        await self._database.ping()


class StoreContext:
    """The context manager of a store: opens the pool, migrates the schema, and closes the pool at the end.

    It is not an async generator: an event loop that ends closes all open generators at once, in no order.
    """

    def __init__(self, config: StoreConfig) -> None:
        self._config = config
        self._database: Database | None = None

    async def __aenter__(self) -> PostgresStore:
        settings = read_settings(self._config)

        async def handshake(connection: Connection) -> None:
            await connection.handshake(behind_pgbouncer=settings.pgbouncer)

        async def prepare(connection: Connection) -> None:
            warn_of_defaults(connection.defaults)
            await check_schema(connection, settings, migrate=self._config.migrate)

        async def skip_reset(connection: Connection) -> None:
            # The statements leave no session state, so the driver's reset, a round trip, is not needed.
            return None

        with map_errors():
            pool = asyncpg.create_pool(
                min_size=0,
                max_size=settings.pool_size,
                init=handshake,
                reset=skip_reset,
                connection_class=Connection,
                connect=settings.hosts.connect,
                **settings.connect_arguments,
            )
            database = Database(settings, await pool, self._config.clock, self._config.observers)
        try:
            await database.with_connection(prepare)
        except BaseException:
            await _close(database)
            raise
        self._database = database
        return PostgresStore(database)

    async def __aexit__(self, *exception: object) -> None:
        if self._database is not None:
            await _close(self._database)


async def _close(database: Database) -> None:
    # Bounded in time. It must not continue in the background after a cancellation, because the event loop
    # may end.
    await run_to_completion(database.aclose())
