"""Shared fixtures: an empty namespace of each backend, and stores open on it."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest
from hypothesis import settings

from flowstore_core import FlowStore, open_store
from flowstore_core.plugins import find_backend
from tests.cluster import Cluster
from tests.virtual_clock import VirtualClock
from tests.worker import WorkerPool

BACKENDS = ("memory", "sqlite", "postgresql")

OpenSecondStore = Callable[..., Awaitable[FlowStore]]

# Without a deadline: an example may take seconds on a machine that stalls.
settings.register_profile("flowstore", deadline=None)
settings.load_profile("flowstore")

_cluster = pytest.StashKey[Cluster]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(*capabilities): capabilities of the backends that run the test")
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        # All workers share one cluster; a run without workers starts it when a test first needs it.
        config.stash[_cluster] = Cluster()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["postgresql_url"] = node.config.stash[_cluster].url


def pytest_unconfigure(config: pytest.Config) -> None:
    if _cluster in config.stash:
        config.stash[_cluster].stop()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Exempt the modules and the thousands of tests, which last, from each full garbage collection."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize tests that use ``backend`` with the backends that have the needed capabilities."""
    if "backend" not in metafunc.fixturenames:
        return
    needed = {
        capability for marker in metafunc.definition.iter_markers("needs") for capability in marker.args
    }
    suitable = [name for name in BACKENDS if needed <= find_backend(name)[1].capabilities]
    metafunc.parametrize("backend", suitable, indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that have a time limit of their own: the last tests must be short.

    A process that still runs a long test, after the others have ended, leaves a processor idle.
    """
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)


@pytest.fixture(scope="session")
def postgresql_url(request: pytest.FixtureRequest) -> Iterator[str]:
    url = getattr(request.config, "workerinput", {}).get("postgresql_url")
    if url is not None:
        yield url
        return
    cluster = Cluster()
    try:
        yield cluster.url
    finally:
        cluster.stop()


@pytest.fixture
async def fresh(postgresql_url: str) -> AsyncIterator[str]:
    """The URL of an empty PostgreSQL namespace, dropped after the test."""
    async with find_backend("postgresql")[1].scratch(postgresql_url) as url:
        yield url


@pytest.fixture
async def admin(fresh: str) -> AsyncIterator[asyncpg.Connection]:
    """A separate connection to the server, with the schema of ``fresh`` in its search_path."""
    query = parse_qs(urlsplit(fresh).query)
    connection = await asyncpg.connect(host=query["host"][0], user="postgres", database="postgres")
    await connection.execute(f'SET search_path = "{query["schema"][0]}"')
    try:
        yield connection
    finally:
        await connection.close()


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """The name of the backend under test."""
    return str(request.param)


@contextmanager
def memory_folder() -> Iterator[Path]:
    """A temporary folder in memory if the system has /dev/shm, otherwise on disk.

    On a disk, SQLite waits for a sync at every commit.
    """
    memory = Path("/dev/shm")
    has_room = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 1 << 30
    parent = memory if has_room else None
    with tempfile.TemporaryDirectory(prefix="flowstore-", dir=parent, ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.fixture
def memory_path() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


@pytest.fixture
def backend_url(backend: str, request: pytest.FixtureRequest, memory_path: Path) -> str:
    """A URL of the backend, in which a test may create a namespace."""
    if backend == "memory":
        return "memory://"
    if backend == "sqlite":
        return f"sqlite:///{memory_path}/flows.db"
    return str(request.getfixturevalue("postgresql_url"))


@pytest.fixture
async def namespace(backend: str, backend_url: str) -> AsyncIterator[str]:
    """The URL of an empty namespace of the backend, dropped after the test."""
    async with find_backend(backend)[1].scratch(backend_url) as fresh:
        yield fresh


@pytest.fixture
def clock() -> VirtualClock:
    """The clock of every store that the fixtures open."""
    return VirtualClock()


@pytest.fixture
async def open_second_store(namespace: str, clock: VirtualClock) -> AsyncIterator[OpenSecondStore]:
    """Open a store on the namespace, in addition to ``store``; closed after the test.

    Stores use the virtual clock; with ``clock=None`` they use the clock of the backend.
    """
    async with AsyncExitStack() as stack:

        async def open_store_on_namespace(**options: Any) -> FlowStore:
            return await stack.enter_async_context(open_store(namespace, **{"clock": clock, **options}))

        yield open_store_on_namespace


@pytest.fixture
async def store(open_second_store: OpenSecondStore) -> FlowStore:
    """A store on the empty namespace, with the virtual clock."""
    return await open_second_store()


@pytest.fixture(scope="session")
def worker_pool() -> Iterator[WorkerPool]:
    """Worker processes, each with its own store; started when a test first needs them."""
    workers = WorkerPool()
    yield workers
    workers.stop()
