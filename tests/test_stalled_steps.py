"""get_stalled_steps reads by index: results, races, cost, older versions (STP-8)."""

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

from flowstore_core import (
    FlowStore,
    FlowStoreError,
    RunStatus,
    StepRequest,
    StepStatus,
    new_run_id,
    open_store,
)
from flowstore_core.open import resolve_store
from flowstore_core.plugins import find_backend
from flowstore_postgres import stalled as postgres_stalled
from flowstore_postgres.sql_placeholders import fill_in
from flowstore_sqlite import stalled as sqlite_stalled
from flowstore_sqlite.codecs import to_us
from tests.databases import add_rows, connect, count_instructions, count_rows, execute
from tests.virtual_clock import VirtualClock

FLOW = UUID(int=1)
SECOND = timedelta(seconds=1)
HOUR = timedelta(hours=1)
KEYS = ("a", "b", "c")
ENDED = (StepStatus.SUCCEEDED, StepStatus.FAILED)

Call = Callable[[FlowStore], Awaitable[object]]


@pytest.fixture(params=["sqlite", "postgresql"])
async def url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'x.db'}"
    else:
        base = request.getfixturevalue("postgresql_url")
        async with find_backend("postgresql")[1].scratch(base) as fresh:
            yield fresh


async def _remove_bounds(url: str) -> None:
    """Make the next call read every active run."""
    none = "NULL" if url.startswith("sqlite") else "'-infinity'"
    await execute(url, f"UPDATE runs SET stall_bound = {none}")


async def _keys(store: FlowStore, as_of: datetime | None = None) -> list[str]:
    return [step.step_key for step in await store.get_stalled_steps(as_of=as_of)]


# Results


def _random_call(rng: random.Random, run_ids: list[UUID], clock: VirtualClock) -> Call:
    """A call that may change which steps stall, and when."""
    run_id, key = rng.choice(run_ids), rng.choice(KEYS)
    due = rng.choice([None, clock.now - HOUR, clock.now + 10 * SECOND, clock.now + HOUR])
    lease = rng.choice([None, 10 * SECOND, HOUR])
    owner = rng.choice([None, "me"])
    request = StepRequest(step_key=key, step_type="http", queue=rng.choice("pq"), due_at=due)
    status = rng.choice([*ENDED, StepStatus.PENDING])
    calls: list[Call] = [
        lambda s: s.try_record_dispatch(run_id, key, due_at=due),
        lambda s: s.try_record_dispatch(run_id, key, due_at=due, queue="q", step_type="http"),
        lambda s: s.release_dispatch(run_id, key),
        lambda s: s.redispatch_step(run_id, key, due_at=due),
        lambda s: s.try_claim_step(run_id, key, owner="me", lease=lease),
        lambda s: s.release_step_claim(run_id, key),
        lambda s: s.renew_step_claim(run_id, key, owner="me", lease=HOUR),
        lambda s: s.record_step_start(run_id, key, "http", owner=owner),
        lambda s: s.record_step_complete(run_id, key, status),
        lambda s: s.record_skipped_step(run_id, key, "http", "why"),
        lambda s: s.retry_step(run_id, key, reset=KEYS),
        lambda s: s.retry_step(run_id, key, dispatch=[request]),
        lambda s: s.reschedule_step(run_id, key, attempt=1, due_at=due),
        lambda s: s.reschedule_step(run_id, key, attempt=1, error_message="bad", due_at=due),
        lambda s: s.register_waiter(run_id, key, "go", expires_at=due),
        lambda s: s.remove_waiter(run_id, key),
        lambda s: s.expire_waiter(run_id, key),
        lambda s: s.deliver_signal(run_id, "go", "{}"),
        lambda s: s.advance_run(run_id, key, rng.choice(ENDED), attempt=1, dispatch=[]),
        lambda s: s.complete_run(run_id, RunStatus.CANCELLED),
        lambda s: s.start_run(FLOW, "flow", run_id, "manual"),
        lambda s: s.trigger_run(FLOW, "flow", run_id, "manual", dispatch=[request]),
        lambda s: s.delete_run(run_id),
    ]
    return rng.choice(calls)


async def _outcome(call: Call, store: FlowStore) -> object:
    try:
        return await call(store)
    except FlowStoreError as error:
        return type(error)


@pytest.mark.parametrize("seed", range(8))
async def test_results_equal_those_of_a_store_that_reads_everything(seed: int, url: str) -> None:
    rng, clock = random.Random(seed), VirtualClock()
    run_ids = [new_run_id() for _ in range(3)]
    async with open_store(url, clock=clock) as store, open_store("memory://", clock=clock) as reference:
        for run_id in run_ids:
            for one in (store, reference):
                await one.start_run(FLOW, "flow", run_id, "manual")
        for _ in range(300):
            call, state = _random_call(rng, run_ids, clock), rng.getstate()
            expected = await _outcome(call, reference)
            rng.setstate(state)
            assert await _outcome(call, store) == expected
            clock.now += rng.choice([0, 0, 1, 5, 90, 1800]) * SECOND
            take = rng.choice([1, 2, 100])
            as_of = rng.choice([None, clock.now - 30 * SECOND, clock.now + 2 * HOUR])
            for _ in range(rng.randrange(3)):
                stalled = await store.get_stalled_steps(as_of=as_of, take=take)
                assert stalled == await reference.get_stalled_steps(as_of=as_of, take=take)


async def _sleep(store: FlowStore, run_id: UUID, later: datetime) -> None:
    """Bring the steps of a run into states in which none of them stalls."""
    await store.try_record_dispatch(run_id, "dispatched", due_at=later)
    await store.try_record_dispatch(run_id, "queued", due_at=later, queue="q", step_type="http")
    await store.try_claim_step(run_id, "claimed", owner="me", lease=HOUR)
    await store.try_claim_step(run_id, "free", owner="me", lease=HOUR)
    await store.release_step_claim(run_id, "free")
    for key, expires_at in (("waits", later), ("waits on", None)):
        await store.record_step_start(run_id, key, "http")
        await store.register_waiter(run_id, key, key, expires_at=expires_at)
    for key in ("failed", "skipped"):
        await store.record_step_start(run_id, key, "http")
    await store.record_step_complete(run_id, "failed", StepStatus.FAILED)
    await store.record_step_complete(run_id, "skipped", StepStatus.SKIPPED)


CHANGES: dict[str, tuple[str, Callable[[FlowStore, UUID], Awaitable[object]]]] = {
    "release a claim": ("claimed", lambda s, r: _release_started(s, r)),
    "release a dispatch": ("waits", lambda s, r: s.remove_waiter(r, "waits")),
    "release a queued dispatch": ("queued", lambda s, r: _release_queued(s, r)),
    "dispatch a known key": ("free", lambda s, r: s.try_record_dispatch(r, "free")),
    "dispatch a new key": ("new", lambda s, r: s.try_record_dispatch(r, "new")),
    "start a new key": ("new", lambda s, r: s.record_step_start(r, "new", "http")),
    "deliver a signal": ("waits on", lambda s, r: s.deliver_signal(r, "waits on", "{}")),
    "register a waiter anew": (
        "waits on",
        lambda s, r: s.register_waiter(r, "waits on", "waits on", expires_at=VirtualClock().now),
    ),
    "retry": ("failed", lambda s, r: s.retry_step(r, "failed")),
    "start again": ("failed", lambda s, r: s.record_step_start(r, "failed", "http")),
    "reschedule": ("waits on", lambda s, r: _reschedule(s, r)),
    "move a queued dispatch": (
        "queued",
        lambda s, r: s.redispatch_step(r, "queued", due_at=VirtualClock().now),
    ),
}


async def _release_started(store: FlowStore, run_id: UUID) -> None:
    await store.record_step_start(run_id, "claimed", "http", owner="me")
    await store.get_stalled_steps()
    await store.release_step_claim(run_id, "claimed")


async def _release_queued(store: FlowStore, run_id: UUID) -> None:
    await store.record_step_start(run_id, "queued", "http")
    await store.get_stalled_steps()
    await store.release_dispatch(run_id, "queued")


async def _reschedule(store: FlowStore, run_id: UUID) -> None:
    await store.remove_waiter(run_id, "waits on")
    await store.reschedule_step(run_id, "waits on", attempt=1)


@pytest.mark.parametrize("change", CHANGES)
async def test_a_change_of_a_run_that_sleeps_is_seen(change: str, url: str) -> None:
    clock = VirtualClock()
    key, make_change = CHANGES[change]
    async with open_store(url, clock=clock) as store, open_store(url, clock=clock) as other:
        run_id = new_run_id()
        await store.start_run(FLOW, "flow", run_id, "manual")
        await _sleep(store, run_id, clock.now + HOUR)
        for _ in range(2):
            assert await _keys(store) == []
        await make_change(other, run_id)
        for _ in range(2):
            assert await _keys(store) == [key]


async def test_calls_of_several_stores_miss_no_change(url: str) -> None:
    async with open_store(url) as first, open_store(url) as second:
        stores = (first, second)
        run_ids = [new_run_id() for _ in range(4)]
        for run_id in run_ids:
            await first.start_run(FLOW, "flow", run_id, "manual")

        async def change(store: FlowStore, seed: int) -> None:
            rng, clock = random.Random(seed), VirtualClock()
            for _ in range(60):
                clock.now = datetime.now(UTC)
                await _outcome(_random_call(rng, run_ids, clock), store)

        async def poll(store: FlowStore, done: asyncio.Event) -> int:
            calls = 0
            while not done.is_set():
                await store.get_stalled_steps(take=rng.choice([1, 100]))
                calls += 1
            return calls

        rng = random.Random(1)
        for round_ in range(3):
            done = asyncio.Event()
            polls = [asyncio.create_task(poll(store, done)) for store in stores]
            await asyncio.gather(*(change(store, 10 * round_ + n) for n in range(4) for store in stores))
            done.set()
            assert min(await asyncio.gather(*polls)) > 0
            as_of = datetime.now(UTC) + 2 * HOUR
            found = [await store.get_stalled_steps(as_of=as_of) for store in stores]
            await _remove_bounds(url)
            assert found == [await first.get_stalled_steps(as_of=as_of)] * 2


async def test_a_store_without_the_right_to_write_lists_the_steps(
    fresh: str, admin: asyncpg.Connection
) -> None:
    clock = VirtualClock()
    role = f"reader_{new_run_id().hex}"
    async with open_store(fresh, clock=clock) as store:
        run_id = new_run_id()
        await store.start_run(FLOW, "flow", run_id, "manual")
        await store.try_record_dispatch(run_id, "due")
    schema = await admin.fetchval("SELECT quote_ident(current_schema())")
    await admin.execute(f"CREATE ROLE {role} LOGIN")
    try:
        await admin.execute(f"GRANT USAGE ON SCHEMA {schema} TO {role}")
        await admin.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO {role}")
        reader = fresh.replace("user=postgres", f"user={role}")
        async with open_store(reader, clock=clock, migrate=False) as store:
            for _ in range(2):
                assert await _keys(store) == ["due"]
    finally:
        await admin.execute(f"DROP OWNED BY {role}")
        await admin.execute(f"DROP ROLE {role}")


# Cost

TAKE = 10
LONG_AGO, FAR_AHEAD = (datetime(year, 1, 1, tzinfo=UTC) for year in (2020, 2100))
ADD_TO_POSTGRESQL = """
WITH run AS MATERIALIZED (SELECT gen_random_uuid() AS id FROM generate_series(1, $1)), added AS (
    INSERT INTO runs (run_id, flow_id, flow_name, status, trigger_key, started_at, start_token)
    SELECT id, id, 'flow', 'Running', 'manual', $3, id FROM run
)
INSERT INTO steps (run_id, step_key, dispatched_at, due_at, stall_noted)
SELECT id, 'a', $3, $2::timestamptz, false FROM run
"""
ADD_TO_SQLITE = """
CREATE TEMP TABLE new AS
WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < :count)
SELECT randomblob(16) AS id FROM numbers;
INSERT INTO runs (run_id, flow_id, flow_name, status, trigger_key, started_at)
SELECT id, id, 'flow', 'Running', 'manual', :long_ago FROM new;
INSERT INTO steps (run_id, step_key, dispatched_at, due_at) SELECT id, 'a', :long_ago, :due_at FROM new
"""


async def _add_runs(url: str, count: int, due_at: datetime) -> None:
    """Add Running runs with one dispatched step each."""
    scripts = {"sqlite": ADD_TO_SQLITE, "postgresql": ADD_TO_POSTGRESQL}
    await add_rows(url, **scripts, count=count, due_at=due_at, long_ago=LONG_AGO)


async def _count_work(url: str) -> dict[str, int]:
    """The work of the query: rows that PostgreSQL reads, or instructions of SQLite."""
    lookahead = TAKE + postgres_stalled.LOOKAHEAD
    if url.startswith("sqlite"):
        arguments = {"as_of": to_us(datetime.now(UTC)), "bounded": lookahead, "unbounded": 10_000}
        return {"instructions": count_instructions(url, sqlite_stalled.READ_RUNS, arguments)}
    admin = await connect(url)
    try:
        schema = await admin.fetchval("SELECT quote_ident(current_schema())")
        for setting in ("seqscan", "bitmapscan", "hashjoin", "mergejoin", "material"):
            await admin.execute(f"SET enable_{setting} = off")
        explained = "EXPLAIN (ANALYZE, FORMAT JSON) " + fill_in(postgres_stalled.GET_STALLED_STEPS, schema)
        [plan] = json.loads(await admin.fetchval(explained, None, None, TAKE, lookahead, 10_000))
        return {"rows": count_rows(plan["Plan"])}
    finally:
        await admin.close()


@pytest.mark.parametrize("analyzed", [False, True], ids=["old statistics", "new statistics"])
@pytest.mark.parametrize("due_at", [LONG_AGO, FAR_AHEAD], ids=["due", "later"])
async def test_the_cost_does_not_depend_on_the_number_of_runs(
    due_at: datetime, analyzed: bool, url: str
) -> None:
    async with open_store(url) as store:

        async def add(count: int) -> dict[str, int]:
            await _add_runs(url, count, due_at)
            stalled = await store.get_stalled_steps(take=TAKE)
            assert len(stalled) == (TAKE if due_at == LONG_AGO else 0)
            if analyzed and not url.startswith("sqlite"):
                await execute(url, "ANALYZE")
            return await _count_work(url)

        few, many = await add(500), await add(4_000)
    assert all(many[name] <= 1.5 * few[name] for name in many), (few, many)


# Older versions


async def test_a_store_of_the_version_before_is_migrated_in_place(url: str) -> None:
    clock = VirtualClock()
    _, backend, _ = resolve_store(url)
    async with open_store(url, clock=clock) as store:
        run_id = new_run_id()
        await store.start_run(FLOW, "flow", run_id, "manual")
        await _sleep(store, run_id, clock.now + HOUR)
        await store.try_record_dispatch(run_id, "due")
        expected = await store.get_stalled_steps(as_of=clock.now + 2 * HOUR)
        assert len(expected) == 5
    before = max(backend.earlier_schema_versions())  # type: ignore[attr-defined]
    await backend.revert_schema(url, before)  # type: ignore[attr-defined]
    async with open_store(url, clock=clock) as store:
        for _ in range(2):
            assert await store.get_stalled_steps(as_of=clock.now + 2 * HOUR) == expected
            assert await _keys(store) == ["due"]


async def test_a_step_that_an_older_version_adds_or_changes_is_seen(url: str) -> None:
    clock = VirtualClock()
    time = to_us(clock.now) if url.startswith("sqlite") else f"'{clock.now}'"
    async with open_store(url, clock=clock) as store:
        run_id = new_run_id()
        await store.start_run(FLOW, "flow", run_id, "manual")
        await _sleep(store, run_id, clock.now + HOUR)
        assert await _keys(store) == []
        await execute(
            url, f"INSERT INTO steps (run_id, step_key, dispatched_at) SELECT run_id, 'new', {time} FROM runs"
        )
        for _ in range(2):
            assert await _keys(store) == ["new"]
        await execute(url, f"UPDATE steps SET due_at = {time} WHERE step_key = 'dispatched'")
        for _ in range(2):
            assert await _keys(store) == ["dispatched", "new"]
