"""Claims among sleeping runs, with an old snapshot, and of several workers that share a queue."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

from benchmarks.options import Options, say
from benchmarks.queue_stores import (
    Backend,
    QueueStore,
    Worker,
    add_sleeping_runs,
    count_ready,
    start_worker,
    trigger_runs,
)
from benchmarks.queue_worker import CHAIN, LEASE, QUEUES, WORK, execute, request
from benchmarks.results import Measure, Report, Result, Sample, Target
from benchmarks.rounds import Variant, measure
from benchmarks.workload import FLOW, STEPS_PER_RUN, WrongAnswerError, percentile
from flowstore_core import new_run_id

LIMIT = 64
SIZES = (1_000, 100_000, 1_000_000)
SMALLEST = (100, 200, 400)
"""Minimum sizes at any scale."""
CYCLES = 50
"""Claims in one round."""
SLEEPING_LIMIT = 1.2
POLLS_LIMIT = 1.5

SNAPSHOT_RUNS = 1_000
SNAPSHOT_MINUTES = 10.0
CYCLE_SECONDS = 0.1
"""Time of one cycle of the load: in each store LIMIT runs are triggered, claimed and completed."""
WINDOW_SECONDS = 20.0
WINDOWS = 3
"""Windows of a figure."""
RECOVERY_WINDOWS = 3
"""Windows between the end of the snapshot and the figure after it: a minute."""
BEFORE, HELD, AFTER = "before", "with old snapshot", "a minute later"
SNAPSHOT_LIMIT = 2

WORKERS = (2, 4)
COMPETITION_LIMIT = 16
SHORT_LIMIT = 2.0


def sizes(options: Options) -> list[int]:
    return [max(least, int(size * options.scale)) for size, least in zip(SIZES, SMALLEST, strict=True)]


def sleeping_name(backend: str) -> str:
    return f"{backend}, claim_next_steps(limit={LIMIT})"


def snapshot_name(backend: str) -> str:
    return f"{backend}, claim_next_steps(limit={LIMIT}) under load, with an old snapshot"


def short_name(backend: str) -> str:
    return f"{backend}, claims with fewer steps than limit although more were free"


def competition_name(backend: str) -> str:
    return f"{backend}, worker processes on one queue, limit {COMPETITION_LIMIT}"


def throughput_name(backend: str) -> str:
    return f"{backend}, steps claimed and advanced"


def polls_name(backend: str) -> str:
    return f"{backend}, get_stalled_steps and get_runs_to_stop"


def sleeping_targets(backend: str, options: Options) -> list[Target]:
    return _growth_targets(backend, options, sleeping_name(backend), SLEEPING_LIMIT)


def polls_targets(backend: str, options: Options) -> list[Target]:
    return _growth_targets(backend, options, polls_name(backend), POLLS_LIMIT)


def _growth_targets(backend: str, options: Options, name: str, limit: float) -> list[Target]:
    small, middle, large = (f"{size:,} sleeping runs" for size in sizes(options))
    return [
        Target(f"{backend}, {middle}", name, middle, small, False, limit, None, "p50_ms"),
        Target(f"... {large}", name, large, small, False, limit, None, "p50_ms"),
    ]


def snapshot_targets(backend: str) -> list[Target]:
    def at_most(limit: float, title: str, phase: str) -> list[Target]:
        name = snapshot_name(backend)
        other = other_store(phase)
        return [
            Target(title, name, phase, other, False, limit, None, "p50_ms"),
            # Scheduling delays are no part of it, which on a busy machine take most of the time.
            Target("... processor time", name, phase, other, False, limit, None, "value"),
        ]

    return [
        *at_most(SNAPSHOT_LIMIT, f"{backend}, claims, {HELD}", HELD),
        # As without a snapshot, with the tolerance of sleeping runs.
        *at_most(SLEEPING_LIMIT, f"... {AFTER}", AFTER),
    ]


def other_store(phase: str) -> str:
    return f"{phase}: other store"


def competition_targets(backend: str) -> list[Target]:
    def at_most(number: int, title: str) -> Target:
        return Target(
            title, short_name(backend), processes(number), None, False, SHORT_LIMIT, None, "value", "%"
        )

    return [at_most(number, f"{backend}, {number} workers, short claims, %") for number in WORKERS]


def processes(number: int) -> str:
    return "1 process" if number == 1 else f"{number} processes"


class Cost(NamedTuple):
    """The cost of a claim, in seconds."""

    duration: float
    processor_time: float


async def _cycle(at: QueueStore, processor_time: Callable[[], float] = time.process_time) -> Cost:
    """Trigger LIMIT runs, claim their steps and complete them. Returns the cost of the claim."""
    await trigger_runs(at.store, LIMIT, request(WORK))
    used = processor_time()
    began = perf_counter()
    claimed = await at.store.claim_next_steps(QUEUES, lease=LEASE, limit=LIMIT)
    cost = Cost(perf_counter() - began, processor_time() - used)
    if len(claimed) != LIMIT:
        raise WrongAnswerError(f"claimed steps: expected {LIMIT}, found {len(claimed)}")
    await asyncio.gather(*(execute(at.store, step) for step in claimed))
    return cost


def _claim_sample(latencies: Sequence[float]) -> Sample:
    ordered = sorted(latencies)
    p50 = percentile(ordered, 0.5)
    return Sample(len(ordered) * LIMIT, p50_ms=p50, p99_ms=percentile(ordered, 0.99), value=p50)


def _cost_sample(costs: Sequence[Cost]) -> Sample:
    """Latencies, and as the value the median of the processor time in milliseconds."""
    latencies, times = (sorted(one) for one in zip(*costs, strict=True))
    return Sample(
        len(costs) * LIMIT,
        p50_ms=percentile(latencies, 0.5),
        p99_ms=percentile(latencies, 0.99),
        value=percentile(times, 0.5),
    )


async def sleeping(report: Report, options: Options, backend: Backend) -> None:
    if not options.wants(sleeping_name(backend.name)):
        return

    async def cycles(at: QueueStore, amount: int) -> Sample:
        return _claim_sample([(await _cycle(at)).duration for _ in range(amount)])

    async with AsyncExitStack() as stack:
        variants = []
        for size in sizes(options):
            at = await backend.open(stack, f"sleeping_{size}")
            say(f"{backend.name}: making {size:,} sleeping runs")
            await add_sleeping_runs(at, size)
            variants.append(Variant(f"{size:,} sleeping runs", partial(cycles, at)))
        await measure(
            report,
            options,
            sleeping_name(backend.name),
            "milliseconds, median of a round",
            variants,
            least=CYCLES,
            note="One caller; between the claims it triggers and completes the runs that are claimed.",
        )


async def polls(report: Report, options: Options, backend: Backend) -> None:
    name = polls_name(backend.name)
    if not options.wants(name):
        return

    async def poll(at: QueueStore, amount: int) -> Sample:
        latencies = []
        for _ in range(amount):
            # The newest runs have changed since the last call.
            await asyncio.gather(*(at.store.start_run(FLOW, "orders", new_run_id(), "x") for _ in range(4)))
            began = perf_counter()
            if await at.store.get_stalled_steps() or await at.store.get_runs_to_stop():
                raise WrongAnswerError("no step stalls, and no run is to stop")
            latencies.append(perf_counter() - began)
        return _claim_sample(latencies)

    async with AsyncExitStack() as stack:
        variants = []
        for size in sizes(options):
            at = await backend.open(stack, f"polls_{size}")
            say(f"{backend.name}: making {size:,} sleeping runs")
            await add_sleeping_runs(at, size)
            began = perf_counter()
            await at.store.get_stalled_steps()
            say(f"{backend.name}: the first get_stalled_steps took {perf_counter() - began:.1f} s")
            variants.append(Variant(f"{size:,} sleeping runs", partial(poll, at)))
        await measure(
            report,
            options,
            name,
            "milliseconds, median of a round",
            variants,
            least=CYCLES,
            note="Both calls, one after the other. The first get_stalled_steps, which sets the bounds of all "
            "runs, is not in the figures.",
        )


async def snapshot(report: Report, options: Options, backend: Backend) -> None:
    name = snapshot_name(backend.name)
    if not options.wants(name):
        return
    scale = min(1.0, options.scale)
    window = WINDOW_SECONDS * scale
    windows = max(WINDOWS, round(options.given.snapshot_minutes * 60 / window))
    results = []
    cycles = 0

    async with AsyncExitStack() as stack:
        # A snapshot of one database does not keep dead rows of the other.
        stores = [await backend.open(stack, f"snapshot_{one}") for one in ("held", "none")]
        for at in stores:
            await add_sleeping_runs(at, max(SMALLEST[0], int(SNAPSHOT_RUNS * scale)))

        async def load(phase: str) -> list[Sample]:
            """Keep up the load on both stores for a window. Returns a sample of each."""
            nonlocal cycles
            costs: list[list[Cost]] = [[], []]
            clocks = [await at.processor_clock() for at in stores]
            end = perf_counter() + window
            while perf_counter() < end or not costs[0]:
                began = perf_counter()
                cycles += 1
                # Each store goes first in every second cycle.
                for number in (0, 1) if cycles % 2 else (1, 0):
                    costs[number].append(await _cycle(stores[number], clocks[number]))
                await asyncio.sleep(max(0.0, began + CYCLE_SECONDS - perf_counter()))
            found = [_cost_sample(one) for one in costs]
            shown = " and ".join(f"{one.value:.2f} ms (p50 {one.p50_ms:.2f} ms)" for one in found)
            say(f"{name}, {phase}: {shown}")
            return found

        async def take(phase: str) -> None:
            found = [await load(phase) for _ in range(WINDOWS)]
            for title, samples in zip((phase, other_store(phase)), zip(*found, strict=True), strict=True):
                results.append(Result(title, list(samples)))

        await load("warm-up")
        await take(BEFORE)
        cycles = 0
        began = perf_counter()
        async with stores[0].hold_snapshot():
            for _ in range(windows - WINDOWS):
                await load(HELD)
            await take(HELD)
        held_minutes, held_runs = (perf_counter() - began) / 60, cycles * LIMIT
        for _ in range(RECOVERY_WINDOWS):
            await load("after the snapshot")
        await take(AFTER)
    note = (
        f"Two stores in databases of their own have the same load, in alternating cycles. In each, up to "
        f"{LIMIT / CYCLE_SECONDS:,.0f} runs per second are triggered, claimed and completed, "
        f"{held_runs:,} of them while a snapshot of the first database is held for {held_minutes:.3g} "
        f"minutes. Each figure has {WINDOWS} windows of {window:g} s; the snapshot's are its last ones"
    )
    unit = "milliseconds of processor time, of client and server; p50 and p99 are the time of a call"
    report.measures.append(Measure(name, unit, results, note))


async def _drain(at: QueueStore, workers: Sequence[Worker], step_type: str, steps: int) -> Drained:
    """Let the workers claim and advance all steps of new runs."""
    runs = steps if step_type == WORK else -(-steps // STEPS_PER_RUN)
    await trigger_runs(at.store, runs, request(step_type))
    expected = runs if step_type == WORK else runs * STEPS_PER_RUN
    began = time.time()
    replies = await asyncio.gather(*(worker.ask() for worker in workers))
    drained = Drained(began, expected, replies)
    if sum(count for _, _, count in drained.calls) != expected or await count_ready(at.store):
        raise WrongAnswerError("the workers have not claimed each step once")
    left = await at.store.get_queues()
    if any(queue.running or queue.waiting for queue in left):
        raise WrongAnswerError("the workers have not completed each step")
    return drained


class Drained:
    def __init__(self, began: float, steps: int, replies: Sequence[dict[str, Any]]) -> None:
        self.steps = steps
        self.seconds = max(reply["ended"] for reply in replies) - began
        self.calls: list[tuple[float, float, int]] = [tuple(call) for one in replies for call in one["calls"]]

    def short_claims(self, limit: int) -> float:
        """The share of claims, in percent, with fewer steps than limit although more were free.

        The steps of every call that began before the end of a claim count as not free for it. Claims without
        a step count only if they are short.
        """
        counted = short = 0
        for _, ended, count in self.calls:
            taken = sum(other for began, _, other in self.calls if began < ended)
            is_short = count < limit and taken < self.steps
            short += is_short
            counted += is_short or count > 0
        return 100 * short / counted


async def competition(report: Report, options: Options, backend: Backend) -> None:
    name = competition_name(backend.name)
    if not options.wants(name):
        return
    short = Measure(short_name(backend.name), "% of claims")

    async def compete(at: QueueStore, workers: Sequence[Worker], result: Result, amount: int) -> Sample:
        drained = await _drain(at, workers, WORK, amount)
        result.samples.append(Sample(drained.steps, value=drained.short_claims(COMPETITION_LIMIT)))
        return Sample(drained.steps, rate=drained.steps / drained.seconds)

    async with AsyncExitStack() as stack:
        variants = []
        for number in WORKERS:
            at = await backend.open(stack, f"competition_{number}")
            workers = [
                await stack.enter_async_context(start_worker("drain", at, COMPETITION_LIMIT))
                for _ in range(number)
            ]
            result = Result(processes(number))
            short.results.append(result)
            variants.append(Variant(result.variant, partial(compete, at, workers, result)))
        await measure(
            report, options, name, "steps per second", variants, least=COMPETITION_LIMIT * 4 * max(WORKERS)
        )
    for result in short.results:
        del result.samples[0]  # The warm-up.
    report.measures.append(short)


async def throughput(report: Report, options: Options, backend: Backend) -> None:
    name = throughput_name(backend.name)
    if not options.wants(name):
        return

    async def work(at: QueueStore, workers: Sequence[Worker], amount: int) -> Sample:
        drained = await _drain(at, workers, CHAIN, amount)
        return Sample(drained.steps, rate=drained.steps / drained.seconds)

    async with AsyncExitStack() as stack:
        variants = []
        most = max(options.callers)
        for number, concurrency in (*((1, one) for one in options.callers), (2, most)):
            title = f"{processes(number)}, {concurrency} steps at once"
            at = await backend.open(stack, f"throughput_{number}_{concurrency}")
            limit = max(1, concurrency // 2 // number)
            workers = [
                await stack.enter_async_context(start_worker("drain", at, limit)) for _ in range(number)
            ]
            variants.append(Variant(title, partial(work, at, workers)))
        await measure(
            report,
            options,
            name,
            "steps per second",
            variants,
            least=4 * most,
            note=f"Chains of {STEPS_PER_RUN} steps; each process claims and advances two batches at once.",
        )
