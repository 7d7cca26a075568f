"""The descriptor: what ping and doctor say, and what the package imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import flowstore_redis
import pytest
import redis_server
from flowstore_redis.plugin import RedisBackend
from flowstore_redis.server import ServerFacts, check_server
from spaces import space_at

from flowstore_core import Capability, new_run_id, open_store
from flowstore_core.open import resolve_store

PACKAGE = Path(flowstore_redis.__file__).parent
ALLOWED = {"flowstore_core", "flowstore_documents", "flowstore_redis", "hiredis", "redis"}
EXAMPLES = Path(__file__).parents[1] / "examples"

needs_server = pytest.mark.skipif(redis_server.BINARY is None, reason=redis_server.MISSING)


def test_the_package_imports_core_the_toolkit_and_its_driver_only() -> None:
    found = set()
    for file in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level
                found.add(str(node.module).partition(".")[0])
    assert found - sys.stdlib_module_names - {"__future__"} == ALLOWED


def test_the_driver_is_imported_only_when_a_store_is_opened() -> None:
    code = "import flowstore_redis.plugin, sys; sys.exit('redis' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


WELL = {
    "redis_version": "7.0.15",
    "redis_mode": "standalone",
    "role": "master",
    "maxmemory_policy": "noeviction",
    "aof_enabled": "1",
}
ALWAYS = {"appendfsync": "always", "no-appendfsync-on-rewrite": "no", "save": ""}


def codes(info: Mapping[str, str], config: Mapping[str, str] | None = ALWAYS) -> list[str]:
    return [finding.code for finding in check_server(ServerFacts({**WELL, **info}, config))]


def test_doctor_finds_what_can_lose_data() -> None:
    assert codes({}) == []
    assert codes({"aof_rewrite_in_progress": "1", "aof_base_size": "88"}) == []
    assert codes({"role": "slave"}) == ["unusable-server"]
    assert codes({"maxmemory_policy": "volatile-lru"}) == ["unusable-server"]
    assert codes({"redis_mode": "sentinel"}) == ["unusable-server"]
    assert codes({"redis_version": "6.2.7"}) == ["unusable-server"]
    assert codes({"redis_version": "7.2.4", "valkey_version": "8.0.1"}) == []
    assert codes({"connected_slaves": "2"}) == ["asynchronous-replicas"]
    assert codes({"aof_last_write_status": "err"}) == ["log-not-written"]
    assert codes({"used_memory": "90", "maxmemory": "100"}) == ["nearly-full"]
    assert codes({"used_memory": "90", "maxmemory": "0"}) == []


@pytest.mark.parametrize(
    ("info", "config", "words"),
    [
        ({}, {**ALWAYS, "appendfsync": "everysec"}, "up to 2 seconds"),
        ({}, {**ALWAYS, "appendfsync": "no"}, "not yet synced"),
        ({}, {**ALWAYS, "no-appendfsync-on-rewrite": "yes"}, "rewritten"),
        ({}, None, "CONFIG GET is refused"),
        ({"aof_rewrite_in_progress": "1", "aof_base_size": "0"}, ALWAYS, "until the first rewrite"),
        ({"aof_rewrite_scheduled": "1", "aof_base_size": "0"}, ALWAYS, "until the first rewrite"),
        ({"aof_enabled": "0"}, {**ALWAYS, "save": "3600 1"}, "since the last snapshot"),
        ({"aof_enabled": "0"}, ALWAYS, "a restart loses everything"),
    ],
)
def test_a_server_that_can_lose_writes_is_not_durable(
    info: Mapping[str, str], config: Mapping[str, str] | None, words: str
) -> None:
    facts = ServerFacts({**WELL, **info}, config)
    assert not facts.is_durable
    assert words in facts.durability
    assert codes(info, config) == ["not-durable"]


@needs_server
@pytest.mark.parametrize("sync", ["always", "everysec"])
async def test_a_store_is_durable_only_on_a_server_that_syncs_every_write(sync: str) -> None:
    with redis_server.running_server({**redis_server.DURABLE, "appendfsync": sync}) as server:
        async with open_store(server.url()) as store:
            assert (Capability.DURABLE in store.capabilities) == (sync == "always")
            assert store.max_skew == timedelta(0)
        _, backend, config = resolve_store(server.url(), migrate=False)
        assert isinstance(backend, RedisBackend)
        said = (await backend.describe(config))["durability"]
        assert ("durable: every write" if sync == "always" else "up to 2 seconds") in said
        found = [finding.code for finding in await backend.diagnose(config, thorough=False)]
        assert found == ([] if sync == "always" else ["not-durable"])


@needs_server
async def test_a_log_that_has_just_begun_is_not_durable_before_its_first_rewrite() -> None:
    """A server that is killed meanwhile does not read the log."""
    with redis_server.running_server({"save": ""}) as server:
        async with open_store(server.url()) as store:
            await store.start_run(new_run_id(), "flow", new_run_id(), "manual")
        async with space_at(server.url()) as space:
            send = space.connection.send
            await send("CONFIG", "SET", "rdb-key-save-delay", 600_000_000)  # 10 minutes.
            await send("CONFIG", "SET", "appendonly", "yes", "appendfsync", "always")
            async with open_store(server.url()) as store:
                assert Capability.DURABLE not in store.capabilities
                await store.start_run(new_run_id(), "flow", new_run_id(), "manual")
            server.kill(children=True)
            server.settings |= redis_server.DURABLE
            server.start()
            async with open_store(server.url()) as store:
                assert Capability.DURABLE in store.capabilities
                assert await store.get_runs() == ()


@needs_server
def test_the_example(url: str) -> None:
    command = [sys.executable, EXAMPLES / "first_run.py", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "Succeeded: charge, pack, ship",
        "a crash of the server loses nothing",
    ]
