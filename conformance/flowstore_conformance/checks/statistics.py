"""QRY-4 and QRY-5: dashboard counts and timeseries."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID

from flowstore_conformance.checks.example_checks import example
from flowstore_conformance.checks.fixtures import (
    DAY,
    FLOW,
    HOUR,
    SECOND,
    TICK,
    new_id,
    now,
    require_clock,
    run_step,
    start,
)
from flowstore_conformance.checks.indexed_queries import EARLIEST
from flowstore_conformance.checks.volumes import expect_result
from flowstore_conformance.context import CheckContext
from flowstore_conformance.registry import check
from flowstore_core import (
    Capability,
    DashboardStatistics,
    RunStatus,
    RunTimeseriesBucket,
    RunTimeseriesGranularity,
)

CLOCK = [Capability.VIRTUAL_CLOCK]
BY_HOUR, BY_DAY = RunTimeseriesGranularity.HOUR, RunTimeseriesGranularity.DAY


async def _start_run(
    context: CheckContext,
    begun: datetime,
    status: RunStatus | None = None,
    duration: timedelta = timedelta(0),
    **given: Any,
) -> None:
    """Start a run at a given time and, with a status, complete it after a duration."""
    clock = require_clock(context)
    clock.now = begun
    run_id = await start(context, **given)
    if status is not None:
        clock.now = begun + duration
        await context.store.complete_run(run_id, status)


# QRY-4


@check("QRY-4")
async def statistics_count_flows_and_active_runs(context: CheckContext) -> None:
    """total_flows counts the flows of stored runs; a reopened run counts as active, not as completed."""
    store = context.store
    none = DashboardStatistics(total_flows=0, active_runs=0, completed_today=0, failed_today=0)
    context.expect(await store.get_statistics(), none, "the statistics of an empty store")
    first, second = await start(context), await start(context)
    other = await start(context, flow_id=new_id(context))
    await store.configure_run(new_id(context), new_id(context), "manual")
    for run_id in (first, second):
        await run_step(context, run_id)
    wanted = {"total_flows": 2, "active_runs": 3}
    found = await store.get_statistics()
    counted = {name: getattr(found, name) for name in wanted}
    context.expect(counted, wanted, "the statistics of three Running runs of two flows")
    await store.complete_run(first, RunStatus.SUCCEEDED)
    await store.complete_run(other, RunStatus.CANCELLED)
    found = await store.get_statistics()
    context.expect((found.total_flows, found.active_runs), (2, 1), "the statistics after two of them ended")
    await store.retry_step(first, "charge")
    found = await store.get_statistics()
    context.expect((found.active_runs, found.completed_today), (2, 0), "the statistics with a reopened run")
    await store.cleanup(now(context) + DAY)
    context.expect((await store.get_statistics()).total_flows, 1, "total_flows after a cleanup")
    for moment in (datetime(1, 1, 2, tzinfo=UTC), datetime(9999, 12, 30, tzinfo=UTC)):
        answer = await store.get_statistics(as_of=moment)
        context.expect(answer.active_runs, 2, f"the statistics as of {moment}")


@check("QRY-4", "QRY-1", "QRY-5", needs=CLOCK)
async def maintenance_changes_no_count(context: CheckContext) -> None:
    """Counts and series of each status and flow are right after cleanups that delete nothing."""
    store = context.store
    flows = {status: new_id(context) for status in RunStatus}
    for each in (1, 2, 3):
        for status, flow_id in flows.items():
            run_id = await start(context, flow_id=flow_id)
            if status is not RunStatus.RUNNING:
                await store.complete_run(run_id, status)
        if each == 3:
            await _expect_counts(context, flows, each, "before a cleanup")
        await store.cleanup(EARLIEST)
        await _expect_counts(context, flows, each, "after a cleanup that deleted none")


async def _expect_counts(
    context: CheckContext, flows: Mapping[RunStatus, UUID], each: int, when: str
) -> None:
    """Expect the same number of runs in each status; the runs of a status are those of a flow."""
    store, at, every, of = context.store, now(context), each * len(flows), f"with {each} in each flow, {when}"
    found = await store.get_statistics()
    counts = (found.total_flows, found.active_runs, found.completed_today, found.failed_today)
    context.expect(counts, (len(flows), each, each, each), f"get_statistics {of}")
    for status, total in ((None, every), *((status, each) for status in flows)):
        page = await store.get_runs_page(status=status, take=0)
        what = f"total_count of get_runs_page(status={status}) {of}"
        expect_result(context, page.total_count, total, what, clause="QRY-1")
    for flow_id, total in ((None, every), *((flow_id, each) for flow_id in flows.values())):
        series = await _series(context, BY_DAY, at, at + TICK, flow_id)
        what = f"the runs of the day in get_run_timeseries, flow_id={flow_id}, {of}"
        expect_result(context, [number for _, number in series], [total], what, clause="QRY-5")


@check("QRY-4", needs=CLOCK)
async def today_is_the_utc_day_of_completion(context: CheckContext) -> None:
    """completed_today and failed_today count Succeeded and Failed by completed_at on as_of's UTC day."""
    store, clock = context.store, require_clock(context)
    midnight = datetime(2026, 3, 14, tzinfo=UTC)
    # Started yesterday and completed today: counts today.
    await _start_run(context, midnight - TICK, RunStatus.SUCCEEDED, TICK)
    await _start_run(context, midnight, RunStatus.FAILED)
    await _start_run(context, midnight, RunStatus.FAILED, DAY - TICK)
    await _start_run(context, midnight, RunStatus.CANCELLED)
    # Completed yesterday and tomorrow.
    await _start_run(context, midnight - 2 * TICK, RunStatus.SUCCEEDED, TICK)
    await _start_run(context, midnight, RunStatus.SUCCEEDED, DAY)
    await _start_run(context, midnight, RunStatus.FAILED, DAY)
    for days in (0, -1, -20):
        await _start_run(context, midnight + days * DAY, flow_id=new_id(context))
    clock.now = midnight + 12 * HOUR
    zone = timezone(timedelta(hours=14))
    for as_of, counts in (
        (None, (1, 2)),
        (midnight, (1, 2)),
        (midnight + DAY - TICK, (1, 2)),
        (midnight.astimezone(zone), (1, 2)),
        (midnight + DAY, (1, 1)),
        (midnight - TICK, (1, 0)),
        (midnight + 2 * DAY, (0, 0)),
    ):
        wanted = DashboardStatistics(
            total_flows=4, active_runs=3, completed_today=counts[0], failed_today=counts[1]
        )
        context.expect(await store.get_statistics(as_of=as_of), wanted, f"the statistics as of {as_of}")


# QRY-5


async def _series(
    context: CheckContext,
    granularity: RunTimeseriesGranularity,
    since: datetime,
    until: datetime,
    flow_id: UUID | None = None,
) -> list[tuple[datetime, int]]:
    buckets = await context.store.get_run_timeseries(granularity, since, until, flow_id)
    return [(bucket.timestamp, bucket.total) for bucket in buckets]


@example("QRY-5", needs=CLOCK)
async def buckets_are_whole_and_without_gaps(context: CheckContext) -> None:
    """since is floored and until ceiled to the bucket; empty buckets are included."""
    for granularity, width in ((BY_HOUR, HOUR), (BY_DAY, DAY)):
        first = datetime(2026, 2, 27 if width == DAY else 20, tzinfo=UTC)
        for begun in (first - TICK, first, first + width - TICK, first + 3 * width, first + 4 * width):
            await _start_run(context, begun, flow_id=UUID(int=width.days))
        counts = (2, 0, 0, 1)
        wanted = [(first + n * width, total) for n, total in enumerate(counts)]
        for since, until in (
            (first, first + 4 * width),
            (first + width - TICK, first + 3 * width + TICK),
            (first + TICK, first + 4 * width - TICK),
        ):
            found = await _series(context, granularity, since, until, UUID(int=width.days))
            context.expect(found, wanted, f"the {granularity}s from {since} to {until} and their runs")
        empty = RunTimeseriesBucket(
            timestamp=first + width,
            total=0,
            succeeded=0,
            failed=0,
            cancelled=0,
            running=0,
            p50_duration_ms=None,
            p95_duration_ms=None,
        )
        found_empty = await context.store.get_run_timeseries(granularity, first + width, first + 2 * width)
        context.expect(found_empty, (empty,), "an empty bucket")
        for moment in (first, first + width / 3):
            found = await _series(context, granularity, moment, moment)
            context.expect(found, [], "the buckets of since == until")
    ends = (datetime(1, 1, 2, tzinfo=UTC), datetime(9999, 12, 30, tzinfo=UTC))
    for bound, other in zip(ends, (TICK, -TICK), strict=True):
        since, until = min(bound, bound + other), max(bound, bound + other)
        found = await _series(context, BY_DAY, since, until)
        context.expect([total for _, total in found], [0], f"the day at the limit of time, {since}")
    start_of_all = datetime(2000, 1, 1, tzinfo=UTC)
    found = await _series(context, BY_DAY, start_of_all, start_of_all + 10_000 * DAY)
    stamps = [stamp for stamp, _ in found]
    wanted_stamps = [start_of_all + n * DAY for n in range(10_000)]
    context.expect_that(
        stamps == wanted_stamps, f"the buckets of 10,000 days: expected 10,000, got {len(stamps)}"
    )


@example("QRY-5", needs=CLOCK)
async def overlapping_windows_agree(context: CheckContext) -> None:
    """A window has the same buckets whatever other windows were read before, such as parts of its days."""
    flow_id, midnight = new_id(context), datetime(2026, 6, 14, tzinfo=UTC)
    hours = (0, 1, 11, 23, 24, 25, 25, 47)
    for hour in hours:
        await _start_run(context, midnight + hour * HOUR, flow_id=flow_id)
    windows = [(0, 2), (10, 12), (22, 26), (0, 24), (24, 48), (1, 47), (0, 48)]
    for first, end in (*windows, *reversed(windows)):
        since, until = midnight + first * HOUR, midnight + end * HOUR
        wanted = [(midnight + hour * HOUR, hours.count(hour)) for hour in range(first, end)]
        found = await _series(context, BY_HOUR, since, until, flow_id)
        context.expect(found, wanted, f"the hours from {since} to {until} and their runs")
        days = [midnight + day * DAY for day in range(first // 24, -(-end // 24))]
        wanted = [(day, 4) for day in days]
        found = await _series(context, BY_DAY, since, until, flow_id)
        context.expect(found, wanted, f"the days from {since} to {until} and their runs")


@example("QRY-5", needs=CLOCK)
async def buckets_start_at_utc_hours_and_days(context: CheckContext) -> None:
    """Whatever the zones of since and until, a bucket starts at a whole UTC hour or day."""
    await _start_run(context, datetime(2026, 5, 14, 23, 30, tzinfo=UTC))
    zone = timezone(timedelta(hours=5, minutes=30))
    since = datetime(2026, 5, 15, 5, 0, tzinfo=zone)
    for granularity, hour in ((BY_DAY, 0), (BY_HOUR, 23)):
        wanted = [(datetime(2026, 5, 14, hour, tzinfo=UTC), 1)]
        found = await _series(context, granularity, since, since + timedelta(minutes=1))
        context.expect(found, wanted, f"the UTC {granularity} that contains {since}")


@example("QRY-5", needs=CLOCK)
async def buckets_count_runs_by_start_and_current_status(context: CheckContext) -> None:
    """Only runs of the given flow; a later status change counts in the bucket of the run's start."""
    store, other = context.store, new_id(context)
    first = datetime(2026, 3, 14, 9, tzinfo=UTC)
    await _start_run(context, first, RunStatus.SUCCEEDED, 5 * HOUR)
    await _start_run(context, first, RunStatus.SUCCEEDED)
    await _start_run(context, first + SECOND, RunStatus.FAILED)
    await _start_run(context, first, RunStatus.CANCELLED)
    await _start_run(context, first + HOUR - TICK)
    await _start_run(context, first + HOUR, RunStatus.FAILED, 3 * SECOND, flow_id=other)
    await _start_run(context, first + HOUR, None, flow_id=FLOW)
    names = ("total", "succeeded", "failed", "cancelled", "running")
    for flow_id, wanted in (
        (None, [(5, 2, 1, 1, 1), (2, 0, 1, 0, 1)]),
        (other, [(0, 0, 0, 0, 0), (1, 0, 1, 0, 0)]),
        (FLOW, [(5, 2, 1, 1, 1), (1, 0, 0, 0, 1)]),
        (new_id(context), [(0, 0, 0, 0, 0), (0, 0, 0, 0, 0)]),
    ):
        buckets = await store.get_run_timeseries(BY_HOUR, first, first + 2 * HOUR, flow_id)
        found = [tuple(getattr(bucket, name) for name in names) for bucket in buckets]
        context.expect(found, wanted, f"{', '.join(names)} of two hours, flow_id={flow_id}")
    plain: Any = "hour"
    found = [bucket.p50_duration_ms for bucket in await _plain(context, plain, first + HOUR, other)]
    context.expect(found, [3000.0], "a percentile of one flow's runs, with granularity as a plain str")


async def _plain(context: CheckContext, granularity: Any, first: datetime, flow_id: UUID) -> Any:
    return await context.store.get_run_timeseries(granularity, first, first + HOUR, flow_id)


@example("QRY-5", needs=CLOCK)
async def percentiles_are_linear_interpolated(context: CheckContext) -> None:
    """Type 7 over the durations of completed runs, in milliseconds; None without completed runs."""
    first = datetime(2026, 4, 14, tzinfo=UTC)
    cases: tuple[tuple[list[float], float | None, float | None], ...] = (
        ([], None, None),
        ([7.0], 7.0, 7.0),
        ([1.0, 2.0], 1.5, 1.95),
        ([3.0, 1.0, 2.0], 2.0, 2.9),
        ([10.0, 20.0, 30.0, 40.0], 25.0, 38.5),
        ([0.001, 0.002], 0.0015, 0.00195),
        ([0.0, 0.0, 86_400_000.0], 0.0, 77_760_000.0),
        ([float(n) for n in range(12)], 5.5, 10.45),
    )
    ends = (RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.CANCELLED)
    for at, (durations, p50, p95) in enumerate(cases):
        begun = first + at * HOUR
        for number, duration in enumerate(durations):
            await _start_run(context, begun, ends[number % 3], timedelta(milliseconds=duration))
        # A Running run has no duration.
        await _start_run(context, begun)
        buckets = await context.store.get_run_timeseries(BY_HOUR, begun, begun + HOUR)
        for name, wanted in (("p50_duration_ms", p50), ("p95_duration_ms", p95)):
            found = [getattr(bucket, name) for bucket in buckets]
            close = len(found) == 1 and (
                found[0] is wanted
                if wanted is None or found[0] is None
                else abs(found[0] - wanted) <= 1e-9 * max(1.0, wanted)
            )
            sentence = f"{name} of runs that took {durations} ms"
            context.expect_that(close, f"{sentence}: expected {wanted}, got {found}")
