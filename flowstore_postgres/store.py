"""The PostgreSQL store: its nouns put together, and how it is opened and closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from flowstore_core import StoreConfig
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


@asynccontextmanager
async def open_postgres(config: StoreConfig) -> AsyncIterator[PostgresStore]:
    """Open the pool, bring the schema up to date, and close everything at the end."""
    settings = read_connection_settings(config)

    async def identify(connection: Connection) -> None:
        await connection.identify(behind_pgbouncer=settings.pgbouncer)

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
        database = Database(settings, await pool, config.clock)
    try:
        await database.on_connection(
            lambda connection: check_schema(connection, settings, migrate=config.migrate)
        )
        yield PostgresStore(database)
    finally:
        # A task of its own, so that a cancelled closing closes all the same.
        await asyncio.shield(asyncio.ensure_future(database.aclose()))
