"""PostgreSQL: calls per second and latencies, compared with common techniques of engines."""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg

from benchmarks.baselines.postgres_checked import checked_claim
from benchmarks.baselines.postgres_grouped import grouped_callers
from benchmarks.baselines.postgres_insert import prepared_insert
from benchmarks.baselines.postgres_own import own_claim
from benchmarks.baselines.postgres_sets import set_based
from benchmarks.baselines.postgres_statements import statement_per_call
from benchmarks.baselines.postgres_transactions import transaction_per_call
from benchmarks.cluster import cluster
from benchmarks.machine import describe, disk_folder, file_system
from benchmarks.options import Options, parser, run, say
from benchmarks.results import Report, Target
from benchmarks.rounds import Variant, measure, measure_paired
from benchmarks.rss import watch_rss
from benchmarks.workload import STEPS_PER_RUN, StoreRecords, claims, lifecycles, paired_claims
from flowstore_core import open_store

POOLS = (10, 20)
"""Candidate pool sizes of the baselines; the faster one is used."""
POOL_TRIALS = 3
CLAIMANTS = 8

OURS = "flowstore"
TRANSACTIONS = "a transaction per call"
STATEMENTS = "one statement per call"
SETS = "limit: set-based, four tables, no callers"
SETS_ONE_ROW = "limit: set-based, one row a step, no callers"
PAIRED = "try_claim_step, 1 caller, alternating with a bare INSERT"
PREPARED = "bare prepared INSERT, held connection"
CHECKED = "limit: prepared claim with the contract's checks, held connection"
OWN = "limit: flowstore's own statement, prepared, held connection"
GROUPED = "limit: callers that are grouped, and nothing else"


def targets(callers: tuple[int, ...]) -> list[Target]:
    """The targets for these numbers of callers."""
    known = [
        Target("lifecycle, 256 callers", life(256), OURS, TRANSACTIONS, True, 12, 15),
        Target("... against set-based, four tables", life(256), OURS, SETS, True, 0.6, 0.7),
        Target("... against set-based, one row a step", life(256), OURS, SETS_ONE_ROW, True, 0.6, 0.7),
        Target("... against callers that are grouped", life(256), OURS, GROUPED, True, 0.6, 0.7),
        Target("... such callers against set-based, four tables", life(256), GROUPED, SETS, True, None),
        Target("... p99 of a call", life(256), OURS, TRANSACTIONS, False, 1 / 15, None, "p99_ms"),
        Target("lifecycle, 1,024 callers", life(1024), OURS, TRANSACTIONS, True, 16, 20),
        Target("... against callers that are grouped", life(1024), OURS, GROUPED, True, 0.6, 0.7),
        Target("lifecycle, 1 caller", life(1), OURS, TRANSACTIONS, True, 1.7),
        Target("claims, 256 callers", claim(256), OURS, TRANSACTIONS, True, 10),
        Target("... against callers that are grouped", claim(256), OURS, GROUPED, True, None),
        Target("contended claims, 256 callers", contended(256), OURS, TRANSACTIONS, True, 12),
        Target("... against callers that are grouped", contended(256), OURS, GROUPED, True, None),
        Target("latency of a single claim", PAIRED, OURS, PREPARED, False, 1.1, 1.05, "p50_ms"),
        Target("... against a claim with its checks", PAIRED, OURS, CHECKED, False, 1.1, 1.05, "p50_ms"),
        Target("... against its own statement", PAIRED, OURS, OWN, False, 1.1, 1.05, "p50_ms"),
    ]
    names = {of(number) for of in (life, claim, contended) for number in callers} | {PAIRED}
    return [target for target in known if target.measure in names]


def life(callers: int) -> str:
    return f"lifecycle, {_callers(callers)}"


def claim(callers: int) -> str:
    return f"try_claim_step, all keys different, {_callers(callers)}"


def contended(callers: int) -> str:
    return f"try_claim_step, {CLAIMANTS} claimants per key, {_callers(callers)}"


def _callers(number: int) -> str:
    return "1 caller" if number == 1 else f"{number:,} callers"


async def program(options: Options) -> Report:
    folder = disk_folder(options.folder)
    async with AsyncExitStack() as stack:
        data = stack.enter_context(tempfile.TemporaryDirectory(prefix="flowstore-bench-", dir=folder))
        url = await stack.enter_async_context(cluster(Path(data)))
        server = await asyncpg.connect(url)
        stack.push_async_callback(server.close)
        report = await _report(server, options, folder)
        await _measure(stack, url, server, report, options)
    report.judge(targets(options.callers))
    return report


async def _report(server: Any, options: Options, folder: Path) -> Report:
    async def show(setting: str) -> str:
        return str(await server.fetchval(f"SHOW {setting}"))

    machine = {"PostgreSQL": (await show("server_version")).partition(" ")[0]}
    machine |= describe("asyncpg")
    durability = [
        f"{name} {await show(name)}" for name in ("fsync", "synchronous_commit", "full_page_writes")
    ]
    settings = {
        "durability": ", ".join(durability) + f"; data on {file_system(folder)}",
        "rounds": f"{options.rounds} of {options.seconds:g} s per variant, interleaved; medians",
        "steps": f"{STEPS_PER_RUN} per run, ids by new_run_id(), runs made beforehand",
    }
    return Report("postgres", machine, settings)


async def _best_pool(url: str, options: Options) -> int:
    """The pool size with which a transaction per call is faster."""
    callers = max(options.callers)
    amount = max(callers, int(300 * options.seconds))
    rates = dict.fromkeys(POOLS, 0.0)
    for trial in range(POOL_TRIALS):
        for size in POOLS:
            async with transaction_per_call(url, size, f"trial_{size}_{trial}") as baseline:
                found = await lifecycles(baseline, baseline, callers, amount)
                rates[size] += (found.rate or 0.0) / POOL_TRIALS
    say(", ".join(f"a pool of {size}: {rate:,.0f} lifecycles per second" for size, rate in rates.items()))
    return max(POOLS, key=lambda size: rates[size])


async def _measure(stack: AsyncExitStack, url: str, server: Any, report: Report, options: Options) -> None:
    pool = await _best_pool(url, options)
    report.settings = {
        **report.settings,
        "pools": f"baselines {pool} connections, the better of {POOLS}; flowstore its default",
    }
    store = await stack.enter_async_context(open_store(url))
    transactions = await stack.enter_async_context(transaction_per_call(url, pool))
    statements = await stack.enter_async_context(statement_per_call(url, pool))
    sets = await stack.enter_async_context(set_based(url, one_row=False))
    sets_one_row = await stack.enter_async_context(set_based(url, one_row=True))
    grouped = await stack.enter_async_context(grouped_callers(url))
    prepared = await stack.enter_async_context(prepared_insert(url))
    checked = await stack.enter_async_context(checked_claim(url))
    own = await stack.enter_async_context(own_claim(url))
    records = StoreRecords(store)

    async def settle() -> None:
        # A checkpoint caused by one variant must not slow down another.
        await server.execute("CHECKPOINT")

    take = partial(measure, report, options, settle=settle)

    def of(work: Callable[..., Awaitable[Any]], callers: int, **more: int) -> list[Variant]:
        """The three stores with the same workload."""
        return [
            Variant(OURS, lambda amount: work(store, records, callers, amount, **more)),
            Variant(TRANSACTIONS, lambda amount: work(transactions, transactions, callers, amount, **more)),
            Variant(STATEMENTS, lambda amount: work(statements, statements, callers, amount, **more)),
        ]

    def with_limit(work: Callable[..., Awaitable[Any]], callers: int, **more: int) -> list[Variant]:
        limit = Variant(GROUPED, lambda amount: work(grouped, grouped, callers, amount, **more))
        return [*of(work, callers, **more), limit] if callers > 1 else of(work, callers, **more)

    await measure_paired(
        report,
        options,
        PAIRED,
        "calls per second",
        (OURS, PREPARED, CHECKED, OWN),
        lambda amount: paired_claims(
            ((store, records), (prepared, prepared), (checked, checked), (own, own)), amount
        ),
        least=256,
    )
    for callers in options.callers:
        variants = with_limit(lifecycles, callers)
        if callers > 1:
            variants.append(Variant(SETS, sets.lifecycles))
            variants.append(Variant(SETS_ONE_ROW, sets_one_row.lifecycles))
        await take(life(callers), "lifecycles per second", variants, least=max(2 * callers, 64))
        await take(
            claim(callers), "calls per second", with_limit(claims, callers), least=max(4 * callers, 256)
        )
        if callers >= CLAIMANTS:
            variants = with_limit(claims, callers, claimants=CLAIMANTS)
            await take(contended(callers), "calls per second", variants, least=4 * callers)
    if options.claims:
        await watch_rss(report, options, store, 256, options.claims)


if __name__ == "__main__":
    run(parser(str(__doc__), "1,256,1024"), program)
