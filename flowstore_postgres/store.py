"""The PostgreSQL store: its nouns put together, and how it is opened and closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from flowstore_core import StoreConfig
from flowstore_postgres.claims import Claims
from flowstore_postgres.controls import Controls
from flowstore_postgres.database import Connection, Database, Peer
from flowstore_postgres.errors import map_errors
from flowstore_postgres.events import Events
from flowstore_postgres.migrate import check_schema, read_connection_settings
from flowstore_postgres.outputs import Outputs
from flowstore_postgres.retention import Retention
from flowstore_postgres.runs import Runs
from flowstore_postgres.signals import Signals
from flowstore_postgres.statistics import Statistics
from flowstore_postgres.steps import Steps

# Read once per connection: who serves it, and how far the server's clock is from ours.
IDENTIFY = """
SELECT pg_backend_pid() AS pid, clock_timestamp() AS now,
       (SELECT backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()) AS started
"""


class PostgresStore(Runs, Steps, Claims, Controls, Signals, Outputs, Events, Retention, Statistics):
    """The store; each noun's file holds its statements and the methods that run them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def ping(self) -> None:
        await self._database.ping()


@asynccontextmanager
async def open_postgres(config: StoreConfig) -> AsyncIterator[PostgresStore]:
    """Open the pool, bring the schema up to date, and close everything at the end."""
    settings = read_connection_settings(config)
    loop = asyncio.get_running_loop()

    async def identify(connection: Connection) -> None:
        asked = loop.time()
        row = await connection.fetchrow(IDENTIFY)
        middle = (asked + loop.time()) / 2
        # Behind PgBouncer the next statement may have another peer, which must not be terminated.
        started = None if settings.pgbouncer else row["started"]
        connection.peer = Peer(row["pid"], started, row["now"].timestamp() - middle)

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
