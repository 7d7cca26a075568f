"""What ``flowstore doctor`` learns of a PostgreSQL server: its settings, its clock, rows, counters.

``look`` reads facts; the functions of judgement.py turn them into findings. Two connections, a few
statements; only the checks of rows take long, so they are bounded by time.
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
from flowstore_postgres import counters
from flowstore_postgres.database import fill_in, in_microseconds
from flowstore_postgres.errors import LOST, describe, map_errors
from flowstore_postgres.hosts import read_hosts
from flowstore_postgres.judgement import Facts, Setting, judge
from flowstore_postgres.migrate import (
    CLOSE_SECONDS,
    COUNT_UNSEARCHED,
    MANY,
    Settings,
    pinned_transaction,
    read_connection_settings,
    read_version,
)
from flowstore_postgres.sessions import PINNED

ROWS_SECONDS = 5.0
"""How long the checks of rows may take together, unless thorough."""
LEAST_SECONDS = 0.1
"""What each check gets all the same."""
COUNTED = 10_000
"""As many orphans are counted at most."""
FIXED_AT_ONCE = 1000

WANTED = (
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
READ_SETTINGS = "SELECT name, setting, source FROM pg_catalog.pg_settings WHERE name = ANY($1::text[])"
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
        WHERE usename = current_user AND pid <> pg_backend_pid()) AS of_role,
       (SELECT extract(epoch FROM max(clock_timestamp() - xact_start))
        FROM pg_catalog.pg_stat_activity
        WHERE datname = current_database() AND backend_type = 'client backend'
          AND pid <> pg_backend_pid())::float8 AS oldest_transaction
"""
READ_CLOCK = "SELECT clock_timestamp()"
WHO_SERVES = "SELECT pg_backend_pid()"
LIMIT_TIME = "SET LOCAL statement_timeout = {milliseconds}"

# Those of which cleanup takes care by itself one day (RET-4), and those that no call can leave behind.
FORGOTTEN = ("idempotency_keys", "controls")
STRAYS = ("steps", "attempts", "waiters", "deliveries", "outputs", "events")
FIND_FORGOTTEN = f"""
SELECT run_id::text FROM {{schema}}.{{table}} o
WHERE created_at <= clock_timestamp() - $1::bigint * {{microsecond}}
  AND NOT EXISTS (SELECT FROM {{schema}}.runs r WHERE r.run_id = o.run_id) LIMIT {COUNTED}
"""
FIND_STRAYS = f"""
SELECT run_id::text FROM {{schema}}.{{table}} o
WHERE NOT EXISTS (SELECT FROM {{schema}}.runs r WHERE r.run_id = o.run_id) LIMIT {COUNTED}
"""
# A key that a trigger uses at this moment is locked by it; it is left alone. What is deleted is looked at
# again by the statement itself, once it has the lock.
DELETE_FORGOTTEN = f"""
DELETE FROM {{schema}}.{{table}} d WHERE ctid = ANY(ARRAY(
    SELECT ctid FROM {{schema}}.{{table}} o
    WHERE created_at <= clock_timestamp() - $1::bigint * {{microsecond}}
      AND NOT EXISTS (SELECT FROM {{schema}}.runs r WHERE r.run_id = o.run_id)
    LIMIT {FIXED_AT_ONCE} FOR UPDATE SKIP LOCKED
)) AND NOT EXISTS (SELECT FROM {{schema}}.runs r WHERE r.run_id = d.run_id)
"""
# Such a row cannot get a run any more: its run was there before it.
DELETE_STRAYS = f"""
DELETE FROM {{schema}}.{{table}} d WHERE ctid = ANY(ARRAY(
    SELECT ctid FROM {{schema}}.{{table}} o
    WHERE NOT EXISTS (SELECT FROM {{schema}}.runs r WHERE r.run_id = o.run_id)
    LIMIT {FIXED_AT_ONCE} FOR UPDATE SKIP LOCKED
))
"""


@asynccontextmanager
async def _connect(settings: Settings, *, pinned: bool = True) -> AsyncIterator[Any]:
    """A connection; unless ``pinned``, the defaults of the server, the database and the role hold on it."""
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
    """Every finding about the server and the schema; changes nothing."""
    settings = read_connection_settings(config)
    try:
        async with _connect(settings) as connection, _connect(settings, pinned=False) as second:
            facts = await look(connection, second, settings, config)
            found = list(judge(facts))
            version, _ = await read_version(connection, settings)
            if version:
                found += await _check_rows(connection, settings, version, thorough=thorough)
            return found
    except (ConfigurationError, StoreUnavailableError) as error:
        if error.database_code == POOLER_REFUSES:
            return [_refused_by_a_pooler()]
        raise


POOLER_REFUSES = "08P01"
"""protocol_violation: what PgBouncer answers to a setting that it does not know at the start."""


def _refused_by_a_pooler() -> Diagnostic:
    return Diagnostic(
        code="pooler-undeclared",
        severity=Severity.ERROR,
        summary="the server refuses the settings of a connection, as PgBouncer does",
        meaning="flowstore sets time-outs when it connects; a transaction pooler forbids that.",
        remedy="add pgbouncer=true to the URL's query",
    )


def local_time() -> float:
    """This machine's clock, in seconds since the epoch."""
    return time.time()


async def look(connection: Any, second: Any, settings: Settings, config: StoreConfig) -> Facts:
    """What the server says of itself, asked over two connections at once.

    The second shows the settings, so none should be pinned on it.
    """
    rows = await second.fetch(READ_SETTINGS, list(WANTED))
    server = await connection.fetchrow(READ_SERVER)
    skew, error = await _compare_clocks(connection)
    # Through a transaction pooler, two connections that take turns may meet one server process.
    served = [await one.fetchval(WHO_SERVES) for one in (connection, second, connection, second)]
    return Facts(
        settings={row["name"]: Setting(row["setting"], row["source"]) for row in rows},
        replica=server["replica"],
        version=server["version"],
        version_text=server["version_text"],
        role=server["role"],
        database=server["database"],
        superuser=bool(server["superuser"]),
        role_limit=-1 if server["role_limit"] is None else server["role_limit"],
        database_limit=server["database_limit"],
        # Less the second of our own.
        connections=max(server["connections"] - 1, 0),
        connections_of_role=max(server["of_role"] - 1, 0),
        oldest_transaction=server["oldest_transaction"],
        skew=skew,
        skew_error=error,
        pooled=len(set(served)) < 2 or served[0] != served[2] or served[1] != served[3],
        pool_size=settings.pool_size,
        pgbouncer=settings.pgbouncer,
        place=_place(config, server["database"]),
    )


def _place(config: StoreConfig, database: str) -> tuple[str, ...]:
    """psql's options for the first host of the URL."""
    place: list[str] = []
    for host, port in read_hosts(config.url, config.options)[:1]:
        place += ["-h", host]
        if port is not None:
            place += ["-p", str(port)]
    return (*place, "-d", database)


async def _compare_clocks(connection: Any) -> tuple[float, float]:
    """The server's clock minus ours in seconds, and how far off that may be: the best of three."""
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
    connection: Any, settings: Settings, version: int, *, thorough: bool
) -> list[Diagnostic]:
    checks: list[tuple[str, Check]] = []
    if version >= counters.SINCE:
        # The cheap ones first; the next reads an index of all runs.
        checks += [
            ("run_changes", counters.find_unfolded),
            ("unsearched", _find_unsearched),
            ("counters", counters.compare),
        ]
    checks += [(table, partial(_find_orphans, table)) for table in (*FORGOTTEN, *STRAYS)]
    found: list[Diagnostic] = []
    unfinished: list[str] = []
    until = time.monotonic() + ROWS_SECONDS
    for name, check in checks:
        left = 0 if thorough else int(max(until - time.monotonic(), LEAST_SECONDS) * 1000)
        try:
            # At serializable, reading all rows of a table would make transactions of others fail.
            async with connection.transaction(isolation="read_committed", readonly=True):
                await connection.execute(LIMIT_TIME.format(milliseconds=left))
                found += await check(connection, settings)
        except asyncpg.QueryCanceledError:
            unfinished.append(name)
    if unfinished:
        found.append(
            Diagnostic(
                code="rows-not-checked",
                severity=Severity.NOTE,
                summary=f"not all rows were looked at: {', '.join(unfinished)}",
                meaning=f"The checks of rows were stopped after {ROWS_SECONDS:g} s.",
                remedy="flowstore doctor --thorough",
            )
        )
    return found


async def _find_unsearched(connection: Any, settings: Settings) -> Sequence[Diagnostic]:
    statement = COUNT_UNSEARCHED.replace("{schema}", settings.quoted_schema)
    if await connection.fetchval(statement) < MANY:
        return ()
    return (
        Diagnostic(
            code="search-behind",
            severity=Severity.NOTE,
            summary=f"{MANY:,} or more ended runs are not in the index for searches",
            meaning="Every search reads them one by one. cleanup and flowstore migrate up add them to the "
            "index.",
            remedy="flowstore migrate up",
        ),
    )


async def _find_orphans(table: str, connection: Any, settings: Settings) -> Sequence[Diagnostic]:
    statement, arguments = _about(table, FIND_FORGOTTEN, FIND_STRAYS, settings)
    rows = await connection.fetch(statement, *arguments)
    if not rows:
        return ()
    return (orphaned_rows(table, [row[0] for row in rows], never_started=table in FORGOTTEN, limit=COUNTED),)


def _about(table: str, forgotten: str, strays: str, settings: Settings) -> tuple[str, tuple[Any, ...]]:
    old = table in FORGOTTEN
    statement = fill_in(forgotten if old else strays, settings.quoted_schema)
    return statement.replace("{table}", table), (in_microseconds(ORPHAN_GRACE),) if old else ()


async def fix(config: StoreConfig, findings: Sequence[Diagnostic]) -> Sequence[str]:
    """Delete orphans, fold changes and correct counters, as the findings say; safe while others write."""
    settings = read_connection_settings(config)
    done = []
    async with _connect(settings) as connection:
        for finding in findings:
            table = finding.code.removeprefix("orphans-").replace("-", "_")
            try:
                if finding.code == "counters-wrong":
                    done.append(await counters.correct(connection, settings))
                elif finding.code == "changes-unfolded":
                    done.append(await counters.fold(connection, settings))
                elif table in (*FORGOTTEN, *STRAYS):
                    done.append(await _delete_orphans(table, connection, settings))
            except LOST as error:
                raise describe(error) from None
    return done


async def _delete_orphans(table: str, connection: Any, settings: Settings) -> str:
    statement, arguments = _about(table, DELETE_FORGOTTEN, DELETE_STRAYS, settings)
    deleted, number = 0, 1
    while number:
        # Little by little, so that nobody waits long for a row.
        async with pinned_transaction(connection):
            number = int((await connection.execute(statement, *arguments)).rpartition(" ")[2])
        deleted += number
    return f"deleted {deleted:,} rows of table {table} that belonged to no run"
