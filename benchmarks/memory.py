"""The memory store on one core: lifecycles per second of one caller, and memory over many claims."""

from __future__ import annotations

from time import perf_counter, process_time

from benchmarks.machine import describe
from benchmarks.options import Options, parser, run
from benchmarks.results import Report, Sample, Target
from benchmarks.rounds import Variant, measure
from benchmarks.rss import watch_rss
from benchmarks.workload import (
    INPUT,
    OUTPUT,
    STEPS_PER_RUN,
    Step,
    StoreRecords,
    WrongAnswerError,
    claims,
    lifecycles,
    make_steps,
)
from flowstore_core import FlowStore, StepStatus, open_store

OURS = "flowstore"
UNTIMED = "lifecycle, 1 caller"
PROCESSOR = "... per second of processor time"
TIMED = "lifecycle, callers: {callers:,}, each call timed"
CLAIMS = "try_claim_step, callers: {callers:,}, each call timed"
ROUND_LIMIT = 100_000
"""Maximum lifecycles of a round: each round has a new store, which keeps them all."""
WATCHED_CLAIMS = 500_000

TARGET = Target("lifecycles per second", UNTIMED, OURS, None, True, 150_000, None, "rate", "/s")


async def program(options: Options) -> Report:
    settings = {
        "rounds": f"{options.rounds} of {options.seconds:g} s, each on a fresh store; medians",
        "steps": f"{STEPS_PER_RUN} per run, ids by new_run_id(), runs made beforehand; input is checked",
    }
    report = Report("memory", describe(), settings)
    await measure(report, options, UNTIMED, "lifecycles per second", [Variant(OURS, _untimed)], least=1_000)
    report.derive(UNTIMED, PROCESSOR, "lifecycles per second", "value")
    for callers in options.callers:

        async def timed(amount: int, callers: int = callers) -> Sample:
            async with open_store("memory://") as store:
                return await lifecycles(store, StoreRecords(store), callers, min(amount, ROUND_LIMIT))

        async def claimed(amount: int, callers: int = callers) -> Sample:
            async with open_store("memory://") as store:
                return await claims(store, StoreRecords(store), callers, min(amount, 4 * ROUND_LIMIT))

        name = TIMED.format(callers=callers)
        await measure(report, options, name, "lifecycles per second", [Variant(OURS, timed)], least=1_000)
        name = CLAIMS.format(callers=callers)
        await measure(report, options, name, "calls per second", [Variant(OURS, claimed)], least=1_000)
    report.judge((TARGET,))
    async with open_store("memory://") as store:
        watched = options.claims or max(10_000, int(WATCHED_CLAIMS * options.scale))
        await watch_rss(report, options, store, 1, watched)
    return report


async def _untimed(amount: int) -> Sample:
    """Lifecycles of one caller in sequence, without timing single calls."""
    amount = min(amount, ROUND_LIMIT)
    run_ids, steps = make_steps(amount)
    async with open_store("memory://") as store:
        records = StoreRecords(store)
        await records.add_runs(run_ids)
        began, began_cpu = perf_counter(), process_time()
        await _lifecycles(store, steps)
        seconds, cpu = perf_counter() - began, process_time() - began_cpu
        found = await records.count_completed(run_ids)
    if found != amount:
        raise WrongAnswerError(f"completed steps: expected {amount}, found {found}")
    # Per second of processor time, unaffected by other processes.
    return Sample(amount, rate=amount / seconds, value=amount / cpu)


async def _lifecycles(store: FlowStore, steps: list[Step]) -> None:
    for run_id, step_key in steps:
        await store.try_record_dispatch(run_id, step_key)
        await store.annotate_dispatch(run_id, step_key, "job-4711")
        await store.try_claim_step(run_id, step_key)
        attempt = await store.record_step_start(run_id, step_key, "task", input_json=INPUT)
        await store.record_step_complete(
            run_id, step_key, StepStatus.SUCCEEDED, output_json=OUTPUT, attempt=attempt
        )


if __name__ == "__main__":
    run(parser(str(__doc__), "1"), program)
