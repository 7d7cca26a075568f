"""The plugin. A URL with a name is shared within the process, one without is private to one open."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from flowstore_core import Backend, StoreConfig, hookimpl
from flowstore_core.urls import parse_url
from flowstore_documents import OPTIONS, DocumentStore, capabilities_of, open_documents
from flowstore_documents.memory_space import MemoryData

_named: dict[str, MemoryData] = {}


class YourdbBackend:
    """The descriptor. Add DURABLE and MULTI_PROCESS to its capabilities when they hold."""

    name = "yourdb"
    schemes = frozenset({"yourdb"})
    capabilities = capabilities_of(snapshots=True)
    options = OPTIONS
    contract_version = 1

    @asynccontextmanager
    async def open(self, config: StoreConfig) -> AsyncIterator[DocumentStore]:
        # Connect here, and import the driver here: a missing driver is then reported with its remedy.
        from flowstore_yourdb.space import YourdbSpace

        name = config.parts.hosts
        data = _named.setdefault(name, MemoryData()) if name else MemoryData()
        space = YourdbSpace(data)
        async with open_documents(space, config, backend=self.name, capabilities=self.capabilities) as store:
            yield store

    @asynccontextmanager
    async def scratch(self, url: str) -> AsyncIterator[str]:
        """Make an empty namespace beside the one at ``url``, such as a prefix, and delete it at the end."""
        name = f"scratch-{secrets.token_hex(8)}"
        try:
            yield parse_url(f"yourdb://{name}").with_options(parse_url(url).options)
        finally:
            _named.pop(name, None)


@hookimpl
def flowstore_backends() -> Sequence[Backend]:
    return [YourdbBackend()]
