"""The built-in backends conform to every check of the suite.

The profile is quick unless FLOWSTORE_TEST_PROFILE names a more thorough one, as it does in CI. As in a run of
the command, most checks share a namespace with its open stores, and all share worker processes.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from flowstore_conformance.context import Profile, SharedNamespace
from flowstore_conformance.registry import Check, Kind
from flowstore_conformance.status import Status
from flowstore_conformance.suite import run_check, select_checks
from flowstore_conformance.worker_pool import WorkerProcesses

from flowstore_core import PROPERTIES
from flowstore_core.backend import (
    FaultInjectable,
    OutageInjectable,
    SchemaVersionAdjustable,
    WriteFailable,
)
from flowstore_core.plugins import find_backend
from tests.conftest import memory_folder

SEED = 20_260_314
PROFILE = Profile(os.environ.get("FLOWSTORE_TEST_PROFILE", "quick"))

pytestmark = [
    # A check of a thorough profile takes minutes on a loaded machine.
    pytest.mark.timeout(300 if PROFILE is Profile.QUICK else 900),
    # That of the shared stores.
    pytest.mark.asyncio(loop_scope="module"),
]


def hook_of(check: Check) -> type[Any]:
    """The protocol that a check of injected faults needs; see tests/test_conformance_faults.py."""
    if check.run.__module__.endswith(".outages"):
        return OutageInjectable
    if check.clauses[0] == "CON-1":
        return WriteFailable
    return SchemaVersionAdjustable if check.clauses[0] == "CON-6" else FaultInjectable


class SharedParts:
    """What the checks of a backend share; opened for the first of them, closed after the last."""

    def __init__(self, folder: Path, request: pytest.FixtureRequest) -> None:
        self.processes = WorkerProcesses()
        self._folder = folder
        self._request = request
        self._namespaces: dict[str, SharedNamespace] = {}

    def url(self, name: str) -> str:
        if name == "postgresql":
            return str(self._request.getfixturevalue("postgresql_url"))
        return "memory://" if name == "memory" else f"sqlite:///{self._folder}/flows.db"

    def namespace(self, name: str) -> SharedNamespace:
        if name not in self._namespaces:
            self._namespaces[name] = SharedNamespace(
                self.url(name), find_backend(name)[1], PROFILE, processes=self.processes
            )
        return self._namespaces[name]

    async def aclose(self) -> None:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self.processes.aclose)
            for namespace in self._namespaces.values():
                stack.push_async_callback(namespace.discard)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(request: pytest.FixtureRequest) -> AsyncIterator[SharedParts]:
    with memory_folder() as folder:
        parts = SharedParts(folder, request)
        yield parts
        await parts.aclose()


@pytest.mark.parametrize("name", ["memory", "sqlite", "postgresql"])
@pytest.mark.parametrize("check", select_checks(), ids=lambda check: f"{check.clauses[0]}-{check.name}")
async def test_conforms(check: Check, name: str, shared: SharedParts) -> None:
    backend = find_backend(name)[1]
    missing = check.needs - backend.capabilities
    if missing:
        assert missing <= PROPERTIES
        pytest.skip(f"{name} does not declare {', '.join(sorted(missing))}")
    result = await run_check(
        check,
        shared.url(name),
        backend,
        PROFILE,
        SEED,
        shared=shared.namespace(name),
        processes=shared.processes,
    )
    said = result.failure.message if result.failure is not None else result.reason
    if check.kind is Kind.FAULT and not isinstance(backend, hook_of(check)):
        assert result.status is Status.UNSUPPORTED, said
        pytest.skip(said)
    assert result.status is Status.PASS, said
