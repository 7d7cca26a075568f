"""Dashboard statistics and timeseries on PostgreSQL, from the counters of migration 2."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from datetime import date, datetime
from uuid import UUID

from flowstore_core import (
    DashboardStatistics,
    FlowStoreError,
    RunTimeseriesBucket,
    RunTimeseriesGranularity,
)
from flowstore_core.timeseries import BUCKET_WIDTH, bucket_starts, whole_days
from flowstore_postgres.database import Database
from flowstore_postgres.transactions import Transaction

log = logging.getLogger("flowstore_postgres")

# Each number is the sum over the folded counters and the changes since.
GET_STATISTICS = """
WITH today AS (
    SELECT (coalesce($1, $2, clock_timestamp()) AT TIME ZONE 'UTC')::date AS day
), flows AS (
    SELECT flow_id, sum(runs) AS runs, sum(running) AS running FROM (
        SELECT flow_id, running + succeeded + failed + cancelled AS runs, running FROM {schema}.run_counts
        UNION ALL
        SELECT flow_id, amount, CASE status WHEN 'Running' THEN amount ELSE 0 END FROM {schema}.run_changes
    ) numbers GROUP BY flow_id
), completed AS (
    SELECT sum(succeeded) AS succeeded, sum(failed) AS failed FROM (
        SELECT succeeded, failed FROM {schema}.run_days WHERE day = (SELECT day FROM today)
        UNION ALL
        SELECT CASE status WHEN 'Succeeded' THEN amount ELSE 0 END,
               CASE status WHEN 'Failed' THEN amount ELSE 0 END
        FROM {schema}.run_changes WHERE completed_on = (SELECT day FROM today)
    ) numbers
)
SELECT (SELECT count(*) FROM flows WHERE runs > 0) AS flows,
       (SELECT coalesce(sum(running), 0)::bigint FROM flows) AS active,
       coalesce(completed.succeeded, 0)::bigint AS succeeded, coalesce(completed.failed, 0)::bigint AS failed
FROM completed
"""

# A day's summary is valid while the day's number of changes equals the one in the summary; both are read in
# one snapshot. percentile_cont interpolates as type 7 does; durations are whole microseconds.
GET_RUN_TIMESERIES = """
WITH days AS MATERIALIZED (
    SELECT day, sum(changes)::bigint AS changes FROM (
        SELECT day, changes FROM {schema}.run_days
        UNION ALL
        SELECT started_on, 1 FROM {schema}.run_changes
    ) numbers
    WHERE day >= ($2::timestamptz AT TIME ZONE 'UTC')::date AND day <= ($3 AT TIME ZONE 'UTC')::date
    GROUP BY day HAVING sum(changes) > 0
), known AS MATERIALIZED (
    SELECT day, s.buckets FROM days JOIN {schema}.run_summaries s USING (day, changes)
    WHERE s.granularity = $4 AND s.scope = $5
), others AS MATERIALIZED (
    SELECT days.* FROM days WHERE NOT EXISTS (SELECT FROM known WHERE known.day = days.day)
)
SELECT ARRAY(SELECT buckets FROM known) AS known,
       ARRAY(SELECT ROW(day, changes) FROM others) AS others,
       ARRAY(
           SELECT ROW(bucket, total, succeeded, failed, cancelled, running, durations[1], durations[2])
           FROM (SELECT bucket, count(*) AS total,
               count(*) FILTER (WHERE status = 'Succeeded') AS succeeded,
               count(*) FILTER (WHERE status = 'Failed') AS failed,
               count(*) FILTER (WHERE status = 'Cancelled') AS cancelled,
               count(*) FILTER (WHERE status = 'Running') AS running,
               percentile_cont(ARRAY[0.5, 0.95]::float8[]) WITHIN GROUP (ORDER BY duration)
                   FILTER (WHERE duration IS NOT NULL) AS durations
           FROM (
               SELECT date_bin($1::interval, r.started_at, $2) AS bucket, r.status,
                      (extract(epoch FROM r.completed_at - r.started_at) * 1000000)::float8 AS duration
               FROM others JOIN {schema}.runs r
                   ON r.status IN ('Running', 'Succeeded', 'Failed', 'Cancelled') AND {filter}
                   AND r.started_at >= greatest(others.day::timestamp AT TIME ZONE 'UTC', $2)
                   AND r.started_at < least((others.day + 1)::timestamp AT TIME ZONE 'UTC', $3)
           ) started GROUP BY bucket) summed
       ) AS computed
"""
STORE_SUMMARY = """
INSERT INTO {schema}.run_summaries (granularity, scope, day, changes, buckets) VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (granularity, scope, day) DO UPDATE SET changes = excluded.changes, buckets = excluded.buckets
"""

Bucket = tuple[int, int, int, int, int, float | None, float | None]
"""total, succeeded, failed, cancelled, running, and p50 and p95 in microseconds."""


class Statistics:
    """The contract of these operations is in flowstore_core/statistics.py."""

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
        scope = "" if flow_id is None else str(flow_id)
        filtered, arguments = ("true", ()) if flow_id is None else ("r.flow_id = $6", (flow_id,))
        first, end = whole_days(since, until)
        row = await self._database.read_row(
            GET_RUN_TIMESERIES.replace("{filter}", filtered),
            *(BUCKET_WIDTH[granularity], first, end, granularity.value, scope, *arguments),
        )
        computed = {one[0]: tuple(one)[1:] for one in row["computed"]}
        found = dict(computed)
        for buckets in row["known"]:
            found.update(
                (datetime.fromisoformat(start), tuple(values)) for start, *values in json.loads(buckets)
            )
        await self._store_summaries(granularity, scope, first, end, row["others"], computed)
        return tuple(_bucket(start, found.get(start)) for start in bucket_starts(since, until, granularity))

    async def _store_summaries(
        self,
        granularity: RunTimeseriesGranularity,
        scope: str,
        since: datetime,
        until: datetime,
        days: Sequence[tuple[date, int]],
        computed: dict[datetime, Bucket],
    ) -> None:
        """Store the computed buckets of days that lie completely in the window."""
        rows = []
        for day, changes in days:
            start = datetime(day.year, day.month, day.day, tzinfo=since.tzinfo)
            end = start + BUCKET_WIDTH[RunTimeseriesGranularity.DAY]
            if since <= start and end <= until:
                own = [(at.isoformat(), *values) for at, values in computed.items() if start <= at < end]
                rows.append((granularity.value, scope, day, changes, json.dumps(own)))

        async def work(transaction: Transaction) -> None:
            for row in sorted(rows):
                await transaction.execute(STORE_SUMMARY, *row)

        try:
            if rows:
                await self._database.transaction("get_run_timeseries", work)
        except FlowStoreError as error:
            # Optional: a read-only role computes the summaries each time.
            log.debug("the summaries of %d days were not stored: %s", len(rows), error)


def _bucket(start: datetime, values: Bucket | None) -> RunTimeseriesBucket:
    total, succeeded, failed, cancelled, running, p50, p95 = values or (0, 0, 0, 0, 0, None, None)
    return RunTimeseriesBucket(
        timestamp=start,
        total=total,
        succeeded=succeeded,
        failed=failed,
        cancelled=cancelled,
        running=running,
        p50_duration_ms=None if p50 is None else p50 / 1000,
        p95_duration_ms=None if p95 is None else p95 / 1000,
    )
