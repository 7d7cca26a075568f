"""The space keeps the promises of KeyValueSpace on a real server, also at its limits and after failures."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
import redis_server
import trustme
from flowstore_conformance.network_faults import inject_network_faults
from flowstore_redis.connection import FULL, REPLICA
from flowstore_redis.plugin import RedisBackend
from flowstore_redis.space import RedisSpace
from spaces import space_at

from flowstore_core import ConfigurationError, StoreUnavailableError, new_run_id, open_store
from flowstore_core.backend import Diagnostic
from flowstore_core.open import resolve_store
from flowstore_core.urls import parse_url
from flowstore_documents import Change, MaybeApplied, NotApplied
from flowstore_documents.space_checks import (
    FAULT_CHECKS,
    SPACE_CHECKS,
    FaultCheck,
    OpenSpace,
    SpaceCheck,
    names,
    put,
)

pytestmark = pytest.mark.skipif(redis_server.BINARY is None, reason=redis_server.MISSING)


def space_opener(url: str) -> OpenSpace:
    """Opens spaces with one prefix, a new one."""
    return partial(space_at, url, prefix=f"space-{secrets.token_hex(8)}")


@pytest.mark.parametrize("check", SPACE_CHECKS, ids=lambda check: check.__name__)
async def test_the_space(check: SpaceCheck, url: str) -> None:
    await check(space_opener(url))


@pytest.mark.parametrize("check", FAULT_CHECKS, ids=lambda check: check.__name__)
async def test_the_space_with_faults(check: FaultCheck, url: str) -> None:
    async with inject_network_faults(url) as faults:
        await check(space_opener(faults.url), faults)


# The clock


async def test_the_clock_never_falls_when_the_clock_of_the_server_does(space: RedisSpace) -> None:
    """As after a fail-over to a server whose clock is an hour behind."""
    ahead = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
    key = f"{space.connection.settings.prefix}:clock"
    await space.connection.send("SET", key, int(ahead.timestamp()) * 1_000_000)
    assert await space.clock() == ahead
    assert timedelta(minutes=50) < await space.clock_lead() <= timedelta(hours=1)
    assert await space.commit([Change({}, {b"late": b""}, before=ahead)]) == [None]
    (version,) = await space.commit([Change({}, {b"a": b""}, before=ahead + timedelta(microseconds=1))])
    assert version is not None


async def test_a_time_that_was_told_stays_when_the_clock_of_the_server_is_set_back(
    space: RedisSpace, url: str
) -> None:
    """The view had a time that nobody has stored, and the server's clock is an hour behind it now."""
    ahead = datetime.now(UTC).replace(microsecond=7) + timedelta(hours=1)
    async with space_at(url, prefix=space.connection.settings.prefix) as other:
        await space.commit([Change(time=ahead)])
        assert await other.clock() == (await other.read(())).time == ahead
        await space.commit([Change(puts={b"a": b""}, time=ahead + timedelta(microseconds=1))])
        assert (await other.read(())).time == ahead + timedelta(microseconds=1)


# Watching


async def test_other_commits_wake_no_watch(space: RedisSpace) -> None:
    """Nor do commits that only store a time: stores that wait read queues, and would wake each other."""
    hints = space.watch([(b"a", b"b"), (b"mm", b"mn")])
    await anext(hints)
    hint = asyncio.ensure_future(anext(hints))
    await put(space, z="elsewhere", mn1="elsewhere", b="elsewhere")
    for _ in range(3):
        await space.commit([Change(time=(await space.read(())).time)])
    # The commits were made one after another, so a hint for the first would be here after the next answer.
    await put(space, z="2")
    assert not hint.done()
    await put(space, a="1")
    await hint
    await hints.aclose()  # type: ignore[attr-defined]


async def scripts(space: RedisSpace) -> int:
    found = re.search(rb"cmdstat_evalsha:calls=(\d+)", await space.connection.send("INFO", "commandstats"))
    assert found is not None
    return int(found[1])


async def test_stores_that_wait_for_a_later_step_do_not_wake_each_other() -> None:
    with redis_server.running_server() as server:
        async with open_store(server.url()) as one, open_store(server.url()) as two:
            run_id, later = new_run_id(), datetime.now(UTC) + timedelta(hours=1)
            await one.start_run(new_run_id(), "flow", run_id, "manual")
            assert await one.try_record_dispatch(run_id, "a", queue="q", step_type="http", due_at=later)
            async with space_at(server.url()) as space:
                before = await scripts(space)
                waiting = (store.wait_for_steps(["q"], timeout=timedelta(seconds=3)) for store in (one, two))
                assert await asyncio.gather(*waiting) == [False, False]
                # A look before and after the watch begins, and at the end, of two or three requests each.
                assert await scripts(space) - before < 40


async def pings(space: RedisSpace) -> int:
    reply = await space.connection.send("INFO", "commandstats")
    found = re.search(rb"cmdstat_ping:calls=(\d+)", reply)
    return int(found[1]) if found else 0


async def test_a_watch_lives_through_silence_and_ends_with_its_server() -> None:
    with redis_server.running_server() as server:
        async with space_at(server.url()) as space, space_at(server.url(), request_timeout=3) as watching:
            hints = watching.watch([(b"a", b"b")])
            await anext(hints)
            hint = asyncio.ensure_future(anext(hints))
            while await pings(space) < 2:  # noqa: ASYNC110 - nothing tells of requests
                await asyncio.sleep(0.1)
            assert not hint.done()
            await put(space, a="1")
            await hint
            server.pause()
            # The request that waits keeps its longer time.
            watching.connection.settings = replace(watching.connection.settings, request_timeout=0.1)
            with pytest.raises(NotApplied, match="silent"):
                await anext(hints)
            server.resume()


# Failures


async def test_a_hanging_server_may_have_applied_a_commit() -> None:
    with redis_server.running_server() as server:
        async with space_at(server.url()) as space:
            await put(space, a="1")
            server.pause()
            settings = space.connection.settings
            space.connection.settings = replace(settings, request_timeout=0.3, connect_timeout=0.3)
            with pytest.raises(MaybeApplied):
                await space.commit([Change(puts={b"a": b"2"})])
            with pytest.raises(NotApplied):
                await space.read([b"a"])
            server.resume()


async def until_done(request: Callable[[], Awaitable[object]]) -> None:
    """Repeat a request until the server is there."""
    while True:
        with suppress(NotApplied):
            await request()
            return
        await asyncio.sleep(0.01)


async def test_a_server_that_has_forgotten_the_scripts_gets_them_again(url: str) -> None:
    with redis_server.running_server() as server:
        async with space_at(server.url()) as space:
            await put(space, a="1")
            await space.connection.send("SCRIPT", "FLUSH")
            await put(space, b="1")
            await space.connection.send("SCRIPT", "FLUSH")
            assert await names(space) == [b"a", b"b"]
            server.kill()
            server.start()
            await until_done(lambda: space.read([b"a"]))
            await put(space, c="1")
            assert await names(space) == [b"a", b"b", b"c"]


async def test_a_request_that_connects_while_the_space_closes_leaves_no_connection() -> None:
    with redis_server.running_server() as server:
        async with space_at(server.url()) as space, space_at(server.url()) as other:
            reading = asyncio.create_task(space.read([b"a"]))
            await asyncio.sleep(0)
            await space.aclose()
            with pytest.raises(NotApplied, match="closed"):
                await reading
            async with asyncio.timeout(60):
                while len((await other.connection.send("CLIENT", "LIST")).splitlines()) > 1:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)  # Until the server has noticed.


async def test_nothing_is_sent_when_the_server_cannot_be_reached() -> None:
    url = f"redis://someone:hunter2@127.0.0.1:{redis_server.free_port()}"
    async with space_at(url) as space:
        with pytest.raises(NotApplied, match="cannot be reached") as refused:
            await space.commit([Change(puts={b"a": b""})])
        assert refused.value.retry
    with pytest.raises(StoreUnavailableError, match="cannot be reached") as error:
        async with open_store(url):
            pass
    assert "hunter2" not in f"{error.value!r} {error.value.__cause__!r} {error.value.__context__!r}"


async def test_a_full_memory_is_reported_with_its_remedy(url: str) -> None:
    with redis_server.running_server() as server:
        async with space_at(server.url(prefix="space")) as space:
            await put(space, a="1")
            run_id = new_run_id()
            async with open_store(server.url()) as store:
                await store.start_run(new_run_id(), "flow", run_id, "manual")
            await space.connection.send("CONFIG", "SET", "maxmemory", 1)
            with pytest.raises(NotApplied) as full:
                await space.commit([Change(puts={b"a": b"2", b"b": b""})])
            assert (full.value.reason, full.value.retry) == (FULL, False)
            # Reads go on, and nothing of the commit was applied.
            assert (await space.read([b"a", b"b"])).found[b"a"].value == b"1"
            assert await names(space) == [b"a"]
            async with open_store(server.url()) as store:
                with pytest.raises(StoreUnavailableError, match="maxmemory"):
                    await store.start_run(new_run_id(), "flow", new_run_id(), "manual")
                # An export tells its time.
                archive = await store.export_run(run_id)
                assert archive is not None
            await space.connection.send("CONFIG", "SET", "maxmemory", 0)
            await put(space, b="1")


async def test_keys_of_another_program_are_left_alone(space: RedisSpace, url: str) -> None:
    await space.connection.send("SET", f"{space.connection.settings.prefix}:keys", "a string")
    with pytest.raises(NotApplied, match="another program"):
        await put(space, a="1")
    await space.connection.send("DEL", f"{space.connection.settings.prefix}:keys")
    assert (await space.read([b"a"])).found == {}


# Servers


@contextmanager
def server_with(**settings: str) -> Iterator[redis_server.Server]:
    changed = {name.replace("_", "-"): value for name, value in settings.items()}
    with redis_server.running_server({**redis_server.DURABLE, **changed}) as server:
        yield server


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"maxmemory_policy": "allkeys-lru"}, "maxmemory-policy is allkeys-lru"),
        ({"maxmemory_policy": "volatile-ttl"}, "maxmemory-policy is volatile-ttl"),
        ({"cluster_enabled": "yes"}, "cluster mode"),
        ({"replica_read_only": "no"}, "replica-read-only is no"),
    ],
)
async def test_servers_with_wrong_settings_are_refused(settings: dict[str, str], problem: str) -> None:
    with server_with(cluster_port=str(redis_server.free_port()), **settings) as server:
        with pytest.raises(ConfigurationError, match=problem):
            async with open_store(server.url()):
                pass
        codes = [finding.code for finding in await diagnose(server)]
        assert codes == ["unusable-server"]


async def test_a_replica_is_refused_at_once_and_later() -> None:
    with (
        server_with() as primary,
        server_with() as server,
        server_with(replicaof=f"127.0.0.1 {primary.port}") as replica,
    ):
        with pytest.raises(StoreUnavailableError, match=REPLICA):
            async with open_store(replica.url()):
                pass
        async with space_at(server.url()) as space:
            await put(space, a="1")
            # The open connection learns it from the reply, and a new one at its start.
            await space.connection.send("REPLICAOF", "127.0.0.1", primary.port)
            for _ in range(2):
                with pytest.raises(NotApplied, match=REPLICA):
                    await space.read([b"a"])
                with pytest.raises(NotApplied, match=REPLICA):
                    await put(space, a="2")
        while "asynchronous-replicas" not in [finding.code for finding in await diagnose(primary)]:  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.1)  # Until the replicas have connected.


async def test_a_store_that_was_durable_refuses_a_server_that_is_not() -> None:
    with server_with() as server:
        async with open_store(server.url(), retry_timeout=600) as store:
            server.kill()
            server.settings["appendfsync"] = "everysec"
            server.start()
            with pytest.raises(StoreUnavailableError, match="no longer syncs"):
                await store.start_run(new_run_id(), "flow", new_run_id(), "manual")


async def test_a_server_that_comes_back_empty_can_be_used_on() -> None:
    with server_with(appendonly="no") as server:
        async with open_store(server.url(), retry_timeout=600) as store:
            for _ in range(3):
                await store.start_run(new_run_id(), "flow", new_run_id(), "manual")
            server.kill()
            server.start()
            run_id = new_run_id()
            await store.start_run(new_run_id(), "flow", run_id, "manual")
            assert [run.run_id for run in await store.get_runs()] == [run_id]


async def diagnose(server: redis_server.Server) -> Sequence[Diagnostic]:
    _, backend, config = resolve_store(server.url(), migrate=False)
    assert isinstance(backend, RedisBackend)
    return await backend.diagnose(config, thorough=False)


# Users and TLS

RULES = (
    *("~flows:*", "&flows:*", "+@connection", "+@read", "+@write", "+@scripting", "+@pubsub"),
    *("+time", "+info", "+config|get"),
)


async def test_a_user_needs_permissions_for_the_prefix_only() -> None:
    with server_with() as server:
        async with space_at(server.url()) as admin:
            await admin.connection.send("ACL", "SETUSER", "flows", "on", ">p:/@ss", *RULES)
            login = (
                f"redis://flows:p%3A%2F%40ss@{server.address}?request_timeout=60&connect_timeout=60&prefix="
            )
            async with open_store(login + "flows") as store:
                run_id = new_run_id()
                await store.start_run(new_run_id(), "flow", run_id, "manual")
                # Nothing of a commit is applied if a part of it is not permitted.
                for command in ("zadd", "hset", "publish"):
                    await admin.connection.send("ACL", "SETUSER", "flows", f"-{command}")
                    with pytest.raises(StoreUnavailableError, match="permission"):
                        await store.start_run(new_run_id(), "flow", new_run_id(), "manual")
                    await admin.connection.send("ACL", "SETUSER", "flows", f"+{command}")
                assert [run.run_id for run in await store.get_runs()] == [run_id]
            for url, reason in (
                (login + "other", "permission"),
                (login.replace("p%3A%2F%40ss", "hunter2") + "flows", "user or the password"),
            ):
                with pytest.raises(StoreUnavailableError, match=reason) as error:
                    async with open_store(url) as store:
                        await store.get_run(run_id)
                assert (
                    "hunter2" not in f"{error.value!r} {error.value.__cause__!r} {error.value.__context__!r}"
                )


async def test_a_password_without_a_user() -> None:
    with server_with(requirepass="a secret") as server:
        async with open_store(server.url().replace("//", "//:a%20secret@")) as store:
            await store.ping()
        with pytest.raises(StoreUnavailableError, match="user or the password"):
            async with open_store(server.url()):
                pass


async def test_tls_with_certificates_of_both_sides(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    for name in ("server", "client"):
        issued = authority.issue_cert("127.0.0.1", common_name=name)
        issued.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        issued.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.pem")
    port = str(redis_server.free_port())
    with server_with(
        tls_port=port,
        tls_cert_file=f"{tmp_path}/server.pem",
        tls_key_file=f"{tmp_path}/server.key",
        tls_ca_cert_file=f"{tmp_path}/ca.pem",
    ):
        secure = f"rediss://127.0.0.1:{port}?connect_timeout=60&cert={tmp_path}/client.pem&key={tmp_path}/client.key&cacert="
        async with open_store(f"{secure}{tmp_path}/ca.pem") as store:
            await store.ping()
        trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
        with pytest.raises(StoreUnavailableError, match="TLS handshake"):
            async with open_store(f"{secure}{tmp_path}/other.pem"):
                pass


# URLs and prefixes


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("redis://host:0", "port from 1"),
        ("redis://host:99999", "port from 1"),
        ("redis://host,other", "one server"),
        ("redis://ho%20st", "one server"),
        ("redis://host/flows", "number of the database"),
        ("redis://host?prefix=a%20b", "prefix"),
        ("redis://host?prefix=" + "a" * 101, "prefix"),
        ("redis://host?cacert=missing.pem", "option cacert cannot be read"),
        (f"redis://host?cacert={__file__}", "rediss://"),
        (f"rediss://host?cert={__file__}", "given together"),
        ("redis://host?request_timeout=0", "request_timeout"),
    ],
)
async def test_malformed_urls_are_refused(url: str, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        async with open_store(url):
            pass


async def test_scratch_namespaces_leave_other_keys_alone(url: str) -> None:
    prefix = secrets.token_hex(8)
    parts = parse_url(url)
    own_url = parts.with_more_options({"prefix": prefix})
    async with space_at(own_url) as own, space_at(url, prefix=f"{prefix}-scratch") as neighbour:
        await put(own, a="1")
        await put(neighbour, a="1")
        async with RedisBackend().scratch(own_url) as scratch_url, space_at(scratch_url) as scratch:
            await put(scratch, **{f"k{number}": "" for number in range(100)})
            assert len(await names(scratch)) == 100
        async with space_at(scratch_url) as scratch:
            assert await names(scratch) == []
        assert await names(own) == await names(neighbour) == [b"a"]
        await own.delete_all()
        await neighbour.delete_all()
