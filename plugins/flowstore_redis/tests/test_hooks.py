"""The hooks for the conformance suite: locks, outages, failing writes."""

from __future__ import annotations

import asyncio
import secrets
from uuid import UUID

import pytest
from flowstore_redis.plugin import RedisBackend

from flowstore_core import ConfigurationError, FlowStore, StoreUnavailableError, new_run_id, open_store
from flowstore_core.urls import parse_url


@pytest.fixture
def namespace(url: str) -> str:
    parts = parse_url(url)
    return parts.with_more_options({"prefix": f"hooks-{secrets.token_hex(8)}"})


async def new_run(store: FlowStore) -> UUID:
    run_id = new_run_id()
    await store.start_run(UUID(int=7), "orders", run_id, "manual")
    return run_id


async def test_a_lock_delays_the_writes_of_any_store_until_it_ends(namespace: str) -> None:
    async with open_store(namespace) as store, RedisBackend().inject_outages(namespace) as injector:
        run_id = await new_run(store)
        async with injector.lock():
            claiming = asyncio.ensure_future(store.try_claim_step(run_id, "charge"))
            await asyncio.wait({claiming}, timeout=0.2)
            assert not claiming.done()
        assert await claiming


@pytest.mark.parametrize("number", [0, 1])
async def test_an_interruption_makes_the_store_unavailable(namespace: str, number: int) -> None:
    async with RedisBackend().inject_outages(namespace) as injector, open_store(injector.url) as store:
        await new_run(store)
        assert len(injector.interruptions) == 2
        async with list(injector.interruptions.values())[number]():
            with pytest.raises(StoreUnavailableError):
                await store.ping()


async def test_commits_fail_until_the_injector_stops(namespace: str) -> None:
    async with (
        open_store(namespace) as other,
        RedisBackend().inject_write_failures(namespace) as injector,
        open_store(injector.url) as store,
    ):
        run_id = await new_run(store)
        injector.fail()
        for _ in range(2):
            with pytest.raises(StoreUnavailableError, match="cannot write to its disk"):
                await store.try_claim_step(run_id, "charge")
        assert await other.get_claimed_step_keys(run_id) == set()
        assert await other.try_claim_step(run_id, "ship"), "a write of another store fails too"
        assert injector.stop()
        assert await store.try_claim_step(run_id, "charge")
        injector.fail(skip=100)
        assert not await store.try_claim_step(run_id, "charge")
        assert not injector.stop()


async def test_a_server_with_tls_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="TLS"):
        async with RedisBackend().inject_faults("rediss://localhost"):
            pass
