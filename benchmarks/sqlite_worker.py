"""One of several processes on one SQLite file: executes lifecycles for some seconds.

The protocol with benchmarks.sqlite consists of lines: print "ready", wait for a line, work, print the
figures.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from time import perf_counter

from benchmarks.baselines.sqlite_callables import callable_per_call
from benchmarks.workload import (
    Records,
    StepCalls,
    StoreRecords,
    WrongAnswerError,
    lifecycles_until,
    make_steps,
    store_url,
)
from flowstore_core import open_store


async def work(calls: StepCalls, records: Records, callers: int, seconds: float, most: int) -> None:
    run_ids, steps = make_steps(most)
    await records.add_runs(run_ids)
    # Warm up: the first calls load modules and prepare statements.
    source = iter(steps)
    latencies: list[float] = []
    warm = await lifecycles_until(calls, source, latencies, callers, lambda: True)
    latencies.clear()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.readline)
    began = perf_counter()
    done = await lifecycles_until(
        calls, source, latencies, callers, lambda: perf_counter() >= began + seconds
    )
    took = perf_counter() - began
    found = await records.count_completed(run_ids)
    if found != warm + done:
        raise WrongAnswerError(f"completed steps: expected {warm + done}, found {found}")
    if next(source, None) is None:
        raise WrongAnswerError("too few prepared steps for the duration")
    sys.stdout.write(json.dumps({"done": done, "seconds": took, "latencies": latencies}) + "\n")


async def main(variant: str, path: Path, callers: int, seconds: float, most: int) -> None:
    if variant == "flowstore":
        async with open_store(store_url(path)) as store:
            await work(store, StoreRecords(store), callers, seconds, most)
    else:
        async with callable_per_call(path, grouped=variant == "grouped", create=False) as baseline:
            await work(baseline, baseline, callers, seconds, most)


if __name__ == "__main__":
    _, chosen, file, number, time, limit = sys.argv
    asyncio.run(main(chosen, Path(file), int(number), float(time), int(limit)))
