"""The plugin: ``network://host:port/namespace``, and one scheme for each bug."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from flowstore_core import Backend, Capability, ConfigurationError, StoreConfig, hookimpl
from flowstore_core.urls import StoreUrl, parse_url
from flowstore_documents import OPTIONS, DocumentStore, capabilities_of, open_documents
from tests.network_backend.space import (
    LateSpace,
    LeakingSpace,
    NetworkSpace,
    StaleSpace,
)


class NetworkBackend:
    """The descriptor."""

    options: frozenset[str] = OPTIONS
    contract_version = 1

    def __init__(self, name: str, space: type[NetworkSpace], *, resends: bool = False) -> None:
        self.name = name
        self.schemes = frozenset({name})
        self.capabilities: frozenset[Capability] = capabilities_of(snapshots=True, watch=False) | {
            Capability.MULTI_PROCESS
        }
        self._space = space
        self._resends = resends

    def _connect(self, url: StoreUrl) -> NetworkSpace:
        host, colon, port = url.hosts.rpartition(":")
        if not colon or not port.isdecimal() or not url.path:
            raise ConfigurationError(f"the URL must be {self.name}://host:port/namespace")
        return self._space(host, int(port), url.path)

    @asynccontextmanager
    async def open(self, config: StoreConfig) -> AsyncIterator[DocumentStore]:
        space = self._connect(config.parts)
        async with open_documents(space, config, backend=self.name, capabilities=self.capabilities) as store:
            if self._resends:
                resend_blindly(store)
            yield store

    @asynccontextmanager
    async def scratch(self, url: str) -> AsyncIterator[str]:
        fresh = parse_url(url).with_path(f"scratch-{secrets.token_hex(8)}")
        try:
            yield fresh
        finally:
            space = self._connect(parse_url(fresh))
            await space.drop()
            await space.aclose()


def resend_blindly(store: DocumentStore) -> None:
    """Let a store repeat each change whose reply was lost, as if it had not happened."""

    async def resolve(operation: str, slot: object) -> bool:
        return False

    store._committer._resolve = resolve  # type: ignore[method-assign, assignment]


@hookimpl
def flowstore_backends() -> Sequence[Backend]:
    return [
        NetworkBackend("network", NetworkSpace),
        NetworkBackend("network-resends", NetworkSpace, resends=True),
        NetworkBackend("network-stale", StaleSpace),
        NetworkBackend("network-late", LateSpace),
        NetworkBackend("network-leaks", LeakingSpace),
    ]
