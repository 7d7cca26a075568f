"""Schema operations for deployment tools, without opening a store; see SqliteBackend in plugin.py."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from functools import partial

from flowstore_core import StoreConfig
from flowstore_sqlite.connection import Connection, read_transaction, write_transaction
from flowstore_sqlite.file_access import create_file, file_exists
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

RESTORE_VERSION = f"{INSERT_VERSION} ON CONFLICT DO NOTHING"
READ_TRIGGERS = "SELECT name, sql FROM main.sqlite_schema WHERE type = 'trigger'"
# The columns that a table has in both files.
COMMON_COLUMNS = """
SELECT t.name, group_concat(c.name) FROM main.sqlite_schema t, pragma_table_info(t.name, 'main') c
WHERE t.type = 'table' AND t.name NOT LIKE 'sqlite%' AND t.name <> 'flowstore_schema'
  AND c.name IN (SELECT name FROM pragma_table_info(t.name, 'newest'))
GROUP BY t.name
"""
# The index of texts follows its table by triggers.
CLEARED_TABLES = """
SELECT name FROM main.sqlite_schema
WHERE type = 'table' AND name <> 'flowstore_schema'
  AND name NOT LIKE 'sqlite%' AND name NOT LIKE 'run_trigrams%'
"""
SEARCH_VERSION = 3
"""The first schema version with tables for the search index."""


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

    add, delete = (RESTORE_VERSION, row), (DELETE_VERSION, row[:1])
    await change(*(add if difference > 0 else delete))
    try:
        yield
    finally:
        await change(*(add if difference < 0 else delete))


async def clear_file(url: str) -> None:
    """Delete every row of a scratch file except the versions; see ScratchClearable."""
    await asyncio.to_thread(_clear_file, database_path(url))


def _clear_file(path: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        # A scratch file need not survive a power cut.
        db.execute("PRAGMA synchronous = OFF")
        db.execute("BEGIN IMMEDIATE")
        tables = db.execute(CLEARED_TABLES).fetchall()
        # Twice, because the triggers of one table add rows to others.
        for (table,) in 2 * tables:
            db.execute(f"DELETE FROM {table}")
        db.execute("COMMIT")


async def revert_schema(url: str, version: int) -> None:
    """See SchemaRevertible."""
    await asyncio.to_thread(_revert_file, database_path(url), version)


def _revert_file(path: str, version: int) -> None:
    newest = f"{path}-newest"
    os.rename(path, newest)
    create_file(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for migration in load_migrations():
            if migration.version <= version:
                db.executescript(_script(migration))
        db.execute("ATTACH ? AS newest", (newest,))
        db.execute("BEGIN")
        # The triggers of counters would count the copied runs a second time.
        triggers = db.execute(READ_TRIGGERS).fetchall()
        for name, _ in triggers:
            db.execute(f"DROP TRIGGER {name}")
        for table, columns in db.execute(COMMON_COLUMNS).fetchall():
            db.execute(f"INSERT INTO main.{table} ({columns}) SELECT {columns} FROM newest.{table}")
        for _, definition in triggers:
            db.execute(definition)
        if version >= SEARCH_VERSION and enable_search(db):
            index_some(db, now=0)
        db.execute("COMMIT")
    os.unlink(newest)


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
