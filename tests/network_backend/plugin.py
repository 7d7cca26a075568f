"""The plugin: ``network://host:port,host:port/namespace``, and one scheme for each bug."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from flowstore_core import (
    Backend,
    Capability,
    ConfigurationError,
    StoreConfig,
    StoreUnavailableError,
    hookimpl,
)
from flowstore_core.urls import StoreUrl, parse_url
from flowstore_documents import OPTIONS, DocumentStore, capabilities_of, open_documents
from tests.network_backend.space import (
    LeakingSpace,
    NetworkSpace,
    StaleSpace,
)

Mutation = Callable[[DocumentStore], None]
"""Adds a bug to an open store."""


class NetworkBackend:
    """The descriptor."""

    options: frozenset[str] = OPTIONS
    contract_version = 1

    def __init__(
        self, name: str, space: type[NetworkSpace] = NetworkSpace, mutate: Mutation | None = None
    ) -> None:
        self.name = name
        self.schemes = frozenset({name})
        self.capabilities: frozenset[Capability] = capabilities_of(snapshots=True, watch=False) | {
            Capability.MULTI_PROCESS
        }
        self._space = space
        self._mutate = mutate

    def _connect(self, url: StoreUrl) -> NetworkSpace:
        hosts = [spec.rpartition(":") for spec in url.hosts.split(",")]
        if not url.path or not all(host and port.isdecimal() for host, _, port in hosts):
            raise ConfigurationError(f"the URL must be {self.name}://host:port,.../namespace")
        return self._space([(host, int(port)) for host, _, port in hosts], url.path)

    @asynccontextmanager
    async def open(self, config: StoreConfig) -> AsyncIterator[DocumentStore]:
        space = self._connect(config.parts)
        async with open_documents(space, config, backend=self.name, capabilities=self.capabilities) as store:
            if self._mutate is not None:
                self._mutate(store)
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
    """Repeat each change whose reply was lost, as if it had not happened."""

    async def resolve(operation: str, slot: object) -> bool:
        return False

    store._committer._resolve = resolve  # type: ignore[method-assign, assignment]


def commit_late(store: DocumentStore) -> None:
    """Report each change whose reply was lost as one that did not happen, although it may still arrive."""

    async def resolve(operation: str, slot: object) -> bool:
        raise StoreUnavailableError("connection_lost")

    store._committer._resolve = resolve  # type: ignore[method-assign, assignment]


@hookimpl
def flowstore_backends() -> Sequence[Backend]:
    return [
        NetworkBackend("network"),
        NetworkBackend("network-resends", mutate=resend_blindly),
        NetworkBackend("network-late", mutate=commit_late),
        NetworkBackend("network-stale", StaleSpace),
        NetworkBackend("network-leaks", LeakingSpace),
    ]
