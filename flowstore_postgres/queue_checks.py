"""The checks of ``flowstore doctor`` on queues: dead rows of table pending, and the listener."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any
from uuid import uuid4

import asyncpg

from flowstore_core.diagnostics import Diagnostic, Severity
from flowstore_postgres.server_checks import ServerFacts, connection_limits, psql
from flowstore_postgres.settings import Settings

MIN_SCHEMA_VERSION = 8
"""The schema version with table pending."""
MAX_DEAD_ROWS = 50_000
"""With so many dead rows a claim that reads past them took 9 ms instead of 0.5."""
MAX_DEAD_SECONDS = 600.0
"""Under load many rows are dead between two vacuums. A vacuum that is due for longer is prevented."""
MAX_HELD_TRANSACTIONS = 1_000_000
"""The same in transactions, for a session of another role, whose times only pg_read_all_stats may see."""
MAX_INDEX_BYTES = 256 << 20
MAX_BYTES_PER_ROW = 10_000
"""An index that exceeds both limits consists almost entirely of empty pages."""
NOTIFICATION_SECONDS = 10.0
"""The time in which a notification must arrive."""

READ_PENDING = """
SELECT n_live_tup AS live, n_dead_tup AS dead,
       pg_relation_size(to_regclass($2 || '.pending_by_time')) AS index_bytes,
       extract(epoch FROM clock_timestamp() - greatest(
           last_vacuum, last_autovacuum, pg_postmaster_start_time(),
           (SELECT applied_at FROM {schema}.schema_version WHERE version = $1)))::float8 AS unvacuumed_seconds
FROM pg_catalog.pg_stat_all_tables WHERE relid = to_regclass($2 || '.pending')
"""
# The session with the oldest snapshot or transaction of this database. A walsender has those of a standby.
READ_OLDEST_SNAPSHOT = """
SELECT pid, coalesce(nullif(application_name, ''), 'unnamed') AS application, usename AS role,
       coalesce(state, backend_type, 'state not visible') AS state,
       extract(epoch FROM clock_timestamp() - xact_start)::float8 AS seconds,
       greatest(age(backend_xmin), age(backend_xid)) AS transactions
FROM pg_catalog.pg_stat_activity
WHERE (datname = current_database() OR backend_type = 'walsender') AND pid <> pg_backend_pid()
  AND (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL)
ORDER BY transactions DESC LIMIT 1
"""
HAS_QUEUED_STEPS = """
SELECT EXISTS (SELECT FROM {schema}.pending)
       OR coalesce(pg_stat_get_tuples_inserted(to_regclass($1 || '.pending')), 0) > 0
"""
LIMIT_TIME = "SET LOCAL statement_timeout = 1000"


async def find_dead_rows(facts: ServerFacts, connection: Any, settings: Settings) -> Sequence[Diagnostic]:
    """Report dead rows that vacuum does not delete, and the cause; otherwise an index of empty pages."""
    schema = settings.quoted_schema
    pending = await connection.fetchrow(READ_PENDING.replace("{schema}", schema), MIN_SCHEMA_VERSION, schema)
    live, dead, index_bytes = pending["live"], pending["dead"], pending["index_bytes"]
    megabytes = f"{index_bytes / (1 << 20):,.0f} MB"
    if dead >= MAX_DEAD_ROWS:
        holder = await connection.fetchrow(READ_OLDEST_SNAPSHOT)
        examples: tuple[str, ...] = ()
        if holder is not None and _holds_back_vacuum(holder):
            reason = (
                f"Vacuum cannot delete them while session {holder['pid']} is in a transaction, for "
                f"{_held_for(holder)} so far (role {holder['role']}, application "
                f"{holder['application']}, {holder['state']})."
            )
            remedy = psql(facts, f"SELECT pg_terminate_backend({holder['pid']})")
            examples = (f"pid {holder['pid']}",)
        elif pending["unvacuumed_seconds"] >= MAX_DEAD_SECONDS:
            reason = f"The table has not been vacuumed for {_length(pending['unvacuumed_seconds'])}."
            remedy = psql(facts, f"VACUUM {schema}.pending")
        else:
            return ()
        return (
            Diagnostic(
                code="queue-bloated",
                severity=Severity.WARNING,
                summary=f"table pending has {dead:,} dead and {live:,} live rows; its index has {megabytes}",
                meaning="Every wait_for_steps reads past dead rows, and claim_next_steps does once a minute in each "
                f"store. {reason}",
                remedy=remedy,
                count=dead,
                examples=examples,
            ),
        )
    if index_bytes <= max(MAX_INDEX_BYTES, live * MAX_BYTES_PER_ROW):
        return ()
    return (
        Diagnostic(
            code="queue-index-large",
            severity=Severity.NOTE,
            summary=f"index pending_by_time has {megabytes} for {live:,} rows",
            meaning="It grew while dead rows could not be deleted, or with a long queue, and does not shrink "
            "by itself. Every vacuum reads all of it.",
            remedy=psql(facts, f"REINDEX INDEX CONCURRENTLY {schema}.pending_by_time"),
        ),
    )


async def find_unreachable_listener(
    facts: ServerFacts, connection: Any, second: Any, settings: Settings
) -> AsyncIterator[Diagnostic]:
    """Report obstacles between notifications and waiting calls, if steps are or were queued."""
    if not await _has_queued_steps(connection, settings):
        return
    if facts.pgbouncer:
        yield Diagnostic(
            code="watch-unavailable",
            severity=Severity.NOTE,
            summary="the store has queues, and with pgbouncer=true it cannot wait for their steps",
            meaning="A transaction pooler passes no notifications, so the store lacks capability WATCH. "
            "Workers at this URL have to poll claim_next_steps; a step waits for half of their pause on "
            "average.",
            remedy="give workers a URL of the server itself, without pgbouncer=true",
        )
        return
    if facts.replica or facts.pooled:
        # Other findings name the cause.
        return
    for one in connection_limits(facts):
        if one.limit >= 0 and one.free == facts.pool_size:
            yield Diagnostic(
                code="listener-refused",
                severity=Severity.WARNING,
                summary=f"pool_size is {facts.pool_size}, and {one.free} of {one.limit} connections are "
                "free: none is left for the listener",
                meaning=f"The limit is {one.name}. Waiting calls share one connection beside the pool; while "
                "it is refused, each of them reads the store every second instead of being woken.",
                remedy=f"{one.remedy}; or add pool_size={max(facts.pool_size - 1, 1)} to the URL's query",
            )
            break
    if not await _receives_notifications(connection, second):
        yield Diagnostic(
            code="notifications-lost",
            severity=Severity.WARNING,
            summary=f"LISTEN succeeded, and a notification did not arrive within {NOTIFICATION_SECONDS:g} s",
            meaning="A pooler or proxy between flowstore and the server drops notifications. New steps do "
            "not wake waiting calls; workers find them at the time-out.",
            remedy="give workers a URL of the server itself; if the URL leads to a transaction pooler, add "
            "pgbouncer=true to the URL's query",
        )


async def _has_queued_steps(connection: Any, settings: Settings) -> bool:
    """Whether steps are or were queued; False if the table is locked."""
    schema = settings.quoted_schema
    try:
        async with connection.transaction(isolation="read_committed", readonly=True):
            await connection.execute(LIMIT_TIME)
            return bool(await connection.fetchval(HAS_QUEUED_STEPS.replace("{schema}", schema), schema))
    except asyncpg.QueryCanceledError:
        return False


async def _receives_notifications(connection: Any, second: Any) -> bool:
    """Whether a notification of one connection reaches the other, on a channel that no store uses."""
    arrived = asyncio.Event()
    channel = f"flowstore_doctor_{uuid4().hex}"

    def listener(*notification: Any) -> None:
        arrived.set()

    await connection.add_listener(channel, listener)
    try:
        await second.execute("SELECT pg_notify($1, '')", channel)
        async with asyncio.timeout(NOTIFICATION_SECONDS):
            await arrived.wait()
    except TimeoutError:
        return False
    finally:
        await connection.remove_listener(channel, listener)
    return True


def _holds_back_vacuum(session: Any) -> bool:
    seconds: float | None = session["seconds"]
    if seconds is None:
        return bool(session["transactions"] >= MAX_HELD_TRANSACTIONS)
    return seconds >= MAX_DEAD_SECONDS


def _held_for(session: Any) -> str:
    seconds: float | None = session["seconds"]
    return f"{session['transactions']:,} transactions" if seconds is None else _length(seconds)


def _length(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"
