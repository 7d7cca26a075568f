"""The databases of benchmarks.scaling: how each is started, and where it counts what a step costs."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import shutil
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.util import find_spec
from pathlib import Path

import psutil

from benchmarks.cluster import keep_running
from flowstore_chaos.server import Server, new_server

SYNCHRONOUS = {"synchronous_standby_names": "*"}
IS_SYNCHRONOUS = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming' AND sync_state = 'sync'"
WRITTEN = "SELECT pg_current_wal_insert_lsn() - '0/0'"
SYNCS = "SELECT sum(fsyncs) FROM pg_stat_io WHERE object = 'wal'"
STATISTICS_SECONDS = 11.0
"""After so long without a statement, each connection has reported its statistics to the server."""
START_SECONDS = 60.0
ETCD_CLUSTER = Path(__file__).parents[1] / "plugins/flowstore_etcd/tests/etcd_cluster.py"
SYNCS_OF_ETCD = "etcd_disk_wal_fsync_duration_seconds_count"
SIZE_OF_ETCD = "etcd_mvcc_db_total_size_in_use_in_bytes"

# psql is started as another user, so Python forks, and gRPC would kill some of these processes.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")


class Database:
    """A database, and its counters; those that it does not have are None."""

    def __init__(self, name: str, url: str) -> None:
        self.name = name
        self.url = url

    async def version(self) -> str | None:
        """The version of the server."""
        return None

    async def written(self) -> int:
        """Bytes written so far: to the log of the first server, or to all files by one process."""
        raise NotImplementedError

    async def syncs(self) -> int | None:
        """Syncs of the log of the first server so far."""
        return None

    async def size(self) -> int | None:
        """Bytes that the data takes, old values included."""
        return None

    async def compacted_size(self) -> int | None:
        """Delete all old values, and return the size of the rest."""
        return None

    def processor_seconds(self) -> float:
        """User and system time so far of all processes of the servers."""
        return 0.0


class SqliteFile(Database):
    """One file, written by this process."""

    async def written(self) -> int:
        # ru_oublock counts blocks of 512 bytes on every file system.
        return resource.getrusage(resource.RUSAGE_SELF).ru_oublock * 512


class PostgresServers(Database):
    """A server, and perhaps its standby."""

    def __init__(self, name: str, servers: Sequence[Server]) -> None:
        super().__init__(name, servers[0].url())
        self._servers = servers

    async def version(self) -> str:
        return (await self._servers[0].psql("SHOW server_version")).partition(" ")[0]

    async def written(self) -> int:
        return int(await self._servers[0].psql(WRITTEN))

    async def syncs(self) -> int:
        await asyncio.sleep(STATISTICS_SECONDS)
        return int(await self._servers[0].psql(SYNCS))

    def processor_seconds(self) -> float:
        seconds = 0.0
        for server in self._servers:
            # The processes of closed connections have ended.
            ended = psutil.Process(server.pid).cpu_times()
            seconds += ended.children_user + ended.children_system + _processor_seconds(server.pid)
        return seconds


class EtcdMembers(Database):
    """The members of a cluster; the first one is reached first."""

    def __init__(self, name: str, url: str, keeper: int) -> None:
        """``keeper`` is the id of the process that started the members."""
        super().__init__(name, url)
        self._keeper = keeper
        (address, *_) = url.removeprefix("etcd://").partition("/")[0].split(",")
        self._address = f"http://{address}"
        self._first = min(psutil.Process(keeper).children(), key=psutil.Process.create_time)

    async def version(self) -> str:
        found = re.search(r'server_version="(.+?)"', await self._fetch("/metrics"))
        return found[1] if found else "unknown"

    async def written(self) -> int:
        return int(self._first.io_counters().write_bytes)

    async def syncs(self) -> int:
        return await self._counter(SYNCS_OF_ETCD)

    async def size(self) -> int:
        return await self._counter(SIZE_OF_ETCD)

    async def compacted_size(self) -> int:
        status = json.loads(await self._fetch("/v3/maintenance/status", {}))
        revision = status["header"]["revision"]
        await self._fetch("/v3/kv/compaction", {"revision": revision, "physical": True})
        return await self.size()

    def processor_seconds(self) -> float:
        return _processor_seconds(self._keeper)

    async def _counter(self, name: str) -> int:
        found = re.search(rf"^{name} (\S+)$", await self._fetch("/metrics"), re.MULTILINE)
        if found is None:
            raise RuntimeError(f"etcd has no counter {name}")
        return int(float(found[1]))

    async def _fetch(self, path: str, posted: Mapping[str, object] | None = None) -> str:
        data = None if posted is None else json.dumps(posted).encode()

        def fetch() -> str:
            with urllib.request.urlopen(self._address + path, data, timeout=START_SECONDS) as reply:
                return str(reply.read().decode())

        return await asyncio.to_thread(fetch)


def _processor_seconds(root: int) -> float:
    process = psutil.Process(root)
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return float(sum(one.user + one.system for one in times))


@asynccontextmanager
async def sqlite(folder: Path) -> AsyncIterator[Sequence[Database]]:
    yield [SqliteFile("SQLite", f"sqlite:///{folder}/flows.db")]


@asynccontextmanager
async def postgres(folder: Path) -> AsyncIterator[Sequence[Database]]:
    """A server alone, and one with a synchronous standby."""
    async with (
        new_server(folder / "alone", {}) as alone,
        new_server(folder / "primary", SYNCHRONOUS) as primary,
        _standby(primary, folder / "standby") as standby,
    ):
        yield [
            PostgresServers("PostgreSQL", [alone]),
            PostgresServers("PostgreSQL, synchronous standby", [primary, standby]),
        ]


@asynccontextmanager
async def _standby(primary: Server, folder: Path) -> AsyncIterator[Server]:
    standby = await primary.new_standby(folder, "standby", {"hot_standby": "on"})
    try:
        await standby.start()
        async with asyncio.timeout(START_SECONDS):
            while await primary.psql(IS_SYNCHRONOUS) != "1":  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.05)
        yield standby
    finally:
        await standby.aclose()


@asynccontextmanager
async def etcd(folder: Path) -> AsyncIterator[Sequence[Database]]:
    """One member, and three."""
    async with _etcd_cluster(folder, 1) as one, _etcd_cluster(folder, 3) as three:
        yield [one, three]


@asynccontextmanager
async def _etcd_cluster(folder: Path, members: int) -> AsyncIterator[EtcdMembers]:
    environment = {**os.environ, "TMPDIR": str(folder)}
    async with keep_running(str(ETCD_CLUSTER), str(members), environment=environment) as (url, keeper):
        name = "etcd, one member" if members == 1 else f"etcd, {members} members"
        yield EtcdMembers(name, url, keeper)


Start = Callable[[Path], AbstractAsyncContextManager[Sequence[Database]]]

KINDS: Mapping[str, Start] = {"sqlite": sqlite, "postgresql": postgres, "etcd": etcd}
"""How the databases of a kind are started."""


def missing_for(kind: str) -> str | None:
    """The command that installs what databases of a kind lack."""
    if kind != "etcd":
        return None
    if find_spec("flowstore_etcd") is None:
        return "pip install ./plugins/flowstore_etcd"
    return None if shutil.which("etcd") else "apt-get install etcd-server"
