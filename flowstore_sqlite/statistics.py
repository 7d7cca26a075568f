"""Dashboard counts and timeseries in SQLite, from the counters of migration 2."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import partial
from uuid import UUID

from flowstore_core import (
    DashboardStatistics,
    FlowStoreError,
    RunStatus,
    RunTimeseriesBucket,
    RunTimeseriesGranularity,
)
from flowstore_core.timeseries import BUCKET_WIDTH, bucket_starts, percentile_ms, whole_days
from flowstore_sqlite.codecs import join_sql, to_us
from flowstore_sqlite.database import Database

_log = logging.getLogger("flowstore_sqlite")

DAY = BUCKET_WIDTH[RunTimeseriesGranularity.DAY] // timedelta(microseconds=1)

COUNT_FLOWS = "SELECT COUNT(DISTINCT flow_id) FROM run_counts WHERE amount > 0"
COUNT_ACTIVE = "SELECT COALESCE(SUM(amount), 0) FROM run_counts WHERE status = 'Running'"
COUNT_COMPLETED = "SELECT succeeded, failed FROM run_days WHERE day = ?"

# A summary is valid while the change counter of its day is the one it was computed at.
READ_SUMMARIES = """
SELECT run_days.day, run_days.changes, buckets FROM run_days
LEFT JOIN run_summaries AS kept ON kept.granularity = :granularity AND kept.scope = :scope
    AND kept.day = run_days.day AND kept.changes = run_days.changes
WHERE run_days.day >= :first AND run_days.day <= :last AND run_days.changes > 0
"""
# Ordered by duration for the percentiles.
READ_RUNS = """
SELECT started_at, status, completed_at - started_at AS duration FROM runs
WHERE status IN ('Running', 'Succeeded', 'Failed', 'Cancelled')
    AND started_at >= :since AND started_at < :until
"""
WHERE_FLOW = "AND flow_id = :flow_id"
SAVE_SUMMARY = """
INSERT INTO run_summaries (granularity, scope, day, changes, buckets) VALUES (?, ?, ?, ?, ?)
ON CONFLICT (granularity, scope, day) DO UPDATE SET changes = excluded.changes, buckets = excluded.buckets
"""

Bucket = tuple[int, int, int, int, float | None, float | None]
"""Running, succeeded, failed, cancelled, and p50 and p95 in milliseconds."""


class Statistics:
    """See flowstore_core.statistics for the contract."""

    _database: Database

    async def get_statistics(self, *, as_of: datetime | None) -> DashboardStatistics:
        def statistics(db: sqlite3.Connection) -> DashboardStatistics:
            day = (self._database.now() if as_of is None else to_us(as_of)) // DAY
            succeeded, failed = db.execute(COUNT_COMPLETED, (day,)).fetchone() or (0, 0)
            return DashboardStatistics(
                total_flows=db.execute(COUNT_FLOWS).fetchone()[0],
                active_runs=db.execute(COUNT_ACTIVE).fetchone()[0],
                completed_today=succeeded,
                failed_today=failed,
            )

        return await self._database.read(statistics)

    async def get_run_timeseries(
        self,
        granularity: RunTimeseriesGranularity,
        since: datetime,
        until: datetime,
        flow_id: UUID | None,
    ) -> tuple[RunTimeseriesBucket, ...]:
        first, end = map(to_us, whole_days(since, until))
        width = BUCKET_WIDTH[granularity] // timedelta(microseconds=1)
        scope = b"" if flow_id is None else flow_id.bytes
        statement = join_sql(READ_RUNS, "" if flow_id is None else WHERE_FLOW, "ORDER BY duration")
        values = {
            "granularity": granularity.value,
            "scope": scope,
            "first": first // DAY,
            "last": end // DAY,
            "flow_id": scope,
        }

        def timeseries(db: sqlite3.Connection) -> tuple[dict[int, Bucket], list[tuple[object, ...]]]:
            found: dict[int, Bucket] = {}
            new: list[tuple[object, ...]] = []
            for day, changes, saved in db.execute(READ_SUMMARIES, values).fetchall():
                if saved is not None:
                    found.update((start, tuple(own)) for start, *own in json.loads(saved))
                    continue
                window = {"since": max(first, day * DAY), "until": min(end, (day + 1) * DAY)}
                buckets = _compute(db.execute(statement, {**values, **window}).fetchall(), width)
                found.update(buckets)
                if window == {"since": day * DAY, "until": (day + 1) * DAY}:
                    own = [(start, *bucket) for start, bucket in buckets.items()]
                    new.append((granularity.value, scope, day, changes, json.dumps(own)))
            return found, new

        found, new = await self._database.read(timeseries)
        await self._save_summaries(new)
        return tuple(
            _to_bucket(start, found.get(to_us(start), (0, 0, 0, 0, None, None)))
            for start in bucket_starts(since, until, granularity)
        )

    async def _save_summaries(self, rows: Sequence[tuple[object, ...]]) -> None:
        try:
            if rows:
                await self._database.write(partial(_insert_summaries, rows))
        except FlowStoreError as error:
            # Summaries are a cache: the result is complete without them.
            _log.debug("the summaries of %d days were not saved: %s", len(rows), error)


def _insert_summaries(rows: Sequence[tuple[object, ...]], db: sqlite3.Connection, now: int) -> None:
    db.executemany(SAVE_SUMMARY, rows)


def _compute(rows: Sequence[tuple[int, str, int | None]], width: int) -> dict[int, Bucket]:
    """Compute buckets from rows of started_at, status and duration, in ascending order of duration."""
    counts: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    durations: dict[int, list[int]] = defaultdict(list)
    for started_at, status, duration in rows:
        start = started_at // width * width
        counts[start][status] += 1
        if duration is not None:
            durations[start].append(duration)
    return {
        start: (
            own[RunStatus.RUNNING],
            own[RunStatus.SUCCEEDED],
            own[RunStatus.FAILED],
            own[RunStatus.CANCELLED],
            percentile_ms(durations[start], 0.5),
            percentile_ms(durations[start], 0.95),
        )
        for start, own in counts.items()
    }


def _to_bucket(start: datetime, bucket: Bucket) -> RunTimeseriesBucket:
    running, succeeded, failed, cancelled, p50, p95 = bucket
    return RunTimeseriesBucket(
        timestamp=start,
        total=running + succeeded + failed + cancelled,
        succeeded=succeeded,
        failed=failed,
        cancelled=cancelled,
        running=running,
        p50_duration_ms=p50,
        p95_duration_ms=p95,
    )
