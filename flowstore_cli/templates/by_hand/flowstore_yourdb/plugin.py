"""The plugin. A URL with a name is shared within the process, one without is private to one open."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial

from flowstore_core import Backend, Capability, StoreConfig, hookimpl
from flowstore_core.urls import parse_url

from flowstore_yourdb.data import Data
from flowstore_yourdb.store import YourdbStore

_named: dict[str, Data] = {}


class YourdbBackend:
    """The descriptor. Declare a capability when the store keeps its clauses."""

    name = "yourdb"
    schemes = frozenset({"yourdb"})
    capabilities = frozenset({Capability.VIRTUAL_CLOCK})
    options: frozenset[str] = frozenset()
    contract_version = 1

    @asynccontextmanager
    async def open(self, config: StoreConfig) -> AsyncIterator[YourdbStore]:
        # Import your driver here, not at the top: a missing driver is then reported with its remedy.
        name = config.parts.hosts
        data = _named.setdefault(name, Data()) if name else Data()
        yield YourdbStore(data, config.clock or partial(datetime.now, UTC))

    @asynccontextmanager
    async def scratch(self, url: str) -> AsyncIterator[str]:
        """Make an empty namespace beside the one at ``url``, such as a schema, and drop it at the end."""
        name = f"scratch-{secrets.token_hex(8)}"
        try:
            yield parse_url(f"yourdb://{name}").with_options(parse_url(url).options)
        finally:
            _named.pop(name, None)


@hookimpl
def flowstore_backends() -> Sequence[Backend]:
    return [YourdbBackend()]
