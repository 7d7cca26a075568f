"""Counters, summaries and indexes for queries over all runs, and migrations that create them."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import UUID

import asyncpg
import pytest

from flowstore_core import (
    FlowStore,
    InvalidArgumentError,
    RunPosition,
    RunStatus,
    StepStatus,
    new_run_id,
    open_store,
)
from flowstore_core.open import resolve_store
from flowstore_core.plugins import find_backend
from tests.virtual_clock import VirtualClock

FLOWS = (UUID(int=1), UUID(int=2))
NOON = datetime(2026, 3, 14, 12, tzinfo=UTC)


SEARCH_TRIGGERS = ("search_ended", "search_loaded", "search_deleted", "search_late", "search_skipped")
SQLITE_SEARCH_TRIGGERS = ("search_ended", "search_loaded", "search_deleted", "search_skipped")
QUEUE_TRIGGERS = (
    "search_closed",
    "requeue_step",
    "dequeue_step",
    "requeue_waiting",
    "requeue_delivered",
    "requeue_unblocked",
)
QUEUE_TRIGGERS += ("requeue_run", "dequeue_run", "recompute_ready_at")
STALL_TRIGGERS = (
    "unbound_added",
    "unbound_changed",
    "unbound_restarted",
    "unbound_delivered",
    "unbound_unblocked",
)
MAILBOX_TRIGGERS = ("take_buffered", "take_buffered_renamed", "drop_buffered")


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
async def url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    if request.param == "memory":
        yield f"memory://{tmp_path.name}"
    elif request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'x.db'}"
    else:
        base = request.getfixturevalue("postgresql_url")
        async with find_backend("postgresql")[1].scratch(base) as fresh:
            yield fresh


@pytest.fixture(params=["sqlite", "postgresql"])
async def database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'x.db'}"
    else:
        base = request.getfixturevalue("postgresql_url")
        async with find_backend("postgresql")[1].scratch(base) as fresh:
            yield fresh


async def _execute(url: str, *statements: str) -> None:
    """Execute statements on a separate connection; {s} is replaced by the schema's prefix."""
    if url.startswith("sqlite"):
        db = sqlite3.connect(url.removeprefix("sqlite:///"))
        for statement in statements:
            db.execute(statement.replace("{s}", ""))
        db.commit()
        db.close()
        return
    query = parse_qs(urlsplit(url).query)
    connection = await asyncpg.connect(host=query["host"][0], user="postgres", database="postgres")
    try:
        for statement in statements:
            await connection.execute(statement.replace("{s}", f'"{query["schema"][0]}".'))
    finally:
        await connection.close()


async def _create_runs(store: FlowStore, clock: VirtualClock, generator: random.Random, count: int) -> None:
    """Start, complete and reopen runs over several days."""
    for number in range(count):
        clock.now += timedelta(minutes=generator.randrange(90))
        run_id = new_run_id()
        await store.start_run(generator.choice(FLOWS), f"flow {number % 3}", run_id, "manual")
        await store.record_step_start(run_id, "a", "http")
        clock.now += timedelta(seconds=generator.randrange(9), microseconds=generator.randrange(9))
        outcome = generator.choice([StepStatus.SUCCEEDED, StepStatus.FAILED])
        await store.record_step_complete(run_id, "a", outcome, output_json=f'"needle {number % 7}"')
        if generator.random() < 0.8:
            status = RunStatus.FAILED if outcome is StepStatus.FAILED else RunStatus.SUCCEEDED
            await store.complete_run(run_id, generator.choice([status, RunStatus.CANCELLED]))
        if generator.random() < 0.2:
            await store.retry_step(run_id, "a")
    await store.cleanup(clock.now - timedelta(hours=20))


async def _query_all(store: FlowStore, now: datetime) -> list[Any]:
    """Return the results of every query over all runs."""
    results: list[Any] = [await store.get_statistics(as_of=now - timedelta(days=days)) for days in range(3)]
    for flow_id in (None, *FLOWS):
        results += [
            await store.get_runs_page(flow_id, status=status, search=search, take=5)
            for status in (None, *RunStatus)
            for search in (None, "needle 3", "e 3", "3")
        ]
        for granularity in ("hour", "day"):
            days = timedelta(days=6)
            # Twice: computed, then cached.
            for _ in range(2):
                series = await store.get_run_timeseries(granularity, now - days, now + days, flow_id)  # type: ignore[arg-type]
                results.append(series)
    return results


async def _query_without_counters(store: FlowStore, now: datetime) -> list[Any]:
    """Return the results of the same queries on a copy of the runs in a memory store."""
    runs = await store.get_runs(take=1000)
    async with open_store("memory://", clock=lambda: now) as copy:
        (state,) = copy._store.values()  # type: ignore[attr-defined]
        for run in runs:
            detail = await store.get_run_detail(run.run_id)
            assert detail is not None
            await copy.start_run(run.flow_id, run.flow_name, run.run_id, run.trigger_key)
            for step in detail.steps:
                for attempt in step.attempts:
                    await copy.record_step_start(run.run_id, step.step_key, attempt.step_type)
                    if attempt.status is not StepStatus.RUNNING:
                        await copy.record_step_complete(
                            run.run_id, step.step_key, attempt.status, output_json=attempt.output_json
                        )
            record = state._runs[run.run_id.int]
            record.started_at, record.completed_at, record.status = (
                run.started_at,
                run.completed_at,
                run.status,
            )
        return await _query_all(copy, now)


async def test_counters_equal_an_enumeration_of_all_runs(url: str) -> None:
    clock, generator = VirtualClock(), random.Random(7)
    clock.now = NOON
    async with open_store(url, clock=clock) as store:
        for _ in range(4):
            await _create_runs(store, clock, generator, 40)
            assert await _query_all(store, clock.now) == await _query_without_counters(store, clock.now)


async def test_counters_are_correct_during_concurrent_writes(database: str) -> None:
    async with open_store(database) as store:

        async def write_run(number: int) -> None:
            run_id = new_run_id()
            await store.trigger_run(FLOWS[number % 2], "f", run_id, "manual")
            await store.record_step_start(run_id, "a", "http")
            await store.record_step_complete(run_id, "a", StepStatus.FAILED)
            if number % 3:
                await store.complete_run(run_id, RunStatus.FAILED)
            if number % 6 == 1:
                await store.retry_step(run_id, "a")

        done = asyncio.gather(*(write_run(number) for number in range(120)))
        while not done.done():
            page = await store.get_runs_page(take=1000)
            assert page.total_count == len(page.runs)
        await done
        for status in RunStatus:
            page = await store.get_runs_page(status=status, take=1000)
            assert page.total_count == len(page.runs)
        assert (await store.get_statistics()).active_runs == 60


async def test_changes_by_other_programs_are_counted(database: str) -> None:
    clock = VirtualClock()
    clock.now = NOON
    async with open_store(database, clock=clock) as store:
        await _create_runs(store, clock, random.Random(1), 60)
        before = await _query_all(store, clock.now)
        await _execute(database, "DELETE FROM {s}runs WHERE flow_name = 'flow 1'")
        after = await _query_all(store, clock.now)
        assert after != before
        assert after == await _query_without_counters(store, clock.now)


async def test_a_version_1_database_is_migrated_with_its_data(database: str) -> None:
    clock = VirtualClock()
    clock.now = NOON
    # Create the data with the current schema, then remove its counters and indexes.
    async with open_store(database, clock=clock) as store:
        await _create_runs(store, clock, random.Random(3), 80)
        expected = await _query_all(store, clock.now)
    await _downgrade(database)
    _, backend, config = resolve_store(database)
    assert await backend.schema_version(config) == 1  # type: ignore[attr-defined]
    async with open_store(database, clock=clock) as store:
        assert await _query_all(store, clock.now) == expected
        await _create_runs(store, clock, random.Random(4), 40)
        assert await _query_all(store, clock.now) == await _query_without_counters(store, clock.now)
    await _downgrade(database)
    await backend.migrate(config)  # type: ignore[attr-defined]
    assert "by index" in (await backend.describe(config))["search"]  # type: ignore[attr-defined]
    async with open_store(database, clock=clock, migrate=False) as store:
        assert await _query_all(store, clock.now) == await _query_without_counters(store, clock.now)


async def _downgrade(url: str) -> None:
    tables = ("run_changes", "run_counts", "run_days", "run_summaries", "run_texts", "unsearched")
    if url.startswith("sqlite"):
        triggers = (
            "count_started",
            "count_loaded",
            "count_deleted",
            "count_changed",
            "tag_ended",
            "forget_tags",
            *SQLITE_SEARCH_TRIGGERS,
        )
        await _execute(
            url,
            *(
                f"DROP TRIGGER {name}"
                for name in (*triggers, *QUEUE_TRIGGERS, *MAILBOX_TRIGGERS, *STALL_TRIGGERS)
            ),
            "DROP TRIGGER note_end",
            "DROP TRIGGER note_late_change",
            "DROP INDEX runs_stall_bound",
            "ALTER TABLE runs DROP COLUMN stall_bound",
            "ALTER TABLE steps DROP COLUMN stall_noted",
            "DROP INDEX controls_deadline",
            "DROP INDEX controls_latched",
            "ALTER TABLE controls DROP COLUMN ended",
            "DROP VIEW step_readiness",
            "DROP TABLE queued_steps",
            "DROP TABLE buffered_signals",
            "DROP TABLE run_tags",
            "ALTER TABLE runs DROP COLUMN tags",
            "DROP TABLE run_trigrams",
            *(f"DROP TABLE {name}" for name in tables[1:]),
            "ALTER TABLE steps DROP COLUMN searched_open",
            "DROP INDEX runs_of_status",
            "DROP INDEX runs_of_flow_and_status",
            "CREATE INDEX runs_started ON runs (started_at)",
            "CREATE INDEX runs_of_flow ON runs (flow_id, started_at)",
            "CREATE INDEX runs_active ON runs (started_at) WHERE status = 'Running'",
            "DELETE FROM flowstore_schema WHERE version > 1",
        )
        return
    functions = ("note_ended_run", "note_late_step", "forget_text", "gather_texts", "enable_search")
    others = ("index_texts", "count_run_changes", "fold_run_changes", "forget_run_changes")
    others += ("ignore_loaded_sums", "skip_known_run", "index_step", "index_steps", "reset_ended")
    others += ("take_buffered", "drop_buffered", "index_tags", "forget_tags", "ignore_loaded_tag")
    others += ("note_stall_change",)
    queue = ("queue", "priority", "step_type", "input_json")
    await _execute(
        url,
        *(
            f"DROP TABLE {{s}}{name}"
            for name in (*tables, "commits", "pending", "buffered_signals", "run_tags", "stall_changes")
        ),
        *(f"DROP FUNCTION {{s}}{name} CASCADE" for name in (*functions, *others)),
        "ALTER TABLE {s}steps DROP COLUMN searched_open, DROP COLUMN claim_call, DROP COLUMN pending_writes, "
        "DROP COLUMN stall_noted",
        *(f"ALTER TABLE {{s}}steps DROP COLUMN dispatch_{name}" for name in queue),
        "ALTER TABLE {s}controls DROP COLUMN ended",
        "ALTER TABLE {s}runs DROP COLUMN tags, DROP COLUMN stall_bound",
        "DROP INDEX {s}runs_by_flow_and_status, {s}controls_by_creation, {s}idempotency_keys_by_creation",
        "CREATE INDEX runs_by_start ON {s}runs (started_at DESC, run_id DESC)",
        "CREATE INDEX runs_by_flow ON {s}runs (flow_id, started_at DESC, run_id DESC)",
        "DELETE FROM {s}schema_version WHERE version > 1",
    )


async def test_a_search_finds_later_changes_of_completed_runs(database: str) -> None:
    async with open_store(database) as store:

        async def search(needle: str) -> set[UUID]:
            return {run.run_id for run in (await store.get_runs_page(search=needle)).runs}

        running, skipped, reopened = new_run_id(), new_run_id(), new_run_id()
        for run_id in (running, skipped, reopened):
            await store.start_run(FLOWS[0], "flow", run_id, "manual")
            await store.record_step_start(run_id, "a", "http")
        await store.record_step_complete(reopened, "a", StepStatus.FAILED, error_message="haystack")
        for run_id in (running, skipped, reopened):
            await store.complete_run(run_id, RunStatus.CANCELLED)
        assert await search("haystack") == {reopened}
        # cleanup indexes the texts of all three runs.
        await store.cleanup(NOON - timedelta(days=3650))
        assert await search("haystack") == {reopened}
        await store.record_step_complete(running, "a", StepStatus.FAILED, error_message="LATE haystack")
        await store.record_skipped_step(skipped, "b", "http", "late HAYSTACK")
        assert await search("late haystack") == {running, skipped}
        await store.cleanup(NOON - timedelta(days=3650))
        assert await search("late haystack") == {running, skipped}
        await store.retry_step(reopened, "a")
        await store.record_step_start(reopened, "a", "http")
        await store.record_step_complete(reopened, "a", StepStatus.SUCCEEDED, output_json='"late haystack"')
        assert await search("late haystack") == {running, skipped, reopened}
        await store.complete_run(reopened, RunStatus.SUCCEEDED)
        assert await search("late haystack") == {running, skipped, reopened}
        await store.cleanup(datetime.now(UTC) + timedelta(days=1))
        assert await search("haystack") == set()


async def test_a_search_indexes_the_runs_that_it_scans(database: str) -> None:
    async with open_store(database) as store:
        for number in range(100):
            run_id = new_run_id()
            await store.start_run(FLOWS[0], f"flow {number}", run_id, "manual")
            await store.complete_run(run_id, RunStatus.SUCCEEDED)
        for _ in range(3):
            assert (await store.get_runs_page(search="flow 77")).total_count == 1


async def test_searches_work_without_the_index_and_a_migration_restores_it(database: str) -> None:
    _, backend, config = resolve_store(database)
    if database.startswith("sqlite"):
        statements = ["DROP TABLE run_trigrams"]
        statements += [f"DROP TRIGGER {name}" for name in SQLITE_SEARCH_TRIGGERS]
    else:
        tables = (
            "steps" if name in ("search_late", "search_skipped") else "runs" for name in SEARCH_TRIGGERS
        )
        pairs = zip(SEARCH_TRIGGERS, tables, strict=True)
        statements = ["DROP INDEX {s}run_texts_by_trigram"]
        statements += [f"DROP TRIGGER {name} ON {{s}}{table}" for name, table in pairs]
    async with open_store(database) as store:
        for number in range(20):
            run_id = new_run_id()
            await store.start_run(FLOWS[0], f"flow {number}", run_id, "manual")
            await store.complete_run(run_id, RunStatus.SUCCEEDED)
        for _ in range(2):
            await store.cleanup(NOON - timedelta(days=3650))
            assert (await store.get_runs_page(search="flow 1")).total_count == 11
            assert (await store.get_runs_page(search="FLOW 17")).total_count == 1
            if statements:
                await _execute(database, *statements)
                statements = []
        assert "every run" in (await backend.describe(config))["search"]  # type: ignore[attr-defined]
        run_id = new_run_id()
        await store.start_run(FLOWS[0], "flow 17", run_id, "manual")
        await store.complete_run(run_id, RunStatus.SUCCEEDED)
        await backend.migrate(config)  # type: ignore[attr-defined]
        assert "by index" in (await backend.describe(config))["search"]  # type: ignore[attr-defined]
        assert (await store.get_runs_page(search="FLOW 17")).total_count == 2


async def test_roles_with_privileges_on_version_1_get_them_on_later_objects(postgresql_url: str) -> None:
    role = f"flows_app_{new_run_id().hex}"
    async with find_backend("postgresql")[1].scratch(postgresql_url) as url:
        schema = parse_qs(urlsplit(url).query)["schema"][0]
        async with open_store(url):
            pass
        await _downgrade(url)
        await _execute(
            url,
            f"CREATE ROLE {role} LOGIN",
            f'GRANT USAGE ON SCHEMA "{schema}" TO {role}',
            f'GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA "{schema}" TO {role}',
        )
        try:
            async with open_store(url):
                pass
            async with open_store(url.replace("user=postgres", f"user={role}"), migrate=False) as store:
                run_id = new_run_id()
                await store.start_run(FLOWS[0], "flow", run_id, "manual")
                await store.complete_run(run_id, RunStatus.SUCCEEDED)
                assert (await store.get_runs_page(search="flow")).total_count == 1
                now = datetime.now(UTC)
                series = await store.get_run_timeseries("day", now - timedelta(days=2), now)  # type: ignore[arg-type]
                assert sum(bucket.total for bucket in series) == 1
                assert await store.cleanup(now + timedelta(days=1)) == 1
        finally:
            await _execute(url, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


def test_a_position_is_text_without_spaces() -> None:
    position = RunPosition(started_at=NOON, run_id=UUID(int=7))
    assert str(position) == "2026-03-14T12:00:00.000000Z_00000000-0000-0000-0000-000000000007"
    assert RunPosition.parse(str(position)) == position
    early = RunPosition(started_at=datetime(1, 1, 2, tzinfo=UTC), run_id=UUID(int=0))
    assert RunPosition.parse(str(early)) == early
    bad = ["", "_", "x", str(UUID(int=7)), "2026-03-14_" + str(UUID(int=7)), str(position)[:-1]]
    for text in [*bad, "0001-01-01T00:00:00+14:00_" + str(UUID(int=7))]:
        with pytest.raises(InvalidArgumentError, match="position"):
            RunPosition.parse(text)
