"""The free connections that a store keeps beside the driver's pool."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from functools import partial
from uuid import UUID

import asyncpg
import pytest

from flowstore_core import FlowStore, new_run_id, open_store
from flowstore_postgres import database, pool
from flowstore_postgres.fault_injection import inject_faults

FLOW = UUID(int=1)
READERS = 8


@pytest.fixture
def short_idle_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the store and the driver close connections soon."""
    monkeypatch.setattr(pool, "IDLE_SECONDS", 0.2)
    create = partial(asyncpg.create_pool, max_inactive_connection_lifetime=0.2)
    monkeypatch.setattr(asyncpg, "create_pool", create)


async def open_connections(admin: asyncpg.Connection, name: str) -> int:
    count = await admin.fetchval("SELECT count(*) FROM pg_stat_activity WHERE application_name = $1", name)
    return int(count)


async def wait_until_closed(admin: asyncpg.Connection, name: str) -> None:
    async with asyncio.timeout(120):
        while await open_connections(admin, name) > 0:  # noqa: ASYNC110 - the server has no event for it
            await asyncio.sleep(0.05)


async def read_concurrently(store: FlowStore) -> None:
    await asyncio.gather(*(store.get_runs_page(search=f"{number}") for number in range(READERS)))


@pytest.mark.usefixtures("short_idle_time")
async def test_connections_that_no_call_uses_are_closed(fresh: str, admin: asyncpg.Connection) -> None:
    name = f"idle {new_run_id()}"
    async with open_store(fresh, pool_size=5, application_name=name) as store:
        await read_concurrently(store)
        assert await open_connections(admin, name) > 1
        await wait_until_closed(admin, name)
        # The next calls open others.
        await read_concurrently(store)
        assert await open_connections(admin, name) > 0
    assert await open_connections(admin, name) == 0


async def test_a_free_connection_that_the_server_closed_is_replaced(
    fresh: str, admin: asyncpg.Connection
) -> None:
    name = f"idle {new_run_id()}"
    async with open_store(fresh, pool_size=5, application_name=name) as store:
        for _ in range(3):
            await read_concurrently(store)
            await admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1", name
            )
            await wait_until_closed(admin, name)
            await read_concurrently(store)


async def test_waiting_calls_share_a_pool_of_one(fresh: str) -> None:
    async with open_store(fresh, pool_size=1) as store:
        run = new_run_id()
        await store.start_run(FLOW, "orders", run, "manual")
        for _ in range(20):
            pages = await asyncio.gather(*(store.get_runs_page() for _ in range(READERS)))
            assert [page.total_count for page in pages] == [1] * READERS


async def test_a_worn_out_connection_is_replaced(
    fresh: str, admin: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver replaces a connection after a number of statements, which it counts when it gets it back."""
    monkeypatch.setattr(pool, "MAX_USES", 10)
    monkeypatch.setattr(asyncpg, "create_pool", partial(asyncpg.create_pool, max_queries=20))
    name, found = f"idle {new_run_id()}", set()
    async with open_store(fresh, pool_size=5, application_name=name) as store:
        for _ in range(100):
            await store.get_runs_page()
            rows = await admin.fetch("SELECT pid FROM pg_stat_activity WHERE application_name = $1", name)
            found |= {row["pid"] for row in rows}
    assert len(found) > 2


async def test_a_silent_server_does_not_delay_the_close(fresh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads that closing cancels leave free connections, which wait for the end of their statements."""
    monkeypatch.setattr(database, "CLOSE_SECONDS", 0.2)
    async with (
        inject_faults(fresh) as proxy,
        open_store(proxy.url, pool_size=5, acquire_timeout=300, statement_timeout=300) as store,
    ):
        await read_concurrently(store)
        async with proxy.silence():
            reads = [
                asyncio.ensure_future(store.get_runs_page(search=f"{number}")) for number in range(READERS)
            ]
            await asyncio.wait(reads, timeout=0.5)
            closing = asyncio.ensure_future(store.aclose())
            closed, _ = await asyncio.wait({closing}, timeout=30)
        await asyncio.wait([*reads, closing])
        assert closed


async def read_behind_a_lock(
    store: FlowStore, admin: asyncpg.Connection, name: str, connections: int
) -> None:
    """Make so many reads, and let all of them wait for a lock at the same time."""
    async with admin.transaction():
        await admin.execute("LOCK TABLE runs IN ACCESS EXCLUSIVE MODE")
        reads = [asyncio.ensure_future(store.get_runs_page(search=f"{n}")) for n in range(connections)]
        async with asyncio.timeout(60):
            while connections != await admin.fetchval(  # noqa: ASYNC110 - the server has no event for it
                # Within a transaction the statistics would stay as they were first read.
                "SELECT count(*) FROM pg_stat_clear_snapshot(), pg_stat_activity "
                "WHERE application_name = $1 AND wait_event_type = 'Lock'",
                name,
            ):
                await asyncio.sleep(0.05)
    await asyncio.gather(*reads)


async def test_a_refused_setting_of_a_kept_connection_costs_no_connection(
    fresh: str, admin: asyncpg.Connection
) -> None:
    """The first claim of a store prepares a connection for the next ones with SET."""
    name = f"claims {new_run_id()}"
    async with (
        inject_faults(fresh) as proxy,
        open_store(proxy.url, pool_size=5, application_name=name) as store,
    ):
        proxy.refuse_request()
        assert not await store.claim_next_steps(["orders"], lease=timedelta(minutes=1))
        assert proxy.disarm()
        # The fifth is kept for claims.
        await read_behind_a_lock(store, admin, name, 4)
