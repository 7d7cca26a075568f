"""Stores for the tests: one of each backend, empty."""

from __future__ import annotations

import runpy
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from agents import Log

from flowstore import FlowStore, open_store

# The PostgreSQL server of flowstore's own tests.
Cluster = runpy.run_path(str(Path(__file__).parents[3] / "tests" / "cluster.py"))["Cluster"]


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    cluster = Cluster()
    yield cluster.url
    cluster.stop()


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    name = f"pydantic_{secrets.token_hex(8)}"
    if request.param == "memory":
        return f"memory://{name}"
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/agents.db"
    return f"{request.getfixturevalue('server')}&schema={name}"


@pytest.fixture
async def store(url: str) -> AsyncIterator[FlowStore]:
    async with open_store(url) as opened:
        yield opened


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "log")
