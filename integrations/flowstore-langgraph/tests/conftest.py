"""Stores for the tests: one of each backend, empty."""

from __future__ import annotations

import runpy
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# The servers of flowstore's own tests, and of those of flowstore-etcd.
Cluster = runpy.run_path(str(ROOT / "tests" / "cluster.py"))["Cluster"]
ETCD = runpy.run_path(str(ROOT / "plugins" / "flowstore_etcd" / "tests" / "etcd_cluster.py"))


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    cluster = Cluster()
    yield cluster.url
    cluster.stop()


@pytest.fixture(scope="session")
def etcd() -> Iterator[str]:
    pytest.importorskip("flowstore_etcd", reason="flowstore-etcd is not installed")
    if ETCD["BINARY"] is None:
        pytest.skip(ETCD["MISSING"])
    with ETCD["running_cluster"]() as running:
        yield running.url("")


@pytest.fixture(params=["memory", "sqlite", "postgresql", "etcd"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    name = f"langgraph_{secrets.token_hex(8)}"
    if request.param == "memory":
        return f"memory://{name}"
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/threads.db"
    if request.param == "etcd":
        return f"{request.getfixturevalue('etcd')}{name}"
    return f"{request.getfixturevalue('server')}&schema={name}"
