"""The space keeps the promises of KeyValueSpace on a real server, also at its limits and after failures."""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import etcd_cluster
import grpc.aio
import pytest
import trustme
from flowstore_etcd.connection import FULL
from flowstore_etcd.fault_injection import inject_faults
from flowstore_etcd.settings import read_settings
from flowstore_etcd.space import EtcdSpace

from flowstore_core import ConfigurationError, StoreConfig, StoreUnavailableError, new_run_id, open_store
from flowstore_core.urls import parse_url
from flowstore_documents import (
    AppliedOrRefused,
    Change,
    KeyValueSpace,
    MaybeApplied,
    NotApplied,
    SnapshotGone,
    TooLarge,
)
from flowstore_documents.clock_register import ClockRegister
from flowstore_documents.space_checks import (
    FAULT_CHECKS,
    SPACE_CHECKS,
    FaultCheck,
    OpenSpace,
    SpaceCheck,
    names,
    put,
)


@asynccontextmanager
async def space_at(url: str, **options: object) -> AsyncIterator[EtcdSpace]:
    parts = parse_url(url)
    config = StoreConfig(
        url=url, scheme="etcd", options={**parts.options, **options}, clock=None, migrate=True
    )
    space = EtcdSpace(read_settings(config))
    try:
        yield space
    finally:
        await space.aclose()


@pytest.fixture
async def space(cluster: etcd_cluster.Cluster) -> AsyncIterator[EtcdSpace]:
    async with space_at(cluster.url(f"space-{secrets.token_hex(8)}")) as opened:
        yield opened


def space_opener(url: str) -> OpenSpace:
    """Opens spaces with one prefix."""
    return partial(space_at, url)


@pytest.mark.parametrize("check", SPACE_CHECKS, ids=lambda check: check.__name__)
async def test_the_space(check: SpaceCheck, cluster: etcd_cluster.Cluster) -> None:
    await check(space_opener(cluster.url(f"space-{secrets.token_hex(8)}")))


@pytest.mark.parametrize("check", FAULT_CHECKS, ids=lambda check: check.__name__)
async def test_the_space_with_faults(check: FaultCheck, cluster: etcd_cluster.Cluster) -> None:
    async with inject_faults(cluster.url(f"space-{secrets.token_hex(8)}")) as faults:
        await check(space_opener(faults.url), faults)


# Times, snapshots and limits


async def test_a_change_tells_the_time_on_which_it_was_decided(cluster: etcd_cluster.Cluster) -> None:
    """The clock of one machine is some seconds ahead of that of the other one."""
    ahead = timedelta(0)
    url = cluster.url(f"space-{secrets.token_hex(8)}")
    async with space_at(url) as space, space_at(url) as other:
        assert (await space.read([])).time is None
        await other.clock()
        space._clock = ClockRegister(
            space, timedelta(seconds=10), machine_clock=lambda: datetime.now(UTC) + ahead
        )
        for puts in ({b"a": b""}, {}):
            ahead += timedelta(seconds=3)
            moment = (await space.read([b"a"])).time
            assert moment is not None
            assert moment > await other.clock()
            (version,) = await space.commit([Change(puts=puts, time=moment)])
            assert version is not None
            assert moment <= await other.clock()
            # It is known now, so that nothing is sent.
            assert None not in await space.commit([Change(time=moment)])


async def test_a_snapshot_shows_what_was_there_until_it_is_compacted(
    space: EtcdSpace, cluster: etcd_cluster.Cluster
) -> None:
    await put(space, a="1", b="1")
    at = (await space.read([b"a"])).at
    await space.commit([Change(puts={b"a": b"2"}, deletes=[b"b"])])
    assert (await space.read([b"a"], at=at)).found[b"a"].value == b"1"
    assert await names(space, at) == [b"a", b"b"]
    now = (await space.read([b"a"])).at
    cluster.members[0].call("kv/compaction", revision=now, physical=True)
    with pytest.raises(SnapshotGone):
        await names(space, at)
    assert await names(space, now) == [b"a"]


async def test_a_commit_beyond_the_limits_of_the_server_is_refused(space: EtcdSpace) -> None:
    with pytest.raises(TooLarge, match="max-request-bytes"):
        await space.commit([Change(puts={b"too large": b"v" * 2_000_000})])
    with pytest.raises(TooLarge, match="max-txn-ops"):
        await space.commit([Change(puts={b"%d" % index: b"" for index in range(129)})])


# Failures


async def test_nothing_is_sent_when_no_member_can_be_reached() -> None:
    url = f"etcd://someone:hunter2@127.0.0.1:{etcd_cluster.free_port()}/x"
    async with space_at(url) as space:
        with pytest.raises(NotApplied, match="no member of etcd can be reached") as refused:
            await space.commit([Change(puts={b"a": b""})])
        assert refused.value.retry
    with pytest.raises(StoreUnavailableError) as error:
        async with open_store(url, retry_timeout=0.1) as store:
            await store.ping()
    assert "hunter2" not in f"{error.value!r} {error.value.__cause__!r} {error.value.__context__!r}"


async def test_a_dead_member_is_left_for_the_next_one(cluster: etcd_cluster.Cluster) -> None:
    dead = f"127.0.0.1:{etcd_cluster.free_port()}"
    async with space_at(f"etcd://{dead},{cluster.members[0].address}/{secrets.token_hex(8)}") as space:
        await put(space, a="1")
        assert await names(space) == [b"a"]


async def test_a_silent_member_ends_calls_in_time() -> None:
    server = await asyncio.start_server(lambda *_: asyncio.sleep(3600), "127.0.0.1", 0)
    url = f"etcd://127.0.0.1:{server.sockets[0].getsockname()[1]}/x"
    async with space_at(url, connect_timeout=0.2) as space:
        with pytest.raises(NotApplied, match="no member"):
            await space.read([b"a"])
    server.close()


async def test_a_hanging_server_may_have_applied_a_commit() -> None:
    with etcd_cluster.running_cluster() as cluster:
        async with space_at(cluster.url(), request_timeout=0.3, connect_timeout=0.3) as space:
            await put(space, a="1")
            cluster.members[0].pause()
            with pytest.raises(MaybeApplied):
                await space.commit([Change(puts={b"a": b"2"})])
            with pytest.raises(NotApplied):
                await space.read([b"a"])
            cluster.members[0].resume()


async def test_a_read_that_a_full_etcd_refuses_names_the_remedy(space: EtcdSpace) -> None:
    """Old releases refuse reads too (fixed by etcd #14254 and #14884)."""

    async def refuse(*_: object, **__: object) -> object:
        details = "etcdserver: mvcc: database space exceeded"
        raise grpc.aio.AioRpcError(
            grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.aio.Metadata(), grpc.aio.Metadata(), details
        )

    for member in space._connection._members:
        member.txn = refuse
    with pytest.raises(NotApplied) as full:
        await space.read([b"a"])
    assert (full.value.reason, full.value.retry) == (FULL, False)


async def put_new(space: KeyValueSpace, key: bytes) -> None:
    await space.commit([Change({key: None}, {key: b"x" * 60_000})])


async def fill(space: KeyValueSpace) -> int:
    """Write until a commit fails; its number."""
    for number in range(1000):
        try:
            await put_new(space, b"%d" % number)
        except AppliedOrRefused:
            return number
    raise AssertionError("the database never became full")


async def test_a_full_database_is_reported_with_its_remedy() -> None:
    quota = 16 * 2**20
    with etcd_cluster.running_cluster(1, [f"--quota-backend-bytes={quota}"]) as cluster:
        async with space_at(cluster.url()) as space:
            number = await fill(space)
            found = (await space.read([b"%d" % index for index in range(number + 1)])).found
            # etcd also says that it is full after the last transaction that it applies.
            assert len(found) in (number, number + 1)
            with pytest.raises(AppliedOrRefused) as full:
                await put_new(space, b"new")
            assert full.value.reason == FULL
            assert (await space.read([b"new"])).found == {}
        began = time.monotonic()
        with pytest.raises(StoreUnavailableError, match="alarm"):
            async with open_store(cluster.url(), retry_timeout=600) as store:
                await store.start_run(new_run_id(), "flow", new_run_id(), "manual")
        assert time.monotonic() - began < 300


# Users and TLS


@contextmanager
def cluster_with_users() -> Iterator[etcd_cluster.Cluster]:
    with etcd_cluster.running_cluster() as cluster:
        call = cluster.members[0].call
        call("auth/user/add", name="root", password="a secret")
        call("auth/user/grant", user="root", role="root")
        call("auth/user/add", name="flows", password="p:/@ss")
        call("auth/role/add", name="flows")
        permission = {"permType": "READWRITE", "key": "Zmxvd3M6", "range_end": "Zmxvd3M7"}  # flows: to flows;
        call("auth/role/grant", name="flows", perm=permission)
        call("auth/user/grant", user="flows", role="flows")
        call("auth/enable")
        yield cluster


async def test_a_user_needs_permission_for_the_prefix_only() -> None:
    with cluster_with_users() as cluster:
        member = cluster.members[0].address
        async with open_store(f"etcd://flows:p%3A%2F%40ss@{member}/flows") as store:
            run_id = new_run_id()
            await store.start_run(new_run_id(), "flow", run_id, "manual")
            # A server that is started again has forgotten the login.
            cluster.members[0].kill()
            cluster.start()
            assert await store.get_run(run_id) is not None
        for url, reason in (
            (f"etcd://flows:p%3A%2F%40ss@{member}/other", "permission"),
            (f"etcd://flows:hunter2@{member}/flows", "wrong user or password"),
            (f"etcd://{member}/flows", "asks for a user"),
        ):
            with pytest.raises(StoreUnavailableError, match=reason) as error:
                async with open_store(url) as store:
                    await store.get_run(run_id)
            assert "hunter2" not in f"{error.value!r} {error.value.__cause__!r} {error.value.__context__!r}"


async def test_a_user_without_authentication_is_reported(cluster: etcd_cluster.Cluster) -> None:
    with pytest.raises(StoreUnavailableError, match="leave out the user"):
        async with open_store(f"etcd://me:secret@{cluster.members[0].address}/flows") as store:
            await store.ping()


async def test_tls_with_certificates_of_both_sides(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    for name in ("server", "client"):
        issued = authority.issue_cert("127.0.0.1", common_name=name)
        issued.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        issued.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.pem")
    arguments = [
        f"--cert-file={tmp_path}/server.pem",
        f"--key-file={tmp_path}/server.key",
        f"--trusted-ca-file={tmp_path}/ca.pem",
        "--client-cert-auth",
    ]
    with etcd_cluster.data_folder() as folder:
        cluster = etcd_cluster.Cluster(folder, 1, arguments, scheme="https")
        try:
            cluster.start()
            files = f"?cacert={tmp_path}/ca.pem&cert={tmp_path}/client.pem&key={tmp_path}/client.key"
            async with open_store(cluster.url("flows", files), retry_timeout=60) as store:
                await store.ping()
            trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
            with pytest.raises(StoreUnavailableError, match="TLS handshake"):
                async with open_store(cluster.url("flows", f"?cacert={tmp_path}/other.pem")) as store:
                    await store.ping()
        finally:
            cluster.stop()


# URLs and prefixes


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("etcd://host:0/x", "port from 1"),
        ("etcd://host:99999/x", "port from 1"),
        ("etcd://host,,other/x", "separated by commas"),
        ("etcd://ho%20st/x", "separated by commas"),
        ("etcd://host/a//b", "prefix"),
        ("etcd://host/a:b", "prefix"),
        ("etcd://host/" + "a" * 101, "prefix"),
        ("etcd://:secret@host/x", "must have a user"),
        ("etcd://host/x?cert=missing.pem&tls=true", "option cert cannot be read"),
        ("etcd://host/x?request_timeout=0", "request_timeout"),
    ],
)
async def test_malformed_urls_are_refused(url: str, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem) as error:
        async with open_store(url):
            pass
    assert "secret" not in str(error.value)


async def test_scratch_namespaces_leave_other_keys_alone(cluster: etcd_cluster.Cluster) -> None:
    from flowstore_etcd.plugin import EtcdBackend

    prefix = secrets.token_hex(8)
    async with space_at(cluster.url(prefix)) as own, space_at(cluster.url(f"{prefix}-scratch")) as neighbour:
        await put(own, a="1")
        await put(neighbour, a="1")
        async with EtcdBackend().scratch(cluster.url(prefix)) as url, space_at(url) as scratch:
            await put(scratch, **{f"k{number}": "" for number in range(100)})
            assert len(await names(scratch)) == 100
        async with space_at(url) as scratch:
            assert await names(scratch) == []
        assert await names(own) == await names(neighbour) == [b"a"]


# Forks

FORK = """
import asyncio, os, sys
from flowstore_core import ConfigurationError, open_store

async def ping(url):
    async with open_store(url) as store:
        await store.ping()

def fork(url):
    child = os.fork()
    if child == 0:
        try:
            asyncio.run(ping(url))
        except ConfigurationError as error:
            os._exit(3 if "spawn" in str(error) else 4)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

async def fork_with_open_store(url):
    async with open_store(url) as store:
        await store.ping()
        return fork(url)

url = sys.argv[1]
asyncio.run(ping(url))
assert [fork(url) for _ in range(5)] == [0] * 5
assert asyncio.run(fork_with_open_store(url)) == 3
assert fork(url) == 0
"""


def test_a_process_can_be_forked_while_no_store_is_open(cluster: etcd_cluster.Cluster) -> None:
    command = [sys.executable, "-c", FORK, cluster.url("fork")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


FORKED_SUBPROCESSES = """
import asyncio, subprocess, sys
from flowstore_core import open_store

async def main():
    async with open_store(sys.argv[1]) as store:

        async def read():
            while True:
                await store.get_active_runs()

        readers = [asyncio.create_task(read()) for _ in range(8)]
        command = [sys.executable, "-c", ""]
        for _ in range(50):
            started = await asyncio.create_subprocess_exec(*command, preexec_fn=lambda: None)
            assert await started.wait() == 0
        for reader in readers:
            reader.cancel()

asyncio.run(main())
"""


def test_forked_subprocesses_end_well_without_the_fork_support_of_grpc(cluster: etcd_cluster.Cluster) -> None:
    command = [sys.executable, "-c", FORKED_SUBPROCESSES, cluster.url("subprocesses")]
    environment = {**os.environ, "GRPC_ENABLE_FORK_SUPPORT": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
