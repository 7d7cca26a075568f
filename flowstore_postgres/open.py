"""The context that opens and closes a store."""

from __future__ import annotations

import asyncpg

from flowstore_core import StoreConfig
from flowstore_core.shielding import run_to_completion
from flowstore_postgres.connection import Connection
from flowstore_postgres.database import Database
from flowstore_postgres.errors import map_errors
from flowstore_postgres.hints import HintingStore, WatchingStore
from flowstore_postgres.migrate import check_schema
from flowstore_postgres.session_settings import warn_of_defaults
from flowstore_postgres.settings import read_settings
from flowstore_postgres.watching import Listener, Notifier


class StoreContext:
    """The context manager of a store: opens the pool, migrates the schema, and closes the pool at the end.

    It is not an async generator: an event loop that ends closes all open generators at once, in no order.
    """

    def __init__(self, config: StoreConfig) -> None:
        self._config = config
        self._store: HintingStore | None = None

    async def __aenter__(self) -> HintingStore:
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
            await run_to_completion(database.aclose())
            raise
        notifier = Notifier(database, settings.schema)
        if settings.pgbouncer:
            self._store = HintingStore(database, notifier)
        else:
            self._store = WatchingStore(database, notifier, Listener(settings))
        return self._store

    async def __aexit__(self, *exception: object) -> None:
        if self._store is not None:
            # Bounded in time. It must not continue in the background after a cancellation, because the event
            # loop may end.
            await run_to_completion(self._store.release())
