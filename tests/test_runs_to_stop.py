"""get_runs_to_stop reads by index: results, cost, migration, older versions."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import asyncpg
import pytest

from flowstore_core import FlowStore, FlowStoreError, RunStatus, new_run_id, open_store
from flowstore_core.open import resolve_store
from flowstore_core.plugins import find_backend
from flowstore_postgres import controls as postgres_controls
from flowstore_postgres.sql_placeholders import fill_in
from flowstore_sqlite import controls as sqlite_controls
from flowstore_sqlite.codecs import to_us
from tests.databases import add_rows, connect, count_instructions, count_rows, execute
from tests.virtual_clock import VirtualClock

FLOW = UUID(int=1)
HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)

Call = Callable[[FlowStore], Awaitable[object]]


@pytest.fixture(params=["sqlite", "postgresql"])
async def url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'x.db'}"
    else:
        base = request.getfixturevalue("postgresql_url")
        async with find_backend("postgresql")[1].scratch(base) as fresh:
            yield fresh


# Results


def _random_call(rng: random.Random, run_ids: list[UUID], clock: VirtualClock) -> Call:
    """A call that may change which runs are to stop."""
    run_id = rng.choice(run_ids)
    later = clock.now + rng.choice([10 * SECOND, HOUR])
    timeout_at = rng.choice([None, clock.now, later])
    calls: list[Call] = [
        lambda s: s.configure_run(run_id, FLOW, "manual", timeout_at=timeout_at),
        lambda s: s.extend_deadline(run_id, later),
        lambda s: s.mark_timed_out(run_id, as_of=clock.now),
        lambda s: s.mark_timed_out(run_id),
        lambda s: s.request_cancel(run_id),
        lambda s: s.complete_run(run_id, RunStatus.CANCELLED),
        lambda s: s.retry_step(run_id, "a"),
        lambda s: s.start_run(FLOW, "flow", run_id, "manual"),
        lambda s: s.trigger_run(FLOW, "flow", run_id, "manual", timeout_at=timeout_at),
        lambda s: s.cleanup(clock.now - HOUR),
    ]
    return rng.choice(calls)


async def _outcome(call: Call, store: FlowStore) -> object:
    try:
        return await call(store)
    except FlowStoreError as error:
        return type(error)


async def _fail_step(store: FlowStore, run_id: UUID) -> None:
    """Record a step that retry_step can reopen."""
    await store.record_step_start(run_id, "a", "http")
    await store.record_step_complete(run_id, "a", "Failed")


@pytest.mark.parametrize("seed", range(8))
async def test_results_equal_those_of_a_store_that_reads_everything(seed: int, url: str) -> None:
    rng, clock = random.Random(seed), VirtualClock()
    run_ids = [new_run_id() for _ in range(4)]
    async with open_store(url, clock=clock) as store, open_store("memory://", clock=clock) as reference:
        for run_id in run_ids:
            for one in (store, reference):
                await one.start_run(FLOW, "flow", run_id, "manual")
                await _fail_step(one, run_id)
        for _ in range(200):
            call = _random_call(rng, run_ids, clock)
            assert await _outcome(call, store) == await _outcome(call, reference)
            clock.now += rng.choice([0, 0, 1, 5, 90, 1800]) * SECOND
            take = rng.choice([1, 2, 100])
            as_of = rng.choice([None, clock.now - 30 * SECOND, clock.now + 2 * HOUR])
            for _ in range(rng.randrange(3)):
                to_stop = await store.get_runs_to_stop(as_of=as_of, take=take)
                assert to_stop == await reference.get_runs_to_stop(as_of=as_of, take=take)


@pytest.mark.parametrize("latched", [False, True], ids=["due", "latched"])
async def test_ended_runs_do_not_hide_the_others(latched: bool, url: str) -> None:
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_ids = [new_run_id() for _ in range(3 * postgres_controls.LOOKAHEAD)]

        async def trigger(run_id: UUID) -> None:
            await store.trigger_run(FLOW, "flow", run_id, "manual", timeout_at=None if latched else clock.now)
            if latched:
                await store.request_cancel(run_id)

        await asyncio.gather(*map(trigger, run_ids))
        last = max(run_ids)
        await asyncio.gather(
            *(store.complete_run(run_id, RunStatus.CANCELLED) for run_id in run_ids if run_id != last)
        )
        for _ in range(2):
            assert [run.run_id for run in await store.get_runs_to_stop(take=1)] == [last]


async def test_a_store_without_the_right_to_write_lists_the_runs(
    fresh: str, admin: asyncpg.Connection
) -> None:
    clock = VirtualClock()
    role = f"reader_{new_run_id().hex}"
    async with open_store(fresh, clock=clock) as store:
        ended, late = new_run_id(), new_run_id()
        for run_id in (ended, late):
            await store.trigger_run(FLOW, "flow", run_id, "manual", timeout_at=clock.now)
        await store.complete_run(ended, RunStatus.FAILED)
    schema = await admin.fetchval("SELECT quote_ident(current_schema())")
    await admin.execute(f"CREATE ROLE {role} LOGIN")
    try:
        await admin.execute(f"GRANT USAGE ON SCHEMA {schema} TO {role}")
        await admin.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO {role}")
        reader = fresh.replace("user=postgres", f"user={role}")
        async with open_store(reader, clock=clock, migrate=False) as store:
            for _ in range(2):
                assert [run.run_id for run in await store.get_runs_to_stop()] == [late]
        assert not await admin.fetchval("SELECT bool_or(ended) FROM controls")
    finally:
        await admin.execute(f"DROP OWNED BY {role}")
        await admin.execute(f"DROP ROLE {role}")


# Cost

TAKE = 10
LONG_AGO, FAR_AHEAD = (datetime(year, 1, 1, tzinfo=UTC) for year in (2020, 2100))


async def _count_work(url: str) -> dict[str, int]:
    """The work of the queries: rows that PostgreSQL reads, or instructions of SQLite."""
    if url.startswith("sqlite"):
        arguments = {"as_of": to_us(datetime.now(UTC)), "take": TAKE}
        return {"instructions": count_instructions(url, sqlite_controls.GET_RUNS_TO_STOP, arguments)}
    admin = await connect(url)
    try:
        schema = await admin.fetchval("SELECT quote_ident(current_schema())")
        explained = "EXPLAIN (ANALYZE, FORMAT JSON) " + fill_in(postgres_controls.GET_RUNS_TO_STOP, schema)
        [plan] = json.loads(await admin.fetchval(explained, None, None, TAKE, TAKE))
        return {"rows": count_rows(plan["Plan"])}
    finally:
        await admin.close()


ADD_TO_POSTGRESQL = """
WITH run AS MATERIALIZED (
    SELECT gen_random_uuid() AS id, n % 2 = 0 AS has_ended FROM generate_series(1, 2 * $1) n
), added AS (
    INSERT INTO runs (run_id, flow_id, flow_name, status, trigger_key, started_at, completed_at, start_token)
    SELECT id, id, 'flow', CASE WHEN has_ended THEN 'Succeeded' ELSE 'Running' END, 'manual', $3::timestamptz,
           CASE WHEN has_ended THEN $3 END, id FROM run
)
INSERT INTO controls (run_id, flow_id, trigger_key, created_at, timeout_at, cancel_requested_at)
SELECT id, id, 'manual', $3, $2::timestamptz, CASE WHEN has_ended THEN $3 END FROM run
"""
ADD_TO_SQLITE = """
CREATE TEMP TABLE new AS
WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 2 * :count)
SELECT randomblob(16) AS id, n % 2 = 0 AS ends, n % 4 = 0 AS is_late FROM numbers;
INSERT INTO runs (run_id, flow_id, flow_name, status, trigger_key, started_at)
SELECT id, id, 'flow', 'Running', 'manual', :long_ago FROM new;
INSERT INTO controls (run_id, flow_id, trigger_key, created_at, timeout_at, cancelled_at)
SELECT id, id, 'manual', :long_ago, CASE WHEN NOT is_late THEN :timeout_at END,
    CASE WHEN ends AND NOT is_late THEN :long_ago END
FROM new;
UPDATE runs SET status = 'Succeeded', completed_at = :long_ago
WHERE run_id IN (SELECT id FROM new WHERE ends);
UPDATE controls SET timeout_at = :timeout_at, cancelled_at = :long_ago
WHERE run_id IN (SELECT id FROM new WHERE is_late)
"""


async def _add_runs(url: str, count: int, timeout_at: datetime) -> None:
    """Add Running runs with a deadline, and as many that have ended with a deadline and a latch."""
    scripts = {"sqlite": ADD_TO_SQLITE, "postgresql": ADD_TO_POSTGRESQL}
    await add_rows(url, **scripts, count=count, timeout_at=timeout_at, long_ago=LONG_AGO)


@pytest.mark.parametrize("timeout_at", [LONG_AGO, FAR_AHEAD], ids=["due", "later"])
async def test_the_cost_does_not_depend_on_the_number_of_runs(timeout_at: datetime, url: str) -> None:
    async with open_store(url) as store:

        async def add(count: int) -> dict[str, int]:
            await _add_runs(url, count, timeout_at)
            for _ in range(4):
                to_stop = await store.get_runs_to_stop(take=TAKE)
                assert len(to_stop) == (TAKE if timeout_at == LONG_AGO else 0)
            if not url.startswith("sqlite"):
                # As autovacuum does after so many changes.
                await execute(url, "VACUUM ANALYZE")
            return await _count_work(url)

        few, many = await add(500), await add(4_000)
    assert all(many[name] <= 1.5 * few[name] for name in many), (few, many)


# Older versions


async def test_a_run_that_an_older_version_reopens_can_be_stopped(url: str) -> None:
    async with open_store(url, clock=VirtualClock()) as store:
        run_id = new_run_id()
        await store.start_run(FLOW, "flow", run_id, "manual")
        await store.request_cancel(run_id)
        await store.complete_run(run_id, RunStatus.CANCELLED)
        assert await store.get_runs_to_stop() == ()
        latch = "cancelled_at" if url.startswith("sqlite") else "cancel_requested_at"
        time = to_us(LONG_AGO) if url.startswith("sqlite") else f"'{LONG_AGO}'"
        await execute(
            url,
            "UPDATE runs SET status = 'Running', completed_at = NULL",
            f"UPDATE controls SET {latch} = NULL",
        )
        assert await store.get_runs_to_stop() == ()
        await execute(url, f"UPDATE controls SET {latch} = {time}")
        assert [run.run_id for run in await store.get_runs_to_stop()] == [run_id]


async def test_a_store_of_the_version_before_is_migrated_in_place(url: str) -> None:
    clock = VirtualClock()
    _, backend, _ = resolve_store(url)
    async with open_store(url, clock=clock) as store:
        late, cancelled, ended, reopened = [new_run_id() for _ in range(4)]
        for run_id in (late, ended, reopened):
            await store.trigger_run(FLOW, "flow", run_id, "manual", timeout_at=clock.now)
        await store.start_run(FLOW, "flow", cancelled, "manual")
        await store.request_cancel(cancelled)
        await _fail_step(store, reopened)
        for run_id in (ended, reopened):
            await store.complete_run(run_id, RunStatus.FAILED)
        expected = await store.get_runs_to_stop()
        assert [run.run_id for run in expected] == [late, cancelled]
    before = max(backend.earlier_schema_versions())  # type: ignore[attr-defined]
    await backend.revert_schema(url, before)  # type: ignore[attr-defined]
    async with open_store(url, clock=clock) as store:
        for _ in range(2):
            assert await store.get_runs_to_stop() == expected
        await store.retry_step(reopened, "a")
        await store.extend_deadline(reopened, clock.now)
        assert {run.run_id for run in await store.get_runs_to_stop()} == {late, cancelled, reopened}
