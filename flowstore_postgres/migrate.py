"""Connection settings, and numbered migrations applied under a lock (CON-6)."""

from __future__ import annotations

import functools
import logging
import os
import re
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from inspect import signature
from types import MappingProxyType
from typing import Any
from urllib.parse import quote, urlencode

import asyncpg

from flowstore_core import ConfigurationError, SchemaVersionError, StoreConfig
from flowstore_core.urls import has_control_characters, parse_url
from flowstore_postgres.errors import describe, map_errors
from flowstore_postgres.hosts import Host, Hosts, read_hosts, read_ports
from flowstore_postgres.plugin import DRIVER_OPTIONS, DRIVER_VARIABLES, DRIVER_WORDS
from flowstore_postgres.sessions import PINNED

log = logging.getLogger("flowstore_postgres")

DEFAULT_SCHEMA = "flowstore"
_NAME = re.compile(r"[^\x00-\x1f\x7f-\x9f$\u2028\u2029\ud800-\udfff]+")
CLOSE_SECONDS = 5.0

# Not to_regclass(): it may answer from a cache that was filled before another process, for whose lock
# we waited, created the table.
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
# IF NOT EXISTS is not safe against others who do the same at the same moment; a lock is.
LOCK_SCHEMA = "SELECT pg_advisory_xact_lock(hashtextextended('flowstore:' || $1, 0))"
SET_WRITABLE = "SET TRANSACTION READ WRITE"
NO_TIMEOUT = "SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0"
# A script is run by any client, whose role or database may have other defaults. The lock is that of a store
# which migrates the same schema when it is opened.
SCRIPT = f"""BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE;
{NO_TIMEOUT};
SET LOCAL search_path = pg_catalog, pg_temp;
{{}};
{{}}
{{}}
{{}};
COMMIT;
"""
HAS_INDEX = """
SELECT EXISTS (SELECT FROM pg_catalog.pg_trigger WHERE tgname = 'search_ended'
               AND tgrelid = $name${schema}.runs$name$::regclass) AS indexed
"""
ENABLE_SEARCH = "SELECT {schema}.enable_search()"
INDEX_TEXTS = "SELECT {schema}.index_texts()"
DROP_INDEX = "DROP INDEX IF EXISTS {schema}.run_texts_by_trigram"
MANY = 20_000
COUNT_UNSEARCHED = f"SELECT count(*) FROM (SELECT FROM {{schema}}.unsearched LIMIT {MANY}) few"
GATHER_TEXTS = "SELECT {schema}.gather_texts($1)"
GATHERED = 256
"""How many ended runs one transaction adds to the index for searches."""
SERVER_ENCODING = "SHOW server_encoding"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the URL and the options say."""

    schema: str
    pool_size: int
    acquire_timeout: float
    statement_timeout: float
    retry_timeout: float
    pgbouncer: bool
    hosts: Hosts = field(repr=False)
    connect_arguments: dict[str, Any] = field(repr=False)
    """What ``hosts.connect`` needs."""

    @property
    def quoted_schema(self) -> str:
        return quote_identifier(self.schema)

    @property
    def client_timeout(self) -> float:
        """A little longer than the server's own, which gives the clearer answer."""
        return self.statement_timeout + 0.5


def read_connection_settings(config: StoreConfig) -> Settings:
    """Check the options and turn libpq's into arguments for the driver."""
    _check_tls_files(config)
    hosts = read_hosts(config.url, config.options)
    statement_timeout = config.seconds("statement_timeout", 30.0, 0.1, 3600.0)
    pgbouncer = config.flag("pgbouncer", False)
    arguments: dict[str, Any] = {
        **_driver_arguments(config, hosts),
        "timeout": config.seconds("connect_timeout", 10.0, 0.1, 600.0),
    }
    if len(hosts) > 1 and "target_session_attrs" not in config.options:
        # One of them takes writes; the others are its standbys, which answer with the past.
        arguments["target_session_attrs"] = os.environ.get("PGTARGETSESSIONATTRS") or "read-write"
    if pgbouncer:
        # In transaction mode statements of one session meet different servers.
        arguments["statement_cache_size"] = 0
    else:
        milliseconds = str(int(statement_timeout * 1000))
        arguments["server_settings"] = {
            "application_name": str(config.options.get("application_name", "flowstore")),
            "statement_timeout": milliseconds,
            # Bounds how long a transaction of a vanished client can hold its locks.
            "idle_in_transaction_session_timeout": milliseconds,
            **PINNED,
        }
    return Settings(
        schema=_check_schema_name(config.text("schema", DEFAULT_SCHEMA)),
        pool_size=config.integer("pool_size", 5, 1, 1000),
        acquire_timeout=config.seconds("acquire_timeout", 10.0, 0.01, 600.0),
        statement_timeout=statement_timeout,
        retry_timeout=config.seconds("retry_timeout", 15.0, 0.0, 3600.0),
        pgbouncer=pgbouncer,
        hosts=Hosts(hosts),
        connect_arguments=arguments,
    )


def _driver_arguments(config: StoreConfig, hosts: Sequence[Host]) -> dict[str, Any]:
    """The driver's arguments; an option has precedence over the same thing in the front of the URL.

    The driver never parses the user's URL: it gets decoded parts. Options for which it has no argument, those
    for TLS above all, are in the query of a URL that is made here.
    """
    url = config.parts
    given = {k: str(v) for k, v in config.options.items() if k in DRIVER_OPTIONS - {"application_name"}}
    given.update({name: config.choice(name, "", DRIVER_WORDS[name]) for name in DRIVER_WORDS.keys() & given})
    user, password, database, dbname, _, port, servicefile = (
        given.pop(name, "")
        for name in ("user", "password", "database", "dbname", "host", "port", "servicefile")
    )
    arguments: dict[str, Any] = {
        "user": user or url.user,
        "password": password or url.password,
        "database": dbname or database or url.path,
        "servicefile": servicefile,
    }
    if (servicefile or "service" in given) and "servicefile" not in signature(asyncpg.connect).parameters:
        raise ConfigurationError("options service and servicefile need asyncpg 0.31 or newer")
    _check_texts({**given, **arguments, "host": ",".join(host for host, _ in hosts)})
    # The hosts have their ports.
    arguments["port"] = read_ports(port) if not hosts else None
    query = urlencode(given, quote_via=quote, errors="surrogatepass")
    return {"dsn": f"postgresql://?{query}", **{name: value for name, value in arguments.items() if value}}


def _check_texts(given: Mapping[str, str]) -> None:
    """Refuse control characters, such as the line end of a mounted secret, that the server would not find."""
    for name, value in given.items():
        if has_control_characters(value):
            raise ConfigurationError(f"option {name} must not contain control characters, such as a line end")
    for variable, name in DRIVER_VARIABLES.items():
        if not given.get(name) and has_control_characters(os.environ.get(variable, "")):
            raise ConfigurationError(
                f"environment variable {variable} must not contain control characters, such as a line end"
            )


def _check_tls_files(config: StoreConfig) -> None:
    """Say which file cannot be read; the driver would only say that something was not found."""
    for option in ("sslrootcert", "sslcert", "sslkey", "sslcrl"):
        for origin, name in (
            (f"option {option}", config.options.get(option)),
            (f"PG{option.upper()}", os.environ.get(f"PG{option.upper()}")),
        ):
            if not isinstance(name, str) or not name or (option == "sslrootcert" and name == "system"):
                continue
            problem = None
            try:
                with open(name, "rb"):
                    pass
            except (OSError, ValueError) as error:
                problem = getattr(error, "strerror", None) or "not a file name"
            if problem:
                raise ConfigurationError(f"the file that {origin} names cannot be read: {problem}")
            break


def _check_schema_name(name: str) -> str:
    # Quoted, anything would do; but the functions of the schema are written between dollar signs.
    size = len(name.encode(errors="surrogatepass"))
    if size > 63 or name.startswith("pg_") or name == "information_schema" or not _NAME.fullmatch(name):
        raise ConfigurationError(
            "option schema must have 1 to 63 bytes of UTF-8, no control characters, no dollar sign, and not "
            "be one of the server's own (pg_..., information_schema)"
        )
    return name


def quote_identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def quote_text(text: str) -> str:
    """A string constant, whatever standard_conforming_strings is."""
    return "E'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """One numbered .sql file; ``{schema}`` in it stands for the schema's quoted name."""

    number: int
    name: str
    works_from: int
    """The version of the oldest code that can still work on the schema once this is applied."""
    sql: str


@functools.cache
def read_migrations() -> tuple[Migration, ...]:
    """Every migration by number. A file's first line says ``-- works_from: N``."""
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
    settings = read_connection_settings(config)
    lock = LOCK_SCHEMA.replace("$1", quote_text(settings.schema))
    scripts = []
    for one in read_migrations():
        prepare = f"CREATE SCHEMA IF NOT EXISTS {{schema}};{CREATE_VERSION_TABLE};" if one.number == 1 else ""
        values = f"({one.number}, '{one.name}', {one.works_from})"
        record = RECORD_VERSION.replace("($1, $2, $3)", values)
        parts = (part.replace("{schema}", settings.quoted_schema) for part in (prepare, one.sql, record))
        script = SCRIPT.format(lock, *parts)
        scripts.append((one.number, one.name, script))
    return scripts


async def read_version(connection: Any, settings: Settings) -> tuple[int, int]:
    """The schema's version and the lowest code version that can work on it; (0, 0) without one."""
    if not await connection.fetchval(VERSION_TABLE_EXISTS, settings.schema):
        return 0, 0
    row = await connection.fetchrow(READ_VERSION.replace("{schema}", settings.quoted_schema))
    return (0, 0) if row is None else (row["version"], row["works_from"])


async def check_schema(connection: Any, settings: Settings, *, migrate: bool) -> int:
    """Make sure that this code can work on the schema, migrating it where allowed.

    Raises SchemaVersionError, leaving everything untouched, for a newer schema, or for an older one
    with migrate=False.
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
    """A transaction at READ COMMITTED that may write, whatever the defaults of the session.

    Statements that follow a wait for a lock must see what was committed meanwhile.
    """
    async with connection.transaction(isolation="read_committed"):
        try:
            await connection.execute(SET_WRITABLE)
        except asyncpg.FeatureNotSupportedError:
            # Only a replica refuses it.
            raise describe(asyncpg.ReadOnlySQLTransactionError()) from None
        yield


async def _apply(connection: Any, settings: Settings, needed: int) -> int:
    schema = settings.quoted_schema
    if await connection.fetchval(SERVER_ENCODING) != "UTF8":
        raise ConfigurationError("the database must have encoding UTF8; create one with: createdb -E UTF8")
    # Bringing a large database up takes its time.
    await connection.execute(NO_TIMEOUT)
    await connection.fetchval(LOCK_SCHEMA, settings.schema)
    # Others may have migrated while we waited for the lock.
    found, works_from = await read_version(connection, settings)
    if works_from > needed:
        raise SchemaVersionError(found, needed, "install a newer flowstore")
    if not await connection.fetchval(SCHEMA_EXISTS, settings.schema):
        await connection.execute(f"CREATE SCHEMA {schema}")
    if not found:
        await connection.execute(CREATE_VERSION_TABLE.replace("{schema}", schema))
    record = RECORD_VERSION.replace("{schema}", schema)
    for one in read_migrations():
        if one.number > found:
            await connection.execute(one.sql.replace("{schema}", schema))
            await connection.execute(record, one.number, one.name, one.works_from)
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
    settings = read_connection_settings(config)
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
    """Apply what is missing, and make searches as quick as the server allows."""
    async with _connect(config) as (connection, settings):
        version = await check_schema(connection, settings, migrate=True)

        def sql(statement: str) -> str:
            return statement.replace("{schema}", settings.quoted_schema)

        # An index that could not be made before: pg_trgm may have been installed since.
        async with pinned_transaction(connection):
            await connection.execute(NO_TIMEOUT)
            enabled = await connection.fetchval(sql(ENABLE_SEARCH))
        if enabled:
            if await connection.fetchval(sql(COUNT_UNSEARCHED)) == MANY:
                # Much quicker without the index, which is built at the end; searches are right meanwhile.
                async with pinned_transaction(connection):
                    await connection.execute(sql(DROP_INDEX))
            gathered = 1
            while gathered:
                async with pinned_transaction(connection):
                    gathered = await connection.fetchval(sql(GATHER_TEXTS), GATHERED)
            async with pinned_transaction(connection):
                await connection.execute(NO_TIMEOUT)
                await connection.execute(sql(INDEX_TEXTS))
        return version


async def has_search_index(config: StoreConfig) -> bool:
    async with _connect(config) as (connection, settings):
        statement = HAS_INDEX.replace("{schema}", settings.quoted_schema)
        return bool(await connection.fetchval(statement))


@asynccontextmanager
async def scratch_schema(url: str) -> AsyncIterator[str]:
    """A new schema of our own making beside the URL's, dropped at the end; yields its URL."""
    name = f"flowstore_scratch_{secrets.token_hex(8)}"
    parts = parse_url(url)
    options = {**parts.options, "schema": name}
    fresh = parts.with_options(options)
    config = StoreConfig(
        url=fresh,
        scheme=parts.scheme,
        options=MappingProxyType(dict(options)),
        clock=None,
        migrate=True,
    )
    async with _connect(config) as (connection, settings), pinned_transaction(connection):
        # No IF NOT EXISTS: a schema that exists is somebody's, and is never taken over.
        await connection.execute(f"CREATE SCHEMA {settings.quoted_schema}")
    try:
        yield fresh
    finally:
        async with _connect(config) as (connection, settings), pinned_transaction(connection):
            await connection.execute(f"DROP SCHEMA {settings.quoted_schema} CASCADE")
