"""The examples of the conformance suite pass through a synchronous store.

The adapter below is a backend: each operation of its stores is a call of a SyncFlowStore in a thread. A
SyncFlowStore treats all backends alike; one that answers in its event loop and one that answers from another
thread suffice. tests/test_sync.py uses PostgreSQL too.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from flowstore_conformance.context import Profile
from flowstore_conformance.registry import Check, Kind
from flowstore_conformance.status import Status
from flowstore_conformance.suite import run_check, select_checks

from flowstore_core import Backend, StoreConfig, SyncFlowStore, open_store_sync
from flowstore_core.plugins import Plugin, declared_max_skew, find_backend

SEED = 20_260_314
EXAMPLES = [check for check in select_checks() if check.kind is Kind.EXAMPLE]
THREADS = 64
"""More than the examples make calls at once: a thread that waits in wait_for_steps must not delay others."""


class ThreadedStore:
    """A store of coroutines around a synchronous one."""

    def __init__(self, store: SyncFlowStore, threads: ThreadPoolExecutor) -> None:
        self._store = store
        self._threads = threads
        self.capabilities = store.capabilities
        self.limits = store.limits
        self.max_skew = store.max_skew

    def __getattr__(self, operation: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        method = getattr(self._store, operation)

        async def call(**arguments: Any) -> Any:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, partial(method, **arguments))

        return call


class ThreadedBackend:
    """A built-in backend, used through its synchronous store."""

    contract_version = 1

    def __init__(self, base: Backend) -> None:
        self._base = base
        self.name = f"sync-{base.name}"
        self.schemes = frozenset({self.name})
        self.capabilities = base.capabilities
        self.max_skew = declared_max_skew(base)
        self.options = base.options

    @asynccontextmanager
    async def open(self, config: StoreConfig) -> AsyncIterator[ThreadedStore]:
        url = _with_scheme(config.url, self._base.name)
        opening = partial(open_store_sync, url, clock=config.clock, migrate=config.migrate, **config.options)
        store = await asyncio.to_thread(opening)
        with ThreadPoolExecutor(THREADS) as threads:
            try:
                yield ThreadedStore(store, threads)
            finally:
                await asyncio.to_thread(store.close)

    @asynccontextmanager
    async def scratch(self, url: str) -> AsyncIterator[str]:
        async with self._base.scratch(_with_scheme(url, self._base.name)) as fresh:
            yield _with_scheme(fresh, self.name)


def _with_scheme(url: str, scheme: str) -> str:
    return f"{scheme}://{url.partition('://')[2]}"


@pytest.mark.parametrize("name", ["memory", "sqlite"])
@pytest.mark.parametrize("check", EXAMPLES, ids=lambda check: f"{check.clauses[0]}-{check.name}")
async def test_conforms(
    check: Check,
    name: str,
    memory_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plugin, base = find_backend(name)
    backend = ThreadedBackend(base)

    def find(scheme: str) -> tuple[Plugin, Backend]:
        return (plugin, backend) if scheme == backend.name else find_backend(scheme)

    monkeypatch.setattr("flowstore_core.open.find_backend", find)
    missing = check.needs - backend.capabilities
    if missing:
        pytest.skip(f"{name} does not declare {', '.join(sorted(missing))}")
    url = {"memory": "memory://", "sqlite": f"sqlite:///{memory_path}/flows.db"}[name]
    result = await run_check(check, _with_scheme(url, backend.name), backend, Profile.QUICK, SEED)
    said = result.failure.message if result.failure is not None else result.reason
    assert result.status is Status.PASS, said
