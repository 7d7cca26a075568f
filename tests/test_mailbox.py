"""Buffered signals in stores that an older flowstore uses too, and the round trips of signals (MBX)."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from flowstore_chaos.proxy import Fault, proxy_before
from flowstore_core import FlowStore, SignalDeliveryStatus, new_run_id, open_store
from flowstore_core.open import resolve_store
from flowstore_sqlite.schema_migrations import load_migrations

# The statements of the version before the mailbox.
REGISTER_BY_SQLITE_VERSION_6 = """
INSERT INTO waiters (run_id, step_key, signal_name, expires_at, created_at) VALUES (?, ?, ?, NULL, ?)
ON CONFLICT (run_id, step_key) DO UPDATE SET
    signal_name = excluded.signal_name, expires_at = excluded.expires_at
"""
FIND_BY_SQLITE_VERSION_6 = (
    "SELECT step_key, delivered_at FROM deliveries WHERE run_id = ? AND delivery_id = ?"
)
REGISTER_BY_POSTGRESQL_VERSION_9 = """
INSERT INTO waiters (run_id, step_key, signal_name, expires_at, created_at)
VALUES ($1, $2, $3, NULL, clock_timestamp())
ON CONFLICT (run_id, step_key) DO UPDATE
    SET signal_name = excluded.signal_name, expires_at = excluded.expires_at
"""
FIND_BY_POSTGRESQL_VERSION_9 = (
    "SELECT step_key, delivered_at FROM deliveries WHERE run_id = $1 AND delivery_id = $2"
)


async def _new_run(store: FlowStore) -> UUID:
    run_id = new_run_id()
    await store.start_run(uuid4(), "orders", run_id, "manual")
    return run_id


async def _buffer(store: FlowStore, run_id: UUID, *payloads: str) -> None:
    for payload in payloads:
        result = await store.deliver_signal(run_id, "go", payload, delivery_id=payload, buffer=True)
        assert result.status is SignalDeliveryStatus.BUFFERED


async def _expect_taken(store: FlowStore, run_id: UUID, *payloads: str) -> None:
    """Expect the waiters "new" and "renamed" to have these payloads, and delivered_at between both calls."""
    for step_key, payload in zip(("new", "renamed"), payloads, strict=True):
        waiter = await store.get_waiter(run_id, step_key)
        assert waiter is not None
        assert (waiter.signal_name, waiter.payload_json) == ("go", payload)
        assert waiter.delivered_at is not None
        assert abs((waiter.delivered_at - waiter.created_at).total_seconds()) < 600


async def test_waiters_of_sqlite_version_6_take_buffered_signals(tmp_path: Path) -> None:
    path = tmp_path / "flows.db"
    async with open_store(f"sqlite:///{path}") as store:
        with closing(sqlite3.connect(path, isolation_level=None)) as old:
            run_id = await _new_run(store)
            await _buffer(store, run_id, "1", "2", "3")
            await store.register_waiter(run_id, "renamed", "other")
            now = old.execute("SELECT created_at FROM waiters").fetchone()[0]
            for step_key in ("new", "renamed"):
                old.execute(REGISTER_BY_SQLITE_VERSION_6, (run_id.bytes, step_key, "go", now))
            await _expect_taken(store, run_id, "1", "2")
            # An older flowstore finds the id, and so does not deliver the payload once more.
            found = old.execute(FIND_BY_SQLITE_VERSION_6, (run_id.bytes, "1")).fetchone()
            assert found[0] == ""
            old.execute("DELETE FROM runs WHERE run_id = ?", (run_id.bytes,))
            assert await store.get_buffered_signals(run_id) == ()


async def test_a_sqlite_file_of_version_6_is_migrated_in_place(tmp_path: Path) -> None:
    path, run_id = tmp_path / "flows.db", UUID(int=7)
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE flowstore_schema (version, name, works_from, applied_at)")
        for migration in load_migrations()[:6]:
            db.executescript(migration.sql)
            row = (migration.version, migration.name, migration.works_from, 0)
            db.execute("INSERT INTO flowstore_schema VALUES (?, ?, ?, ?)", row)
        db.execute(
            "INSERT INTO runs (run_id, flow_id, status, started_at, flow_name, trigger_key) "
            "VALUES (?1, ?1, 'Running', 0, 'flow', 'manual')",
            (run_id.bytes,),
        )
        db.execute("INSERT INTO deliveries VALUES (?, 'd', 'a', 1)", (run_id.bytes,))
        db.commit()
    async with open_store(f"sqlite:///{path}") as store:
        first = await store.deliver_signal(run_id, "go", "{}", delivery_id="d", buffer=True)
        assert (first.status, first.step_key) == (SignalDeliveryStatus.DELIVERED, "a")
        await _buffer(store, run_id, "1")
        assert load_migrations()[6].works_from <= 6


async def test_waiters_of_postgresql_version_9_take_buffered_signals(
    fresh: str, admin: asyncpg.Connection
) -> None:
    async with open_store(fresh) as store:
        run_id = await _new_run(store)
        await _buffer(store, run_id, "1", "2", "3")
        await store.register_waiter(run_id, "renamed", "other")
        for step_key in ("new", "renamed"):
            await admin.execute(REGISTER_BY_POSTGRESQL_VERSION_9, run_id, step_key, "go")
        await _expect_taken(store, run_id, "1", "2")
        # An older flowstore finds the id, and so does not deliver the payload once more.
        assert (await admin.fetchrow(FIND_BY_POSTGRESQL_VERSION_9, run_id, "1"))["step_key"] == ""
        await admin.execute("DELETE FROM runs WHERE run_id = $1", run_id)
        assert await store.get_buffered_signals(run_id) == ()


async def test_a_postgresql_store_of_version_9_is_migrated_in_place(
    fresh: str, admin: asyncpg.Connection
) -> None:
    _, backend, config = resolve_store(fresh)
    for number, _, script in backend.migrations(config):  # type: ignore[attr-defined]
        if number < 10:
            await admin.execute(script)
    run_id = new_run_id()
    await admin.execute(
        "INSERT INTO runs (run_id, flow_id, flow_name, status, trigger_key, started_at, start_token) "
        "VALUES ($1, $1, 'orders', 'Running', 'manual', now(), $1)",
        run_id,
    )
    await admin.execute("INSERT INTO deliveries VALUES ($1, 'd', 'a', now())", run_id)
    async with open_store(fresh) as store:
        first = await store.deliver_signal(run_id, "go", "{}", delivery_id="d", buffer=True)
        assert (first.status, first.step_key) == (SignalDeliveryStatus.DELIVERED, "a")
        await _buffer(store, run_id, "1")


Call = Callable[[FlowStore, UUID], Awaitable[Any]]

# BEGIN, the lock of the run with the note of the commit, one statement, COMMIT.
ROUND_TRIPS: dict[str, tuple[Call, int]] = {
    "a new waiter": (lambda s, r: s.register_waiter(r, "new", "new"), 4),
    "a waiter that takes a payload": (lambda s, r: s.register_waiter(r, "new", "early"), 4),
    "a delivery": (lambda s, r: s.deliver_signal(r, "go", "{}"), 4),
    "a delivery with an id": (lambda s, r: s.deliver_signal(r, "go", "{}", delivery_id="d"), 4),
    "a delivery without a waiter": (lambda s, r: s.deliver_signal(r, "none", "{}"), 4),
    "a delivery that is buffered": (lambda s, r: s.deliver_signal(r, "none", "{}", buffer=True), 5),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
async def test_signals_take_few_round_trips_on_postgresql(name: str, fresh: str) -> None:
    call, expected = ROUND_TRIPS[name]
    async with (
        proxy_before(fresh) as (proxy, through),
        open_store(fresh) as direct,
        open_store(through, pool_size=1) as store,
    ):
        # The first calls prepare their statements, and the store's own work may come between.
        messages = []
        for _ in range(10):
            run_id = await _new_run(direct)
            await direct.register_waiter(run_id, "wait", "go")
            await direct.deliver_signal(run_id, "early", "{}", buffer=True)
            proxy.arm(0, Fault.REPLY_LOST)
            await call(store, run_id)
            messages.append(proxy.messages)
        assert min(messages) == expected
