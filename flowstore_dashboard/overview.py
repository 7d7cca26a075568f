"""The overview: numbers of today, runs over time, recent failures and queues."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

from starlette.requests import Request
from starlette.responses import Response

from flowstore_core import (
    Capability,
    FlowRunRecord,
    FlowStepRecord,
    FlowStore,
    RunStatus,
    RunTimeseriesBucket,
    RunTimeseriesGranularity,
    StepStatus,
)
from flowstore_core.timeseries import BUCKET_WIDTH
from flowstore_dashboard.site import Site, parameter

WINDOWS = {
    RunTimeseriesGranularity.HOUR: timedelta(hours=23),
    RunTimeseriesGranularity.DAY: timedelta(days=29),
}
RECENT = 8
"""Number of newest runs on the overview."""
FAILED_RUNS = 25
"""Maximum number of failed runs whose failures are grouped."""
STEPS_OF_RUN = 3
"""Maximum number of failed steps of one run that are counted."""
CACHED_RUNS = 1000
SERIES = ("succeeded", "failed", "cancelled", "running")
MAX_ERROR = 160


@dataclass(frozen=True, slots=True)
class Failure:
    """Failures of one step of one flow, with the newest of them."""

    flow_name: str
    step_key: str | None
    """None if the run failed without a failed step."""
    number: int
    run: FlowRunRecord
    error: str | None


@dataclass(frozen=True, slots=True)
class Column:
    """A bucket of the chart; its parts are percentages of the tallest bucket, stacked from the bottom."""

    bucket: RunTimeseriesBucket
    left: float
    width: float
    parts: tuple[tuple[str, float, float], ...]
    """Status, top and height."""
    label: str


@dataclass(frozen=True, slots=True)
class Chart:
    columns: tuple[Column, ...]
    most: int
    total: int
    ticks: tuple[tuple[float, str], ...]
    p50: tuple[tuple[float, float], ...]
    p95: tuple[tuple[float, float], ...]
    """Points of the lines of durations, in percent."""
    longest_ms: float


class Failures:
    """The failed steps of failed runs, remembered: a completed run rarely changes."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[UUID, datetime | None], tuple[FlowStepRecord, ...]] = OrderedDict()

    async def recent(self, store: FlowStore, now: datetime) -> tuple[Sequence[Failure], bool]:
        """The failures of the last day's runs, by flow and step, and whether these are all."""
        page = await store.get_runs_page(status=RunStatus.FAILED, take=FAILED_RUNS)
        since = now - timedelta(days=1)
        runs = [run for run in page.runs if run.started_at >= since]
        steps = await asyncio.gather(*(self._failed_steps(store, run) for run in runs))
        groups: dict[tuple[str, str | None], list[tuple[FlowRunRecord, str | None]]] = {}
        for run, failed in zip(runs, steps, strict=True):
            for step in failed or (None,):
                key = (run.flow_name, None if step is None else step.step_key)
                groups.setdefault(key, []).append((run, None if step is None else step.error_message))
        failures = [
            Failure(flow, step, len(found), found[0][0], _shorten(found[0][1]))
            for (flow, step), found in groups.items()
        ]
        failures.sort(key=lambda one: (-one.number, one.flow_name, one.step_key or ""))
        return failures, len(runs) < FAILED_RUNS

    async def _failed_steps(self, store: FlowStore, run: FlowRunRecord) -> tuple[FlowStepRecord, ...]:
        key = (run.run_id, run.completed_at)
        if key not in self._known:
            statuses = await store.get_step_statuses(run.run_id)
            failed = [name for name, status in statuses.items() if status is StepStatus.FAILED]
            # One after the other: a run has few, and the runs are read at the same time.
            read = [await store.get_step(run.run_id, name) for name in failed[:STEPS_OF_RUN]]
            self._known[key] = tuple(step for step in read if step is not None)
            if len(self._known) > CACHED_RUNS:
                self._known.popitem(last=False)
        return self._known[key]


def _shorten(text: str | None) -> str | None:
    if text is None:
        return None
    text = " ".join(text[: 4 * MAX_ERROR].split())
    return text if len(text) <= MAX_ERROR else f"{text[:MAX_ERROR]}..."


def draw_chart(buckets: Sequence[RunTimeseriesBucket], granularity: RunTimeseriesGranularity) -> Chart:
    """The chart of some buckets: stacked columns by status, and lines of the durations."""
    most = max((bucket.total for bucket in buckets), default=0)
    width = 100 / max(len(buckets), 1)
    longest = max((bucket.p95_duration_ms or 0.0 for bucket in buckets), default=0.0)
    columns = []
    for index, bucket in enumerate(buckets):
        top = 100.0
        parts = []
        for name in SERIES:
            number = getattr(bucket, name)
            if number:
                height = max(number / most * 100, 0.8)
                top -= height
                parts.append((name, round(top, 2), round(height, 2)))
        columns.append(
            Column(
                bucket, round(index * width, 3), round(width, 3), tuple(parts), _label(bucket, granularity)
            )
        )
    every = 6 if granularity is RunTimeseriesGranularity.HOUR else 7
    ticks = tuple(
        (round((index + 0.5) * width, 3), _tick(bucket, granularity))
        for index, bucket in enumerate(buckets)
        if (len(buckets) - 1 - index) % every == 0
    )
    return Chart(
        tuple(columns),
        most,
        sum(bucket.total for bucket in buckets),
        ticks,
        _line([bucket.p50_duration_ms for bucket in buckets], width, longest),
        _line([bucket.p95_duration_ms for bucket in buckets], width, longest),
        longest,
    )


def _line(values: Sequence[float | None], width: float, longest: float) -> tuple[tuple[float, float], ...]:
    return tuple(
        (round((index + 0.5) * width, 3), round(96 - value / longest * 92, 2) if longest else 96.0)
        for index, value in enumerate(values)
        if value is not None
    )


def _tick(bucket: RunTimeseriesBucket, granularity: RunTimeseriesGranularity) -> str:
    start = bucket.timestamp.astimezone(UTC)
    return f"{start:%H:%M}" if granularity is RunTimeseriesGranularity.HOUR else f"{start:%b} {start.day}"


def _label(bucket: RunTimeseriesBucket, granularity: RunTimeseriesGranularity) -> str:
    start = bucket.timestamp.astimezone(UTC)
    end = start + BUCKET_WIDTH[granularity]
    if granularity is RunTimeseriesGranularity.HOUR:
        return f"{start:%Y-%m-%d %H:%M} to {end:%H:%M}"
    return f"{start:%Y-%m-%d}"


class OverviewPage:
    path = "/"

    def __init__(self, site: Site) -> None:
        self._site = site
        self._failures = Failures()

    async def show(self, request: Request) -> Response:
        site, store = self._site, self._site.store
        if not site.has(Capability.DASHBOARD):
            return site.render(request, "lacking.html", title="Overview", capability=Capability.DASHBOARD)
        by = parameter(request, "by") or "hour"
        granularity = RunTimeseriesGranularity.DAY if by == "day" else RunTimeseriesGranularity.HOUR
        now = datetime.now(UTC)
        statistics, buckets, page, (failures, is_complete), queues = await asyncio.gather(
            store.get_statistics(),
            store.get_run_timeseries(granularity, now - WINDOWS[granularity], now),
            store.get_runs_page(take=RECENT),
            self._failures.recent(store, now),
            store.get_queues() if site.has(Capability.QUEUES) else _nothing(),
        )
        return site.render(
            request,
            "overview.html",
            statistics=statistics,
            chart=draw_chart(buckets, granularity),
            by=granularity,
            page=page,
            failures=failures[:10],
            failures_complete=is_complete,
            failed_runs=FAILED_RUNS,
            queues=queues,
        )

    async def version(self, request: Request) -> object:
        """A value that changes with the page."""
        site, store = self._site, self._site.store
        if not site.has(Capability.DASHBOARD):
            return None
        queues = tuple(await store.get_queues()) if site.has(Capability.QUEUES) else ()
        return await store.get_statistics(), await store.get_runs_page(take=RECENT), queues

    async def wait(self, request: Request, seconds: float) -> None:
        """Wait until the page may have changed."""
        await asyncio.sleep(seconds)


async def _nothing() -> None:
    return None
