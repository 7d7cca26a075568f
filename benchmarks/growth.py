"""Cost of the stores' operations with 10,000, 100,000 and 1,000,000 completed runs."""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from time import perf_counter
from uuid import uuid4

from benchmarks.cluster import cluster
from benchmarks.copies import (
    FLOWS,
    RARE,
    RARE_RUNS,
    TAGS,
    Copy,
    make_models,
    plan,
    utc_now,
)
from benchmarks.growth_bytes import postgres_bytes, sqlite_bytes
from benchmarks.growth_stores import Namespace, Open, open_postgres, open_sqlite
from benchmarks.growth_writers import CLEANED, WRITERS, writers_beside_cleanup
from benchmarks.machine import describe, disk_folder, file_system
from benchmarks.options import Options, parser, run, say
from benchmarks.results import Report, Sample, Target
from benchmarks.rounds import Variant, measure, measure_paired
from benchmarks.workload import (
    WrongAnswerError,
    lifecycles,
    sample,
)
from flowstore_core import (
    FlowRunDetail,
    FlowStore,
    RunStatus,
    RunTimeseriesGranularity,
    new_run_id,
)

SIZES = (10_000, 100_000, 1_000_000)
SMALLEST = (200, 400, 800)
"""Minimum sizes at any scale."""
PAGE = 50
DEEP = 100_000
RANDOM_IDS = "{size:,} runs, ids by uuid4()"

Call = Callable[[], Awaitable[None]]


def sizes(options: Options) -> list[int]:
    return [max(least, int(size * options.scale)) for size, least in zip(SIZES, SMALLEST, strict=True)]


def targets(backend: str, options: Options) -> list[Target]:
    small, _, large = (f"{size:,} runs" for size in sizes(options))

    def slower(name: str, call: str, most: float) -> Target:
        return Target(name, f"{backend}, {call}", large, small, False, most, None, "p50_ms")

    def within(name: str, call: str, most: float, aim: float | None = None) -> Target:
        return Target(name, f"{backend}, {call}", large, None, False, most, aim, "p50_ms", "ms")

    return [
        Target(f"{backend}, lifecycle's time", f"{backend}, lifecycle", small, large, False, 1.3),
        within("... statistics, ms", "statistics", 2),
        slower("... first page", "first page", 1.5),
        slower("... deep page by position", "deep page", 1.5),
        within("... page with exact count, ms", "page with exact count", 20),
        within("... page of a status with count, ms", "page of a status with exact count", 20),
        within("... search, ms", "search", 25),
        within("... 30-day timeseries, ms", "30-day timeseries", 100, 25),
        slower("... cleanup", "cleanup", 1.5),
        Target(
            "... writers' p99 during cleanup",
            f"{backend}, writers and cleanup",
            "during cleanup",
            "without",
            False,
            2,
            None,
            "p99_ms",
        ),
        Target(
            "... against DELETE by hand",
            f"{backend}, writers and cleanup",
            "during cleanup",
            "during DELETE by hand",
            False,
            1,
            None,
            "p99_ms",
        ),
    ]


async def program(options: Options) -> Report:
    folder = disk_folder(options.folder)
    settings = {
        "durability": f"as in the other programs; data on {file_system(folder)}",
        "rounds": f"{options.rounds} of {options.seconds:g} s per variant, interleaved; medians",
        "stored runs": f"completed, of 3 steps, of {FLOWS} flows, over 90 days, 90 % succeeded",
        "lifecycles": f"{max(options.callers)} callers, 8 steps per run",
    }
    report = Report("growth", describe("asyncpg", "aiosqlite"), settings)
    async with AsyncExitStack() as stack:
        directory = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="flowstore-bench-", dir=folder))
        )
        if options.wants_backend("PostgreSQL"):
            url = await stack.enter_async_context(cluster(directory))
            await _backend(report, options, "PostgreSQL", partial(open_postgres, url))
            await postgres_bytes(report, options, url)
        if options.wants_backend("SQLite"):
            await _backend(report, options, "SQLite", partial(open_sqlite, directory))
            await sqlite_bytes(report, options, directory)
    for backend in ("PostgreSQL", "SQLite"):
        report.judge(targets(backend, options))
    return report


async def _check_copies(store: FlowStore, copies: Sequence[Copy]) -> None:
    """Check through the store that one copy of each model equals its model."""

    def shape(detail: FlowRunDetail) -> list[object]:
        steps = [(one.step_key, one.status, one.attempt_count, one.output_json) for one in detail.steps]
        return [detail.status, detail.trigger_key, *steps]

    for copy in {one.model.run_id: one for one in copies}.values():
        found = await store.get_run_detail(copy.run_id)
        if (
            found is None
            or shape(found) != shape(copy.model)
            or (found.started_at, found.completed_at) != (copy.started_at, copy.completed_at)
        ):
            raise WrongAnswerError("a copied run differs from its model")


async def _backend(report: Report, options: Options, backend: str, opener: Open) -> None:
    async with AsyncExitStack() as stack:
        namespaces = [await _namespace(stack, backend, opener, size) for size in sizes(options)]
        randomly = []
        if options.wants(f"{backend}, lifecycle"):
            largest = max(sizes(options))
            randomly.append(await _namespace(stack, backend, opener, largest, random_ids=True))
        await _measure(report, options, backend, namespaces, randomly)


async def _namespace(
    stack: AsyncExitStack, backend: str, opener: Open, size: int, *, random_ids: bool = False
) -> Namespace:
    """A store with ``size`` completed runs, verified through the store."""
    say(f"{backend}: making {size:,} runs{' with random ids' if random_ids else ''}")
    store, copy, migrate, delete_by_hand = await opener(
        stack, f"runs_{size}{'_random' if random_ids else ''}"
    )
    models = await make_models(store)
    copies = plan(models, size - len(models), random_ids=random_ids, now=utc_now())
    await copy(copies)
    await migrate()
    await _check_copies(store, copies)
    page = await store.get_runs_page(take=1)
    rare = await store.get_runs_page(search=RARE)
    if page.total_count != size or rare.total_count != RARE_RUNS + 1:
        raise WrongAnswerError(f"{page.total_count} runs instead of {size}, {rare.total_count} rare ones")
    ends = sorted([one.completed_at for one in copies])
    depth = min(DEEP, size // 2)
    last = (await store.get_runs(skip=depth - 1, take=1))[0]
    name = RANDOM_IDS.format(size=size) if random_ids else f"{size:,} runs"
    return Namespace(
        name,
        store,
        size,
        ends,
        last.position,
        delete_by_hand,
        uuid4 if random_ids else new_run_id,
        random_ids=random_ids,
    )


async def _measure(
    report: Report,
    options: Options,
    backend: str,
    namespaces: Sequence[Namespace],
    randomly: Sequence[Namespace],
) -> None:
    callers = max(options.callers)

    def life(at: Namespace) -> Variant:
        return Variant(at.name, lambda amount: lifecycles(at.store, at.records, callers, amount, at.new_id))

    # Reads come first: the lifecycles leave Running runs.
    for name, call in CALLS:
        variants = [Variant(at.name, partial(_repeat, partial(call, at))) for at in namespaces]
        await measure(report, options, f"{backend}, {name}", "calls per second", variants, least=1)

    await measure(
        report,
        options,
        f"{backend}, lifecycle",
        "lifecycles per second",
        [life(at) for at in (*namespaces, *randomly)],
        least=4 * callers,
    )
    cleaned = max(1, min(CLEANED, namespaces[0].runs * 9 // 10 // (options.rounds + 1)))

    async def clean(at: Namespace, amount: int) -> Sample:
        seconds = await at.clean(cleaned)
        return Sample(cleaned, rate=cleaned / seconds, p50_ms=seconds * 1000)

    await measure(
        report,
        options,
        f"{backend}, cleanup",
        "runs per second",
        [Variant(at.name, partial(clean, at)) for at in namespaces],
        least=1,
        note=f"A call deletes {cleaned:,} runs; p50 is its time.",
    )
    await measure_paired(
        report,
        options,
        f"{backend}, writers and cleanup",
        "lifecycles per second",
        ("without", "during cleanup", "during DELETE by hand"),
        partial(writers_beside_cleanup, namespaces[-1], options.seconds, options.scale),
        least=1,
        note=f"{WRITERS} writers among {namespaces[-1].name}",
    )


async def _statistics(at: Namespace) -> None:
    found = await at.store.get_statistics()
    _expect(found.total_flows > 1, "several flows")


async def _first_page(at: Namespace) -> None:
    _expect(len(await at.store.get_runs(take=PAGE)) == PAGE, "a full page")


async def _deep_page(at: Namespace) -> None:
    _expect(len(await at.store.get_runs(after=at.after, take=PAGE)) == PAGE, "a full page")


async def _counted_page(at: Namespace) -> None:
    page = await at.store.get_runs_page(take=PAGE)
    _expect(page.total_count >= at.runs, "all runs")


async def _status_page(at: Namespace) -> None:
    page = await at.store.get_runs_page(status=RunStatus.SUCCEEDED, take=PAGE)
    _expect(at.runs // 2 < page.total_count < at.runs, "the succeeded runs")


async def _search(at: Namespace) -> None:
    page = await at.store.get_runs_page(search=RARE, take=PAGE)
    _expect(page.total_count == RARE_RUNS + 1, "the runs with the rare word")


async def _tagged_page(at: Namespace) -> None:
    found = await at.store.get_runs(tags=TAGS, take=PAGE)
    _expect(0 < len(found) == len([run for run in found if run.tags == tuple(TAGS.items())]), "tagged runs")


async def _rare_tag(at: Namespace) -> None:
    page = await at.store.get_runs_page(tags={"word": RARE}, take=PAGE)
    _expect(page.total_count == RARE_RUNS + 1, "the runs with the rare tag")


async def _timeseries(at: Namespace) -> None:
    now = utc_now()
    found = await at.store.get_run_timeseries(RunTimeseriesGranularity.DAY, now - timedelta(days=30), now)
    _expect(sum(bucket.total for bucket in found) > at.runs // 6, "a third of the runs")


CALLS: tuple[tuple[str, Callable[[Namespace], Awaitable[None]]], ...] = (
    ("statistics", _statistics),
    ("first page", _first_page),
    ("deep page", _deep_page),
    ("page with exact count", _counted_page),
    ("page of a status with exact count", _status_page),
    ("search", _search),
    ("first page by tag", _tagged_page),
    ("page by a rare tag with exact count", _rare_tag),
    ("30-day timeseries", _timeseries),
)


def _expect(true: bool, what: str) -> None:
    if not true:
        raise WrongAnswerError(f"the result does not contain {what}")


async def _repeat(call: Call, amount: int) -> Sample:
    """One caller with sequential calls; each result is verified."""
    latencies = []
    began = perf_counter()
    for _ in range(amount):
        start = perf_counter()
        await call()
        latencies.append(perf_counter() - start)
    return sample(amount, perf_counter() - began, latencies)


if __name__ == "__main__":
    run(parser(str(__doc__), "256"), program)
