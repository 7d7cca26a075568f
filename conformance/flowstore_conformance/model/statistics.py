"""Dashboard counts and timeseries."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from fractions import Fraction
from uuid import UUID

from flowstore_conformance.model.state import Base
from flowstore_core import (
    DashboardStatistics,
    FlowRunRecord,
    RunStatus,
    RunTimeseriesBucket,
    RunTimeseriesGranularity,
)

HOUR = timedelta(hours=1)


class Statistics(Base):
    """Dashboard counts and timeseries."""

    def get_statistics(self, *, as_of: datetime | None = None) -> DashboardStatistics:
        """Count flows, active runs and the completions of one UTC day (QRY-4)."""
        records = self._records()
        day = (self.now if as_of is None else as_of).astimezone(UTC).date()
        ended = [r.status for r in records if r.completed_at is not None and r.completed_at.date() == day]
        return DashboardStatistics(
            total_flows=len({record.flow_id for record in records}),
            active_runs=sum(record.status is RunStatus.RUNNING for record in records),
            completed_today=ended.count(RunStatus.SUCCEEDED),
            failed_today=ended.count(RunStatus.FAILED),
        )

    def get_run_timeseries(
        self,
        granularity: RunTimeseriesGranularity,
        since: datetime,
        until: datetime,
        flow_id: UUID | None = None,
    ) -> tuple[RunTimeseriesBucket, ...]:
        """Count runs by started_at in whole buckets without gaps (QRY-5)."""
        width = HOUR if granularity == RunTimeseriesGranularity.HOUR else 24 * HOUR
        epoch = datetime(1, 1, 1, tzinfo=UTC)
        start = since - (since - epoch) % width
        found = []
        while start < until and since != until:
            started = [
                record
                for record in self._records()
                if start <= record.started_at < start + width and flow_id in (None, record.flow_id)
            ]
            found.append(_bucket(start, started))
            start += width
        return tuple(found)

    def _records(self) -> list[FlowRunRecord]:
        return [run.record for run in self.state.runs.values() if run.record is not None]


def _bucket(start: datetime, started: list[FlowRunRecord]) -> RunTimeseriesBucket:
    """A bucket: the runs that started in it, by present status, and their duration percentiles (QRY-5)."""
    statuses = [record.status for record in started]
    durations = sorted(r.completed_at - r.started_at for r in started if r.completed_at is not None)
    return RunTimeseriesBucket(
        timestamp=start,
        total=len(started),
        succeeded=statuses.count(RunStatus.SUCCEEDED),
        failed=statuses.count(RunStatus.FAILED),
        cancelled=statuses.count(RunStatus.CANCELLED),
        running=statuses.count(RunStatus.RUNNING),
        p50_duration_ms=_percentile_ms(durations, Fraction(50, 100)),
        p95_duration_ms=_percentile_ms(durations, Fraction(95, 100)),
    )


def _percentile_ms(ordered: list[timedelta], fraction: Fraction) -> float | None:
    """Type 7 percentile in exact arithmetic (QRY-5); stores use floats, so compare with a tolerance."""
    if not ordered:
        return None
    whole = [Fraction(each // timedelta(microseconds=1), 1000) for each in ordered]
    position = fraction * (len(whole) - 1)
    low = int(position)
    high = min(low + 1, len(whole) - 1)
    return float(whole[low] + (position - low) * (whole[high] - whole[low]))
