"""The hooks for the conformance suite: outages and failing writes."""

from __future__ import annotations

import secrets
from uuid import UUID

import etcd_cluster
import pytest
from flowstore_etcd.plugin import EtcdBackend
from flowstore_etcd.settings import read_settings
from flowstore_etcd.space import EtcdSpace

from flowstore_core import (
    ConfigurationError,
    FlowStore,
    StoreConfig,
    StoreUnavailableError,
    new_run_id,
    open_store,
)
from flowstore_core.urls import parse_url
from flowstore_documents import Change, MaybeApplied


@pytest.fixture
def namespace(cluster: etcd_cluster.Cluster) -> str:
    return cluster.url(f"hooks-{secrets.token_hex(8)}")


async def new_run(store: FlowStore) -> UUID:
    run_id = new_run_id()
    await store.start_run(UUID(int=7), "orders", run_id, "manual")
    return run_id


async def test_there_are_no_locks(namespace: str) -> None:
    async with EtcdBackend().inject_outages(namespace) as injector:
        with pytest.raises(ConfigurationError, match="no locks"):
            injector.lock()


@pytest.mark.parametrize("number", [0, 1])
async def test_an_interruption_makes_the_store_unavailable(namespace: str, number: int) -> None:
    async with EtcdBackend().inject_outages(namespace) as injector, open_store(injector.url) as store:
        await new_run(store)
        assert len(injector.interruptions) == 2
        async with list(injector.interruptions.values())[number]():
            with pytest.raises(StoreUnavailableError):
                await store.ping()


async def test_commits_fail_until_the_injector_stops(namespace: str) -> None:
    async with (
        open_store(namespace) as other,
        EtcdBackend().inject_write_failures(namespace) as injector,
        open_store(injector.url) as store,
    ):
        run_id = await new_run(store)
        injector.fail()
        for _ in range(2):
            with pytest.raises(StoreUnavailableError, match="database of etcd is full"):
                await store.try_claim_step(run_id, "charge")
        assert await other.get_claimed_step_keys(run_id) == set()
        assert await other.try_claim_step(run_id, "ship"), "a write of another store fails too"
        assert injector.stop()
        assert await store.try_claim_step(run_id, "charge")
        injector.fail(skip=100)
        assert not await store.try_claim_step(run_id, "charge")
        assert not injector.stop()


async def test_a_large_request_arrives_when_it_is_released(namespace: str) -> None:
    """It is larger than a frame of HTTP/2."""
    async with EtcdBackend().inject_faults(namespace) as injector:
        space = EtcdSpace(read_settings(StoreConfig.from_url(injector.url)))
        other = EtcdSpace(read_settings(StoreConfig.from_url(namespace)))
        try:
            injector.hold_request()
            with pytest.raises(MaybeApplied):
                await space.commit([Change(puts={b"key": bytes(40_000)})])
            assert injector.disarm()
            assert not (await other.read([b"key"])).found
            await injector.release_request()
            assert (await other.read([b"key"])).found[b"key"].value == bytes(40_000)
        finally:
            await space.aclose()
            await other.aclose()


async def test_a_server_with_tls_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="TLS"):
        async with EtcdBackend().inject_faults("etcd://localhost?tls=true"):
            pass


async def test_a_url_that_declines_tls_gets_a_proxy() -> None:
    async with EtcdBackend().inject_faults("etcd://localhost/flows?tls=false") as proxy:
        assert parse_url(proxy.url).options["tls"] == "false"
