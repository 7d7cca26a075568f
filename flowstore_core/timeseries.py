"""Pure rules about time: limits of datetimes, buckets and percentiles (INP-3, QRY-5)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from math import floor

from flowstore_core.status import RunTimeseriesGranularity

EARLIEST = datetime(1, 1, 2, tzinfo=UTC)
LATEST = datetime(9999, 12, 30, tzinfo=UTC)
MAX_BUCKETS = 10_000

BUCKET_WIDTH = {
    RunTimeseriesGranularity.HOUR: timedelta(hours=1),
    RunTimeseriesGranularity.DAY: timedelta(days=1),
}


def day_start(moment: datetime) -> datetime:
    """Midnight of the UTC day of a datetime."""
    return moment.replace(hour=0, minute=0, second=0, microsecond=0)


def bucket_floor(moment: datetime, granularity: RunTimeseriesGranularity) -> datetime:
    """The start of the bucket that contains a datetime (UTC)."""
    if granularity is RunTimeseriesGranularity.DAY:
        return day_start(moment)
    return moment.replace(minute=0, second=0, microsecond=0)


def bucket_ceil(moment: datetime, granularity: RunTimeseriesGranularity) -> datetime:
    """The datetime itself if it starts a bucket, otherwise the start of the next bucket."""
    start = bucket_floor(moment, granularity)
    return start if start == moment else start + BUCKET_WIDTH[granularity]


def whole_days(since: datetime, until: datetime) -> tuple[datetime, datetime]:
    """Widen a window of at least one day to whole days; return a shorter one unchanged.

    For backends that cache the results of whole days: the first and last day of a window can be cached too,
    while a short window, which is requested often, does not cost a whole day.
    """
    day = RunTimeseriesGranularity.DAY
    if until - since < BUCKET_WIDTH[day]:
        return since, until
    return day_start(since), bucket_ceil(until, day)


def bucket_starts(
    since: datetime, until: datetime, granularity: RunTimeseriesGranularity
) -> Iterator[datetime]:
    """The starts of all buckets between two aligned bounds."""
    while since < until:
        yield since
        since += BUCKET_WIDTH[granularity]


def percentile(ordered: Sequence[int], fraction: float) -> float | None:
    """The linear-interpolated (type 7) percentile of ascending values; None for none."""
    if not ordered:
        return None
    position = fraction * (len(ordered) - 1)
    low = floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def percentile_ms(ordered_us: Sequence[int], fraction: float) -> float | None:
    """The percentile of ascending durations in microseconds, in milliseconds; None for none."""
    value = percentile(ordered_us, fraction)
    return None if value is None else value / 1000
