"""Dashboard counts and timeseries in SQLite."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from datetime import datetime, timedelta
from uuid import UUID

from flowstore_core import DashboardStatistics, RunStatus, RunTimeseriesBucket, RunTimeseriesGranularity
from flowstore_core.timeseries import BUCKET_WIDTH, bucket_starts, day_start, percentile_ms
from flowstore_sqlite.database import Database
from flowstore_sqlite.values import from_us, sql, to_us

# From one flow to the next by index, so that it costs a seek per flow and not a step per run.
COUNT_FLOWS = """
WITH RECURSIVE flows (flow_id) AS (
    SELECT MIN(flow_id) FROM runs
    UNION ALL
    SELECT (SELECT MIN(flow_id) FROM runs WHERE runs.flow_id > flows.flow_id) FROM flows
    WHERE flows.flow_id IS NOT NULL
)
SELECT COUNT(flow_id) FROM flows
"""
COUNT_ACTIVE = "SELECT COUNT(*) FROM runs WHERE status = 'Running'"
COUNT_COMPLETED = """
SELECT status, COUNT(*) FROM runs
WHERE completed_at IS NOT NULL AND completed_at >= ? AND completed_at < ? GROUP BY status
"""

# By duration, as the percentiles need it; bucket number 0 starts at since.
GET_RUN_TIMESERIES = """
SELECT (started_at - :since) / :width, status, completed_at - started_at AS duration FROM runs
WHERE started_at >= :since AND started_at < :until
"""
OF_FLOW = "AND flow_id = :flow_id"


class Statistics(Database):
    """See flowstore_core.statistics for the promises."""

    async def get_statistics(self, *, as_of: datetime | None) -> DashboardStatistics:
        def statistics(db: sqlite3.Connection) -> DashboardStatistics:
            day = day_start(from_us(self.now()) if as_of is None else as_of)
            row = (to_us(day), to_us(day + timedelta(days=1)))
            completed = dict(db.execute(COUNT_COMPLETED, row).fetchall())
            return DashboardStatistics(
                total_flows=db.execute(COUNT_FLOWS).fetchone()[0],
                active_runs=db.execute(COUNT_ACTIVE).fetchone()[0],
                completed_today=completed.get(RunStatus.SUCCEEDED.value, 0),
                failed_today=completed.get(RunStatus.FAILED.value, 0),
            )

        return await self.read(statistics)

    async def get_run_timeseries(
        self,
        granularity: RunTimeseriesGranularity,
        since: datetime,
        until: datetime,
        flow_id: UUID | None,
    ) -> tuple[RunTimeseriesBucket, ...]:
        values: dict[str, int | bytes] = {
            "since": to_us(since),
            "until": to_us(until),
            "width": BUCKET_WIDTH[granularity] // timedelta(microseconds=1),
        }
        statement = sql(GET_RUN_TIMESERIES, "ORDER BY duration")
        if flow_id is not None:
            values["flow_id"] = flow_id.bytes
            statement = sql(GET_RUN_TIMESERIES, OF_FLOW, "ORDER BY duration")

        def timeseries(db: sqlite3.Connection) -> tuple[RunTimeseriesBucket, ...]:
            counts: dict[tuple[int, str], int] = defaultdict(int)
            durations: dict[int, list[int]] = defaultdict(list)
            for bucket, status, duration in db.execute(statement, values):
                counts[bucket, status] += 1
                if duration is not None:
                    durations[bucket].append(duration)
            return tuple(
                _to_bucket(
                    start,
                    {status: counts.get((number, status.value), 0) for status in RunStatus},
                    durations.get(number, []),
                )
                for number, start in enumerate(bucket_starts(since, until, granularity))
            )

        return await self.read(timeseries)


def _to_bucket(start: datetime, counts: dict[RunStatus, int], durations: list[int]) -> RunTimeseriesBucket:
    return RunTimeseriesBucket(
        timestamp=start,
        total=sum(counts.values()),
        succeeded=counts[RunStatus.SUCCEEDED],
        failed=counts[RunStatus.FAILED],
        cancelled=counts[RunStatus.CANCELLED],
        running=counts[RunStatus.RUNNING],
        p50_duration_ms=percentile_ms(durations, 0.5),
        p95_duration_ms=percentile_ms(durations, 0.95),
    )
