"""Schema operations for deployment tools, without opening a store; see SqliteBackend in plugin.py."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

from flowstore_core import StoreConfig
from flowstore_sqlite.connection import Connection, read_transaction, write_transaction
from flowstore_sqlite.file_access import file_exists
from flowstore_sqlite.open import Options, open_writer
from flowstore_sqlite.schema_migrations import (
    CREATE_SCHEMA_TABLE,
    DELETE_VERSION,
    INSERT_VERSION,
    Migration,
    load_migrations,
    read_version,
)
from flowstore_sqlite.search import enable_search, index_some, is_indexed
from flowstore_sqlite.url import database_path


def migrations() -> Sequence[tuple[int, str, str]]:
    """Every migration in order, as (number, name, a script that applies and records it)."""
    return tuple((found.version, found.name, _script(found)) for found in load_migrations())


def _script(migration: Migration) -> str:
    now = "CAST(strftime('%s', 'now') AS INTEGER) * 1000000"
    values = f"({migration.version}, '{migration.name}', {migration.works_from}, {now})"
    record = INSERT_VERSION.replace("(?, ?, ?, ?)", values)
    return f"BEGIN IMMEDIATE;{CREATE_SCHEMA_TABLE.rstrip()};\n\n{migration.sql}\n{record};\nCOMMIT;\n"


async def schema_version(config: StoreConfig) -> int:
    """The schema version of the file; 0 without a file or schema. Creates and changes nothing.

    Raises ConfigurationError, StoreUnavailableError.
    """
    path = database_path(config.url)
    options = Options.read(config)
    if not file_exists(path):
        return 0
    connection = Connection(path)
    try:
        await connection.open()
        version, _ = await connection.run_with_busy_retry(
            partial(read_transaction, read_version), options.busy_timeout
        )
    finally:
        await connection.close()
    return version


@asynccontextmanager
async def adjust_version(url: str, difference: int) -> AsyncIterator[None]:
    """See SchemaVersionAdjustable."""
    newest = load_migrations()[-1]
    newer = newest.version + 1
    row = (
        (newer, "newer", newer, 0) if difference > 0 else (newest.version, newest.name, newest.works_from, 0)
    )

    async def change(statement: str, values: Sequence[object]) -> None:
        connection = Connection(database_path(url))
        try:
            await connection.open()
            await connection.run_in_thread(
                partial(write_transaction, lambda db: db.execute(statement, values))
            )
        finally:
            await connection.close()

    add, delete = (INSERT_VERSION, row), (DELETE_VERSION, row[:1])
    await change(*(add if difference > 0 else delete))
    try:
        yield
    finally:
        await change(*(add if difference < 0 else delete))


async def migrate(config: StoreConfig) -> int:
    """Apply all missing migrations and return the schema version. Creates the file if needed.

    Also creates the search index if this SQLite has FTS5 and the file has none, and updates it.
    Ignores ``config.migrate``. Raises ConfigurationError, SchemaVersionError, StoreUnavailableError.
    """
    connection = Connection(database_path(config.url))
    try:
        options = Options.read(config)
        version = await open_writer(connection, replace(config, migrate=True), options)
        if await connection.run_with_busy_retry(
            partial(write_transaction, enable_search), options.busy_timeout
        ):
            index = partial(write_transaction, partial(index_some, now=0))
            while await connection.run_with_busy_retry(index, options.busy_timeout):
                pass
        return version
    finally:
        await connection.close()


async def has_search_index(config: StoreConfig) -> bool:
    """Whether searches use an index. Changes nothing."""
    connection = Connection(database_path(config.url))
    try:
        await connection.open()
        return await connection.run_with_busy_retry(
            partial(read_transaction, is_indexed), Options.read(config).busy_timeout
        )
    finally:
        await connection.close()
