"""One server for all tests; its URL is FLOWSTORE_URL, so that the conformance suite checks a store there."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.extend([str(Path(__file__).parent), str(Path(__file__).parents[2])])

import redis_server
from flowstore_redis.space import RedisSpace
from spaces import space_at

_servers = ExitStack()


def pytest_configure(config: pytest.Config) -> None:
    # The workers of xdist inherit the URL.
    if not hasattr(config, "workerinput") and redis_server.BINARY is not None:
        server = _servers.enter_context(redis_server.running_server())
        os.environ["FLOWSTORE_URL"] = server.url(options="")


def pytest_unconfigure() -> None:
    _servers.close()


@pytest.fixture(scope="session")
def url() -> str:
    if redis_server.BINARY is None:
        pytest.skip(redis_server.MISSING)
    return os.environ["FLOWSTORE_URL"] + redis_server.PATIENT


@pytest.fixture
async def space(url: str) -> AsyncIterator[RedisSpace]:
    async with space_at(url, prefix=f"space-{secrets.token_hex(8)}") as opened:
        yield opened
