"""Compares the counters of migration 2 with the stored runs, and corrects them."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from flowstore_core.diagnostics import Diagnostic, wrong_counters

FIRST_VERSION = 2
"""The first schema version with counters."""

_DAY_OF = "({0} - (({0} % 86400000000) + 86400000000) % 86400000000) / 86400000000"
COUNT_FLOWS = """
SELECT COUNT(DISTINCT flow_id) FROM (
    SELECT flow_id FROM (
        SELECT flow_id, status, COUNT(*) AS amount FROM runs GROUP BY flow_id, status
        UNION ALL
        SELECT flow_id, status, -amount FROM run_counts
    ) GROUP BY flow_id, status HAVING SUM(amount) <> 0
)
"""
# changes has no expected value, but it must not be 0 on a day with runs: timeseries omit such a day.
WRONG_DAYS = f"""
SELECT day, SUM(succeeded) AS succeeded, SUM(failed) AS failed, MAX(1, 1 - SUM(changes)) AS changes FROM (
    SELECT {_DAY_OF.format("completed_at")} AS day, SUM(status = 'Succeeded') AS succeeded,
        SUM(status = 'Failed') AS failed, 0 AS started, 0 AS changes
    FROM runs WHERE completed_at IS NOT NULL GROUP BY 1
    UNION ALL
    SELECT {_DAY_OF.format("started_at")}, 0, 0, COUNT(*), 0 FROM runs GROUP BY 1
    UNION ALL
    SELECT day, -succeeded, -failed, 0, changes FROM run_days
) GROUP BY day HAVING SUM(succeeded) <> 0 OR SUM(failed) <> 0 OR (SUM(started) > 0 AND SUM(changes) <= 0)
"""
COUNT_DAYS = f"SELECT COUNT(*) FROM ({WRONG_DAYS})"
CORRECT_COUNTERS = (
    "DELETE FROM run_counts",
    "INSERT INTO run_counts (flow_id, status, amount) "
    "SELECT flow_id, status, COUNT(*) FROM runs GROUP BY flow_id, status",
    f"INSERT INTO run_days (day, succeeded, failed, changes) SELECT * FROM ({WRONG_DAYS}) WHERE TRUE "
    "ON CONFLICT (day) DO UPDATE SET succeeded = succeeded + excluded.succeeded, "
    "failed = failed + excluded.failed, changes = changes + excluded.changes",
    # Summaries may be wrong for the same reason. They are recomputed when needed.
    "DELETE FROM run_summaries",
)


def _count(db: sqlite3.Connection) -> tuple[int, int]:
    return db.execute(COUNT_FLOWS).fetchone()[0], db.execute(COUNT_DAYS).fetchone()[0]


def check_counters(db: sqlite3.Connection) -> Sequence[Diagnostic]:
    """Compare the counters with the runs, in the transaction of the caller."""
    return wrong_counters(*_count(db))


def correct_counters(db: sqlite3.Connection) -> str:
    """Recompute the counters from the runs. The caller holds the write lock."""
    flows, days = _count(db)
    for statement in CORRECT_COUNTERS:
        db.execute(statement)
    return f"corrected the counters of {flows:,} flows and {days:,} days"
