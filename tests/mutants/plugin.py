"""The plugin of the mutants: one backend per mutant, with the scheme ``mutant-<name>``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from flowstore_core import Backend, StoreConfig, hookimpl
from flowstore_memory.plugin import MemoryBackend
from flowstore_postgres.plugin import PostgresBackend
from flowstore_sqlite.plugin import SqliteBackend
from tests.mutants import Mutant, all_mutants


class MutantBackend:
    """The backend of a mutant: opens the base's store and adds the bug."""

    contract_version = 1

    def __init__(self, spec: Mutant, base: Backend) -> None:
        self._mutant = spec
        self._base = base
        self.name = f"mutant-{spec.name}"
        self.schemes = frozenset({self.name})
        self.capabilities = base.capabilities
        self.options = base.options

    @asynccontextmanager
    async def open(self, config: StoreConfig) -> AsyncIterator[Any]:
        plain = replace(config, url=_with_scheme(config.url, self._mutant.base), scheme=self._mutant.base)
        async with self._base.open(plain) as store:
            mutant = self._mutant.build(store)
            mutant.backend = self.name
            opened = getattr(mutant, "opened", None)
            if opened is not None:
                await opened()
            yield mutant

    def __getattr__(self, name: str) -> Any:
        if name in HOOKS:
            return getattr(self._base, name)
        raise AttributeError(name)

    @asynccontextmanager
    async def scratch(self, url: str) -> AsyncIterator[str]:
        async with self._base.scratch(_with_scheme(url, self._mutant.base)) as fresh:
            yield _with_scheme(fresh, self.name)


HOOKS = (
    "max_skew",
    "inject_write_failures",
    "non_durable_urls",
    "inject_faults",
    "inject_outages",
    "adjust_schema_version",
    "earlier_schema_versions",
    "revert_schema",
)
"""The optional members that a mutant has if its base has them."""


def _with_scheme(url: str, scheme: str) -> str:
    return f"{scheme}://{url.partition('://')[2]}"


@hookimpl
def flowstore_backends() -> list[Backend]:
    bases: dict[str, Backend] = {
        "memory": MemoryBackend(),
        "sqlite": SqliteBackend(),
        "postgresql": PostgresBackend(),
    }
    return [MutantBackend(mutant, bases[mutant.base]) for mutant in all_mutants().values()]
