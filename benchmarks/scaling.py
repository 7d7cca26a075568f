"""Scaling: what a durable step costs on one file, on one server, with a synchronous standby, and on etcd.

Runs have eight steps, each of which is claimed, run and advanced by the reference engine; every step
counts an eighth of the start of its run. Client and servers share one machine and one disk. docs/scaling.md
derives from the costs what larger machines can do. etcd is measured if its plugin and its server are
installed.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from time import perf_counter, process_time

from benchmarks.engines.flowstore_replay_engine import Work, engine
from benchmarks.machine import describe, disk_folder, file_system
from benchmarks.options import Options, parser, run, say
from benchmarks.results import Measure, Report, Result, Sample
from benchmarks.rounds import Variant, measure
from benchmarks.scaling_databases import KINDS, Database, missing_for

STEPS = "durable steps, {concurrency:,} at once"


class Costs:
    """Measures the costs of one variant: a value per step for each round, the warm-up included."""

    def __init__(self, database: Database, work: Work) -> None:
        self.database = database
        self.client, self.server = Result(database.name), Result(database.name)
        self.written, self.syncs = Result(database.name), Result(database.name)
        self.added, self.kept = Result(database.name), Result(database.name)
        self._work = work
        self._steps = 0
        self._syncs: int | None = None
        self._size: int | None = None

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

    async def begin(self) -> None:
        """Read the counters that are read only once for all rounds."""
        self._syncs, self._size = await self.database.syncs(), await self.database.compacted_size()

    async def end(self) -> None:
        database = self.database
        for result, before, count in (
            (self.syncs, self._syncs, database.syncs),
            (self.added, self._size, database.size),
            (self.kept, self._size, database.compacted_size),
        ):
            now = await count()
            if before is not None and now is not None:
                result.samples.append(Sample(self._steps, value=(now - before) / self._steps))


async def program(options: Options) -> Report:
    folder = disk_folder(options.folder)
    report = Report(
        "scaling",
        describe("asyncpg", "aiosqlite", "grpcio"),
        {
            "durability": f"the defaults of each store; data on {file_system(folder)}",
            "rounds": f"{options.rounds} of {options.seconds:g} s per database, interleaved; medians",
        },
    )
    async with AsyncExitStack() as stack:
        data = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flowstore-bench-", dir=folder)))
        databases: list[Database] = []
        for kind in options.given.databases:
            if command := missing_for(kind):
                report.notes.append(f"{kind} was skipped: {command}")
                say(report.notes[-1])
                continue
            databases += await stack.enter_async_context(KINDS[kind](data))
        versions = {one.name.partition(",")[0]: await one.version() for one in databases}
        report.machine = {name: found for name, found in versions.items() if found} | {**report.machine}
        for concurrency in options.callers:
            await _measure(databases, report, options, concurrency)
    return report


async def _measure(databases: Sequence[Database], report: Report, options: Options, concurrency: int) -> None:
    measured = STEPS.format(concurrency=concurrency)
    if not options.wants(measured):
        return
    async with AsyncExitStack() as stack:
        costs = [
            Costs(one, await stack.enter_async_context(engine(one.url, concurrency))) for one in databases
        ]
        await asyncio.gather(*(one.begin() for one in costs))
        variants = [Variant(one.database.name, one.round) for one in costs]
        await measure(report, options, measured, "steps per second", variants, least=8 * concurrency)
        await asyncio.gather(*(one.end() for one in costs))
    for one in costs:
        for result in (one.client, one.server, one.written):
            # The warm-up.
            del result.samples[0]
    for name, unit, results in (
        ("processor time of the client", "\N{MICRO SIGN}s per step", [one.client for one in costs]),
        ("processor time of the server", "\N{MICRO SIGN}s per step", [one.server for one in costs]),
        ("written to the log", "bytes per step", [one.written for one in costs]),
        ("syncs of the log", "per step", [one.syncs for one in costs]),
        ("added to the database", "bytes per step", [one.added for one in costs]),
        ("left in the database by compaction", "bytes per step", [one.kept for one in costs]),
    ):
        if found := [result for result in results if any(result.values("value"))]:
            report.measures.append(Measure(f"{measured}: {name}", unit, found))


def _read_options() -> argparse.ArgumentParser:
    options = parser(str(__doc__), "1,64")
    options.add_argument(
        "--databases",
        type=_kinds,
        default=tuple(KINDS),
        metavar="NAMES",
        help=f"of {', '.join(KINDS)}, separated by commas (all)",
    )
    return options


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(text.split(","))
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; choose from {', '.join(KINDS)}")
    return kinds


if __name__ == "__main__":
    run(_read_options(), program)
