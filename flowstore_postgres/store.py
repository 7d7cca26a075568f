"""The PostgreSQL store: its nouns put together, and how it is opened and closed."""

from __future__ import annotations

import asyncpg

from flowstore_core import StoreConfig
from flowstore_core.shielding import run_to_completion
from flowstore_postgres.claims import Claims
from flowstore_postgres.connection import Connection
from flowstore_postgres.controls import Controls
from flowstore_postgres.database import Database
from flowstore_postgres.errors import map_errors
from flowstore_postgres.events import Events
from flowstore_postgres.migrate import check_schema, read_connection_settings
from flowstore_postgres.outputs import Outputs
from flowstore_postgres.pages import Pages
from flowstore_postgres.retention import Retention
from flowstore_postgres.retries import Retries
from flowstore_postgres.runs import Runs
from flowstore_postgres.sessions import warn_of_defaults
from flowstore_postgres.signals import Signals
from flowstore_postgres.statistics import Statistics
from flowstore_postgres.steps import Steps


class PostgresStore(
    Runs, Pages, Steps, Retries, Claims, Controls, Signals, Outputs, Events, Retention, Statistics
):
    """The store; each noun's file holds its statements and the methods that run them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def ping(self) -> None:
        await self._database.ping()


class OpenPostgres:
    """The context of an open store: the pool, the schema brought up to date; leaving it closes everything.

    Not an async generator: those that a dying event loop finds open it closes all at once, and not the
    inner one after the outer one.
    """

    def __init__(self, config: StoreConfig) -> None:
        self._config = config
        self._database: Database | None = None

    async def __aenter__(self) -> PostgresStore:
        settings = read_connection_settings(self._config)

        async def identify(connection: Connection) -> None:
            await connection.identify(behind_pgbouncer=settings.pgbouncer)

        async def prepare(connection: Connection) -> None:
            warn_of_defaults(connection.defaults)
            await check_schema(connection, settings, migrate=self._config.migrate)

        async def keep(connection: Connection) -> None:
            # Our statements leave nothing behind, so the default reset, a round trip, is not needed.
            return None

        with map_errors():
            pool = asyncpg.create_pool(
                min_size=0,
                max_size=settings.pool_size,
                init=identify,
                reset=keep,
                connection_class=Connection,
                connect=settings.hosts.connect,
                **settings.connect_arguments,
            )
            database = Database(settings, await pool, self._config.clock, self._config.observers)
        try:
            await database.on_connection(prepare)
        except BaseException:
            await _close(database)
            raise
        self._database = database
        return PostgresStore(database)

    async def __aexit__(self, *exception: object) -> None:
        if self._database is not None:
            await _close(self._database)


async def _close(database: Database) -> None:
    # It is bounded, and a cancelled closing that is over must not go on behind its caller's back: the
    # event loop may end then.
    await run_to_completion(database.aclose())
