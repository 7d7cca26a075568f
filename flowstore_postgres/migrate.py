"""Numbered migrations, applied under a lock (CON-6), and scratch schemas."""

from __future__ import annotations

import functools
import logging
import re
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import asyncpg

from flowstore_core import ConfigurationError, SchemaVersionError, StoreConfig
from flowstore_core.urls import parse_url
from flowstore_postgres.errors import describe, map_errors
from flowstore_postgres.search import (
    COUNT_UNINDEXED,
    HAS_INDEX,
    INDEX_BATCH,
    INDEX_RUNS,
    REINDEX_THRESHOLD,
)
from flowstore_postgres.settings import Settings, quote_identifier, read_settings

log = logging.getLogger("flowstore_postgres")

CLOSE_SECONDS = 5.0

# Not to_regclass(): it may use a cache entry from before the lock was taken, when another process had not yet
# created the table.
SCHEMA_EXISTS = "SELECT EXISTS (SELECT FROM pg_catalog.pg_namespace WHERE nspname = $1)"
VERSION_TABLE_EXISTS = """
SELECT EXISTS (SELECT FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
               WHERE n.nspname = $1 AND c.relname = 'schema_version')
"""
READ_VERSION = """
SELECT version, works_from FROM {schema}.schema_version ORDER BY version DESC LIMIT 1
"""
CREATE_VERSION_TABLE = """
CREATE TABLE {schema}.schema_version (
    version    integer     NOT NULL PRIMARY KEY,
    name       text        NOT NULL,
    works_from integer     NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT clock_timestamp()
)
"""
RECORD_VERSION = "INSERT INTO {schema}.schema_version (version, name, works_from) VALUES ($1, $2, $3)"
RESTORE_VERSION = f"{RECORD_VERSION} ON CONFLICT DO NOTHING"
DELETE_VERSION = "DELETE FROM {schema}.schema_version WHERE version = $1"
# The columns that the tables of two schemas have in common.
COMMON_COLUMNS = """
SELECT quote_ident(t.relname), string_agg(quote_ident(c.attname), ', ')
FROM pg_catalog.pg_class t JOIN pg_catalog.pg_attribute c ON c.attrelid = t.oid
JOIN pg_catalog.pg_class t2 ON t2.relname = t.relname
JOIN pg_catalog.pg_attribute c2 ON c2.attrelid = t2.oid AND c2.attname = c.attname
WHERE t.relnamespace = $1::text::regnamespace AND t2.relnamespace = $2::text::regnamespace
  AND t.relkind = 'r' AND t.relname <> 'schema_version'
  AND c.attnum > 0 AND NOT c.attisdropped AND NOT c2.attisdropped
GROUP BY t.relname
"""
# The triggers of counters would count the copied runs a second time.
COPY_TABLE = """
ALTER TABLE {schema}.{table} DISABLE TRIGGER USER;
INSERT INTO {schema}.{table} ({columns}) SELECT {columns} FROM {source}.{table};
ALTER TABLE {schema}.{table} ENABLE TRIGGER USER
"""
# IF NOT EXISTS is not safe against concurrent migrations; a lock is.
LOCK_SCHEMA = "SELECT pg_advisory_xact_lock(hashtextextended('flowstore:' || $1, 0))"
SET_WRITABLE = "SET TRANSACTION READ WRITE"
LIST_TABLES = "SELECT tablename FROM pg_tables WHERE schemaname = $1 ORDER BY tablename"
NO_TIMEOUT = "SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0"
# The script does not rely on the defaults of the role or the database. It takes the same lock as a store that
# migrates the schema while it opens.
SCRIPT = f"""BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE;
{NO_TIMEOUT};
SET LOCAL search_path = pg_catalog, pg_temp;
{{}};
{{}}
{{}}
{{}};
COMMIT;
"""
ENABLE_SEARCH = "SELECT {schema}.enable_search()"
INDEX_TEXTS = "SELECT {schema}.index_texts()"
DROP_INDEX = "DROP INDEX IF EXISTS {schema}.run_texts_by_trigram"
SERVER_ENCODING = "SHOW server_encoding"


def quote_text(text: str) -> str:
    """A string constant that does not depend on standard_conforming_strings."""
    return "E'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """One numbered .sql file, with ``{schema}`` as the placeholder of the schema's quoted name."""

    number: int
    name: str
    works_from: int
    """The schema version of the oldest code that works on the schema after this migration."""
    sql: str

    @property
    def record(self) -> str:
        """The statement that records the migration."""
        values = f"({self.number}, '{self.name}', {self.works_from})"
        return RECORD_VERSION.replace("($1, $2, $3)", values)


@functools.cache
def read_migrations() -> tuple[Migration, ...]:
    """Every migration, by number. The first line of a file is ``-- works_from: N``."""
    found = []
    for entry in files("flowstore_postgres").joinpath("migrations").iterdir():
        text = entry.read_text(encoding="utf-8")
        named = re.fullmatch(r"(\d{4})_(\w+)\.sql", entry.name)
        head = re.match(r"-- works_from: (\d+)\n", text)
        if named is None or head is None:
            raise ConfigurationError(f"{entry.name} is not a migration: flowstore is badly installed")
        number, works_from = int(named[1]), int(head[1])
        found.append(Migration(number=number, name=named[2], works_from=works_from, sql=text))
    return tuple(sorted(found, key=lambda migration: migration.number))


def migration_scripts(config: StoreConfig) -> Sequence[tuple[int, str, str]]:
    """Every migration as (number, name, a script that applies and records it)."""
    settings = read_settings(config)
    lock = LOCK_SCHEMA.replace("$1", quote_text(settings.schema))
    scripts = []
    for one in read_migrations():
        prepare = f"CREATE SCHEMA IF NOT EXISTS {{schema}};{CREATE_VERSION_TABLE};" if one.number == 1 else ""
        parts = (part.replace("{schema}", settings.quoted_schema) for part in (prepare, one.sql, one.record))
        script = SCRIPT.format(lock, *parts)
        scripts.append((one.number, one.name, script))
    return scripts


async def read_version(connection: Any, settings: Settings) -> tuple[int, int]:
    """The schema's version, and the lowest code version that works on it; (0, 0) without a schema."""
    if not await connection.fetchval(VERSION_TABLE_EXISTS, settings.schema):
        return 0, 0
    row = await connection.fetchrow(READ_VERSION.replace("{schema}", settings.quoted_schema))
    return (0, 0) if row is None else (row["version"], row["works_from"])


async def check_schema(connection: Any, settings: Settings, *, migrate: bool) -> int:
    """Check that this code works on the schema, and migrate it if allowed. Returns the schema's version.

    Raises SchemaVersionError, without any change, for a newer schema, or for an older one with migrate=False.
    """
    needed = read_migrations()[-1].number
    found, works_from = await read_version(connection, settings)
    if works_from > needed:
        raise SchemaVersionError(found, needed, "install a newer flowstore")
    if found >= needed:
        return found
    if not migrate:
        raise SchemaVersionError(found, needed, "run: flowstore migrate up (with a role that may)")
    async with pinned_transaction(connection):
        return await _apply(connection, settings, needed)


@asynccontextmanager
async def pinned_transaction(connection: Any) -> AsyncIterator[None]:
    """A writable transaction at READ COMMITTED, independent of the session's defaults.

    A statement after a wait for a lock must see the commits made during the wait.
    """
    async with connection.transaction(isolation="read_committed"):
        try:
            await connection.execute(SET_WRITABLE)
        except asyncpg.FeatureNotSupportedError:
            # Raised only by a replica.
            raise describe(asyncpg.ReadOnlySQLTransactionError()) from None
        yield


async def _apply(connection: Any, settings: Settings, needed: int) -> int:
    schema = settings.quoted_schema
    if await connection.fetchval(SERVER_ENCODING) != "UTF8":
        raise ConfigurationError("the database must have encoding UTF8; create one with: createdb -E UTF8")
    # Migrating a large database takes long.
    await connection.execute(NO_TIMEOUT)
    await connection.fetchval(LOCK_SCHEMA, settings.schema)
    # Another process may have migrated during the wait for the lock.
    found, works_from = await read_version(connection, settings)
    if works_from > needed:
        raise SchemaVersionError(found, needed, "install a newer flowstore")
    if not await connection.fetchval(SCHEMA_EXISTS, settings.schema):
        await connection.execute(f"CREATE SCHEMA {schema}")
    if not found:
        await connection.execute(CREATE_VERSION_TABLE.replace("{schema}", schema))
    for one in read_migrations():
        if found < one.number <= needed:
            # One round trip, because a new store applies all migrations.
            await connection.execute(f"{one.sql}\n{one.record}".replace("{schema}", schema))
            log.info(
                "applied migration %04d %s to schema %s",
                one.number,
                one.name,
                settings.schema,
                extra={"flowstore.schema_version": one.number, "flowstore.schema": settings.schema},
            )
    return max(found, needed)


@asynccontextmanager
async def _connect(config: StoreConfig) -> AsyncIterator[tuple[Any, Settings]]:
    settings = read_settings(config)
    with map_errors():
        connection = await settings.hosts.connect(**settings.connect_arguments)
        try:
            yield connection, settings
        finally:
            await connection.close(timeout=CLOSE_SECONDS)


async def read_schema_version(config: StoreConfig) -> int:
    async with _connect(config) as (connection, settings):
        return (await read_version(connection, settings))[0]


async def migrate_schema(config: StoreConfig) -> int:
    """Apply the missing migrations, and index the runs for searches if pg_trgm is installed."""
    async with _connect(config) as (connection, settings):
        version = await check_schema(connection, settings, migrate=True)

        def sql(statement: str) -> str:
            return statement.replace("{schema}", settings.quoted_schema)

        # pg_trgm may have been installed since the last migration.
        async with pinned_transaction(connection):
            await connection.execute(NO_TIMEOUT)
            enabled = await connection.fetchval(sql(ENABLE_SEARCH))
        if enabled:
            if await connection.fetchval(sql(COUNT_UNINDEXED)) == REINDEX_THRESHOLD:
                # Much faster without the index, which is built at the end. Searches stay correct meanwhile.
                async with pinned_transaction(connection):
                    await connection.execute(sql(DROP_INDEX))
            indexed = 1
            while indexed:
                async with pinned_transaction(connection):
                    indexed = await connection.fetchval(sql(INDEX_RUNS), INDEX_BATCH)
            async with pinned_transaction(connection):
                await connection.execute(NO_TIMEOUT)
                await connection.execute(sql(INDEX_TEXTS))
        return version


async def has_search_index(config: StoreConfig) -> bool:
    async with _connect(config) as (connection, settings):
        statement = HAS_INDEX.replace("{schema}", settings.quoted_schema)
        return bool(await connection.fetchval(statement))


def _config_of(url: str) -> StoreConfig:
    return StoreConfig.from_url(url)


@asynccontextmanager
async def adjust_version(url: str, difference: int) -> AsyncIterator[None]:
    """See SchemaVersionAdjustable."""
    newest = read_migrations()[-1]
    newer = newest.number + 1
    config = _config_of(url)
    row = (newer, "newer", newer) if difference > 0 else (newest.number, newest.name, newest.works_from)

    async def change(*, adds: bool) -> None:
        async with _connect(config) as (connection, settings), pinned_transaction(connection):
            statement = RESTORE_VERSION if adds else DELETE_VERSION
            values = row if adds else row[:1]
            await connection.execute(statement.replace("{schema}", settings.quoted_schema), *values)

    await change(adds=difference > 0)
    try:
        yield
    finally:
        await change(adds=difference < 0)


async def revert_schema(url: str, version: int) -> None:
    """See SchemaRevertible."""
    config = _config_of(url)
    async with _connect(config) as (connection, settings), pinned_transaction(connection):
        target, source = settings.quoted_schema, quote_identifier(f"{settings.schema}_newest")
        await connection.execute(f"ALTER SCHEMA {target} RENAME TO {source}")
        await _apply(connection, settings, version)
        for table, columns in await connection.fetch(COMMON_COLUMNS, target, source):
            parts = {"schema": target, "source": source, "table": table, "columns": columns}
            await connection.execute(COPY_TABLE.format_map(parts))
        await connection.execute(f"DROP SCHEMA {source} CASCADE")


@asynccontextmanager
async def lock_rows(url: str) -> AsyncIterator[None]:
    """Lock every row of a schema; see OutageInjector."""
    async with _connect(_config_of(url)) as (connection, settings), pinned_transaction(connection):
        for row in await connection.fetch(LIST_TABLES, settings.schema):
            table = f"{settings.quoted_schema}.{quote_identifier(row[0])}"
            await connection.execute(f"SELECT FROM {table} FOR UPDATE")
        yield


@asynccontextmanager
async def scratch_schema(url: str) -> AsyncIterator[str]:
    """Create an empty schema in the URL's database, yield its URL, and drop it at the end."""
    name = f"flowstore_scratch_{secrets.token_hex(8)}"
    parts = parse_url(url)
    fresh = parts.with_more_options({"schema": name})
    config = _config_of(fresh)
    async with _connect(config) as (connection, settings), pinned_transaction(connection):
        # Without IF NOT EXISTS, so that an existing schema is never dropped.
        await connection.execute(f"CREATE SCHEMA {settings.quoted_schema}")
    try:
        yield fresh
    finally:
        async with _connect(config) as (connection, settings), pinned_transaction(connection):
            await connection.execute(f"DROP SCHEMA {settings.quoted_schema} CASCADE")


async def clear_schema(url: str) -> None:
    """Delete every row of a scratch schema except the versions. Much faster than TRUNCATE for few rows."""
    async with _connect(_config_of(url)) as (connection, settings), pinned_transaction(connection):
        tables = [row[0] for row in await connection.fetch(LIST_TABLES, settings.schema)]
        deletions = [
            f"DELETE FROM {settings.quoted_schema}.{quote_identifier(table)}"
            for table in tables
            if table != "schema_version"
        ]
        # Twice, because the triggers of one table add rows to others.
        await connection.execute("; ".join(2 * deletions))
