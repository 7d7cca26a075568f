"""Mutants of statistics and timeseries in SQLite, and of the counters and summaries behind them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID

from flowstore_core import FlowStore, RunStatus, RunTimeseriesGranularity, StepStatus, open_store
from tests.calls import FLOW, new_run
from tests.source_mutants import source_mutant
from tests.source_mutants.sqlite_setup import ended_run, new_step
from tests.virtual_clock import VirtualClock

STATISTICS = "flowstore_sqlite/statistics.py"
SUMMARIES = "flowstore_sqlite/migrations/0002_summaries.sql"
COUNTS = "flowstore_sqlite/migrations/0004_counts.sql"
HOUR = RunTimeseriesGranularity.HOUR
DAY = RunTimeseriesGranularity.DAY
MIDNIGHT = datetime(2026, 3, 14, tzinfo=UTC)
NEXT_DAY = MIDNIGHT + timedelta(days=1)
NOON = MIDNIGHT + timedelta(hours=12)
OTHER_FLOW = UUID(int=7)


async def _totals(
    store: FlowStore,
    since: datetime = MIDNIGHT,
    until: datetime = NEXT_DAY,
    granularity: RunTimeseriesGranularity = DAY,
    flow_id: UUID | None = None,
) -> list[int]:
    return [one.total for one in await store.get_run_timeseries(granularity, since, until, flow_id)]


@source_mutant(
    "sqlite",
    kind="time",
    clauses=("QRY-4",),
    changes=[
        (STATISTICS, "to_us(as_of)) // DAY", "to_us(as_of)) / DAY"),
        (STATISTICS, "(COUNT_COMPLETED, (day,))", "(COUNT_COMPLETED, (int(day),))"),
    ],
)
async def day_of_statistics_rounds_towards_1970(url: str) -> None:
    """The day of as_of is rounded towards 1970, so before 1970 it is the day after."""
    clock = VirtualClock(datetime(1969, 12, 30, 12, tzinfo=UTC))
    async with open_store(url, clock=clock) as store:
        await ended_run(store)
        assert (await store.get_statistics(as_of=clock())).completed_today == 1


@source_mutant(
    "sqlite",
    kind="time",
    clauses=("QRY-4",),
    changes=[
        (
            SUMMARIES,
            "    SELECT (NEW.completed_at - ((NEW.completed_at % 86400000000) + 86400000000) % "
            "86400000000) / 86400000000,",
            "    SELECT NEW.completed_at / 86400000000,",
        )
    ],
)
async def day_of_completion_rounds_towards_1970(url: str) -> None:
    """A run that was completed before 1970 counts on the day after."""
    clock = VirtualClock(datetime(1969, 12, 30, 12, tzinfo=UTC))
    async with open_store(url, clock=clock) as store:
        await ended_run(store)
        assert (await store.get_statistics(as_of=clock())).completed_today == 1


@source_mutant(
    "sqlite",
    kind="index",
    clauses=("QRY-4",),
    changes=[
        (
            SUMMARIES,
            "    SELECT (NEW.completed_at - ((NEW.completed_at % 86400000000) + 86400000000) % "
            "86400000000) / 86400000000,",
            "    SELECT (NEW.started_at - ((NEW.started_at % 86400000000) + 86400000000) % "
            "86400000000) / 86400000000,",
        )
    ],
)
async def run_counts_on_the_day_of_its_start(url: str) -> None:
    """completed_today counts a run on the day on which it started."""
    clock = VirtualClock(NOON)
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        clock.advance(days=1)
        await store.complete_run(run_id, RunStatus.SUCCEEDED)
        assert (await store.get_statistics()).completed_today == 1


@source_mutant(
    "sqlite",
    kind="cache",
    clauses=("QRY-5",),
    changes=[
        (
            SUMMARIES,
            "    WHERE day = (NEW.started_at - ((NEW.started_at",
            "    WHERE day = (NEW.completed_at - ((NEW.started_at",
        )
    ],
)
async def completion_invalidates_another_day(url: str) -> None:
    """Completing a run leaves the cached summary of the day on which it started."""
    clock = VirtualClock(NOON)
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.get_run_timeseries(DAY, MIDNIGHT, NEXT_DAY)
        clock.advance(days=1, minutes=7)
        await store.complete_run(run_id, RunStatus.SUCCEEDED)
        (bucket,) = await store.get_run_timeseries(DAY, MIDNIGHT, NEXT_DAY)
        assert (bucket.running, bucket.succeeded) == (0, 1)


@source_mutant(
    "sqlite",
    kind="index",
    clauses=("QRY-4", "STP-6"),
    changes=[
        (
            SUMMARIES,
            "    WHERE day = (NEW.started_at - ((NEW.started_at % 86400000000) + 86400000000) % "
            "86400000000) / 86400000000;\n"
            "    UPDATE run_days SET succeeded = succeeded - (OLD.status = 'Succeeded'),\n"
            "        failed = failed - (OLD.status = 'Failed')\n",
            "    WHERE day = (NEW.started_at - ((NEW.started_at % 86400000000) + 86400000000) % "
            "86400000000) / 86400000000;\n"
            "    UPDATE run_days SET succeeded = succeeded - (OLD.status = 'Succeeded')\n",
        )
    ],
)
async def retried_run_still_counts_as_failed(url: str) -> None:
    """failed_today counts a failed run that was reopened."""
    async with open_store(url, clock=VirtualClock()) as store:
        run_id = await new_run(store)
        await new_step(store, run_id, status=StepStatus.FAILED)
        await store.complete_run(run_id, RunStatus.FAILED)
        await store.retry_step(run_id, "charge")
        assert (await store.get_statistics()).failed_today == 0


@source_mutant(
    "sqlite",
    kind="index",
    clauses=("QRY-1", "QRY-4"),
    changes=[
        (
            COUNTS,
            "DELETE FROM run_counts WHERE flow_id = OLD.flow_id AND amount = 0;",
            "DELETE FROM run_counts WHERE flow_id = OLD.flow_id AND status = OLD.status;",
        )
    ],
)
async def deleted_run_takes_the_count_of_its_status(url: str) -> None:
    """Deleting one run of a flow deletes the counter of all its runs of that status."""
    clock = VirtualClock(MIDNIGHT)
    async with open_store(url, clock=clock) as store:
        await ended_run(store)
        clock.advance(hours=2)
        await ended_run(store)
        await store.cleanup(MIDNIGHT + timedelta(hours=1))
        assert (await store.get_runs_page()).total_count == 1


@source_mutant(
    "sqlite",
    kind="cache",
    clauses=("RET-1", "QRY-5"),
    changes=[
        (
            COUNTS,
            "    UPDATE run_days SET changes = changes + 1\n"
            "    WHERE day = (OLD.started_at - ((OLD.started_at % 86400000000) + 86400000000) % "
            "86400000000) / 86400000000;\n",
            "",
        )
    ],
)
async def cleanup_leaves_the_summary_of_the_day(url: str) -> None:
    """A cached summary counts runs that cleanup has deleted."""
    clock = VirtualClock(NOON)
    async with open_store(url, clock=clock) as store:
        await ended_run(store)
        assert await _totals(store) == [1]
        await store.cleanup(clock.advance(hours=2))
        assert await _totals(store) == [0]


@source_mutant(
    "sqlite",
    kind="cache",
    clauses=("QRY-5",),
    changes=[
        (
            STATISTICS,
            "    AND kept.day = run_days.day AND kept.changes = run_days.changes\n",
            "    AND kept.day = run_days.day\n",
        )
    ],
)
async def summary_is_kept_for_ever(url: str) -> None:
    """A cached summary of a day is used after the day has changed."""
    async with open_store(url, clock=VirtualClock(NOON)) as store:
        await new_run(store)
        await _totals(store)
        await new_run(store)
        assert await _totals(store) == [2]


@source_mutant(
    "sqlite",
    kind="cache",
    clauses=("QRY-5",),
    changes=[
        (
            STATISTICS,
            "kept.granularity = :granularity AND kept.scope = :scope\n",
            "kept.granularity = :granularity\n",
        )
    ],
)
async def flows_share_their_summaries(url: str) -> None:
    """The timeseries of one flow comes from the cached summary of another."""
    async with open_store(url, clock=VirtualClock(NOON)) as store:
        await new_run(store)
        await _totals(store, flow_id=FLOW)
        assert await _totals(store, flow_id=OTHER_FLOW) == [0]


@source_mutant(
    "sqlite",
    kind="cache",
    clauses=("QRY-5",),
    changes=[
        (
            STATISTICS,
            "kept.granularity = :granularity AND kept.scope = :scope\n",
            "kept.scope = :scope\n",
        )
    ],
)
async def hours_and_days_share_their_summaries(url: str) -> None:
    """The buckets of a day come from the cached buckets of its hours."""
    async with open_store(url, clock=VirtualClock(NOON)) as store:
        await new_run(store)
        await _totals(store, granularity=HOUR)
        assert await _totals(store) == [1]


@source_mutant(
    "sqlite",
    kind="cache",
    clauses=("QRY-5",),
    changes=[(STATISTICS, 'if window == {"since": day * DAY, "until": (day + 1) * DAY}:', "if buckets:")],
)
async def part_of_a_day_is_cached_as_the_day(url: str) -> None:
    """The buckets of a few hours are cached as those of the whole day."""
    clock = VirtualClock(MIDNIGHT)
    async with open_store(url, clock=clock) as store:
        await new_run(store)
        clock.now = NOON
        await new_run(store)
        await _totals(store, until=MIDNIGHT + timedelta(hours=2), granularity=HOUR)
        assert sum(await _totals(store, granularity=HOUR)) == 2


@source_mutant(
    "sqlite",
    kind="time",
    clauses=("QRY-5",),
    changes=[(STATISTICS, "AND run_days.day <= :last", "AND run_days.day < :last")],
)
async def window_within_its_last_day_is_empty(url: str) -> None:
    """A window that ends before midnight leaves out its last day."""
    async with open_store(url, clock=VirtualClock(NOON)) as store:
        await new_run(store)
        assert sum(await _totals(store, until=NOON + timedelta(hours=1), granularity=HOUR)) == 1


@source_mutant(
    "sqlite",
    kind="time",
    clauses=("QRY-5",),
    changes=[(STATISTICS, "start = started_at // width * width", "start = int(started_at / width) * width")],
)
async def buckets_round_towards_1970(url: str) -> None:
    """A run that started before 1970 counts in the bucket after its own."""
    since = datetime(1969, 12, 30, tzinfo=UTC)
    async with open_store(url, clock=VirtualClock(since + timedelta(hours=12))) as store:
        await new_run(store)
        assert await _totals(store, since, since + timedelta(days=1)) == [1]


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("QRY-5",),
    changes=[(STATISTICS, '"ORDER BY duration"', '"ORDER BY started_at"')],
)
async def percentiles_of_unordered_durations(url: str) -> None:
    """Percentiles are computed from durations in the order of the starts."""
    clock = VirtualClock(NOON)
    async with open_store(url, clock=clock) as store:
        for seconds in (1, 9, 2):
            run_id = await new_run(store)
            clock.advance(seconds=seconds)
            await store.complete_run(run_id, RunStatus.SUCCEEDED)
        (bucket,) = await store.get_run_timeseries(DAY, MIDNIGHT, NEXT_DAY)
        assert bucket.p50_duration_ms == 2000


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("QRY-5",),
    changes=[
        (
            STATISTICS,
            "WHERE status IN ('Running', 'Succeeded', 'Failed', 'Cancelled')",
            "WHERE status IN ('Running', 'Succeeded', 'Failed')",
        )
    ],
)
async def timeseries_omit_cancelled_runs(url: str) -> None:
    """Timeseries leave out cancelled runs."""
    async with open_store(url, clock=VirtualClock(NOON)) as store:
        await ended_run(store, RunStatus.CANCELLED)
        assert await _totals(store) == [1]


@source_mutant(
    "sqlite",
    kind="time",
    clauses=("QRY-5",),
    changes=[(STATISTICS, "AND started_at >= :since", "AND started_at > :since")],
)
async def run_that_starts_at_midnight_is_omitted(url: str) -> None:
    """Timeseries leave out a run that started exactly at the beginning of a day."""
    async with open_store(url, clock=VirtualClock(MIDNIGHT)) as store:
        await new_run(store)
        assert await _totals(store) == [1]


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("QRY-5",),
    changes=[
        (
            STATISTICS,
            "percentile_ms(durations[start], 0.95),",
            "percentile_ms(durations[start], 0.9),",
        )
    ],
)
async def p95_is_p90(url: str) -> None:
    """p95_duration_ms is the 90th percentile."""
    clock = VirtualClock(NOON)
    async with open_store(url, clock=clock) as store:
        for _ in range(2):
            run_id = await new_run(store)
            clock.advance(seconds=1)
            await store.complete_run(run_id, RunStatus.SUCCEEDED)
            clock.advance(seconds=1)
        run_id = await new_run(store)
        clock.advance(seconds=11)
        await store.complete_run(run_id, RunStatus.SUCCEEDED)
        (bucket,) = await store.get_run_timeseries(DAY, MIDNIGHT, NEXT_DAY)
        assert bucket.p95_duration_ms == 10_000


@source_mutant(
    "sqlite",
    kind="index",
    clauses=("QRY-4", "QRY-1"),
    changes=[
        (
            SUMMARIES,
            "AFTER UPDATE OF status, completed_at ON runs BEGIN\n"
            "    UPDATE run_counts SET amount = amount - 1 WHERE flow_id = OLD.flow_id AND status "
            "= OLD.status;",
            "AFTER UPDATE OF status, completed_at ON runs BEGIN\n"
            "    UPDATE run_counts SET amount = amount - 1 WHERE status = OLD.status;",
        )
    ],
)
async def completion_counts_for_every_flow(url: str) -> None:
    """Completing a run of one flow lowers the number of Running runs of every flow."""
    async with open_store(url) as store:
        await new_run(store, flow_id=OTHER_FLOW)
        await ended_run(store)
        assert (await store.get_statistics()).active_runs == 1
