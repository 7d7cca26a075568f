"""Checks and corrections of the counters of migration 2 against the stored runs.

A counter is the sum over run_counts or run_days and run_changes. Writers change it together with the run, and
folding does not change it, so its error is the same in every snapshot. The difference that one snapshot
shows can therefore be added during concurrent writes, without locking their rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flowstore_core.diagnostics import Diagnostic, Severity, wrong_counters
from flowstore_postgres.migrate import NO_TIMEOUT, pinned_transaction
from flowstore_postgres.settings import Settings

MIN_SCHEMA_VERSION = 7
"""The first schema version that ignores loaded sums and uses the lock below."""
MAX_UNFOLDED = 10_000
"""Normal writers leave some 400 rows of run_changes unfolded; only a bulk load leaves more than this."""

# changes has no correct value, but timeseries omit a day of stored runs whose changes are not positive.
DIFFERENCES = """
WITH counts AS MATERIALIZED (
    SELECT flow_id, sum(running)::bigint AS running, sum(succeeded)::bigint AS succeeded,
           sum(failed)::bigint AS failed, sum(cancelled)::bigint AS cancelled
    FROM (
        SELECT flow_id, count(*) FILTER (WHERE status = 'Running') AS running,
               count(*) FILTER (WHERE status = 'Succeeded') AS succeeded,
               count(*) FILTER (WHERE status = 'Failed') AS failed,
               count(*) FILTER (WHERE status = 'Cancelled') AS cancelled
        FROM {schema}.runs GROUP BY flow_id
        UNION ALL
        SELECT flow_id, -running, -succeeded, -failed, -cancelled FROM {schema}.run_counts
        UNION ALL
        SELECT flow_id, CASE status WHEN 'Running' THEN -amount ELSE 0 END,
               CASE status WHEN 'Succeeded' THEN -amount ELSE 0 END,
               CASE status WHEN 'Failed' THEN -amount ELSE 0 END,
               CASE status WHEN 'Cancelled' THEN -amount ELSE 0 END
        FROM {schema}.run_changes
    ) numbers GROUP BY flow_id
    HAVING sum(running) <> 0 OR sum(succeeded) <> 0 OR sum(failed) <> 0 OR sum(cancelled) <> 0
), days AS MATERIALIZED (
    SELECT day, sum(succeeded)::bigint AS succeeded, sum(failed)::bigint AS failed,
           greatest(1, 1 - sum(changes))::bigint AS changes
    FROM (
        SELECT (completed_at AT TIME ZONE 'UTC')::date AS day,
               count(*) FILTER (WHERE status = 'Succeeded') AS succeeded,
               count(*) FILTER (WHERE status = 'Failed') AS failed, 0 AS started, 0 AS changes
        FROM {schema}.runs WHERE completed_at IS NOT NULL GROUP BY 1
        UNION ALL
        SELECT (started_at AT TIME ZONE 'UTC')::date, 0, 0, count(*), 0 FROM {schema}.runs GROUP BY 1
        UNION ALL
        SELECT day, -succeeded, -failed, 0, changes FROM {schema}.run_days
        UNION ALL
        SELECT started_on, 0, 0, 0, 1 FROM {schema}.run_changes
        UNION ALL
        SELECT completed_on, CASE status WHEN 'Succeeded' THEN -amount ELSE 0 END,
               CASE status WHEN 'Failed' THEN -amount ELSE 0 END, 0, 0
        FROM {schema}.run_changes WHERE completed_on IS NOT NULL
    ) numbers GROUP BY day
    HAVING sum(succeeded) <> 0 OR sum(failed) <> 0 OR (sum(started) > 0 AND sum(changes) <= 0)
)
"""
COUNT_DIFFERENCES = f"""
{DIFFERENCES}
SELECT (SELECT count(*) FROM counts) AS flows, (SELECT count(*) FROM days) AS days
"""
# The lock of fold_run_changes(): while it is held, nothing else writes to run_counts and run_days.
LOCK_FOLDING = """
SELECT pg_advisory_xact_lock(hashtextextended('run_changes', $name${schema}$name$::regnamespace::oid::bigint))
"""
# The triggers that ignore loaded rows accept rows of a transaction with this setting.
MARK_FOLDING = "SELECT set_config('flowstore.folding', 'on', true)"
ADD_DIFFERENCES = f"""
{DIFFERENCES}, counted AS (
    INSERT INTO {{schema}}.run_counts AS c (flow_id, running, succeeded, failed, cancelled)
    SELECT flow_id, running, succeeded, failed, cancelled FROM counts
    ON CONFLICT (flow_id) DO UPDATE SET running = c.running + excluded.running,
        succeeded = c.succeeded + excluded.succeeded, failed = c.failed + excluded.failed,
        cancelled = c.cancelled + excluded.cancelled
), dated AS (
    INSERT INTO {{schema}}.run_days AS d (day, succeeded, failed, changes)
    SELECT day, succeeded, failed, changes FROM days
    ON CONFLICT (day) DO UPDATE SET succeeded = d.succeeded + excluded.succeeded,
        failed = d.failed + excluded.failed, changes = d.changes + excluded.changes
)
SELECT (SELECT count(*) FROM counts) AS flows, (SELECT count(*) FROM days) AS days
"""
DELETE_EMPTY_COUNTS = """
DELETE FROM {schema}.run_counts WHERE running = 0 AND succeeded = 0 AND failed = 0 AND cancelled = 0
"""
# The cause of the wrong counters may affect summaries too. They are computed again on demand.
DELETE_SUMMARIES = "DELETE FROM {schema}.run_summaries"

COUNT_UNFOLDED = f"SELECT count(*) FROM (SELECT FROM {{schema}}.run_changes LIMIT {MAX_UNFOLDED + 1}) few"
FOLD = "SELECT {schema}.fold_run_changes()"


async def compare(connection: Any, settings: Settings) -> Sequence[Diagnostic]:
    """Compare the counters with the stored runs, in one snapshot."""
    row = await connection.fetchrow(_sql(COUNT_DIFFERENCES, settings))
    return wrong_counters(row["flows"], row["days"])


async def find_unfolded(connection: Any, settings: Settings) -> Sequence[Diagnostic]:
    """Report changes of runs that were not folded."""
    if await connection.fetchval(_sql(COUNT_UNFOLDED, settings)) <= MAX_UNFOLDED:
        return ()
    return (
        Diagnostic(
            code="changes-unfolded",
            severity=Severity.WARNING,
            summary=f"more than {MAX_UNFOLDED:,} rows of table run_changes are not folded into the counters",
            meaning="Counts are right, but every page and every statistic reads these rows. After a bulk "
            "load writers fold them. Otherwise folding fails, for a reason that is in the server's log, or a "
            "transaction that has folded is still open.",
            remedy="flowstore doctor --fix",
            fix="fold table run_changes into the counters",
        ),
    )


async def correct(connection: Any, settings: Settings) -> str:
    """Add the differences to the counters, in one transaction."""
    async with pinned_transaction(connection):
        await connection.execute(_sql(LOCK_FOLDING, settings))
        await connection.execute(NO_TIMEOUT)
        await connection.execute(MARK_FOLDING)
        row = await connection.fetchrow(_sql(ADD_DIFFERENCES, settings))
        await connection.execute(_sql(DELETE_EMPTY_COUNTS, settings))
        await connection.execute(_sql(DELETE_SUMMARIES, settings))
    return f"corrected the counters of {row['flows']:,} flows and {row['days']:,} days"


async def fold(connection: Any, settings: Settings) -> str:
    """Fold until nothing is left, or until another session folds."""
    folded, number = 0, 1
    while number:
        async with pinned_transaction(connection):
            number = await connection.fetchval(_sql(FOLD, settings))
        folded += number
    return f"folded {folded:,} rows of table run_changes into the counters"


def _sql(statement: str, settings: Settings) -> str:
    return statement.replace("{schema}", settings.quoted_schema)
