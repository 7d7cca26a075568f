"""Cleanup and delete_run leave no row of a deleted run in any table (RET-1, RET-5)."""

from __future__ import annotations

import asyncio
import gc
import sqlite3
import types
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import UUID, uuid4

import asyncpg
import pytest

from flowstore_core import (
    FlowStore,
    RunStatus,
    RunTimeseriesGranularity,
    StepStatus,
    new_claim_token,
    new_run_id,
    open_store,
)
from flowstore_core.backend import ScratchClearable
from flowstore_core.plugins import find_backend
from tests.virtual_clock import VirtualClock

Delete = Callable[..., Awaitable[None]]

FLOWS = 40
DAY = timedelta(days=1)


async def _create_runs(store: FlowStore, clock: VirtualClock, *, orphans: bool = True) -> set[UUID]:
    """Create every kind of row, in runs of many flows, and return the ids of flows and runs.

    ``orphans``: also the keys and control records of runs that never start.
    """
    ids: set[UUID] = set()
    flows: set[UUID] = set()
    for number in range(FLOWS):
        flow_id, run_id, never_started = uuid4(), new_run_id(), new_run_id()
        ids |= {flow_id, run_id}
        flows.add(flow_id)
        if orphans:
            ids.add(never_started)
            await store.try_register_idempotency_key(flow_id, "t", f"early {number}", never_started)
            await store.configure_run(never_started, flow_id, "t", timeout_at=clock() + DAY)
        await store.trigger_run(
            flow_id, f"flow {number}", run_id, "t", idempotency_key=f"key {number}", tags={"n": f"{number}"}
        )
        await store.set_tags(run_id, {"env": "test"})
        assert await store.try_record_dispatch(run_id, "a")
        token = new_claim_token()
        assert await store.try_claim_step(run_id, "a", owner=token, lease=timedelta(minutes=1))
        assert await store.try_claim_step(run_id, "b")
        assert await store.try_record_dispatch(run_id, "q", queue="mail", step_type="http")
        await store.record_step_start(run_id, "a", "http", owner=token)
        await store.record_step_complete(run_id, "a", StepStatus.FAILED, error_message="it failed")
        await store.retry_step(run_id, "a")
        await store.record_step_start(run_id, "a", "http")
        await store.register_waiter(run_id, "w", "go")
        await store.register_waiter(run_id, "late", "never")
        await store.deliver_signal(run_id, "go", "1", delivery_id=f"delivery {number}")
        for name in ("taken", "early"):
            await store.deliver_signal(run_id, name, "1", delivery_id=f"{name} {number}", buffer=True)
        await store.register_waiter(run_id, "taken", "taken")
        await store.record_step_complete(run_id, "a", StepStatus.SUCCEEDED, output_json='"done"')
        await store.record_skipped_step(run_id, "s", "http")
        await store.save_output(run_id, "o", "1")
        await store.append_event(run_id, "done")
        await store.request_cancel(run_id)
        assert await store.complete_run(run_id, RunStatus.SUCCEEDED)
        clock.advance(seconds=1)
    for flow_id in flows:
        for granularity in RunTimeseriesGranularity:
            await store.get_run_timeseries(granularity, clock() - DAY, clock() + DAY, flow_id)
    return ids


async def _cleanup_all(store: FlowStore, clock: VirtualClock, runs: int = 2 * FLOWS) -> None:
    clock.advance(hours=2)
    assert await store.cleanup(clock()) == runs
    assert (await store.get_statistics()).total_flows == 0


async def _delete_each(store: FlowStore, clock: VirtualClock, runs: int = 2 * FLOWS) -> None:
    found = await store.get_runs(take=1000)
    assert len(found) == runs
    assert all([await store.delete_run(run.run_id) for run in found])
    assert (await store.get_statistics()).total_flows == 0


DELETIONS = pytest.mark.parametrize("delete", [_cleanup_all, _delete_each])


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


# Counts per day contain no id of a run and are kept (RET-1).
DAY_COUNTS = {"run_days"}


def _contains(rows: object, ids: set[UUID]) -> bool:
    """Return whether any of the ids occurs in the rows, in any storage format."""
    text = repr(rows)
    return any(form in text for one in ids for form in (str(one), one.hex, repr(one.bytes)))


def _sqlite_rows(path: Path) -> dict[str, list[Any]]:
    db = sqlite3.connect(path)
    try:
        tables = db.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name <> 'run_trigrams'")
        return {name: db.execute(f'SELECT * FROM "{name}"').fetchall() for (name,) in tables.fetchall()}
    finally:
        db.close()


@DELETIONS
async def test_sqlite_keeps_no_row(delete: Delete, tmp_path: Path, clock: VirtualClock) -> None:
    path, orphans = tmp_path / "flows.db", delete is _cleanup_all
    async with open_store(f"sqlite:///{path}", clock=clock) as store:
        empty = _sqlite_rows(path)
        ids = await _create_runs(store, clock, orphans=orphans)
        # Delete no run, but add these runs to the search index.
        assert await store.cleanup(clock() - 365 * DAY) == 0
        ids |= await _create_runs(store, clock, orphans=orphans)
        full = _sqlite_rows(path)
        await delete(store, clock)
        remaining = _sqlite_rows(path)
    grown = {name for name, rows in full.items() if rows != empty[name]}
    assert empty.keys() - grown == {"flowstore_schema", "run_trigrams_config"}
    # sqlite_sequence belongs to SQLite and has the last AUTOINCREMENT value of a table.
    assert {name for name, rows in remaining.items() if rows != empty[name]} == DAY_COUNTS | {
        "sqlite_sequence"
    }
    assert not _contains(remaining, ids)
    assert len(remaining["run_days"]) <= 2


async def test_sqlite_clears_a_scratch_file(tmp_path: Path, clock: VirtualClock) -> None:
    path = tmp_path / "scratch.db"
    url = f"sqlite:///{path}"
    async with open_store(url, clock=clock) as store:
        empty = _sqlite_rows(path)
        await _create_runs(store, clock)
        await store.cleanup(clock() - 365 * DAY)  # Fills the search index.
        await _create_runs(store, clock)
        full = _sqlite_rows(path)
    backend = find_backend("sqlite")[1]
    assert isinstance(backend, ScratchClearable)
    await backend.clear_scratch(url)
    rows = _sqlite_rows(path)
    kept = {"flowstore_schema", "sqlite_sequence"} | {
        name for name in rows if name.startswith("run_trigrams")
    }
    assert {name for name, found in rows.items() if found} <= kept
    assert rows["flowstore_schema"] == empty["flowstore_schema"]
    assert {name for name, found in full.items() if not found} <= {"run_counts", "run_days"}
    async with open_store(url, clock=clock) as store:
        page = await store.get_runs_page(search="flow")
    assert page.total_count == 0


async def test_sqlite_deletes_empty_counters_of_an_older_version(tmp_path: Path, clock: VirtualClock) -> None:
    path = tmp_path / "flows.db"
    db = sqlite3.connect(path, isolation_level=None)
    for number, _, script in find_backend("sqlite")[1].migrations(None):  # type: ignore[attr-defined]
        if number <= 3:
            db.executescript(script)
    start = (
        "INSERT INTO runs (run_id, flow_id, status, started_at, flow_name, trigger_key) "
        "VALUES (?1, ?1, 'Running', 0, 'f', 't')"
    )
    for _ in range(FLOWS):
        db.execute(start, (uuid4().bytes,))
    db.execute("UPDATE runs SET status = 'Succeeded', completed_at = 1")
    db.execute("DELETE FROM runs WHERE run_id IN (SELECT run_id FROM runs LIMIT 10)")
    assert db.execute("SELECT COUNT(*) FROM run_counts WHERE amount = 0").fetchone() == (FLOWS,)
    db.close()
    async with open_store(f"sqlite:///{path}", clock=clock) as store:
        assert (await store.get_statistics()).total_flows == FLOWS - 10
        rows = _sqlite_rows(path)["run_counts"]
        assert len(rows) == FLOWS - 10
        assert await store.cleanup(clock()) == FLOWS - 10
        assert _sqlite_rows(path)["run_counts"] == []


@DELETIONS
async def test_memory_keeps_no_object(delete: Delete, clock: VirtualClock) -> None:
    async with open_store("memory://", clock=clock) as store:
        ids = await _create_runs(store, clock, orphans=delete is _cleanup_all)
        assert _reachable_ids(store) & ids == ids
        await delete(store, clock, FLOWS)
        assert _reachable_ids(store) & ids == set()


def _reachable_ids(store: FlowStore) -> set[UUID]:
    """Return the ids among all objects reachable from the store."""
    ids: set[UUID] = set()
    seen = set[int]()
    queue: list[Any] = [store]
    while queue:
        one = queue.pop()
        # The store references its event loop, which references this test.
        if id(one) in seen or isinstance(one, (type, types.ModuleType, types.FunctionType, asyncio.Future)):
            continue
        seen.add(id(one))
        if isinstance(one, UUID):
            ids.add(one)
        elif type(one) is int and one.bit_length() > 64:
            ids.add(UUID(int=one))
        elif not isinstance(one, asyncio.AbstractEventLoop):
            queue += gc.get_referents(one)
    return ids


def _socket_and_schema(url: str) -> tuple[str, str]:
    query = parse_qs(urlsplit(url).query)
    return query["host"][0], query["schema"][0]


async def _postgresql_rows(url: str) -> dict[str, list[Any]]:
    host, schema = _socket_and_schema(url)
    connection = await asyncpg.connect(host=host, user="postgres", database="postgres")
    try:
        tables = await connection.fetch(
            "SELECT table_name FROM information_schema.tables WHERE table_schema = $1", schema
        )
        return {
            name: [tuple(row) for row in await connection.fetch(f'SELECT * FROM "{schema}"."{name}"')]
            for (name,) in tables
        }
    finally:
        await connection.close()


@DELETIONS
async def test_postgresql_keeps_no_row(delete: Delete, fresh: str, clock: VirtualClock) -> None:
    orphans = delete is _cleanup_all
    async with open_store(fresh, clock=clock) as store:
        empty = await _postgresql_rows(fresh)
        ids = await _create_runs(store, clock, orphans=orphans)
        assert await store.cleanup(clock() - 365 * DAY) == 0
        ids |= await _create_runs(store, clock, orphans=orphans)
        await delete(store, clock)
        remaining = await _postgresql_rows(fresh)
    # Cleanup deletes rows of table commits after a day.
    expected = DAY_COUNTS | {"commits"}
    assert {name for name, rows in remaining.items() if rows != empty[name]} <= expected
    assert not _contains(remaining, ids)


async def test_postgresql_clears_a_scratch_schema(fresh: str, clock: VirtualClock) -> None:
    async with open_store(fresh, clock=clock) as store:
        empty = await _postgresql_rows(fresh)
        await _create_runs(store, clock)
        await store.cleanup(clock() - 365 * DAY)  # Fills the search index.
        await _create_runs(store, clock)
        full = await _postgresql_rows(fresh)
    empty_tables = {name for name, rows in full.items() if not rows}
    assert empty_tables <= {"run_counts", "run_days", "run_changes", "stall_changes"}
    backend = find_backend("postgresql")[1]
    assert isinstance(backend, ScratchClearable)
    await backend.clear_scratch(fresh)
    assert await _postgresql_rows(fresh) == empty
