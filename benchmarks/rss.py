"""Process memory over many claims, to detect leaks."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from time import perf_counter

from benchmarks.options import Options, say
from benchmarks.results import Measure, Report, Result, Sample, Target
from benchmarks.workload import FLOW, Step, WrongAnswerError
from flowstore_core import FlowStore, RunStatus, new_run_id

STEPS_PER_RUN = 500
CHUNK = 50_000
"""Number of claims between two readings of the process memory; their runs are then cleaned up."""
MIB = 1024 * 1024

NAME = "memory of the process over {claims:,} claims"


async def watch_rss(report: Report, options: Options, store: FlowStore, callers: int, claims: int) -> None:
    """Claim steps in chunks, clean up after each, and measure the growth of memory."""
    name = NAME.format(claims=claims)
    if not options.wants(name):
        return
    readings: list[float] = []
    began = perf_counter()
    for done in range(0, claims, CHUNK):
        await _chunk(store, callers, min(CHUNK, claims - done))
        gc.collect()
        readings.append(_rss() / MIB)
        say(f"{name}: {done + CHUNK:,} claims, {readings[-1]:.1f} MiB, {perf_counter() - began:.0f} s")
    # Skip the first chunks, which fill caches and pools.
    settled = readings[len(readings) // 10 :]
    half = len(settled) // 2
    early, late = settled[:half] or settled, settled[half:] or settled
    samples = [Sample(CHUNK, value=reading) for reading in settled]
    report.measures.append(Measure(name, "MiB, resident", [Result("flowstore", samples)]))
    growth = Measure("growth of the process's memory", "second half against the first", [Result("flowstore")])
    growth.results[0].samples.append(Sample(claims, value=median(late) / median(early)))
    report.measures.append(growth)
    target = Target(
        "memory, second half of the claims", growth.name, "flowstore", None, False, 1.05, 1.01, "value"
    )
    report.judge((target,))


async def _chunk(store: FlowStore, callers: int, claims: int) -> None:
    run_ids = [new_run_id() for _ in range(-(-claims // STEPS_PER_RUN))]
    for run_id in run_ids:
        await store.start_run(FLOW, "bench", run_id, "manual")
    steps = iter(
        [(run_id, f"step-{number}") for run_id in run_ids for number in range(STEPS_PER_RUN)][:claims]
    )
    won = await asyncio.gather(*(_claim(store, steps) for _ in range(callers)))
    if sum(won) != claims:
        raise WrongAnswerError(f"claims won: expected {claims}, found {sum(won)}")
    for run_id in run_ids:
        await store.complete_run(run_id, RunStatus.SUCCEEDED)
    removed = await store.cleanup(datetime.now(UTC) + timedelta(days=1))
    if removed != len(run_ids):
        raise WrongAnswerError(f"runs cleaned up: expected {len(run_ids)}, found {removed}")


async def _claim(store: FlowStore, steps: Iterator[Step]) -> int:
    won = 0
    for run_id, step_key in steps:
        won += await store.try_claim_step(run_id, step_key)
    return won


def _rss() -> int:
    """Resident memory of this process in bytes."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
