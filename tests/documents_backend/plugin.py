"""The plugin: ``documents://name`` is shared within the process, ``documents://`` is private to one open.

``documents-without-snapshots`` is the same on a space that reads no earlier state. With ``limits=large``
values and changes may be larger than a space must allow. ``faults`` names an injector, which disturbs the
requests of the stores that open with its URL.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from flowstore_core import Backend, Capability, StoreConfig, hookimpl
from flowstore_core.urls import parse_url
from flowstore_documents import OPTIONS, DocumentStore, SpaceLimits, capabilities_of, open_documents
from flowstore_documents.memory_space import Fault, MemoryData, MemorySpace

_named: dict[str, MemoryData] = {}
_injectors: dict[str, Injector] = {}

LARGE = SpaceLimits(value_bytes=1_048_576, expected=128, writes=128, request_bytes=4_194_304, changes=8)


class DocumentsBackend:
    """The descriptor."""

    options: frozenset[str] = OPTIONS | {"limits", "faults"}
    contract_version = 1

    def __init__(self, name: str, *, snapshots: bool) -> None:
        self.name = name
        self.schemes = frozenset({name})
        self.capabilities: frozenset[Capability] = capabilities_of(snapshots=snapshots)
        self._snapshots = snapshots

    @asynccontextmanager
    async def open(self, config: StoreConfig) -> AsyncIterator[DocumentStore]:
        name = config.parts.hosts
        data = _named.setdefault(name, MemoryData()) if name else MemoryData()
        limits = LARGE if config.choice("limits", "least", ("least", "large")) == "large" else None
        space = MemorySpace(data, limits=limits, snapshots=self._snapshots)
        if "faults" in config.options:
            _injectors[config.text("faults", "none")].attach(space)
        async with open_documents(space, config, backend=self.name, capabilities=self.capabilities) as store:
            yield store

    @asynccontextmanager
    async def scratch(self, url: str) -> AsyncIterator[str]:
        parts = parse_url(url)
        name = f"scratch-{secrets.token_hex(8)}"
        try:
            yield parse_url(f"{self.name}://{name}").with_options(parts.options)
        finally:
            _named.pop(name, None)

    def variants(self, url: str) -> Mapping[str, str]:
        parts = parse_url(url)
        return {"large limits": parts.with_more_options({"limits": "large"})}

    @asynccontextmanager
    async def inject_faults(self, url: str) -> AsyncIterator[Injector]:
        token = secrets.token_hex(8)
        parts = parse_url(url)
        injector = Injector(parts.with_more_options({"faults": token, "retry_timeout": "0.3"}))
        _injectors[token] = injector
        try:
            yield injector
        finally:
            del _injectors[token]


class Injector:
    """Implements FaultInjector; see flowstore_core.backend."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._spaces: list[MemorySpace] = []

    def attach(self, space: MemorySpace) -> None:
        self._spaces.append(space)

    def _arm(self, fault: Fault, skip: int, *, isolates: bool = False) -> None:
        for space in self._spaces:
            space.arm(fault, skip=skip, isolates=isolates)

    def lose_reply(self, *, skip: int = 0, isolates: bool = False) -> None:
        self._arm(Fault.LOST_REPLY, skip, isolates=isolates)

    def hold_request(self, *, skip: int = 0) -> None:
        self._arm(Fault.DELAYED, skip)

    def refuse_request(self, *, skip: int = 0) -> None:
        self._arm(Fault.NOT_APPLIED, skip)

    async def release_request(self) -> None:
        for space in self._spaces:
            space.release()

    def disarm(self) -> bool:
        struck = [space.disarm() for space in self._spaces]
        return any(struck)


@hookimpl
def flowstore_backends() -> Sequence[Backend]:
    return [
        DocumentsBackend("documents", snapshots=True),
        DocumentsBackend("documents-without-snapshots", snapshots=False),
    ]
