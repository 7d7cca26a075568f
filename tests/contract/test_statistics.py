"""QRY-4 and QRY-5: dashboard counts and timeseries."""

from __future__ import annotations

import statistics
from datetime import UTC, datetime, timedelta, timezone
from uuid import uuid4

import pytest

from flowstore_core import (
    Capability,
    DashboardStatistics,
    FlowStore,
    RunStatus,
    RunTimeseriesBucket,
    RunTimeseriesGranularity,
)
from tests.contract.scenes import FLOW, new_run, run_step
from tests.virtual_clock import VirtualClock

pytestmark = pytest.mark.needs(Capability.DASHBOARD)

HOUR = RunTimeseriesGranularity.HOUR
DAY = RunTimeseriesGranularity.DAY


async def _run(
    store: FlowStore,
    clock: VirtualClock,
    started: datetime,
    status: RunStatus | None = None,
    duration: timedelta = timedelta(0),
    **overrides: object,
) -> None:
    clock.now = started
    run_id = await new_run(store, **overrides)
    if status is not None:
        clock.now = started + duration
        await store.complete_run(run_id, status)


def _counts(bucket: RunTimeseriesBucket) -> tuple[int, int, int, int, int]:
    return bucket.total, bucket.succeeded, bucket.failed, bucket.cancelled, bucket.running


async def test_qry_4_an_empty_store_counts_nothing(store: FlowStore) -> None:
    assert await store.get_statistics() == DashboardStatistics(
        total_flows=0, active_runs=0, completed_today=0, failed_today=0
    )


async def test_qry_4_today_is_the_utc_day_of_completion(store: FlowStore, clock: VirtualClock) -> None:
    midnight = datetime(2026, 3, 14, tzinfo=UTC)
    tick = timedelta(microseconds=1)
    other = uuid4()
    # Started yesterday, completed today: today's.
    await _run(store, clock, midnight - tick, RunStatus.SUCCEEDED, tick)
    await _run(store, clock, midnight, RunStatus.FAILED, flow_id=other)
    await _run(store, clock, midnight, RunStatus.FAILED, timedelta(days=1) - tick)
    await _run(store, clock, midnight, RunStatus.CANCELLED)
    # Yesterday's and tomorrow's.
    await _run(store, clock, midnight - 2 * tick, RunStatus.SUCCEEDED, tick)
    await _run(store, clock, midnight, RunStatus.SUCCEEDED, timedelta(days=1))
    await _run(store, clock, midnight, RunStatus.FAILED, timedelta(days=1))
    for days in (0, -1, -20):
        await _run(store, clock, midnight + timedelta(days=days), flow_id=uuid4())

    clock.now = midnight + timedelta(hours=12)
    today = DashboardStatistics(total_flows=5, active_runs=3, completed_today=1, failed_today=2)
    assert await store.get_statistics() == today
    assert await store.get_statistics(as_of=midnight) == today
    assert await store.get_statistics(as_of=midnight + timedelta(days=1) - tick) == today
    # Whatever the zone, the day is UTC's.
    zone = timezone(timedelta(hours=14))
    assert await store.get_statistics(as_of=midnight.astimezone(zone)) == today
    tomorrow = await store.get_statistics(as_of=midnight + timedelta(days=1))
    assert (tomorrow.completed_today, tomorrow.failed_today) == (1, 1)
    yesterday = await store.get_statistics(as_of=midnight - tick)
    assert (yesterday.completed_today, yesterday.failed_today) == (1, 0)


async def test_qry_4_flows_are_those_of_stored_runs(store: FlowStore, clock: VirtualClock) -> None:
    for _ in range(3):
        await _run(store, clock, clock.now, RunStatus.SUCCEEDED)
    await new_run(store, flow_id=uuid4())
    await store.configure_run(uuid4(), uuid4(), "manual")
    assert (await store.get_statistics()).total_flows == 2
    await store.cleanup(clock.advance(seconds=1))
    assert (await store.get_statistics()).total_flows == 1


async def test_qry_4_a_reopened_run_is_active_and_not_completed(store: FlowStore) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id, "charge")
    await store.complete_run(run_id, RunStatus.SUCCEEDED)
    assert (await store.get_statistics()).completed_today == 1
    await store.retry_step(run_id, "charge")
    found = await store.get_statistics()
    assert (found.active_runs, found.completed_today, found.failed_today) == (1, 0, 0)


async def test_qry_4_the_first_and_last_day_a_store_can_hold(store: FlowStore) -> None:
    await new_run(store)
    for moment in (datetime(1, 1, 2, tzinfo=UTC), datetime(9999, 12, 30, tzinfo=UTC)):
        assert (await store.get_statistics(as_of=moment)).active_runs == 1


@pytest.mark.parametrize("granularity", [HOUR, DAY])
async def test_qry_5_buckets_are_whole_contiguous_and_may_be_empty(
    store: FlowStore, clock: VirtualClock, granularity: RunTimeseriesGranularity
) -> None:
    width = timedelta(hours=1) if granularity is HOUR else timedelta(days=1)
    start = datetime(2026, 2, 27, tzinfo=UTC)
    tick = timedelta(microseconds=1)
    await _run(store, clock, start - tick)
    await _run(store, clock, start)
    await _run(store, clock, start + width - tick)
    await _run(store, clock, start + 3 * width)
    await _run(store, clock, start + 4 * width)
    buckets = await store.get_run_timeseries(granularity, start, start + 4 * width)
    assert [bucket.timestamp for bucket in buckets] == [start + n * width for n in range(4)]
    assert [bucket.total for bucket in buckets] == [2, 0, 0, 1]
    assert buckets[1] == RunTimeseriesBucket(
        timestamp=start + width,
        total=0,
        succeeded=0,
        failed=0,
        cancelled=0,
        running=0,
        p50_duration_ms=None,
        p95_duration_ms=None,
    )


async def test_qry_5_since_is_floored_and_until_ceiled(store: FlowStore, clock: VirtualClock) -> None:
    start = datetime(2026, 3, 14, 9, tzinfo=UTC)
    hour, tick = timedelta(hours=1), timedelta(microseconds=1)
    await _run(store, clock, start)
    await _run(store, clock, start + 2 * hour - tick)

    async def stamps(since: datetime, until: datetime) -> list[datetime]:
        return [b.timestamp for b in await store.get_run_timeseries(HOUR, since, until)]

    assert await stamps(start + tick, start + hour + tick) == [start, start + hour]
    assert await stamps(start + hour - tick, start + hour) == [start]
    assert await stamps(start, start + tick) == [start]
    buckets = await store.get_run_timeseries(HOUR, start + hour - tick, start + hour + tick)
    assert [bucket.total for bucket in buckets] == [1, 1]
    days = await store.get_run_timeseries(DAY, start, start + tick)
    assert [(b.timestamp, b.total) for b in days] == [(start.replace(hour=0), 2)]


async def test_qry_5_since_equal_to_until_gives_none(store: FlowStore, clock: VirtualClock) -> None:
    await new_run(store)
    now = clock()
    for moment in (now, now.replace(minute=0, second=0, microsecond=0)):
        assert await store.get_run_timeseries(HOUR, moment, moment) == ()


async def test_qry_5_buckets_are_utcs_whatever_the_zone(store: FlowStore, clock: VirtualClock) -> None:
    await _run(store, clock, datetime(2026, 3, 14, 23, 30, tzinfo=UTC))
    zone = timezone(timedelta(hours=5, minutes=30))
    since = datetime(2026, 3, 15, 5, 0, tzinfo=zone)
    (bucket,) = await store.get_run_timeseries(DAY, since, since + timedelta(minutes=1))
    assert (bucket.timestamp, bucket.total) == (datetime(2026, 3, 14, tzinfo=UTC), 1)
    assert bucket.timestamp.utcoffset() == timedelta(0)


async def test_qry_5_runs_count_by_start_and_present_status(store: FlowStore, clock: VirtualClock) -> None:
    start = datetime(2026, 3, 14, 9, tzinfo=UTC)
    await _run(store, clock, start, RunStatus.SUCCEEDED, timedelta(hours=5))
    await _run(store, clock, start, RunStatus.SUCCEEDED)
    await _run(store, clock, start, RunStatus.FAILED)
    await _run(store, clock, start, RunStatus.CANCELLED)
    await _run(store, clock, start)
    await _run(store, clock, start + timedelta(hours=1), RunStatus.FAILED)
    one, two = await store.get_run_timeseries(HOUR, start, start + timedelta(hours=2))
    assert _counts(one) == (5, 2, 1, 1, 1)
    assert _counts(two) == (1, 0, 1, 0, 0)


async def test_qry_5_only_the_asked_flow_counts(store: FlowStore, clock: VirtualClock) -> None:
    start, other = clock(), uuid4()
    await _run(store, clock, start, RunStatus.SUCCEEDED, timedelta(seconds=1))
    await _run(store, clock, start, RunStatus.FAILED, timedelta(seconds=3), flow_id=other)
    end = start + timedelta(microseconds=1)
    (everything,) = await store.get_run_timeseries(HOUR, start, end)
    (one,) = await store.get_run_timeseries(HOUR, start, end, other)
    (none,) = await store.get_run_timeseries(HOUR, start, end, flow_id=uuid4())
    assert (everything.total, everything.p50_duration_ms) == (2, 2000.0)
    assert (_counts(one), one.p50_duration_ms) == ((1, 0, 1, 0, 0), 3000.0)
    assert (none.total, none.p50_duration_ms) == (0, None)
    (mine,) = await store.get_run_timeseries(HOUR, start, end, FLOW)
    assert mine.total == 1


@pytest.mark.parametrize(
    ("milliseconds", "p50", "p95"),
    [
        ([7.0], 7.0, 7.0),
        ([1.0, 2.0], 1.5, 1.95),
        ([3.0, 1.0, 2.0], 2.0, 2.9),
        ([0.001, 0.002], 0.0015, 0.00195),
        ([0.0, 0.0, 86_400_000.0], 0.0, 77_760_000.0),
    ],
)
async def test_qry_5_percentiles_are_linear_interpolated(
    store: FlowStore, clock: VirtualClock, milliseconds: list[float], p50: float, p95: float
) -> None:
    start = clock()
    for number, duration in enumerate(milliseconds):
        status = [RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.CANCELLED][number % 3]
        await _run(store, clock, start, status, timedelta(milliseconds=duration))
    await _run(store, clock, start)
    (bucket,) = await store.get_run_timeseries(HOUR, start, start + timedelta(microseconds=1))
    assert bucket.p50_duration_ms == pytest.approx(p50, rel=1e-12)
    assert bucket.p95_duration_ms == pytest.approx(p95, rel=1e-12)
    assert (type(bucket.p50_duration_ms), type(bucket.p95_duration_ms)) == (float, float)


async def test_qry_5_percentiles_agree_with_the_textbook(store: FlowStore, clock: VirtualClock) -> None:
    start = clock()
    microseconds = [n * n * 7919 % 1_000_003 for n in range(1, 42)]
    for duration in microseconds:
        await _run(store, clock, start, RunStatus.SUCCEEDED, timedelta(microseconds=duration))
    (bucket,) = await store.get_run_timeseries(HOUR, start, start + timedelta(microseconds=1))
    twentieths = statistics.quantiles(microseconds, n=20, method="inclusive")
    assert bucket.p50_duration_ms == pytest.approx(twentieths[9] / 1000, rel=1e-12)
    assert bucket.p95_duration_ms == pytest.approx(twentieths[18] / 1000, rel=1e-12)


async def test_qry_5_at_most_ten_thousand_buckets(store: FlowStore) -> None:
    start = datetime(2000, 1, 1, tzinfo=UTC)
    buckets = await store.get_run_timeseries(DAY, start, start + timedelta(days=10_000))
    assert len(buckets) == 10_000
    assert {bucket.total for bucket in buckets} == {0}


async def test_qry_5_at_the_limits_of_time(store: FlowStore, clock: VirtualClock) -> None:
    first, last = datetime(1, 1, 2, tzinfo=UTC), datetime(9999, 12, 30, tzinfo=UTC)
    await _run(store, clock, first)
    await _run(store, clock, last - timedelta(microseconds=1))
    (bucket,) = await store.get_run_timeseries(DAY, first, first + timedelta(microseconds=1))
    assert bucket.total == 1
    (bucket,) = await store.get_run_timeseries(DAY, last - timedelta(seconds=1), last)
    assert (bucket.timestamp, bucket.total) == (last - timedelta(days=1), 1)


async def test_qry_5_granularity_may_be_a_plain_str(store: FlowStore, clock: VirtualClock) -> None:
    await new_run(store)
    (bucket,) = await store.get_run_timeseries("day", clock(), clock() + timedelta(seconds=1))  # type: ignore[arg-type]
    assert bucket.total == 1
