"""FlowstoreSaver beside LangGraph's own savers for SQLite and PostgreSQL: ``python benchmark.py``.

The savers take turns in one run, and the table shows the median of the rounds. A put stores a checkpoint with
a value of about 2 KB that changes and one of about 2 KB that does not, and then one write of a task. All
savers are equally durable: SQLite has synchronous=FULL, PostgreSQL synchronous_commit=on.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import runpy
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import aiosqlite
from flowstore_langgraph import FlowstoreSaver
from langgraph.checkpoint.base import BaseCheckpointSaver, empty_checkpoint
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool

Cluster = runpy.run_path(str(Path(__file__).parents[2] / "tests" / "cluster.py"))["Cluster"]
WORDS = [f"word{number}" for number in range(1000)]
Saver = BaseCheckpointSaver[Any]
NewSaver = Callable[[], AbstractAsyncContextManager[Saver]]


def text(seed: int) -> list[str]:
    return random.Random(seed).choices(WORDS, k=250)


def config_of(thread_id: str) -> Any:
    return {"configurable": {"thread_id": thread_id, "checkpoint_ns": ""}}


async def put_steps(saver: Saver, thread_id: str, config: Any, first: int, count: int) -> Any:
    """Add checkpoints to a thread."""
    for step in range(first, first + count):
        versions = {"messages": step + 1, "settings": 1}
        one: Any = {
            **empty_checkpoint(),
            "channel_values": {"messages": text(step), "settings": text(-1)},
            "channel_versions": versions,
        }
        new = versions if step == 0 else {"messages": step + 1}
        config = await saver.aput(config, one, {"source": "loop", "step": step}, new)  # type: ignore[arg-type]
        await saver.aput_writes(config, [("messages", ["done"])], f"task {step}")
    return config


async def puts_per_second(saver: Saver, threads: int, seconds: float) -> float:
    """Checkpoints per second, each with a write, when so many threads put theirs one after the other."""
    end = time.perf_counter() + seconds
    counts = [0] * threads

    async def thread(number: int) -> None:
        thread_id = f"{time.time_ns()}-{number}"
        config = config_of(thread_id)
        while time.perf_counter() < end:
            config = await put_steps(saver, thread_id, config, counts[number], 1)
            counts[number] += 1

    began = time.perf_counter()
    await asyncio.gather(*map(thread, range(threads)))
    return sum(counts) / (time.perf_counter() - began)


async def latest_per_second(saver: Saver, seconds: float) -> float:
    end, count, began = time.perf_counter() + seconds, 0, time.perf_counter()
    while time.perf_counter() < end:
        found = await saver.aget_tuple(config_of("long"))
        assert found is not None
        assert len(found.pending_writes or ()) == 1
        count += 1
    return count / (time.perf_counter() - began)


def sqlite_savers(folder: str) -> dict[str, tuple[NewSaver, Callable[[], int]]]:
    @asynccontextmanager
    async def langgraph() -> AsyncIterator[Saver]:
        async with aiosqlite.connect(f"{folder}/langgraph.db") as connection:
            saver = AsyncSqliteSaver(connection)
            await saver.setup()
            await connection.execute("PRAGMA synchronous = FULL")
            yield saver

    def size(name: str) -> Callable[[], int]:
        return lambda: sum(file.stat().st_size for file in Path(folder).glob(f"{name}.db*"))

    return {
        "flowstore": (lambda: FlowstoreSaver.from_url(f"sqlite:///{folder}/flowstore.db"), size("flowstore")),
        "langgraph": (langgraph, size("langgraph")),
    }


def postgres_savers(url: str) -> dict[str, tuple[NewSaver, Callable[[], int]]]:
    import psycopg

    host = url.partition("host=")[2].partition("&")[0].replace("%2F", "/")
    address = f"host={host} user=postgres dbname=postgres"

    @asynccontextmanager
    async def langgraph() -> AsyncIterator[Saver]:
        options = {"autocommit": True, "prepare_threshold": 0, "row_factory": dict_row}
        async with AsyncConnectionPool(address, kwargs=options, min_size=10, max_size=10) as pool:
            saver = AsyncPostgresSaver(pool)  # type: ignore[arg-type]
            await saver.setup()
            yield saver

    def size(schema: str) -> Callable[[], int]:
        def measure() -> int:
            with psycopg.connect(address, autocommit=True) as connection:
                connection.execute("VACUUM")
                row = connection.execute(
                    "SELECT sum(pg_total_relation_size(c.oid)) FROM pg_class c JOIN pg_namespace n "
                    "ON n.oid = relnamespace WHERE nspname = %s AND relkind = 'r'",
                    (schema,),
                ).fetchone()
            return int(row[0] or 0) if row else 0

        return measure

    return {
        "flowstore": (lambda: FlowstoreSaver.from_url(f"{url}&schema=flowstore_lg"), size("flowstore_lg")),
        "langgraph": (langgraph, size("public")),
    }


async def measure(
    title: str, savers: dict[str, tuple[NewSaver, Callable[[], int]]], arguments: argparse.Namespace
) -> None:
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in savers}
    for name, (new_saver, size) in savers.items():
        async with new_saver() as saver:
            before = size()
            await put_steps(saver, "long", config_of("long"), 0, arguments.checkpoints)
        figures[name]["bytes per checkpoint"] = [(size() - before) / arguments.checkpoints]
    for _ in range(arguments.rounds):
        for name, (new_saver, _size) in savers.items():
            async with new_saver() as saver:
                for threads in (1, 64):
                    rate = await puts_per_second(saver, threads, arguments.seconds)
                    figures[name].setdefault(f"puts/s, {threads} at once", []).append(rate)
                rate = await latest_per_second(saver, arguments.seconds)
                figures[name].setdefault("reads/s of the newest", []).append(rate)
    print(f"\n{title:34}{'flowstore':>12}{'langgraph':>12}{'ratio':>8}")
    for figure in figures["flowstore"]:
        ours, theirs = (statistics.median(figures[name][figure]) for name in ("flowstore", "langgraph"))
        ratio = theirs / ours if figure.startswith("bytes") else ours / theirs
        print(f"{figure:34}{ours:12,.0f}{theirs:12,.0f}{ratio:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints", type=int, default=10_000, help="of the long thread")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each figure of a round")
    arguments = parser.parse_args()
    print(f"a long thread has {arguments.checkpoints:,} checkpoints; {os.cpu_count()} processors")
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure("SQLite", sqlite_savers(folder), arguments))
    cluster = Cluster(durable=True)
    try:
        asyncio.run(measure("PostgreSQL", postgres_savers(cluster.url), arguments))
    finally:
        cluster.stop()


if __name__ == "__main__":
    main()
