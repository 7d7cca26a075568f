"""Queues: latency and cost of waiting workers, claims among sleeping runs, workers that share a queue."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path

import asyncpg

from benchmarks.cluster import cluster
from benchmarks.growth_stores import OpenedStore, open_postgres, open_sqlite
from benchmarks.machine import describe, disk_folder, file_system
from benchmarks.options import Options, parser, run
from benchmarks.queue_claims import (
    SNAPSHOT_MINUTES,
    competition,
    competition_targets,
    polls,
    polls_targets,
    sleeping,
    sleeping_targets,
    snapshot,
    snapshot_targets,
    throughput,
)
from benchmarks.queue_stores import Backend
from benchmarks.queue_waiting import idle, idle_targets, latency, latency_targets
from benchmarks.results import Report
from benchmarks.workload import store_url

FIGURES: dict[str, Callable[[Report, Options, Backend], Awaitable[None]]] = {
    "latency": latency,
    "idle": idle,
    "sleeping": sleeping,
    "polls": polls,
    "snapshot": snapshot,
    "competition": competition,
    "throughput": throughput,
}

QUICK_ROUNDS = 2
QUICK_SNAPSHOT_MINUTES = 2.0

SESSIONS = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND datname = $1"
QUERIED_SESSIONS = """
SELECT count(*) FROM pg_stat_activity
WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND query_start > $1
"""


async def program(options: Options) -> Report:
    folder = disk_folder(options.folder)
    report = Report(
        "queues",
        describe("asyncpg", "aiosqlite"),
        {
            "durability": f"as in the other programs; data on {file_system(folder)}",
            "rounds": f"{options.rounds}, interleaved; medians",
            "processes": "workers are processes of their own, each with a store",
        },
    )
    backends = []
    async with AsyncExitStack() as stack:
        directory = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="flowstore-bench-", dir=folder))
        )
        if options.wants_backend("PostgreSQL"):
            url = await stack.enter_async_context(cluster(directory))
            backends.append(_postgres(url))
        if options.wants_backend("SQLite"):
            backends.append(_sqlite(directory))
        for name, figure in FIGURES.items():
            if name in (options.given.figure or FIGURES):
                for backend in backends:
                    await figure(report, options, backend)
    for backend in backends:
        report.judge(latency_targets(backend.name))
        report.judge(idle_targets(backend.name))
        report.judge(sleeping_targets(backend.name, options))
        report.judge(polls_targets(backend.name, options))
        report.judge(snapshot_targets(backend.name))
        report.judge(competition_targets(backend.name))
    return report


def _postgres(url: str) -> Backend:
    """Each store has a database of its own."""

    def database(name: str) -> str:
        return url.replace("///postgres?", f"///{name}?")

    async def open_database(stack: AsyncExitStack, name: str) -> OpenedStore:
        db = await asyncpg.connect(url)
        try:
            await db.execute(f"CREATE DATABASE {name} TEMPLATE postgres")
        finally:
            await db.close()
        return await open_postgres(database(name), stack, name)

    @asynccontextmanager
    async def hold_snapshot(name: str) -> AsyncIterator[None]:
        db = await asyncpg.connect(database(name))
        try:
            async with db.transaction(isolation="repeatable_read"):
                await db.fetchval(f"SELECT count(*) FROM {name}.runs")
                yield
        finally:
            await db.close()

    async def count_queries(since: datetime) -> int:
        db = await asyncpg.connect(url)
        try:
            return int(await db.fetchval(QUERIED_SESSIONS, since))
        finally:
            await db.close()

    async def processor_clock(name: str) -> Callable[[], float]:
        db = await asyncpg.connect(url)
        try:
            found = await db.fetch(SESSIONS, name)
        finally:
            await db.close()
        used = {Path(f"/proc/{row['pid']}/schedstat"): 0 for row in found}

        def clock() -> float:
            for path in used:
                # A session that has ended uses no more.
                with suppress(FileNotFoundError, ProcessLookupError):
                    used[path] = int(path.read_text().split()[0])
            return time.process_time() + sum(used.values()) / 1e9

        return clock

    return Backend(
        "PostgreSQL",
        open_database,
        lambda name: f"{database(name)}&schema={name}",
        hold_snapshot,
        count_queries,
        processor_clock,
    )


def _sqlite(directory: Path) -> Backend:
    def path(name: str) -> Path:
        return directory / f"{name}.db"

    @asynccontextmanager
    async def hold_snapshot(name: str) -> AsyncIterator[None]:
        db = await asyncio.to_thread(
            sqlite3.connect, path(name), isolation_level=None, check_same_thread=False
        )
        try:
            db.execute("BEGIN")
            db.execute("SELECT count(*) FROM runs").fetchone()
            yield
        finally:
            db.close()

    async def processor_clock(_name: str) -> Callable[[], float]:
        return time.process_time

    return Backend(
        "SQLite",
        partial(open_sqlite, directory),
        lambda name: store_url(path(name)),
        hold_snapshot,
        None,
        processor_clock,
    )


if __name__ == "__main__":
    options = parser(str(__doc__), "64,256")
    options.add_argument(
        "--figure", action="append", choices=FIGURES, help="only this figure (default: all); repeatable"
    )
    options.add_argument(
        "--snapshot-minutes",
        type=float,
        default=SNAPSHOT_MINUTES,
        metavar="M",
        help=f"minutes for which the old snapshot is held ({SNAPSHOT_MINUTES:g})",
    )
    options.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_ROUNDS} rounds and a snapshot of {QUICK_SNAPSHOT_MINUTES:g} minutes, "
        "where no other option says otherwise",
    )
    if "--quick" in sys.argv:
        options.set_defaults(rounds=QUICK_ROUNDS, snapshot_minutes=QUICK_SNAPSHOT_MINUTES)
    run(options, program)
