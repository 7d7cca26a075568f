"""Dashboard counts and timeseries on PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from flowstore_core import DashboardStatistics, RunTimeseriesBucket, RunTimeseriesGranularity
from flowstore_core.timeseries import BUCKET_WIDTH, bucket_starts
from flowstore_postgres.database import Database

# Distinct flows by jumping from one to the next in the index: as many steps as flows, not as runs.
GET_STATISTICS = """
WITH RECURSIVE flows AS (
    (SELECT flow_id FROM {schema}.runs ORDER BY flow_id LIMIT 1)
    UNION ALL
    SELECT (SELECT r.flow_id FROM {schema}.runs r WHERE r.flow_id > f.flow_id ORDER BY r.flow_id LIMIT 1)
    FROM flows f WHERE f.flow_id IS NOT NULL
), today AS (
    SELECT date_trunc('day', coalesce($1, $2, clock_timestamp()), 'UTC') AS midnight
), completed AS (
    SELECT count(*) FILTER (WHERE status = 'Succeeded') AS succeeded,
           count(*) FILTER (WHERE status = 'Failed') AS failed
    FROM {schema}.runs
    WHERE completed_at >= (SELECT midnight FROM today)
      AND completed_at < (SELECT midnight FROM today) + interval '24 hours'
)
SELECT (SELECT count(flow_id) FROM flows) AS flows,
       (SELECT count(*) FROM {schema}.runs WHERE status = 'Running') AS active,
       completed.succeeded, completed.failed
FROM completed
"""

# percentile_cont interpolates as type 7 does; durations are whole microseconds.
GET_RUN_TIMESERIES = """
SELECT date_bin($1::interval, started_at, $2) AS bucket, count(*) AS total,
       count(*) FILTER (WHERE status = 'Succeeded') AS succeeded,
       count(*) FILTER (WHERE status = 'Failed') AS failed,
       count(*) FILTER (WHERE status = 'Cancelled') AS cancelled,
       count(*) FILTER (WHERE status = 'Running') AS running,
       percentile_cont(ARRAY[0.5, 0.95]::float8[]) WITHIN GROUP (
           ORDER BY (extract(epoch FROM completed_at - started_at) * 1000000)::float8
       ) FILTER (WHERE completed_at IS NOT NULL) AS durations
FROM {schema}.runs WHERE started_at >= $2 AND started_at < $3 AND {filter}
GROUP BY bucket
"""


class Statistics:
    _database: Database

    async def get_statistics(self, *, as_of: datetime | None) -> DashboardStatistics:
        row = await self._database.read_row(GET_STATISTICS, as_of, self._database.now())
        return DashboardStatistics(
            total_flows=row["flows"],
            active_runs=row["active"],
            completed_today=row["succeeded"],
            failed_today=row["failed"],
        )

    async def get_run_timeseries(
        self,
        *,
        granularity: RunTimeseriesGranularity,
        since: datetime,
        until: datetime,
        flow_id: UUID | None,
    ) -> Sequence[RunTimeseriesBucket]:
        filtered, arguments = ("true", ()) if flow_id is None else ("flow_id = $4", (flow_id,))
        statement = GET_RUN_TIMESERIES.replace("{filter}", filtered)
        rows = await self._database.read(statement, BUCKET_WIDTH[granularity], since, until, *arguments)
        found = {row["bucket"]: row for row in rows}
        return tuple(_bucket(start, found.get(start)) for start in bucket_starts(since, until, granularity))


def _bucket(start: datetime, row: Any) -> RunTimeseriesBucket:
    p50, p95 = (None, None) if row is None or row["durations"] is None else row["durations"]
    return RunTimeseriesBucket(
        timestamp=start,
        total=0 if row is None else row["total"],
        succeeded=0 if row is None else row["succeeded"],
        failed=0 if row is None else row["failed"],
        cancelled=0 if row is None else row["cancelled"],
        running=0 if row is None else row["running"],
        p50_duration_ms=None if p50 is None else p50 / 1000,
        p95_duration_ms=None if p95 is None else p95 / 1000,
    )
