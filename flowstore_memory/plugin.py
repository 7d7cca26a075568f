"""The plugin: ``memory://`` is private to one open, ``memory://name`` is shared within the process."""

from __future__ import annotations

import re
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial

from flowstore_core import Backend, ConfigurationError, StoreConfig, hookimpl
from flowstore_core.urls import parse_url
from flowstore_memory.state import Namespace
from flowstore_memory.store import CAPABILITIES, MemoryStore, SharedStore

# Named stores live until the process ends. setdefault is atomic, so threads may open a name concurrently.
_named: dict[str, Namespace] = {}

_URL_PATTERN = re.compile(r"memory://[\w.~-]*(\?|$)", re.IGNORECASE)


class MemoryBackend:
    """The descriptor of the memory backend. It has no options."""

    name = "memory"
    schemes = frozenset({"memory"})
    capabilities = CAPABILITIES
    options: frozenset[str] = frozenset()
    contract_version = 1

    @asynccontextmanager
    async def open(self, config: StoreConfig) -> AsyncIterator[MemoryStore]:
        name = _read_name(config.url)
        now = config.clock or partial(datetime.now, UTC)
        store = (
            SharedStore(_named.setdefault(name, Namespace()), now) if name else MemoryStore(Namespace(), now)
        )
        store.attach()
        try:
            yield store
        finally:
            store.detach()

    @asynccontextmanager
    async def scratch(self, url: str) -> AsyncIterator[str]:
        _read_name(url)
        name = f"scratch-{secrets.token_hex(8)}"
        try:
            yield f"memory://{name}"
        finally:
            _named.pop(name, None)


def _read_name(url: str) -> str:
    parts = parse_url(url)
    if not _URL_PATTERN.match(parts.text):
        raise ConfigurationError(
            "a memory URL is memory:// or memory://name, the name of letters, digits and . _ ~ -; "
            "it has no user, port or path"
        )
    return parts.hosts


@hookimpl
def flowstore_backends() -> Sequence[Backend]:
    return [MemoryBackend()]
