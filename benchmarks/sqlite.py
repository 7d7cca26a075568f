"""SQLite with synchronous=FULL: calls per second and latencies, and four processes on one file."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from asyncio.subprocess import PIPE
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.baselines import sqlite_tables
from benchmarks.baselines.sqlite_callables import callable_per_call, inline_calls
from benchmarks.baselines.sqlite_own import own_claim
from benchmarks.baselines.sqlite_sets import SetBased
from benchmarks.baselines.sqlite_transactions import transaction_per_call
from benchmarks.machine import describe, disk_folder, file_system
from benchmarks.options import Options, parser, run
from benchmarks.results import Report, Sample, Target
from benchmarks.rounds import Variant, measure, measure_paired
from benchmarks.rss import watch_rss
from benchmarks.workload import (
    STEPS_PER_RUN,
    StoreRecords,
    claims,
    lifecycles,
    paired_claims,
    sample,
    store_url,
)
from flowstore_core import open_store

PROCESSES = 4
CALLERS_PER_PROCESS = 16
MAX_PER_SECOND = 12_000
"""Upper limit of lifecycles per process and second; this many are prepared."""

OURS = "flowstore"
TRANSACTIONS = "a transaction per call, aiosqlite"
CALLABLES = "one callable per call"
OWN = "limit: the same, flowstore's own statement"
INLINE = "limit: the same without a thread"
SETS = "limit: executemany of 256, no callers"
GROUPED = "grouped, busy_timeout alone"
SINGLE = "one callable per call, busy_timeout alone"

ALTERNATING = "try_claim_step, 1 caller, alternating call by call"
TOTAL = f"lifecycle, {PROCESSES} processes on one file, together"
FAIRNESS = "... the slowest process against the fastest"
WAITS = "... wait of one call at the 99.9th percentile"


def life(callers: int) -> str:
    return f"lifecycle, {callers:,} {'caller' if callers == 1 else 'callers'}"


def claim(callers: int) -> str:
    return f"try_claim_step, all keys different, {callers:,} {'caller' if callers == 1 else 'callers'}"


TARGETS = (
    Target("lifecycle, 256 callers", life(256), OURS, TRANSACTIONS, True, 35),
    Target("claims, 256 callers", claim(256), OURS, TRANSACTIONS, True, 30),
    Target("lifecycle, 1 caller", life(1), OURS, CALLABLES, True, 1.0),
    Target("claims, 1 caller", claim(1), OURS, CALLABLES, True, 1.0),
    Target("... alternating call by call", ALTERNATING, OURS, CALLABLES, True, 1.0),
    Target("... against its own statement", ALTERNATING, OURS, OWN, True, None),
    Target("... against no thread", ALTERNATING, OURS, INLINE, True, None),
    Target("... one callable per call against no thread", ALTERNATING, CALLABLES, INLINE, True, None),
    Target("4 processes: slowest against fastest", FAIRNESS, OURS, None, True, 0.5, None, "value"),
    Target("... wait at the 99.9th percentile, ms", WAITS, OURS, None, False, 500, None, "value", "ms"),
    Target("... total against grouped", TOTAL, OURS, GROUPED, True, 1.0),
    Target("... total against one callable per call", TOTAL, OURS, SINGLE, True, 1.0),
)


async def program(options: Options) -> Report:
    folder = disk_folder(options.folder)
    settings = {
        "durability": f"journal_mode WAL, synchronous FULL; files on {file_system(folder)}",
        "rounds": f"{options.rounds} of {options.seconds:g} s per variant, interleaved; medians",
        "steps": f"{STEPS_PER_RUN} per run, ids by new_run_id(), runs made beforehand",
        "processes": f"{PROCESSES}, each with {CALLERS_PER_PROCESS} callers",
    }
    report = Report("sqlite", describe("aiosqlite"), settings)
    with ExitStack() as folders:
        directory = Path(
            folders.enter_context(tempfile.TemporaryDirectory(prefix="flowstore-bench-", dir=folder))
        )
        await _one_process(directory, report, options)
        await _processes(directory, report, options)
    report.judge(TARGETS)
    return report


async def _one_process(directory: Path, report: Report, options: Options) -> None:
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(open_store(store_url(directory / "flowstore.db")))
        transactions = await stack.enter_async_context(transaction_per_call(directory / "transactions.db"))
        callables = await stack.enter_async_context(callable_per_call(directory / "callables.db"))
        own = await stack.enter_async_context(own_claim(directory / "own.db"))
        inline = await stack.enter_async_context(inline_calls(directory / "inline.db"))
        sets = SetBased(directory / "sets.db")
        stack.callback(sets.close)
        records = StoreRecords(store)
        take = partial(measure, report, options)

        def of(work: Callable[..., Awaitable[Any]], callers: int) -> list[Variant]:
            return [
                Variant(OURS, lambda amount: work(store, records, callers, amount)),
                Variant(TRANSACTIONS, lambda amount: work(transactions, transactions, callers, amount)),
                Variant(CALLABLES, lambda amount: work(callables, callables, callers, amount)),
            ]

        if 1 in options.callers:
            contestants = ((store, records), *((one, one) for one in (callables, own, inline)))
            await measure_paired(
                report,
                options,
                ALTERNATING,
                "calls per second",
                (OURS, CALLABLES, OWN, INLINE),
                lambda amount: paired_claims(contestants, amount),
                least=64,
            )
        for callers in options.callers:
            limits = ([Variant(SETS, sets.lifecycles)], [Variant(SETS, sets.claims)])
            if callers == 1:
                limits = (
                    [Variant(INLINE, lambda amount: lifecycles(inline, inline, 1, amount))],
                    [Variant(INLINE, lambda amount: claims(inline, inline, 1, amount))],
                )
            lives = [*of(lifecycles, callers), *limits[0]]
            await take(life(callers), "lifecycles per second", lives, least=max(callers, 32))
            single = [*of(claims, callers), *limits[1]]
            await take(claim(callers), "calls per second", single, least=max(2 * callers, 64))
        if options.claims:
            await watch_rss(report, options, store, 256, options.claims)


async def _processes(directory: Path, report: Report, options: Options) -> None:
    if not options.wants(TOTAL):
        return

    async def several(variant: str, path: Path, amount: int) -> Sample:
        return await _several(variant, path, options.seconds)

    async with open_store(store_url(directory / "shared-flowstore.db")):
        # Migrate once, so that workers do not wait for each other's migrations.
        pass
    variants = [Variant(OURS, partial(several, "flowstore", directory / "shared-flowstore.db"))]
    for name, variant in ((GROUPED, "grouped"), (SINGLE, "single")):
        path = directory / f"shared-{variant}.db"
        sqlite_tables.create(path)
        variants.append(Variant(name, partial(several, variant, path)))
    await measure(report, options, TOTAL, "lifecycles per second", variants, least=1, warm_up=False)
    report.derive(TOTAL, FAIRNESS, "ratio of their rates", "value")
    report.derive(TOTAL, WAITS, "milliseconds", "p999_ms")


async def _several(variant: str, path: Path, seconds: float) -> Sample:
    """Run concurrent processes on one file; ``value`` is the rate of the slowest divided by the fastest."""
    most = int(seconds * MAX_PER_SECOND) + 3 * CALLERS_PER_PROCESS
    arguments = [variant, str(path), str(CALLERS_PER_PROCESS), str(seconds), str(most)]
    workers: list[asyncio.subprocess.Process] = []
    try:
        for _ in range(PROCESSES):
            command = [sys.executable, "-m", "benchmarks.sqlite_worker", *arguments]
            workers.append(await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE))
        for worker in workers:
            assert worker.stdout is not None
            if await worker.stdout.readline() != b"ready\n":
                raise RuntimeError("a worker process failed; see above")
        replies = await asyncio.gather(*(worker.communicate(b"go\n") for worker in workers))
    finally:
        for worker in workers:
            if worker.returncode is None:
                worker.kill()
                await worker.wait()
    found = [json.loads(reply[0]) for reply in replies]
    rates = [one["done"] / one["seconds"] for one in found]
    latencies = [latency for one in found for latency in one["latencies"]]
    done = sum(one["done"] for one in found)
    whole = sample(done, done / sum(rates), latencies)
    return Sample(done, sum(rates), whole.p50_ms, whole.p99_ms, whole.p999_ms, value=min(rates) / max(rates))


if __name__ == "__main__":
    run(parser(str(__doc__), "1,256"), program)
