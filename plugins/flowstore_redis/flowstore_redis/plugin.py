"""The plugin for Redis; the driver is imported only when a store is opened."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta

from flowstore_core import Backend, Capability, StoreConfig, hookimpl
from flowstore_core.backend import Diagnostic, FaultInjector, OutageInjector, WriteFailureInjector
from flowstore_core.urls import parse_url
from flowstore_documents import (
    OPTIONS,
    TLS_FILES,
    DocumentStore,
    capabilities_of,
    open_documents,
    scratch_prefix,
)


class RedisBackend:
    """The descriptor of the Redis backend."""

    name = "redis"
    schemes = frozenset({"redis", "rediss", "valkey", "valkeys"})
    capabilities = capabilities_of(snapshots=False) | {
        Capability.DURABLE,  # A store has it only if its server syncs every write.
        Capability.MULTI_PROCESS,
        Capability.SHARED_CLOCK,
    }
    max_skew = timedelta(0)
    options = OPTIONS | TLS_FILES | {"connect_timeout", "prefix", "request_timeout"}
    contract_version = 1
    drivers = ("redis", "hiredis")

    @asynccontextmanager
    async def open(self, config: StoreConfig) -> AsyncIterator[DocumentStore]:
        from flowstore_redis.maintenance import connect
        from flowstore_redis.settings import read_settings
        from flowstore_redis.space import RedisSpace

        space = RedisSpace(read_settings(config))
        capabilities = self.capabilities
        try:
            facts = await connect(space.connection)
        except BaseException:
            await space.aclose()
            raise
        if not facts.is_durable:
            capabilities -= {Capability.DURABLE}
        space.connection.must_be_durable = facts.is_durable
        async with open_documents(space, config, backend=self.name, capabilities=capabilities) as store:
            yield store

    @asynccontextmanager
    async def scratch(self, url: str) -> AsyncIterator[str]:
        """A prefix of its own beside the URL's, deleted at the end."""
        from flowstore_redis.maintenance import delete_all
        from flowstore_redis.settings import DEFAULT_PREFIX

        parts = parse_url(url)
        prefix = parts.options.get("prefix", DEFAULT_PREFIX)
        fresh = parts.with_more_options({"prefix": scratch_prefix(prefix)})
        try:
            yield fresh
        finally:
            await delete_all(StoreConfig.from_url(fresh))

    async def clear_scratch(self, url: str) -> None:
        from flowstore_redis.maintenance import delete_all

        await delete_all(StoreConfig.from_url(url), clears=True)

    async def describe(self, config: StoreConfig) -> Mapping[str, str]:
        """The version of the server, its memory, and what a crash can lose."""
        from flowstore_redis.maintenance import describe

        return await describe(config)

    async def diagnose(self, config: StoreConfig, *, thorough: bool) -> Sequence[Diagnostic]:
        """Check the settings of the server, its memory and its clock."""
        from flowstore_redis.maintenance import diagnose

        return await diagnose(config)

    @asynccontextmanager
    async def inject_faults(self, url: str) -> AsyncIterator[FaultInjector]:
        """Route the requests of the stores at the injector's URL through a proxy in this process."""
        from flowstore_redis.fault_injection import inject_faults

        async with inject_faults(url) as injector:
            yield injector

    @asynccontextmanager
    async def inject_write_failures(self, url: str) -> AsyncIterator[WriteFailureInjector]:
        """Refuse commits as a server whose disk is full."""
        from flowstore_redis.fault_injection import inject_faults

        async with inject_faults(url) as injector:
            yield injector

    @asynccontextmanager
    async def inject_outages(self, url: str) -> AsyncIterator[OutageInjector]:
        """Pause the scripts of the server, or make it silent or unreachable for the injector's URL."""
        from flowstore_redis.fault_injection import inject_outages

        async with inject_outages(url) as injector:
            yield injector


@hookimpl
def flowstore_backends() -> Sequence[Backend]:
    return [RedisBackend()]
