"""Scaling: what a durable step costs on one file, on one server, and with a synchronous standby.

Runs have eight steps, each of which is claimed, run and advanced by the reference engine; every step
counts an eighth of the start of its run. Client and servers share one machine and one disk. docs/scaling.md
derives from the costs what larger machines can do.
"""

from __future__ import annotations

import asyncio
import resource
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time

import psutil

from benchmarks.engines.flowstore_replay_engine import Work, engine
from benchmarks.machine import describe, disk_folder, file_system
from benchmarks.options import Options, parser, run
from benchmarks.results import Measure, Report, Result, Sample
from benchmarks.rounds import Variant, measure
from flowstore_chaos.server import Server, new_server

STEPS = "durable steps, {concurrency:,} at once"
SYNCHRONOUS = {"synchronous_standby_names": "*"}
IS_SYNCHRONOUS = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming' AND sync_state = 'sync'"
WRITTEN = "SELECT pg_current_wal_insert_lsn() - '0/0'"
SYNCS = "SELECT sum(fsyncs) FROM pg_stat_io WHERE object = 'wal'"
STATISTICS_SECONDS = 11.0
"""After so long without a statement, each connection has reported its statistics to the server."""
START_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Database:
    """A database, and how to read its counters."""

    name: str
    url: str
    servers: Sequence[Server] = ()

    async def written(self) -> int:
        """Bytes written to the write-ahead log, or to all files by this process."""
        if self.servers:
            return int(await self.servers[0].psql(WRITTEN))
        # ru_oublock counts blocks of 512 bytes on every file system.
        return resource.getrusage(resource.RUSAGE_SELF).ru_oublock * 512

    async def syncs(self) -> int:
        """Syncs of the write-ahead log by the first server, once its connections are idle."""
        await asyncio.sleep(STATISTICS_SECONDS)
        return int(await self.servers[0].psql(SYNCS))

    def processor_seconds(self) -> float:
        """User and system time of all processes of the servers, those that have ended included."""
        seconds = 0.0
        for server in self.servers:
            postmaster = psutil.Process(server.pid)
            ended = postmaster.cpu_times()
            seconds += ended.children_user + ended.children_system
            for process in (postmaster, *postmaster.children(recursive=True)):
                times = process.cpu_times()
                seconds += times.user + times.system
        return seconds


class Costs:
    """Measures the costs of one variant: a value per step for each round, the warm-up included."""

    def __init__(self, database: Database, work: Work) -> None:
        self.database = database
        self.client, self.server = Result(database.name), Result(database.name)
        self.written, self.syncs = Result(database.name), Result(database.name)
        self._work = work
        self._steps = 0

    async def round(self, amount: int) -> Sample:
        written, server = await self.database.written(), self.database.processor_seconds()
        began, client = perf_counter(), process_time()
        steps = (await self._work(amount)).work
        seconds, client = perf_counter() - began, process_time() - client
        server = self.database.processor_seconds() - server
        written = await self.database.written() - written
        self._steps += steps
        for result, value in (
            (self.client, client * 1e6 / steps),
            (self.server, server * 1e6 / steps),
            (self.written, written / steps),
        ):
            result.samples.append(Sample(steps, value=value))
        return Sample(steps, rate=steps / seconds)

    @asynccontextmanager
    async def counting_syncs(self) -> AsyncIterator[None]:
        if not self.database.servers:
            yield
            return
        before = await self.database.syncs()
        yield
        if self._steps:
            syncs = await self.database.syncs() - before
            self.syncs.samples.append(Sample(self._steps, value=syncs / self._steps))


async def program(options: Options) -> Report:
    folder = disk_folder(options.folder)
    async with AsyncExitStack() as stack:
        data = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flowstore-bench-", dir=folder)))
        alone = await stack.enter_async_context(new_server(data / "alone", {}))
        primary = await stack.enter_async_context(new_server(data / "primary", SYNCHRONOUS))
        standby = await stack.enter_async_context(_standby(primary, data / "standby"))
        version = (await alone.psql("SHOW server_version")).partition(" ")[0]
        report = Report(
            "scaling",
            {"PostgreSQL": version, **describe("asyncpg", "aiosqlite")},
            {
                "durability": f"the defaults of each store; data on {file_system(folder)}",
                "rounds": f"{options.rounds} of {options.seconds:g} s per database, interleaved; medians",
            },
        )
        databases = (
            Database("SQLite", f"sqlite:///{data}/flows.db"),
            Database("PostgreSQL", alone.url(), (alone,)),
            Database("PostgreSQL, synchronous standby", primary.url(), (primary, standby)),
        )
        for concurrency in options.callers:
            await _measure(databases, report, options, concurrency)
    return report


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


async def _measure(databases: Sequence[Database], report: Report, options: Options, concurrency: int) -> None:
    async with AsyncExitStack() as stack:
        costs = [
            Costs(one, await stack.enter_async_context(engine(one.url, concurrency))) for one in databases
        ]
        for one in costs:
            await stack.enter_async_context(one.counting_syncs())
        measured = STEPS.format(concurrency=concurrency)
        variants = [Variant(one.database.name, one.round) for one in costs]
        await measure(report, options, measured, "steps per second", variants, least=8 * concurrency)
    if not options.wants(measured):
        return
    for one in costs:
        for result in (one.client, one.server, one.written):
            # The warm-up.
            del result.samples[0]
    for name, unit, results in (
        ("processor time of the client", "\N{MICRO SIGN}s per step", [one.client for one in costs]),
        ("processor time of the server", "\N{MICRO SIGN}s per step", [one.server for one in costs]),
        ("written to the log", "bytes per step", [one.written for one in costs]),
        ("syncs of the log", "per step", [one.syncs for one in costs]),
    ):
        found = [result for result in results if any(result.values("value"))]
        report.measures.append(Measure(f"{measured}: {name}", unit, found))


if __name__ == "__main__":
    run(parser(str(__doc__), "1,64"), program)
