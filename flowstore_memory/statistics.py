"""Dashboard counts and timeseries (QRY-4, QRY-5)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from uuid import UUID

from flowstore_core import DashboardStatistics, RunStatus, RunTimeseriesBucket, RunTimeseriesGranularity
from flowstore_core.timeseries import bucket_floor, bucket_starts, day_start, percentile_ms
from flowstore_memory.state import OpenNamespace, RunState

_DAY = timedelta(days=1)
_MICROSECOND = timedelta(microseconds=1)


class Statistics(OpenNamespace):
    async def get_statistics(self, *, as_of: datetime | None = None) -> DashboardStatistics:
        day = day_start(self._now() if as_of is None else as_of)
        runs = self._runs.values()
        today = Counter(
            run.status for run in runs if run.completed_at is not None and day_start(run.completed_at) == day
        )
        return DashboardStatistics(
            total_flows=len({run.flow_id for run in runs}),
            active_runs=sum(run.status is RunStatus.RUNNING for run in runs),
            completed_today=today[RunStatus.SUCCEEDED],
            failed_today=today[RunStatus.FAILED],
        )

    async def get_run_timeseries(
        self,
        granularity: RunTimeseriesGranularity,
        since: datetime,
        until: datetime,
        flow_id: UUID | None = None,
    ) -> Sequence[RunTimeseriesBucket]:
        buckets: dict[datetime, list[RunState]] = {}
        for run in self._runs.values():
            if since <= run.started_at < until and (flow_id is None or run.flow_id == flow_id):
                buckets.setdefault(bucket_floor(run.started_at, granularity), []).append(run)
        return tuple(
            _bucket(start, buckets.get(start, [])) for start in bucket_starts(since, until, granularity)
        )


def _bucket(start: datetime, runs: Sequence[RunState]) -> RunTimeseriesBucket:
    count = Counter(run.status for run in runs)
    durations = sorted(
        (run.completed_at - run.started_at) // _MICROSECOND for run in runs if run.completed_at is not None
    )
    return RunTimeseriesBucket(
        timestamp=start,
        total=len(runs),
        succeeded=count[RunStatus.SUCCEEDED],
        failed=count[RunStatus.FAILED],
        cancelled=count[RunStatus.CANCELLED],
        running=count[RunStatus.RUNNING],
        p50_duration_ms=percentile_ms(durations, 0.5),
        p95_duration_ms=percentile_ms(durations, 0.95),
    )
