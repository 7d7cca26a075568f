"""The workload of every variant: lifecycles of steps, in the same loop for all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any, Protocol
from urllib.parse import quote
from uuid import UUID

from benchmarks.results import Sample
from flowstore_core import FlowStore, StepStatus, new_run_id

STEPS_PER_RUN = 8
FLOW = UUID("0190b7a0-0000-7000-8000-000000000001")
INPUT = '{"order": 4711, "amount": "19.90", "currency": "EUR"}'
OUTPUT = '{"accepted": true, "reference": "c0ffee"}'
CHUNK = 256
CALLS = 5
"""Number of calls in one lifecycle."""

Step = tuple[UUID, str]


class WrongAnswerError(Exception):
    """A variant did not do its work, so its figures are invalid."""


class ClaimCalls(Protocol):
    """The claim operation of a FlowStore."""

    async def try_claim_step(self, run_id: UUID, step_key: str, /) -> bool: ...


class StepCalls(ClaimCalls, Protocol):
    """The five calls of a lifecycle."""

    async def try_record_dispatch(self, run_id: UUID, step_key: str, /) -> bool: ...

    async def annotate_dispatch(self, run_id: UUID, step_key: str, job_id: str, /) -> None: ...

    async def record_step_start(
        self, run_id: UUID, step_key: str, step_type: str, /, *, input_json: str | None = None
    ) -> int: ...

    async def record_step_complete(
        self,
        run_id: UUID,
        step_key: str,
        status: StepStatus,
        /,
        *,
        output_json: str | None = None,
        attempt: int | None = None,
    ) -> None: ...


class Records(Protocol):
    """Untimed operations: create runs, and count results for verification."""

    async def add_runs(self, run_ids: Sequence[UUID]) -> None:
        """Start these runs."""

    async def count_completed(self, run_ids: Sequence[UUID]) -> int:
        """Number of succeeded steps of these runs."""
        ...

    async def count_claimed(self, run_ids: Sequence[UUID]) -> int:
        """Number of claimed steps of these runs."""
        ...


def store_url(path: Path) -> str:
    """The URL of a flowstore store in that SQLite file."""
    return f"sqlite:///{quote(str(path))}"


class StoreRecords:
    """Records of a FlowStore, through its public operations."""

    def __init__(self, store: FlowStore) -> None:
        self._store = store

    async def add_runs(self, run_ids: Sequence[UUID]) -> None:
        for start in range(0, len(run_ids), CHUNK):
            chunk = run_ids[start : start + CHUNK]
            await asyncio.gather(*(self._store.start_run(FLOW, "bench", one, "manual") for one in chunk))

    async def count_completed(self, run_ids: Sequence[UUID]) -> int:
        found = 0
        for start in range(0, len(run_ids), CHUNK):
            chunk = run_ids[start : start + CHUNK]
            for statuses in await asyncio.gather(*(self._store.get_step_statuses(one) for one in chunk)):
                found += sum(status is StepStatus.SUCCEEDED for status in statuses.values())
        return found

    async def count_claimed(self, run_ids: Sequence[UUID]) -> int:
        found = 0
        for start in range(0, len(run_ids), CHUNK):
            chunk = run_ids[start : start + CHUNK]
            for keys in await asyncio.gather(*(self._store.get_claimed_step_keys(one) for one in chunk)):
                found += len(keys)
        return found


def make_steps(amount: int, new_id: Callable[[], UUID] = new_run_id) -> tuple[list[UUID], list[Step]]:
    """New runs, and ``amount`` steps of them, eight to a run."""
    run_ids = [new_id() for _ in range(-(-amount // STEPS_PER_RUN))]
    steps = [(run_id, f"step-{index}") for run_id in run_ids for index in range(STEPS_PER_RUN)]
    return run_ids, steps[:amount]


async def lifecycles(
    calls: StepCalls,
    records: Records,
    callers: int,
    amount: int,
    new_id: Callable[[], UUID] = new_run_id,
) -> Sample:
    """Execute ``amount`` lifecycles with concurrent callers, which take steps from one source."""
    run_ids, steps = make_steps(amount, new_id)
    await records.add_runs(run_ids)
    source = iter(steps)
    latencies: list[float] = []
    began = perf_counter()
    await _together(callers, lambda: _lifecycle_caller(calls, source, latencies))
    seconds = perf_counter() - began
    _check("completed steps", await records.count_completed(run_ids), amount)
    return sample(amount, seconds, latencies)


async def lifecycles_until(
    calls: StepCalls, source: Iterator[Step], latencies: list[float], callers: int, stop: Callable[[], bool]
) -> int:
    """Execute lifecycles until ``stop`` returns True, at least one per caller. Returns their number."""
    before = len(latencies)

    async def caller() -> None:
        for step in source:
            await _lifecycle_caller(calls, iter((step,)), latencies)
            if stop():
                return

    await _together(callers, caller)
    return (len(latencies) - before) // CALLS


async def _lifecycle_caller(calls: StepCalls, source: Iterator[Step], latencies: list[float]) -> None:
    for run_id, step_key in source:
        t0 = perf_counter()
        dispatched = await calls.try_record_dispatch(run_id, step_key)
        t1 = perf_counter()
        await calls.annotate_dispatch(run_id, step_key, "job-4711")
        t2 = perf_counter()
        claimed = await calls.try_claim_step(run_id, step_key)
        t3 = perf_counter()
        attempt = await calls.record_step_start(run_id, step_key, "task", input_json=INPUT)
        t4 = perf_counter()
        await calls.record_step_complete(
            run_id, step_key, StepStatus.SUCCEEDED, output_json=OUTPUT, attempt=attempt
        )
        t5 = perf_counter()
        if not (dispatched is True and claimed is True and attempt == 1):
            raise WrongAnswerError(f"a new step got {dispatched}, {claimed}, attempt {attempt}")
        latencies += (t1 - t0, t2 - t1, t3 - t2, t4 - t3, t5 - t4)


async def claims(calls: StepCalls, records: Records, callers: int, amount: int, claimants: int = 1) -> Sample:
    """Make ``amount`` calls of try_claim_step, ``claimants`` per key; exactly one must win each key."""
    keys = max(1, amount // claimants)
    run_ids, steps = make_steps(keys)
    await records.add_runs(run_ids)
    source = iter([step for step in steps for _ in range(claimants)])
    latencies: list[float] = []
    won: list[int] = []
    began = perf_counter()
    await _together(callers, lambda: _claim_caller(calls, source, latencies, won))
    seconds = perf_counter() - began
    _check("claims won", sum(won), keys)
    _check("claimed steps", await records.count_claimed(run_ids), keys)
    return sample(keys * claimants, seconds, latencies)


async def _claim_caller(
    calls: ClaimCalls, source: Iterator[Step], latencies: list[float], won: list[int]
) -> None:
    wins = 0
    for run_id, step_key in source:
        began = perf_counter()
        wins += await calls.try_claim_step(run_id, step_key)
        latencies.append(perf_counter() - began)
    won.append(wins)


async def paired_claims(contestants: Sequence[tuple[ClaimCalls, Records]], amount: int) -> tuple[Sample, ...]:
    """One caller claims steps of all contestants alternately, so that all meet the same conditions.

    The order is random: in a fixed order each contestant would always follow the same predecessor.
    """
    rng = Random(amount)
    run_ids, steps = make_steps(amount)
    for _, records in contestants:
        await records.add_runs(run_ids)
    latencies: list[list[float]] = [[] for _ in contestants]
    for run_id, step_key in steps:
        for index in rng.sample(range(len(contestants)), len(contestants)):
            began = perf_counter()
            won = await contestants[index][0].try_claim_step(run_id, step_key)
            latencies[index].append(perf_counter() - began)
            if won is not True:
                raise WrongAnswerError("a free step was not claimed")
    for _, records in contestants:
        _check("claimed steps", await records.count_claimed(run_ids), amount)
    return tuple(sample(amount, sum(each), each) for each in latencies)


async def _together(callers: int, caller: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(caller())


def _check(what: str, found: int, expected: int) -> None:
    if found != expected:
        raise WrongAnswerError(f"{what}: expected {expected}, found {found}")


def sample(work: int, seconds: float, latencies: list[float]) -> Sample:
    """The rate and the percentiles, in milliseconds."""
    latencies.sort()
    return Sample(
        work,
        rate=work / seconds,
        p50_ms=percentile(latencies, 0.5),
        p99_ms=percentile(latencies, 0.99),
        p999_ms=percentile(latencies, 0.999),
    )


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """The percentile of sorted seconds, in milliseconds; None without values."""
    if not ordered:
        return None
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1000
