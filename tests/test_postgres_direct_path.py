"""The direct path, on which the caller's own task sends a single call."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from flowstore_core import FlowStore, StoreClosedError, new_run_id, open_store

FLOW = UUID(int=1)

ClaimCall = Callable[[FlowStore, UUID, str], Awaitable[bool]]
CLAIM_CALLS: list[ClaimCall] = [
    lambda store, run, key: store.try_claim_step(run, key),
    lambda store, run, key: store.try_record_dispatch(run, key),
]


async def new_run(store: FlowStore) -> UUID:
    run = new_run_id()
    await store.start_run(FLOW, "orders", run, "manual")
    # The first call opens the connection that the direct path needs.
    assert await store.try_claim_step(run, "first")
    return run


def start(call: Awaitable[Any]) -> asyncio.Task[Any]:
    return asyncio.ensure_future(call)  # type: ignore[return-value]


@pytest.mark.parametrize("claim", CLAIM_CALLS, ids=["claim", "dispatch"])
async def test_con_4_a_call_cancelled_at_any_time_is_compensated(fresh: str, claim: ClaimCall) -> None:
    rng = random.Random(7)
    keys = [f"step {n}" for n in range(60)]
    completed = set()
    async with open_store(fresh) as store:
        run = await new_run(store)
        for key in keys:
            task = start(claim(store, run, key))
            await asyncio.sleep(rng.random() * 0.003)
            task.cancel()
            with suppress(asyncio.CancelledError):
                if await task:
                    completed.add(key)
            # The compensation blocks no other call.
            assert (await store.get_run_detail(run)) is not None
    async with open_store(fresh) as store:
        results = {key: await claim(store, run, key) for key in keys}
    assert results == {key: key not in completed for key in keys}


@pytest.mark.parametrize("claim", CLAIM_CALLS, ids=["claim", "dispatch"])
async def test_con_4_a_call_cancelled_during_its_statement_has_no_effect(
    fresh: str, admin: asyncpg.Connection, claim: ClaimCall
) -> None:
    tasks = asyncio.all_tasks()
    async with open_store(fresh) as store:
        run = await new_run(store)
        async with admin.transaction():
            await admin.execute("SELECT FROM runs WHERE run_id = $1 FOR UPDATE", run)
            task = start(claim(store, run, "step"))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert await asyncio.wait_for(claim(store, run, "another"), 60) is True
    assert asyncio.all_tasks() == tasks
    async with open_store(fresh) as store:
        assert await claim(store, run, "step") is True
    for _ in range(1000):
        remaining = await admin.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%' || current_schema() || '%'"
            " AND pid <> pg_backend_pid()"
        )
        if not remaining:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"{remaining} connections remain open")


async def test_a_call_on_a_locked_run_delays_no_other_call(fresh: str, admin: asyncpg.Connection) -> None:
    async with open_store(fresh) as store:
        locked, free = await new_run(store), await new_run(store)
        async with admin.transaction():
            await admin.execute("SELECT FROM runs WHERE run_id = $1 FOR UPDATE", locked)
            waiting = start(store.try_claim_step(locked, "step"))
            await asyncio.sleep(0)
            for n in range(20):
                assert await asyncio.wait_for(store.try_claim_step(free, f"step {n}"), 60) is True
            assert not waiting.done()
        assert await asyncio.wait_for(waiting, 60) is True


async def test_a_closing_store_completes_the_call(fresh: str, admin: asyncpg.Connection) -> None:
    async with open_store(fresh) as store:
        run = await new_run(store)
        async with admin.transaction():
            await admin.execute("SELECT FROM runs WHERE run_id = $1 FOR UPDATE", run)
            waiting = start(store.try_claim_step(run, "step"))
            await asyncio.sleep(0.02)
            closing = start(store.aclose())
            await asyncio.sleep(0.02)
            with pytest.raises(StoreClosedError):
                await store.try_claim_step(run, "later")
        assert await asyncio.wait_for(waiting, 60) is True
        await asyncio.wait_for(closing, 60)


async def test_a_call_succeeds_after_an_error_of_the_server(fresh: str, admin: asyncpg.Connection) -> None:
    async with open_store(fresh) as store:
        run = await new_run(store)
        await admin.execute("ALTER TABLE steps RENAME TO gone")
        with pytest.raises(Exception, match="flowstore migrate up"):
            await asyncio.wait_for(store.try_claim_step(run, "step"), 60)
        await admin.execute("ALTER TABLE gone RENAME TO steps")
        assert await store.try_claim_step(run, "step") is True
