"""Other engines on the same PostgreSQL: durable steps per second through their own worker loops."""

from __future__ import annotations

import importlib
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

import asyncpg

from benchmarks.cluster import cluster
from benchmarks.machine import describe, disk_folder, file_system
from benchmarks.options import Options, parser, run, say
from benchmarks.results import Report, Target
from benchmarks.rounds import Variant, measure

# Name in the tables, module below engines, distributions whose versions are reported.
ENGINES = (
    ("flowstore", "flowstore_replay_engine", ()),
    ("pgqueuer", "pgqueuer_jobs", ("pgqueuer",)),
    ("procrastinate", "procrastinate_jobs", ("procrastinate",)),
    ("DBOS", "dbos_workflows", ("dbos",)),
    ("absurd", "absurd_tasks", ("absurd-sdk",)),
)
"""Engines whose module has a ``worker`` can share the work among several processes."""
STEPS = "durable steps, {concurrency:,} at once"


async def program(options: Options) -> Report:
    folder = disk_folder(options.folder)
    distributions = [name for *_, names in ENGINES for name in names]
    async with AsyncExitStack() as stack:
        data = stack.enter_context(tempfile.TemporaryDirectory(prefix="flowstore-bench-", dir=folder))
        url = await stack.enter_async_context(cluster(Path(data)))
        server = await asyncpg.connect(url)
        stack.push_async_callback(server.close)
        version = str(await server.fetchval("SHOW server_version")).partition(" ")[0]
        report = Report(
            "peers",
            {"PostgreSQL": version, **describe("asyncpg", *distributions)},
            {
                "durability": f"PostgreSQL's own defaults, fsync on; data on {file_system(folder)}",
                "rounds": f"{options.rounds} of {options.seconds:g} s per engine, interleaved; medians",
                "work": "a step is an asynchronous function that returns a constant",
            },
        )
        # In sequence, because each engine may hold up to twenty connections.
        for concurrency in options.callers:
            await _compare(url, server, report, options, concurrency)
    return report


async def _compare(
    url: str, server: asyncpg.Connection, report: Report, options: Options, concurrency: int
) -> None:
    processes: int = options.given.processes
    where = f", {processes} worker processes" if processes > 1 else ""
    async with AsyncExitStack() as stack:
        variants = []
        for name, module, _ in ENGINES:
            try:
                engine = importlib.import_module(f"benchmarks.engines.{module}")
            except ImportError as error:
                note = f"{name} was skipped: {error.name} is not installed."
                say(note)
                if note not in report.notes:
                    report.notes.append(note)
                continue
            if processes > 1 and not hasattr(engine, "worker"):
                note = f"{name} was skipped: its benchmark has one worker process."
                say(note)
                if note not in report.notes:
                    report.notes.append(note)
                continue
            database = f"{module}_{concurrency}"
            await server.execute(f"CREATE DATABASE {database}")
            database_url = url.replace("///postgres?", f"///{database}?")
            several = {"processes": processes} if processes > 1 else {}
            opened = engine.engine(database_url, concurrency, **several)
            variants.append(Variant(name, await stack.enter_async_context(opened)))
            note = f"A step of {name}: {engine.STEP}."
            if note not in report.notes:
                report.notes.append(note)

        async def settle() -> None:
            await server.execute("CHECKPOINT")

        measured = STEPS.format(concurrency=concurrency) + where
        await measure(
            report, options, measured, "steps per second", variants, least=8 * concurrency, settle=settle
        )
        report.judge(
            Target(
                f"{concurrency:,} at once{where}, against {one.name}",
                measured,
                "flowstore",
                one.name,
                True,
                1.0,
                1.3 if one.name == "pgqueuer" else None,
            )
            for one in variants
            if one.name != "flowstore"
        )


if __name__ == "__main__":
    options = parser(str(__doc__), "64,256")
    options.add_argument(
        "--processes",
        type=int,
        choices=range(1, 9),
        default=1,
        help="worker processes, each with as many steps at once (1)",
    )
    run(options, program)
