"""The checks of ``flowstore doctor`` on a PostgreSQL server: its settings, clock, rows, counters and queues.

``collect_facts`` reads the facts about the server; server_checks.py derives the findings. That takes two
connections and a few statements. The checks of rows can take long, so they have a time limit.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from functools import partial
from typing import Any

import asyncpg

from flowstore_core import ConfigurationError, StoreConfig, StoreUnavailableError
from flowstore_core.diagnostics import Diagnostic, Severity, orphaned_rows
from flowstore_core.retention import ORPHAN_GRACE
from flowstore_postgres import counters, queue_checks
from flowstore_postgres.errors import CONNECTION_LOST_ERRORS, describe, map_errors
from flowstore_postgres.failover import read_hosts
from flowstore_postgres.migrate import CLOSE_SECONDS, pinned_transaction, read_version
from flowstore_postgres.search import COUNT_UNINDEXED, REINDEX_THRESHOLD
from flowstore_postgres.server_checks import ServerFacts, ServerParameter, check_server
from flowstore_postgres.session_settings import PINNED
from flowstore_postgres.settings import Settings, read_settings
from flowstore_postgres.sql_placeholders import fill_in, in_microseconds

ROWS_SECONDS = 5.0
"""Time limit of all checks of rows together, unless thorough."""
MIN_CHECK_SECONDS = 0.1
"""Minimum time of each check."""
MAX_COUNTED = 10_000
"""Orphans are counted up to this number."""
FIX_BATCH = 1000

PARAMETERS = (
    *PINNED,
    "autovacuum",
    "fsync",
    "full_page_writes",
    "idle_in_transaction_session_timeout",
    "idle_session_timeout",
    "max_connections",
    "reserved_connections",
    "session_replication_role",
    "statement_timeout",
    "superuser_reserved_connections",
    "synchronous_commit",
    "synchronous_standby_names",
    "transaction_timeout",
)
READ_PARAMETERS = "SELECT name, setting, source FROM pg_catalog.pg_settings WHERE name = ANY($1::text[])"
READ_SERVER = """
SELECT pg_is_in_recovery() AS replica, current_setting('server_version_num')::int AS version,
       current_setting('server_version') AS version_text, current_user::text AS role,
       current_database()::text AS database,
       (SELECT rolconnlimit FROM pg_catalog.pg_roles WHERE rolname = current_user) AS role_limit,
       (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user) AS superuser,
       (SELECT datconnlimit FROM pg_catalog.pg_database WHERE datname = current_database()) AS database_limit,
       (SELECT count(*) FROM pg_catalog.pg_stat_activity
        WHERE datid IS NOT NULL AND coalesce(backend_type, 'client backend') = 'client backend'
          AND pid <> pg_backend_pid()) AS connections,
       (SELECT count(*) FROM pg_catalog.pg_stat_activity
        WHERE usename = current_user AND pid <> pg_backend_pid()) AS role_connections,
       (SELECT extract(epoch FROM max(clock_timestamp() - xact_start))
        FROM pg_catalog.pg_stat_activity
        WHERE datname = current_database() AND backend_type = 'client backend'
          AND pid <> pg_backend_pid())::float8 AS oldest_transaction
"""
READ_CLOCK = "SELECT clock_timestamp()"
READ_PID = "SELECT pg_backend_pid()"
SET_TIME_LIMIT = "SET LOCAL statement_timeout = {milliseconds}"

# Tables whose orphans cleanup deletes after a while (RET-4), and tables in which no call leaves orphans.
EXPIRED_TABLES = ("idempotency_keys", "controls")
ORPHAN_TABLES = {
    **dict.fromkeys(("steps", "attempts", "waiters", "deliveries", "outputs", "events"), 1),
    "buffered_signals": 11,
}
"""Each table with the schema version that created it."""
FIND_EXPIRED = f"""
SELECT run_id::text FROM {{schema}}.{{table}} o
WHERE created_at <= clock_timestamp() - $1::bigint * {{microsecond}}
  AND NOT EXISTS (SELECT FROM {{schema}}.runs r WHERE r.run_id = o.run_id) LIMIT {MAX_COUNTED}
"""
FIND_ORPHANS = f"""
SELECT run_id::text FROM {{schema}}.{{table}} o
WHERE NOT EXISTS (SELECT FROM {{schema}}.runs r WHERE r.run_id = o.run_id) LIMIT {MAX_COUNTED}
"""
# Skips a key that a concurrent trigger has locked. The statement checks each row again once it has the lock.
DELETE_EXPIRED = f"""
DELETE FROM {{schema}}.{{table}} d WHERE ctid = ANY(ARRAY(
    SELECT ctid FROM {{schema}}.{{table}} o
    WHERE created_at <= clock_timestamp() - $1::bigint * {{microsecond}}
      AND NOT EXISTS (SELECT FROM {{schema}}.runs r WHERE r.run_id = o.run_id)
    LIMIT {FIX_BATCH} FOR UPDATE SKIP LOCKED
)) AND NOT EXISTS (SELECT FROM {{schema}}.runs r WHERE r.run_id = d.run_id)
"""
# No second check: a run is written before these rows, so none of them can get a run later.
DELETE_ORPHANS = f"""
DELETE FROM {{schema}}.{{table}} d WHERE ctid = ANY(ARRAY(
    SELECT ctid FROM {{schema}}.{{table}} o
    WHERE NOT EXISTS (SELECT FROM {{schema}}.runs r WHERE r.run_id = o.run_id)
    LIMIT {FIX_BATCH} FOR UPDATE SKIP LOCKED
))
"""


@asynccontextmanager
async def _connect(settings: Settings, *, pinned: bool = True) -> AsyncIterator[Any]:
    """A connection. Unless ``pinned``, the defaults of the server, the database and the role apply to it."""
    arguments = dict(settings.connect_arguments)
    if not pinned:
        arguments.pop("server_settings", None)
    with map_errors():
        connection = await settings.hosts.connect(**arguments)
        try:
            yield connection
        finally:
            await connection.close(timeout=CLOSE_SECONDS)


async def diagnose(config: StoreConfig, *, thorough: bool) -> Sequence[Diagnostic]:
    """Every finding about the server and the schema. Changes nothing."""
    settings = read_settings(config)
    try:
        async with _connect(settings) as connection, _connect(settings, pinned=False) as second:
            facts = await collect_facts(connection, second, settings, config)
            found = list(check_server(facts))
            version, _ = await read_version(connection, settings)
            if version:
                found += await _check_rows(connection, settings, version, facts, thorough=thorough)
            if version >= queue_checks.MIN_SCHEMA_VERSION:
                found += [
                    one
                    async for one in queue_checks.find_unreachable_listener(
                        facts, connection, second, settings
                    )
                ]
            return found
    except (ConfigurationError, StoreUnavailableError) as error:
        if error.database_code == POOLER_REFUSES:
            return [_pooler_refuses_settings()]
        raise


POOLER_REFUSES = "08P01"
"""protocol_violation: the error of PgBouncer for an unknown setting in the startup packet."""


def _pooler_refuses_settings() -> Diagnostic:
    return Diagnostic(
        code="pooler-undeclared",
        severity=Severity.ERROR,
        summary="the server refuses the settings of a connection, as PgBouncer does",
        meaning="flowstore sets timeouts when it connects; a transaction pooler forbids that.",
        remedy="add pgbouncer=true to the URL's query",
    )


def local_time() -> float:
    """This machine's clock, in seconds since the epoch."""
    return time.time()


async def collect_facts(
    connection: Any, unpinned: Any, settings: Settings, config: StoreConfig
) -> ServerFacts:
    """Read the facts over two open connections; ``unpinned`` shows the defaults of the parameters."""
    rows = await unpinned.fetch(READ_PARAMETERS, list(PARAMETERS))
    server = await connection.fetchrow(READ_SERVER)
    skew, error = await _compare_clocks(connection)
    # Behind a transaction pooler, alternating statements of two connections may share a server process.
    pids = [await one.fetchval(READ_PID) for one in (connection, unpinned, connection, unpinned)]
    return ServerFacts(
        parameters={row["name"]: ServerParameter(row["setting"], row["source"]) for row in rows},
        replica=server["replica"],
        version=server["version"],
        version_text=server["version_text"],
        role=server["role"],
        database=server["database"],
        superuser=bool(server["superuser"]),
        role_limit=-1 if server["role_limit"] is None else server["role_limit"],
        database_limit=server["database_limit"],
        # Without the second connection of this check.
        connections=max(server["connections"] - 1, 0),
        connections_of_role=max(server["role_connections"] - 1, 0),
        oldest_transaction=server["oldest_transaction"],
        skew=skew,
        skew_error=error,
        pooled=len(set(pids)) < 2 or pids[0] != pids[2] or pids[1] != pids[3],
        pool_size=settings.pool_size,
        pgbouncer=settings.pgbouncer,
        psql_options=_psql_options(config, server["database"]),
    )


def _psql_options(config: StoreConfig, database: str) -> tuple[str, ...]:
    """The options of psql for the first host of the URL."""
    options: list[str] = []
    for host, port in read_hosts(config.url, config.options)[:1]:
        options += ["-h", host]
        if port is not None:
            options += ["-p", str(port)]
    return (*options, "-d", database)


async def _compare_clocks(connection: Any) -> tuple[float, float]:
    """The server's clock minus this machine's, and the error of that, in seconds; the best of three tries."""
    best = (0.0, float("inf"))
    for _ in range(3):
        began = local_time()
        now: datetime = await connection.fetchval(READ_CLOCK)
        ended = local_time()
        error = max(ended - began, 0.0) / 2
        if error < best[1]:
            best = (now.timestamp() - (began + ended) / 2, error)
    return best


Check = Callable[[Any, Settings], Awaitable[Sequence[Diagnostic]]]


async def _check_rows(
    connection: Any, settings: Settings, version: int, facts: ServerFacts, *, thorough: bool
) -> list[Diagnostic]:
    checks: list[tuple[str, Check]] = []
    if version >= queue_checks.MIN_SCHEMA_VERSION:
        checks.append(("pending", partial(queue_checks.find_dead_rows, facts)))
    if version >= counters.MIN_SCHEMA_VERSION:
        # In order of cost: the last reads an index of all runs.
        checks += [
            ("run_changes", counters.find_unfolded),
            ("unsearched", _find_unindexed),
            ("counters", counters.compare),
        ]
    tables = (*EXPIRED_TABLES, *(table for table, first in ORPHAN_TABLES.items() if version >= first))
    checks += [(table, partial(_find_orphans, table)) for table in tables]
    found: list[Diagnostic] = []
    unfinished: list[str] = []
    deadline = time.monotonic() + ROWS_SECONDS
    for name, check in checks:
        left = 0 if thorough else int(max(deadline - time.monotonic(), MIN_CHECK_SECONDS) * 1000)
        try:
            # At serializable, reading all rows of a table would make concurrent transactions fail.
            async with connection.transaction(isolation="read_committed", readonly=True):
                await connection.execute(SET_TIME_LIMIT.format(milliseconds=left))
                found += await check(connection, settings)
        except asyncpg.QueryCanceledError:
            unfinished.append(name)
    if unfinished:
        found.append(
            Diagnostic(
                code="rows-not-checked",
                severity=Severity.NOTE,
                summary=f"not all rows were checked: {', '.join(unfinished)}",
                meaning=f"The checks of rows were stopped after {ROWS_SECONDS:g} s.",
                remedy="flowstore doctor --thorough",
            )
        )
    return found


async def _find_unindexed(connection: Any, settings: Settings) -> Sequence[Diagnostic]:
    statement = COUNT_UNINDEXED.replace("{schema}", settings.quoted_schema)
    if await connection.fetchval(statement) < REINDEX_THRESHOLD:
        return ()
    return (
        Diagnostic(
            code="search-behind",
            severity=Severity.NOTE,
            summary=f"{REINDEX_THRESHOLD:,} or more ended runs are not in the index for searches",
            meaning="Every search reads them one by one. cleanup and flowstore migrate up add them to the "
            "index.",
            remedy="flowstore migrate up",
        ),
    )


async def _find_orphans(table: str, connection: Any, settings: Settings) -> Sequence[Diagnostic]:
    statement, arguments = _table_statement(table, FIND_EXPIRED, FIND_ORPHANS, settings)
    rows = await connection.fetch(statement, *arguments)
    if not rows:
        return ()
    return (
        orphaned_rows(
            table, [row[0] for row in rows], never_started=table in EXPIRED_TABLES, limit=MAX_COUNTED
        ),
    )


def _table_statement(
    table: str, expired: str, orphans: str, settings: Settings
) -> tuple[str, tuple[Any, ...]]:
    expires = table in EXPIRED_TABLES
    statement = fill_in(expired if expires else orphans, settings.quoted_schema)
    return statement.replace("{table}", table), (in_microseconds(ORPHAN_GRACE),) if expires else ()


async def fix(config: StoreConfig, findings: Sequence[Diagnostic]) -> Sequence[str]:
    """Delete orphans, fold changes and correct counters, as ``findings`` names them, during other writes."""
    settings = read_settings(config)
    reports = []
    async with _connect(settings) as connection:
        for finding in findings:
            table = finding.code.removeprefix("orphans-").replace("-", "_")
            try:
                if finding.code == "counters-wrong":
                    reports.append(await counters.correct(connection, settings))
                elif finding.code == "changes-unfolded":
                    reports.append(await counters.fold(connection, settings))
                elif table in (*EXPIRED_TABLES, *ORPHAN_TABLES):
                    reports.append(await _delete_orphans(table, connection, settings))
            except CONNECTION_LOST_ERRORS as error:
                raise describe(error) from None
    return reports


async def _delete_orphans(table: str, connection: Any, settings: Settings) -> str:
    statement, arguments = _table_statement(table, DELETE_EXPIRED, DELETE_ORPHANS, settings)
    deleted, number = 0, 1
    while number:
        # In small transactions, so that no writer waits long for a row.
        async with pinned_transaction(connection):
            number = int((await connection.execute(statement, *arguments)).rpartition(" ")[2])
        deleted += number
    return f"deleted {deleted:,} rows of table {table} that belonged to no run"
