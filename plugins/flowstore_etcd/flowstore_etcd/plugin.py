"""The plugin for etcd; gRPC is imported only when a store is opened."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

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


class EtcdBackend:
    """The descriptor of the etcd backend."""

    name = "etcd"
    schemes = frozenset({"etcd"})
    capabilities = capabilities_of(snapshots=True) | {Capability.DURABLE, Capability.MULTI_PROCESS}
    options = OPTIONS | TLS_FILES | {"connect_timeout", "max_skew", "request_timeout", "tls"}
    contract_version = 1
    drivers = ("grpcio", "protobuf")

    @asynccontextmanager
    async def open(self, config: StoreConfig) -> AsyncIterator[DocumentStore]:
        from flowstore_etcd.settings import read_settings
        from flowstore_etcd.space import EtcdSpace

        space = EtcdSpace(read_settings(config))
        async with open_documents(space, config, backend=self.name, capabilities=self.capabilities) as store:
            yield store

    @asynccontextmanager
    async def scratch(self, url: str) -> AsyncIterator[str]:
        """A prefix beside the URL's own one, deleted at the end."""
        from flowstore_etcd.maintenance import delete_all
        from flowstore_etcd.settings import DEFAULT_PREFIX

        parts = parse_url(url)
        path = parts.path or DEFAULT_PREFIX
        fresh = parts.with_path(scratch_prefix(path))
        try:
            yield fresh
        finally:
            await delete_all(fresh)

    async def clear_scratch(self, url: str) -> None:
        from flowstore_etcd.maintenance import delete_all

        await delete_all(url, clears=True)

    async def describe(self, config: StoreConfig) -> Mapping[str, str]:
        """The versions of the members and the size of the database."""
        from flowstore_etcd.maintenance import describe

        return await describe(config)

    async def diagnose(self, config: StoreConfig, *, thorough: bool) -> Sequence[Diagnostic]:
        """Check that the members answer, have a leader, no alarm, and space left."""
        from flowstore_etcd.maintenance import diagnose

        return await diagnose(config)

    @asynccontextmanager
    async def inject_faults(self, url: str) -> AsyncIterator[FaultInjector]:
        """Route the requests of the stores at the injector's URL through a server in this process."""
        from flowstore_etcd.fault_injection import inject_faults

        async with inject_faults(url) as injector:
            yield injector

    @asynccontextmanager
    async def inject_write_failures(self, url: str) -> AsyncIterator[WriteFailureInjector]:
        """Refuse transactions as a member whose database is full."""
        from flowstore_etcd.fault_injection import inject_faults

        async with inject_faults(url) as injector:
            yield injector

    @asynccontextmanager
    async def inject_outages(self, url: str) -> AsyncIterator[OutageInjector]:
        """Let the member fall silent, or be unreachable, for the stores at the injector's URL."""
        from flowstore_etcd.fault_injection import inject_outages

        async with inject_outages(url) as injector:
            yield injector


@hookimpl
def flowstore_backends() -> Sequence[Backend]:
    return [EtcdBackend()]
