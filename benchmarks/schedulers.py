"""PostgreSQL: the schedulers of a store compared with variants in which operations share one scheduler."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

from benchmarks.cluster import cluster
from benchmarks.machine import describe, disk_folder, file_system
from benchmarks.options import Options, parser, run
from benchmarks.results import Report, Sample, Target
from benchmarks.rounds import Variant, measure
from benchmarks.workload import FLOW, StoreRecords, make_steps, sample
from flowstore_core import FlowStore, RunStatus, StepStatus, new_run_id, open_store
from flowstore_core.batching import Batcher
from flowstore_postgres import store as store_module
from flowstore_postgres.database import Database

OURS = "flowstore"
ONE = "one scheduler for all"
TWO = "one for writes, one for the rest"
STEPS = 4
"""Steps of each run that is read."""


def _share(database: Any, batcher: Batcher) -> None:
    """Use one scheduler for completions of runs and shared reads."""
    completer = database.run_completer
    completer._batcher = database.shared_reads._batcher = batcher
    completer._operation = batcher.operation("complete_run", completer._run, keyed=True)


class _OneScheduler(Database):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        _share(self, self._batch_writer._batcher)


class _TwoSchedulers(Database):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        _share(self, self.shared_reads._batcher)


@asynccontextmanager
async def _open(url: str, database: type[Database]) -> AsyncIterator[FlowStore]:
    with patch.object(store_module, "Database", database):
        opened = open_store(url)
        store = await opened.__aenter__()
    try:
        yield store
    finally:
        await opened.__aexit__(None, None, None)


async def claims_beside_runs(store: FlowStore, callers: int, amount: int) -> Sample:
    """Claims, while as many callers start, read and complete runs."""
    run_ids, steps = make_steps(amount)
    await StoreRecords(store).add_runs(run_ids)
    source = iter(steps)

    async def claim() -> None:
        for run_id, step_key in source:
            began = perf_counter()
            assert await store.try_claim_step(run_id, step_key)
            latencies.append(perf_counter() - began)

    async def drive_runs() -> None:
        while len(latencies) < amount:
            run_id = new_run_id()
            await store.start_run(FLOW, "bench", run_id, "manual")
            statuses = await store.get_step_statuses(run_id)
            assert await store.complete_run(run_id, RunStatus.SUCCEEDED, expected=statuses)

    latencies: list[float] = []
    return await _timed(claim, drive_runs, callers, latencies)


async def reads_beside_completions(store: FlowStore, callers: int, amount: int) -> Sample:
    """Reads of runs, while as many callers complete runs."""
    read, ended = [new_run_id() for _ in range(8)], [new_run_id() for _ in range(amount)]
    await StoreRecords(store).add_runs([*read, *ended])
    for run_id in read:
        for number in range(STEPS):
            await store.record_skipped_step(run_id, f"step-{number}", "task")
    source, numbers = iter(ended), iter(range(amount))

    async def read_statuses() -> None:
        for number in numbers:
            began = perf_counter()
            statuses = await store.get_step_statuses(read[number % len(read)])
            latencies.append(perf_counter() - began)
            assert list(statuses.values()) == [StepStatus.SKIPPED] * STEPS

    async def complete() -> None:
        while len(latencies) < amount and (run_id := next(source, None)):
            assert await store.complete_run(run_id, RunStatus.SUCCEEDED, expected={})

    latencies: list[float] = []
    return await _timed(read_statuses, complete, callers, latencies)


async def _timed(
    measured: Callable[[], Awaitable[None]],
    beside: Callable[[], Awaitable[None]],
    callers: int,
    latencies: list[float],
) -> Sample:
    others = [asyncio.ensure_future(beside()) for _ in range(callers)]
    began = perf_counter()
    await asyncio.gather(*(measured() for _ in range(callers)))
    seconds = perf_counter() - began
    await asyncio.gather(*others)
    return sample(len(latencies), seconds, latencies)


WORKLOADS = {
    "claims beside whole runs": claims_beside_runs,
    "reads beside completions": reads_beside_completions,
}


async def program(options: Options) -> Report:
    folder = disk_folder(options.folder)
    settings = {
        "durability": f"PostgreSQL's own defaults, fsync on; data on {file_system(folder)}",
        "rounds": f"{options.rounds} of {options.seconds:g} s per variant, interleaved; medians",
    }
    report = Report("schedulers", describe("asyncpg"), settings)
    targets = []
    async with AsyncExitStack() as stack:
        data = stack.enter_context(tempfile.TemporaryDirectory(prefix="flowstore-bench-", dir=folder))
        url = await stack.enter_async_context(cluster(Path(data)))
        databases = {OURS: Database, ONE: _OneScheduler, TWO: _TwoSchedulers}
        stores = {
            name: await stack.enter_async_context(_open(url, database))
            for name, database in databases.items()
        }
        for callers in options.callers:
            for title, work in WORKLOADS.items():

                def variant(name: str, work: Any = work, callers: int = callers) -> Variant:
                    return Variant(name, lambda amount: work(stores[name], callers, amount))

                name = f"{title}, {callers} callers each"
                variants = [variant(one) for one in databases]
                await measure(report, options, name, "calls per second", variants, least=8 * callers)
                targets += [
                    Target(f"{title}, {callers}: {other}", name, other, OURS, True, None)
                    for other in (ONE, TWO)
                ]
    report.judge(targets)
    return report


if __name__ == "__main__":
    run(parser(str(__doc__), "64"), program)
