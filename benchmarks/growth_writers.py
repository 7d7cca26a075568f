"""Writers during a cleanup, and during a manual DELETE of as many runs as the lower limit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from time import perf_counter

from benchmarks.growth_stores import Namespace
from benchmarks.results import Sample
from benchmarks.workload import Step, lifecycles_until, make_steps, sample

WRITERS = 16
STEPS_PER_WRITER = 800
"""Prepared steps; enough for the duration of a cleanup."""
CLEANED = 1_000


async def writers_beside_cleanup(
    at: Namespace, seconds: float, scale: float, amount: int
) -> tuple[Sample, Sample, Sample]:
    """Measure writers alone, during a cleanup, and during manual deletes."""
    steps = [await _prepare(at, scale) for _ in range(3)]
    began = perf_counter()
    alone = await _write(at, steps[0], lambda: perf_counter() > began + seconds)
    runs = min(CLEANED, at.runs // 40)

    async def delete_by_hand() -> None:
        await at.delete_by_hand(runs)
        at.cleaned += runs

    beside = []
    for source, work in ((steps[1], at.clean(runs)), (steps[2], delete_by_hand())):
        deleting = asyncio.ensure_future(work)
        beside.append(await _write(at, source, deleting.done))
        await deleting
    return alone, beside[0], beside[1]


async def _prepare(at: Namespace, scale: float) -> Iterator[Step]:
    run_ids, steps = make_steps(max(20, int(STEPS_PER_WRITER * min(1.0, scale))) * WRITERS)
    await at.records.add_runs(run_ids)
    return iter(steps)


async def _write(at: Namespace, source: Iterator[Step], stop: Callable[[], bool]) -> Sample:
    latencies: list[float] = []
    began = perf_counter()
    done = await lifecycles_until(at.store, source, latencies, WRITERS, stop)
    return sample(done, perf_counter() - began, latencies)
