"""URLs with several hosts: the store finds the primary and skips a host that does not reply."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit

import pytest

from flowstore_core import StoreConfig, open_store
from flowstore_core.plugins import find_backend
from flowstore_core.urls import redact
from flowstore_postgres.failover import read_hosts
from flowstore_postgres.settings import read_settings


@pytest.mark.parametrize(
    ("url", "options", "expected"),
    [
        ("postgresql://me:pw@a:1,b:2/db?x=y", {}, [("a", 1), ("b", 2)]),
        ("postgresql://me@a,b/db", {}, [("a", None), ("b", None)]),
        ("postgresql://a,b/db", {"port": "7"}, [("a", 7), ("b", 7)]),
        ("postgresql:///db", {"host": "a,b", "port": "7,8"}, [("a", 7), ("b", 8)]),
        ("postgresql://[::1]:1,[fe80::2]/db", {}, [("::1", 1), ("fe80::2", None)]),
        ("postgresql:///db", {"host": "/run/a:b,/run/c"}, [("/run/a:b", None), ("/run/c", None)]),
        ("postgresql://%2Frun%2Fpg/db", {}, [("/run/pg", None)]),
        ("postgresql://c:1/db", {"host": "a,b", "port": "7"}, [("a", 7), ("b", 7)]),
        ("postgresql://a:1,b/db", {"port": "7"}, [("a", 7), ("b", 7)]),
        ("postgresql:///db", {}, []),
        ("postgresql://me:p%40w@a:1/db", {}, [("a", 1)]),
    ],
)
def test_hosts_are_read_from_the_url_and_the_options(
    url: str, options: Mapping[str, object], expected: list[tuple[str, int | None]]
) -> None:
    assert read_hosts(url, options) == expected


@dataclass
class SilentServer:
    """A server that accepts connections and never replies."""

    port: int = 0
    connections: int = 0


@asynccontextmanager
async def _silent_server() -> AsyncIterator[SilentServer]:
    silent, stopped = SilentServer(), asyncio.Event()

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        silent.connections += 1
        await stopped.wait()
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        silent.port = listening.sockets[0].getsockname()[1]
        yield silent
    finally:
        stopped.set()
        listening.close()


def test_the_password_of_a_url_with_several_hosts_is_redacted() -> None:
    url = "postgresql://me:secret@a:1,b:2/db?target_session_attrs=read-write&password=secret"
    assert redact(url) == "postgresql://me:***@a:1,b:2/db?target_session_attrs=...&password=..."


async def test_a_silent_host_is_skipped_and_then_tried_last(postgresql_url: str) -> None:
    _, backend = find_backend("postgresql")
    folder = parse_qs(urlsplit(postgresql_url).query)["host"][0]
    async with _silent_server() as silent:
        url = (
            f"postgresql://postgres@/postgres?host=127.0.0.1,{folder}&port={silent.port},5432"
            "&sslmode=disable&connect_timeout=2"
        )
        async with backend.scratch(url) as fresh:
            began = time.monotonic()
            async with open_store(fresh, pool_size=4) as store:
                # Half of the timeout is spent on the silent host.
                assert time.monotonic() - began > 0.9
                attempts = silent.connections
                assert attempts > 0
                await asyncio.gather(*(store.get_runs() for _ in range(4)))
                # New connections do not try the silent host first.
                assert silent.connections == attempts
                await store.ping()


async def test_the_next_host_is_tried_after_a_short_timeout_of_the_caller(
    postgresql_url: str,
) -> None:
    _, backend = find_backend("postgresql")
    folder = parse_qs(urlsplit(postgresql_url).query)["host"][0]
    async with backend.scratch(postgresql_url) as fresh, _silent_server() as silent:
        schema = parse_qs(urlsplit(fresh).query)["schema"][0]
        config = StoreConfig(
            url="postgresql://postgres@/postgres",
            scheme="postgresql",
            options={
                "host": f"127.0.0.1,{folder}",
                "port": f"{silent.port},5432",
                "connect_timeout": 60.0,
                "schema": schema,
                "sslmode": "disable",
            },
            clock=None,
            migrate=True,
        )
        settings = read_settings(config)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(settings.hosts.connect(**settings.connect_arguments), 0.2)
        connection = await settings.hosts.connect(**settings.connect_arguments)
        await connection.close()
