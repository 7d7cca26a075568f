"""The sums of migration 2 compared with the runs that they count, and corrected."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from flowstore_core.diagnostics import Diagnostic, wrong_counters

FIRST_VERSION = 2
"""The version of the schema that has them."""

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
# changes has no right value, but a day on which a stored run started without any is left out of timeseries.
DAYS = f"""
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
COUNT_DAYS = f"SELECT COUNT(*) FROM ({DAYS})"
CORRECT = (
    "DELETE FROM run_counts",
    "INSERT INTO run_counts (flow_id, status, amount) "
    "SELECT flow_id, status, COUNT(*) FROM runs GROUP BY flow_id, status",
    f"INSERT INTO run_days (day, succeeded, failed, changes) SELECT * FROM ({DAYS}) WHERE TRUE "
    "ON CONFLICT (day) DO UPDATE SET succeeded = succeeded + excluded.succeeded, "
    "failed = failed + excluded.failed, changes = changes + excluded.changes",
    # What made the sums wrong may have made these wrong too. They are computed again when they are asked for.
    "DELETE FROM run_summaries",
)


def _count(db: sqlite3.Connection) -> tuple[int, int]:
    return db.execute(COUNT_FLOWS).fetchone()[0], db.execute(COUNT_DAYS).fetchone()[0]


def compare(db: sqlite3.Connection) -> Sequence[Diagnostic]:
    """Compare the sums with the runs, in the transaction of the caller."""
    return wrong_counters(*_count(db))


def correct(db: sqlite3.Connection) -> str:
    """Make the sums those of the runs; the caller holds the write lock."""
    flows, days = _count(db)
    for statement in CORRECT:
        db.execute(statement)
    return f"corrected the counters of {flows:,} flows and {days:,} days"
