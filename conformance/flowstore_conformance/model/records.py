"""Outputs, events, retention and the dashboard: what is written once and read, counted or deleted."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from uuid import UUID

from flowstore_conformance.model.state import Nouns, Run
from flowstore_core import (
    DashboardStatistics,
    FlowEventRecord,
    FlowRunRecord,
    RunStatus,
    RunTimeseriesBucket,
    RunTimeseriesGranularity,
)

HOUR = timedelta(hours=1)


class Outputs(Nouns):
    def save_output(self, run_id: UUID, key: str, value_json: str) -> None:
        run, _ = self.known(run_id)
        run.outputs[key] = value_json

    def get_output(self, run_id: UUID, key: str) -> str | None:
        return self.peek(run_id).outputs.get(key)

    def get_outputs(self, run_id: UUID) -> Mapping[str, str]:
        return dict(sorted(self.peek(run_id).outputs.items()))


class Events(Nouns):
    def append_event(
        self, run_id: UUID, event_type: str, *, step_key: str | None = None, message: str | None = None
    ) -> int:
        run, _ = self.known(run_id)
        sequence = len(run.events) + 1
        event = FlowEventRecord(
            sequence=sequence,
            run_id=run_id,
            timestamp=self.now,
            event_type=event_type,
            step_key=step_key,
            message=message,
        )
        run.events = (*run.events, event)
        return sequence

    def get_run_events(self, run_id: UUID, *, after: int = 0, take: int = 200) -> tuple[FlowEventRecord, ...]:
        return tuple(event for event in self.peek(run_id).events if event.sequence > after)[:take]


class Retention(Nouns):
    def cleanup(self, cutoff: datetime) -> int:
        over = [
            run_id
            for run_id, run in self.state.runs.items()
            if run.record is not None
            and run.record.completed_at is not None
            and run.record.completed_at < cutoff
        ]
        for run_id in over:
            del self.state.runs[run_id]
        for scope, (run_id, created_at) in list(self.state.keys.items()):
            if run_id in over or (self._never_started(run_id) and self._is_stale(created_at, cutoff)):
                del self.state.keys[scope]
        for run_id, run in list(self.state.runs.items()):
            control = run.control
            if control is not None and run.record is None and self._is_stale(control.created_at, cutoff):
                del self.state.runs[run_id]
        return len(over)

    def _never_started(self, run_id: UUID) -> bool:
        return self.state.runs.get(run_id, Run()).record is None

    def _is_stale(self, created_at: datetime, cutoff: datetime) -> bool:
        return created_at < cutoff and self.now - created_at >= HOUR


class Statistics(Nouns):
    def get_statistics(self, *, as_of: datetime | None = None) -> DashboardStatistics:
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
        width = HOUR if granularity == RunTimeseriesGranularity.HOUR else 24 * HOUR
        epoch = datetime(1, 1, 1, tzinfo=UTC)
        start = since - (since - epoch) % width
        found = []
        while start < until and since != until:
            inside = [
                record
                for record in self._records()
                if start <= record.started_at < start + width and flow_id in (None, record.flow_id)
            ]
            found.append(_bucket(start, inside))
            start += width
        return tuple(found)

    def _records(self) -> list[FlowRunRecord]:
        return [run.record for run in self.state.runs.values() if run.record is not None]


def _bucket(start: datetime, inside: list[FlowRunRecord]) -> RunTimeseriesBucket:
    statuses = [record.status for record in inside]
    durations = sorted(r.completed_at - r.started_at for r in inside if r.completed_at is not None)
    return RunTimeseriesBucket(
        timestamp=start,
        total=len(inside),
        succeeded=statuses.count(RunStatus.SUCCEEDED),
        failed=statuses.count(RunStatus.FAILED),
        cancelled=statuses.count(RunStatus.CANCELLED),
        running=statuses.count(RunStatus.RUNNING),
        p50_duration_ms=_percentile_ms(durations, Fraction(50, 100)),
        p95_duration_ms=_percentile_ms(durations, Fraction(95, 100)),
    )


def _percentile_ms(ordered: list[timedelta], fraction: Fraction) -> float | None:
    """Type 7 in exact arithmetic; a store computes in floats, so compare with a tolerance."""
    if not ordered:
        return None
    whole = [Fraction(each // timedelta(microseconds=1), 1000) for each in ordered]
    position = fraction * (len(whole) - 1)
    low = int(position)
    high = min(low + 1, len(whole) - 1)
    return float(whole[low] + (position - low) * (whole[high] - whole[low]))
