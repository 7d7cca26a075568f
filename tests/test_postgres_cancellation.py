"""CON-4 on PostgreSQL: a cancelled claim is released even while all connections are busy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from uuid import UUID

import asyncpg
import pytest

from flowstore_chaos.proxy import Fault, MessageMatch, Proxy, proxy_before
from flowstore_core import (
    FlowStore,
    OutcomeUnknownError,
    StoreUnavailableError,
    new_run_id,
    open_store,
)

TIMEOUT_SECONDS = 60.0

WAITS_FOR_A_LOCK = """
SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%"' || $1 || '"%'
"""


async def _until(condition: Callable[[], Awaitable[bool]], description: str) -> None:
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            while not await condition():  # noqa: ASYNC110 - a condition of another process
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"not within {TIMEOUT_SECONDS:g} s: {description}") from None


@asynccontextmanager
async def _locked(admin: asyncpg.Connection, run_id: UUID) -> AsyncIterator[None]:
    """Lock the run, so that every claim on it waits on the server."""
    async with admin.transaction():
        await admin.execute("SELECT FROM runs WHERE run_id = $1 FOR UPDATE", run_id)
        yield


async def _claims_waiting(admin: asyncpg.Connection) -> int:
    # Within a transaction the statistics would be cached.
    await admin.execute("SELECT pg_stat_clear_snapshot()")
    schema = await admin.fetchval("SELECT current_schema()")
    return int(await admin.fetchval(WAITS_FOR_A_LOCK, schema))


async def _runs(store: FlowStore) -> tuple[UUID, UUID]:
    run_ids = (new_run_id(), new_run_id())
    for run_id in run_ids:
        await store.start_run(new_run_id(), "orders", run_id, "manual")
    # Open a connection for batches, so that a single call uses the direct path.
    for _ in range(2):
        await store.try_claim_step(run_ids[0], "warm", owner="warm")
    return run_ids


def _claims(store: FlowStore, run_id: UUID, count: int) -> list[asyncio.Task[bool]]:
    return [asyncio.create_task(store.try_claim_step(run_id, f"step {n}")) for n in range(count)]


async def _cancel(tasks: list[asyncio.Task[bool]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert all(task.cancelled() for task in tasks)


async def _is_claimed(store: FlowStore, run_id: UUID, step_key: str) -> bool:
    return any(claim.step_key == step_key for claim in await store.get_step_claims(run_id))


async def _is_free(store: FlowStore, run_id: UUID, step_key: str) -> bool:
    return not await _is_claimed(store, run_id, step_key)


async def _released(store: FlowStore, run_id: UUID) -> bool:
    return all(claim.owner is not None for claim in await store.get_step_claims(run_id))


@pytest.mark.parametrize("pgbouncer", ["false", "true"])
async def test_claims_are_released_while_an_unacknowledged_statement_can_still_take_effect(
    pgbouncer: str, fresh: str, admin: asyncpg.Connection
) -> None:
    async with (
        open_store(fresh) as direct,
        proxy_before(fresh) as (proxy, through),
        open_store(
            through, pgbouncer=pgbouncer, pool_size=2, statement_timeout=2, acquire_timeout=0.3
        ) as store,
    ):
        locked_run, free_run = await _runs(store)
        async with _locked(admin, locked_run):
            waiting = _claims(store, locked_run, 1)
            await _until(lambda: _number_waiting_is(admin, 1), "a claim waits for the run")
            await _cancel(waiting)
            # Its outcome is unknown while the run is locked; other compensations do not wait for it.
            unacked = await _lose_replies(proxy, store, free_run)
            await _cancel_unacked(unacked)
            # A cancelled claim that takes effect later is released later.
            for key in ("step 0", "step 1", "step 2"):
                await _until(
                    lambda key=key: direct.try_claim_step(free_run, key, owner="next"), "a claim is released"
                )
        await _until(lambda: _released(direct, locked_run), "the claim that had waited is released")
        await _until(lambda: _claims_again(store, locked_run), "the store claims again")


async def _claims_again(store: FlowStore, run_id: UUID) -> bool:
    try:
        return await store.try_claim_step(run_id, "step 0", owner="next")
    except StoreUnavailableError:  # both connections of the pool still resolve earlier statements
        return False


async def _number_waiting_is(admin: asyncpg.Connection, count: int) -> bool:
    return await _claims_waiting(admin) == count


async def _lose_replies(proxy: Proxy, store: FlowStore, run_id: UUID) -> list[asyncio.Task[bool]]:
    """Start claims that succeed and whose replies are lost."""
    proxy.arm(1, Fault.REPLY_LOST, match=MessageMatch.COMMIT, times=3)
    while True:
        tasks = _claims(store, run_id, 3)
        # The store has not retried yet; on a slow machine it may find no connection in time.
        while not (proxy.has_injected or all(task.done() for task in tasks)):  # noqa: ASYNC110
            await asyncio.sleep(0)
        if proxy.has_injected:
            return tasks
        await asyncio.gather(*tasks, return_exceptions=True)


async def _cancel_unacked(tasks: list[asyncio.Task[bool]]) -> None:
    for task in tasks:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert any(task.cancelled() for task in tasks)
    assert True not in results


async def test_a_claim_with_an_outcome_unknown_beyond_retry_timeout_is_released(
    fresh: str, admin: asyncpg.Connection
) -> None:
    async with (
        open_store(fresh) as direct,
        open_store(fresh, pgbouncer=True, pool_size=2, statement_timeout=3, retry_timeout=0) as store,
    ):
        locked_run, _ = await _runs(store)
        async with _locked(admin, locked_run):
            # The first claim takes the direct path; the others share the next batch.
            first, cancelled, kept = _claims(store, locked_run, 3)
            await _until(lambda: _number_waiting_is(admin, 1), "the first waits for the run")
            await _cancel([first])
            await _until(lambda: _number_waiting_is(admin, 2), "a batch waits for the run too")
            await _cancel([cancelled])
            with pytest.raises(OutcomeUnknownError):
                await kept
        # The batch takes effect now, and its fence completes later.
        await _until(lambda: _is_claimed(direct, locked_run, "step 2"), "the batch is committed")
        await _until(lambda: _is_free(direct, locked_run, "step 1"), "the cancelled claim is released")
        assert await _is_claimed(direct, locked_run, "step 2")


async def test_compensations_are_retried_until_the_server_is_back(
    fresh: str, admin: asyncpg.Connection
) -> None:
    async with (
        open_store(fresh) as direct,
        proxy_before(fresh) as (proxy, through),
        open_store(through, pool_size=2, acquire_timeout=0.2, retry_timeout=0.2) as store,
    ):
        _, free_run = await _runs(store)
        unacked = await _lose_replies(proxy, store, free_run)
        proxy.arm(1, Fault.RESET, match=MessageMatch.CONNECT, times=100_000)
        await _cancel_unacked(unacked)
        refused = sum(proxy.injected.values())
        # Several times the number of tries within one retry_timeout.
        await _until(lambda: _true(sum(proxy.injected.values()) > refused + 30), "the store tries to connect")
        assert not await _released(direct, free_run)
        proxy.heal()
        await _until(lambda: _released(direct, free_run), "the claims are released")


async def _true(value: bool) -> bool:
    return value
