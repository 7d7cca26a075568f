"""Waiting workers: how soon a worker in another process starts, and what it costs while it waits."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from functools import partial
from uuid import UUID

from benchmarks.options import Options, say
from benchmarks.queue_stores import Backend, QueueStore, Worker, start_worker, trigger, trigger_runs
from benchmarks.queue_worker import SIGNAL, WAIT_FOR_SIGNAL, WORK, request
from benchmarks.results import Measure, Report, Result, Sample, Statistic, Target
from benchmarks.rounds import Variant, measure
from benchmarks.workload import WrongAnswerError, percentile
from flowstore_core import SignalDeliveryStatus

TRIGGERED = "trigger_run to start of work"
SIGNALLED = "deliver_signal to start of work"
SLEPT = "due time to start of work"
REACTIONS = 100
"""Reactions in one round."""
IDLE_SECONDS = 0.03, 0.13
"""Bounds of the random pause before each trigger and signal; a fixed one might be in step with polls."""
FIRST_DUE = 1.0
DUE_EVERY = 0.05

OBSERVED_SECONDS = 5.0
LIMITS_MS = {"PostgreSQL": (5, 25), "SQLite": (25, 50)}
"""p50 and p99 of the reactions to triggers and signals."""
SLEEP_LIMIT_MS = 20
CPU_LIMIT = 0.5

OURS = "flowstore"


def latency_name(backend: str) -> str:
    return f"{backend}, latency of an idle worker in another process"


def cpu_name(backend: str) -> str:
    return f"{backend}, processor time of a waiting worker"


def queries_name(backend: str) -> str:
    return f"{backend}, sessions with a query in {OBSERVED_SECONDS:g} s of waiting"


def latency_targets(backend: str) -> list[Target]:
    def within(name: str, variant: str, statistic: Statistic, most: float) -> Target:
        return Target(name, latency_name(backend), variant, None, False, most, None, statistic, unit="ms")

    p50, p99 = LIMITS_MS[backend]
    return [
        within(f"{backend}, trigger to start, p50 ms", TRIGGERED, "p50_ms", p50),
        within("... p99 ms", TRIGGERED, "p99_ms", p99),
        within("... signal to start, p50 ms", SIGNALLED, "p50_ms", p50),
        within("... p99 ms", SIGNALLED, "p99_ms", p99),
        within("... due time to start, p99 ms", SLEPT, "p99_ms", SLEEP_LIMIT_MS),
    ]


def idle_targets(backend: str) -> list[Target]:
    def at_most(name: str, measured: str, most: float, unit: str) -> Target:
        return Target(name, measured, OURS, None, False, most, None, "value", unit)

    targets = [at_most(f"{backend}, waiting worker, % of a core", cpu_name(backend), CPU_LIMIT, "%")]
    if backend == "PostgreSQL":
        targets.append(at_most("... sessions with a query", queries_name(backend), 0, ""))
    return targets


async def latency(report: Report, options: Options, backend: Backend) -> None:
    async with AsyncExitStack() as stack:
        at = await backend.open(stack, "latency")
        worker = await stack.enter_async_context(start_worker("react", at))
        await measure(
            report,
            options,
            latency_name(backend.name),
            "milliseconds, median of a round",
            [
                Variant(TRIGGERED, partial(_one_by_one, partial(_react_to_trigger, at, worker))),
                Variant(SIGNALLED, partial(_one_by_one, partial(_react_to_signal, at, worker))),
                Variant(SLEPT, partial(_react_to_due_times, at, worker)),
            ],
            least=REACTIONS,
            note="From the call, or from the due time, to the return of claim_next_steps in the worker.",
        )


async def _one_by_one(react: Callable[[], Awaitable[float]], amount: int) -> Sample:
    return _sample([await react() for _ in range(amount)])


def _sample(latencies: list[float]) -> Sample:
    latencies.sort()
    p50 = percentile(latencies, 0.5)
    return Sample(len(latencies), p50_ms=p50, p99_ms=percentile(latencies, 0.99), value=p50)


async def _start_of_work(worker: Worker, run_id: UUID) -> float:
    found = await worker.read()
    if found["run"] != str(run_id):
        raise WrongAnswerError("the worker started another run")
    return float(found["at"])


async def _react_to_trigger(at: QueueStore, worker: Worker) -> float:
    await asyncio.sleep(random.uniform(*IDLE_SECONDS))
    began = time.time()
    run_id = await trigger(at.store, request(WORK))
    return await _start_of_work(worker, run_id) - began


async def _react_to_signal(at: QueueStore, worker: Worker) -> float:
    run_id = await trigger(at.store, request(WAIT_FOR_SIGNAL))
    await _start_of_work(worker, run_id)
    await asyncio.sleep(random.uniform(*IDLE_SECONDS))
    began = time.time()
    result = await at.store.deliver_signal(run_id, SIGNAL, "{}")
    if result.status is not SignalDeliveryStatus.DELIVERED:
        raise WrongAnswerError("the step did not wait for its signal")
    return await _start_of_work(worker, run_id) - began


async def _react_to_due_times(at: QueueStore, worker: Worker, amount: int) -> Sample:
    first = time.time() + FIRST_DUE
    moments = [first + number * DUE_EVERY + random.uniform(0, DUE_EVERY / 2) for number in range(amount)]
    run_ids = await asyncio.gather(
        *(trigger(at.store, request(WORK, due_at=datetime.fromtimestamp(one, UTC))) for one in moments)
    )
    triggered = time.time()
    due = dict(zip(map(str, run_ids), moments, strict=True))
    latencies = []
    for _ in range(amount):
        found = await worker.read()
        moment = due[found["run"]]
        # The store counts microseconds.
        if found["at"] < moment - 1e-5:
            raise WrongAnswerError("a step was claimed before its due time")
        latencies.append(found["at"] - max(moment, triggered))
    return _sample(latencies)


async def idle(report: Report, options: Options, backend: Backend) -> None:
    if not options.wants(cpu_name(backend.name)):
        return
    seconds = OBSERVED_SECONDS * min(1.0, options.scale)
    queries = Measure(
        queries_name(backend.name),
        "sessions",
        [Result(OURS)],
        "" if seconds == OBSERVED_SECONDS else f"Observed for {seconds:g} s in this trial.",
    )

    async with AsyncExitStack() as stack:
        at = await backend.open(stack, "idle")
        # With sleeping runs, so that the worker waits for a due time, too.
        await trigger_runs(at.store, 100, request(WORK, due_at=datetime(2100, 1, 1, tzinfo=UTC)))
        worker = await stack.enter_async_context(start_worker("idle", at))

        async def observe(amount: int) -> Sample:
            before, began, since = await worker.ask(), time.perf_counter(), datetime.now(UTC)
            await asyncio.sleep(seconds)
            if at.count_queries is not None:
                found = Sample(1, value=await at.count_queries(since))
                queries.results[0].samples.append(found)
            after = await worker.ask()
            if not after["waiting"]:
                raise WrongAnswerError("the worker did not wait")
            took = time.perf_counter() - began
            return Sample(1, value=100 * (after["cpu"] - before["cpu"]) / took)

        # The warm-up observes the first connections, too.
        await measure(
            report, options, cpu_name(backend.name), "% of a core", [Variant(OURS, observe)], least=1
        )
    del queries.results[0].samples[:1]
    if queries.results[0].samples:
        report.measures.append(queries)
        say(f"{queries.name}: {queries.results[0].values('value')}")
