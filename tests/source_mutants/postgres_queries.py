"""Faults of pages, searches, statistics and their counters on PostgreSQL."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID

from flowstore_core import FlowStore, RunStatus, RunTimeseriesGranularity, StepStatus, open_store
from flowstore_core.timeseries import day_start
from tests.calls import new_run
from tests.source_mutants import source_mutant
from tests.source_mutants.postgres_setup import end, finish
from tests.virtual_clock import VirtualClock

PAGES = "flowstore_postgres/pages.py"
SEARCH = "flowstore_postgres/search.py"
STATISTICS = "flowstore_postgres/statistics.py"
SUMMARIES = "flowstore_postgres/migrations/0002_summaries.sql"
INDEX = "flowstore_postgres/migrations/0003_search.sql"
FUNCTIONS = "flowstore_postgres/migrations/0007_self_contained.sql"
DAY = RunTimeseriesGranularity.DAY
HOUR = RunTimeseriesGranularity.HOUR


async def _maintain(store: FlowStore, clock: VirtualClock) -> None:
    """Fold the counters and index the ended runs; deletes no run."""
    assert await store.cleanup(clock.now - timedelta(days=3650)) == 0


async def _found(store: FlowStore, search: str) -> int:
    return (await store.get_runs_page(search=search)).total_count


async def _totals(store: FlowStore, clock: VirtualClock, **filters: Any) -> list[int]:
    """The totals of today's timeseries."""
    today = day_start(clock.now)
    buckets = await store.get_run_timeseries(DAY, today, today + timedelta(days=1), **filters)
    return [bucket.total for bucket in buckets]


# Pages


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("QRY-1",),
    changes=[
        (
            PAGES,
            'position = f"({self.argument(after.started_at)}, {self.argument(after.run_id)})"',
            "position = self.argument(after.started_at)",
        ),
        (PAGES, '"(r.started_at, r.run_id) < {position}"', '"r.started_at < {position}"'),
    ],
)
async def page_skips_runs_of_one_time(url: str) -> None:
    """A page after a position skips the runs that started at the same time."""
    async with open_store(url, clock=VirtualClock()) as store:
        for n in range(4):
            await new_run(store, run_id=UUID(int=n + 1))
        first = await store.get_runs(take=2)
        rest = await store.get_runs(after=first[-1].position)
        assert len(rest) == 2, "runs are skipped"


@source_mutant(
    "postgresql",
    kind="time",
    clauses=("QRY-1",),
    changes=[
        (
            PAGES,
            'position = f"({self.argument(after.started_at)}, {self.argument(after.run_id)})"',
            "started_at = after.started_at\n"
            "            started_at = started_at.replace(\n"
            "                microsecond=started_at.microsecond // 1000 * 1000\n"
            "            )\n"
            '            position = f"({self.argument(started_at)}, {self.argument(after.run_id)})"',
        )
    ],
)
async def position_is_cut_to_milliseconds(url: str) -> None:
    """A page after a position skips runs that started in the same millisecond before it."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        for _ in range(3):
            await new_run(store)
            clock.advance(microseconds=1)
        first = await store.get_runs(take=1)
        assert len(await store.get_runs(after=first[-1].position)) == 2, "runs are skipped"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("QRY-1",),
    changes=[(PAGES, "limits = (skip, take, min(skip + take, MAX_INT64))", "limits = (skip, take, take)")],
)
async def skip_counts_within_the_page(url: str) -> None:
    """A page with a skip has fewer runs than asked for, because each index scan ends after ``take``."""
    async with open_store(url) as store:
        for _ in range(6):
            await new_run(store)
        assert len(await store.get_runs(skip=2, take=3)) == 3, "the page is too short"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("QRY-1", "QRY-2"),
    changes=[(PAGES, "FROM found r WHERE {after}\n", "FROM found r WHERE ({after} OR true)\n")],
)
async def search_ignores_the_position(url: str) -> None:
    """A search begins at the first match although it names a position."""
    async with open_store(url) as store:
        for _ in range(3):
            await new_run(store)
        first = (await store.get_runs_page(search="orders", take=2)).runs
        rest = await store.get_runs_page(search="orders", after=first[-1].position)
        assert len(rest.runs) == 1, "the search repeats runs"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("QRY-1", "QRY-3"),
    changes=[
        (
            PAGES,
            "SELECT (SELECT count(*) FROM found) AS total",
            "SELECT (SELECT count(*) FROM found r WHERE {{after}}) AS total",
        )
    ],
)
async def search_counts_from_the_position(url: str) -> None:
    """The total_count of a search counts only the runs behind the position."""
    async with open_store(url) as store:
        for _ in range(3):
            await new_run(store)
        (first,) = (await store.get_runs_page(search="orders", take=1)).runs
        page = await store.get_runs_page(search="orders", after=first.position)
        assert page.total_count == 3, "the count depends on the position"


# Counters


@source_mutant(
    "postgresql",
    kind="index",
    clauses=("QRY-1", "QRY-3"),
    changes=[
        (
            PAGES,
            '" + ".join(one.value.lower() for one in self._statuses)',
            '" + ".join(\n'
            "            one.value.lower() for one in self._statuses\n"
            "            if one is not RunStatus.CANCELLED or len(self._statuses) == 1\n"
            "        )",
        )
    ],
)
async def folded_total_omits_cancelled_runs(url: str) -> None:
    """The total_count of all statuses omits Cancelled runs once they are folded into the counters."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        await end(store, await new_run(store), RunStatus.CANCELLED)
        await _maintain(store, clock)
        assert (await store.get_runs_page()).total_count == 1, "a Cancelled run is not counted"


@source_mutant(
    "postgresql",
    kind="index",
    clauses=("QRY-4",),
    changes=[
        (
            STATISTICS,
            "running + succeeded + failed + cancelled AS runs",
            "running + succeeded + failed AS runs",
        )
    ],
)
async def flow_of_cancelled_runs_is_not_counted(url: str) -> None:
    """total_flows omits a flow whose runs were all cancelled, once they are folded into the counters."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        await end(store, await new_run(store), RunStatus.CANCELLED)
        await _maintain(store, clock)
        assert (await store.get_statistics()).total_flows == 1, "the flow is not counted"


@source_mutant(
    "postgresql",
    kind="index",
    clauses=("QRY-1", "QRY-3", "QRY-4"),
    changes=[
        (FUNCTIONS, "cancelled = c.cancelled + excluded.cancelled\n", "cancelled = excluded.cancelled\n")
    ],
)
async def second_fold_replaces_the_cancelled_runs(url: str) -> None:
    """Folding replaces the number of Cancelled runs of a flow instead of adding to it."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        for _ in range(2):
            await end(store, await new_run(store), RunStatus.CANCELLED)
            await _maintain(store, clock)
        page = await store.get_runs_page(status=RunStatus.CANCELLED)
        assert page.total_count == 2, "an earlier run is not counted"


@source_mutant(
    "postgresql",
    kind="index",
    clauses=("QRY-1", "QRY-3", "QRY-4", "RET-1"),
    changes=[
        (
            SUMMARIES,
            "CREATE TRIGGER count_deleted AFTER DELETE ON {schema}.runs\n"
            "    FOR EACH ROW EXECUTE FUNCTION {schema}.count_run_changes();\n",
            "",
        )
    ],
)
async def deleted_runs_are_still_counted(url: str) -> None:
    """Runs that cleanup deletes are counted for ever."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        await end(store, await new_run(store))
        assert await store.cleanup(clock.advance(seconds=1)) == 1
        assert (await store.get_runs_page()).total_count == 0, "a deleted run is counted"


@source_mutant(
    "postgresql",
    kind="index",
    clauses=("QRY-4", "QRY-3", "STP-6"),
    changes=[
        (
            SUMMARIES,
            "started_at, flow_id ON {schema}.runs\n    FOR EACH ROW EXECUTE",
            "started_at, flow_id ON {schema}.runs\n    FOR EACH ROW WHEN (NEW.status <> 'Running') EXECUTE",
        )
    ],
)
async def reopened_run_is_not_counted_as_active(url: str) -> None:
    """A run that retry_step reopens still counts as ended."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await finish(store, run_id, "a", StepStatus.FAILED)
        await end(store, run_id, RunStatus.FAILED)
        await store.retry_step(run_id, "a")
        assert (await store.get_statistics()).active_runs == 1, "the reopened run does not count as active"


@source_mutant(
    "postgresql",
    kind="time",
    clauses=("QRY-4",),
    changes=[
        (
            FUNCTIONS,
            "), (\n            NEW.flow_id, (NEW.started_at AT TIME ZONE 'UTC')::date,\n"
            "            (NEW.completed_at AT TIME ZONE 'UTC')::date,",
            "), (\n            NEW.flow_id, (NEW.started_at AT TIME ZONE 'UTC')::date,\n"
            "            CASE WHEN NEW.completed_at IS NOT NULL THEN current_date END,",
        )
    ],
)
async def runs_are_completed_on_the_servers_day(url: str) -> None:
    """completed_today counts by the server's date at the completion instead of by completed_at."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        await end(store, await new_run(store))
        assert (await store.get_statistics()).completed_today == 1, "the run counts on another day"


# Timeseries


@source_mutant(
    "postgresql",
    kind="cache",
    clauses=("QRY-5",),
    changes=[(STATISTICS, "run_summaries s USING (day, changes)", "run_summaries s USING (day)")],
)
async def summaries_are_never_invalidated(url: str) -> None:
    """The summary of a day is used although runs have started on it since."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        await new_run(store)
        assert await _totals(store, clock) == [1]
        await new_run(store)
        assert await _totals(store, clock) == [2], "the summary is out of date"


@source_mutant(
    "postgresql",
    kind="cache",
    clauses=("QRY-5",),
    changes=[
        (
            FUNCTIONS,
            "failed = d.failed + excluded.failed, changes = d.changes + excluded.changes\n    )\n",
            "failed = d.failed + excluded.failed, changes = greatest(d.changes, excluded.changes)\n    )\n",
        )
    ],
)
async def fold_revives_a_summary(url: str) -> None:
    """Folding does not add up a day's number of changes, so an outdated summary becomes valid again."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        await new_run(store)
        await _maintain(store, clock)
        assert await _totals(store, clock) == [1]
        await new_run(store)
        await _maintain(store, clock)
        assert await _totals(store, clock) == [2], "an outdated summary is used"


@source_mutant(
    "postgresql",
    kind="cache",
    clauses=("QRY-5",),
    changes=[(STATISTICS, 'scope = "" if flow_id is None else str(flow_id)', 'scope = ""')],
)
async def flows_share_their_summaries(url: str) -> None:
    """The cached timeseries of one flow is returned for another."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        await new_run(store)
        assert await _totals(store, clock) == [1]
        assert await _totals(store, clock, flow_id=UUID(int=9)) == [0], "another flow's runs are counted"


@source_mutant(
    "postgresql",
    kind="cache",
    clauses=("QRY-5",),
    changes=[
        (
            STATISTICS,
            "WHERE s.granularity = $4 AND s.scope = $5\n",
            "WHERE $4::text IS NOT NULL AND s.scope = $5\n",
        )
    ],
)
async def hours_and_days_share_their_summaries(url: str) -> None:
    """The cached hours of a day are returned as its day bucket."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        await new_run(store)
        today = day_start(clock.now)
        await store.get_run_timeseries(HOUR, today, today + timedelta(days=1))
        assert await _totals(store, clock) == [1], "the day has the numbers of an hour"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("QRY-5",),
    changes=[
        (
            STATISTICS,
            "percentile_cont(ARRAY[0.5, 0.95]::float8[])",
            "percentile_disc(ARRAY[0.5, 0.95]::float8[])",
        ),
    ],
)
async def percentiles_are_not_interpolated(url: str) -> None:
    """Percentiles of a timeseries are durations of single runs instead of interpolated values."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        for seconds in (1, 3):
            run_id = await new_run(store)
            clock.advance(seconds=seconds)
            await end(store, run_id)
        today = day_start(clock.now)
        (bucket,) = await store.get_run_timeseries(DAY, today, today + timedelta(days=1))
        assert bucket.p50_duration_ms == 2000, "the median is not interpolated"


@source_mutant(
    "postgresql",
    kind="time",
    clauses=("QRY-5",),
    changes=[
        (
            STATISTICS,
            "(extract(epoch FROM r.completed_at - r.started_at) * 1000000)::float8",
            "extract(microseconds FROM r.completed_at - r.started_at)::float8",
        )
    ],
)
async def durations_lose_their_minutes(url: str) -> None:
    """The duration of a run that takes longer than a minute loses its minutes."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        clock.advance(minutes=2, seconds=1)
        await end(store, run_id)
        today = day_start(clock.now)
        (bucket,) = await store.get_run_timeseries(DAY, today, today + timedelta(days=1))
        assert bucket.p50_duration_ms == 121_000, "the minutes are lost"


@source_mutant(
    "postgresql",
    kind="time",
    clauses=("QRY-5",),
    changes=[
        (
            STATISTICS,
            "AND r.started_at < least((others.day + 1)::timestamp",
            "AND r.started_at <= least((others.day + 1)::timestamp",
        )
    ],
)
async def run_at_midnight_counts_twice(url: str) -> None:
    """A run that starts at midnight counts on both days."""
    clock = VirtualClock()
    clock.now = day_start(clock.now)
    async with open_store(url, clock=clock) as store:
        await new_run(store)
        clock.advance(days=-1)
        await new_run(store)
        since = clock.now
        buckets = await store.get_run_timeseries(DAY, since, since + timedelta(days=2))
        assert [bucket.total for bucket in buckets] == [1, 1], "a run counts twice"


# Searches


@source_mutant(
    "postgresql",
    kind="index",
    clauses=("QRY-2",),
    changes=[
        (
            INDEX,
            "CREATE TRIGGER search_ended AFTER UPDATE OF status ON {schema}.runs FOR EACH ROW\n"
            "        WHEN (NEW.status <> 'Running')",
            "CREATE TRIGGER search_ended AFTER UPDATE OF status ON {schema}.runs FOR EACH ROW\n"
            "        WHEN (NEW.status IN ('Succeeded', 'Failed'))",
        )
    ],
)
async def cancelled_runs_are_not_indexed(url: str) -> None:
    """A search does not find Cancelled runs, because nothing adds them to the index."""
    async with open_store(url) as store:
        await end(store, await new_run(store), RunStatus.CANCELLED)
        assert await _found(store, "orders") == 1, "a Cancelled run is not found"


@source_mutant(
    "postgresql",
    kind="index",
    clauses=("QRY-2",),
    changes=[
        (
            INDEX,
            "WHEN (OLD.searched_open OR (OLD.status IS NULL AND NEW.status = 'Skipped'))",
            "WHEN (OLD.searched_open)",
        )
    ],
)
async def late_skip_of_a_claimed_key_is_not_indexed(url: str) -> None:
    """A search does not find the reason of a claimed key that is skipped after its run was indexed."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "a", owner="one")
        await end(store, run_id)
        await _maintain(store, clock)
        await store.record_skipped_step(run_id, "a", "task", "obsolete")
        assert await _found(store, "obsolete") == 1, "the late skip is not found"


@source_mutant(
    "postgresql",
    kind="index",
    clauses=("QRY-2",),
    changes=[
        (
            INDEX,
            "    CREATE TRIGGER search_skipped AFTER INSERT ON {schema}.steps FOR EACH ROW\n"
            "        WHEN (NEW.status = 'Skipped') EXECUTE FUNCTION {schema}.note_late_step();\n",
            "",
        )
    ],
)
async def late_skip_of_a_new_key_is_not_indexed(url: str) -> None:
    """A search does not find the reason of a new key that is skipped after its run was indexed."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await end(store, run_id)
        await _maintain(store, clock)
        await store.record_skipped_step(run_id, "a", "task", "obsolete")
        assert await _found(store, "obsolete") == 1, "the late skip is not found"


@source_mutant(
    "postgresql",
    kind="index",
    clauses=("QRY-2",),
    changes=[
        (
            INDEX,
            "WHEN (OLD.searched_open OR (OLD.status IS NULL AND NEW.status = 'Skipped'))",
            "WHEN (OLD.status IS NULL AND NEW.status = 'Skipped')",
        )
    ],
)
async def late_completion_is_not_indexed(url: str) -> None:
    """A search does not find the output of an attempt that is closed after its run was indexed."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.record_step_start(run_id, "a", "task")
        await end(store, run_id)
        await _maintain(store, clock)
        await store.record_step_complete(run_id, "a", StepStatus.SUCCEEDED, output_json="tardy")
        assert await _found(store, "tardy") == 1, "the late output is not found"


@source_mutant(
    "postgresql",
    kind="index",
    clauses=("QRY-2",),
    changes=[
        (
            FUNCTIONS,
            "concat_ws(E'\\n', left(a.error_message, 65536), left(a.output_json, 65536))",
            "left(a.output_json, 65536)",
        )
    ],
)
async def errors_of_earlier_attempts_are_not_indexed(url: str) -> None:
    """A search of an indexed run does not find the error of an earlier attempt."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await finish(store, run_id, "a", StepStatus.FAILED, error_message="timeout")
        await finish(store, run_id, "a")
        await end(store, run_id)
        await _maintain(store, clock)
        assert await _found(store, "timeout") == 1, "the earlier error is not found"


@source_mutant(
    "postgresql",
    kind="size",
    clauses=("QRY-2",),
    changes=[(FUNCTIONS, "left(s.output_json, 65536)", "left(s.output_json, 8192)")],
)
async def long_outputs_are_indexed_in_part(url: str) -> None:
    """A search of an indexed run finds only what the first 8 KiB of an output contain."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await finish(store, run_id, "a", output_json="." * 10_000 + "needle")
        await end(store, run_id)
        await _maintain(store, clock)
        assert await _found(store, "needle") == 1, "the end of the output is not found"


@source_mutant(
    "postgresql",
    kind="index",
    clauses=("QRY-2",),
    changes=[(SEARCH, "    UNION ALL SELECT run_id FROM {schema}.unsearched\n", "")],
)
async def runs_are_not_found_until_they_are_indexed(url: str) -> None:
    """A search does not find ended runs that are not yet in the index."""
    async with open_store(url) as store:
        await end(store, await new_run(store))
        assert await _found(store, "orders") == 1, "an ended run is not found"


@source_mutant(
    "postgresql",
    kind="index",
    clauses=("QRY-2",),
    changes=[(SEARCH, 're.sub(r"([%_\\\\])", r"\\\\\\1", part)', 're.sub(r"([%_])", r"\\\\\\1", part)')],
)
async def backslash_is_not_escaped_for_the_index(url: str) -> None:
    """A search by index does not find a text with a backslash."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store, flow_name="C:\\orders")
        await end(store, run_id)
        await _maintain(store, clock)
        assert await _found(store, "C:\\orders") == 1, "the backslash is not found"


@source_mutant(
    "postgresql",
    kind="size",
    clauses=("QRY-2",),
    changes=[(SEARCH, 'f"FROM 1 FOR {SEARCHED_BYTES})) > 0"', '"FROM 1)) > 0"')],
)
async def search_measures_texts_in_characters(url: str) -> None:
    """A search covers the first 65,536 characters of an output instead of bytes."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await finish(store, run_id, "a", output_json="ü" * 40_000 + "needle")
        assert await _found(store, "needle") == 0, "a text beyond 64 KiB is found"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("QRY-2",),
    changes=[
        (
            SEARCH,
            "WHERE a.run_id = r.run_id AND s.status IS NOT NULL AND ({attempt})",
            "WHERE a.run_id = r.run_id AND ({attempt})",
        )
    ],
)
async def search_finds_attempts_of_reset_steps(url: str) -> None:
    """A search finds the attempts of a step that retry_step has reset."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await finish(store, run_id, "a", StepStatus.FAILED)
        await store.record_skipped_step(run_id, "b", "task", "obsolete")
        await store.retry_step(run_id, "a", reset=["b"])
        assert await _found(store, "obsolete") == 0, "an attempt of a reset step is found"


@source_mutant(
    "postgresql",
    kind="encoding",
    clauses=("QRY-2",),
    changes=[(PAGES, "statement.find(fold_ascii(search),", "statement.find(search.lower(),")],
)
async def search_folds_letters_outside_of_ascii(url: str) -> None:
    """A search folds the case of all letters in names, so a capital umlaut is not found."""
    async with open_store(url) as store:
        await new_run(store, flow_name="ÜBERWEISUNG")
        assert await _found(store, "ÜBERWEISUNG") == 1, "the same letters are not found"
