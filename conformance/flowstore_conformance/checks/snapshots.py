"""Readers beside writers: results are never torn, and returned records never change."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

from flowstore_conformance.context import CheckContext, ContractViolation, Inconclusive
from flowstore_conformance.diffing import plain
from flowstore_conformance.history import comparable
from flowstore_conformance.registry import Kind, check
from flowstore_core import (
    Capability,
    FlowRunDetail,
    FlowRunRecord,
    FlowStepRecord,
    FlowStore,
    RunStatus,
    StepStatus,
)

Work = Coroutine[Any, Any, None]

FLOW = UUID(int=0xF10)
MIN_STATES = 20
"""Number of distinct states that readers must observe; fewer are inconclusive."""

WRITE_TIMEOUT = 15.0
"""Seconds for which writers continue until the readers have observed enough states."""


@check("QRY-3", "RUN-2", "STP-1", "STP-6", kind=Kind.SNAPSHOT, rotation="torn reads")
async def details_are_never_torn(context: CheckContext) -> None:
    """get_run_detail, get_run and get_step beside writers each read from one snapshot."""
    stores = await context.workers(3)
    rounds = context.profile.of(6, 24, 400)
    runs = [UUID(int=number) for number in (1, 2, 3)]
    """The current run of each writer."""
    seen: set[object] = set()
    min_states = min(MIN_STATES, rounds)

    async def write(number: int) -> None:
        store = stores[number % len(stores)]
        for count in _rounds(context, rounds, lambda: len(seen) >= min_states):
            # Start a new run now and then, because attempts accumulate with each lifecycle of a run.
            if count % 3 == 0:
                run_id = UUID(int=(number + 1 << 32) + count)
                await store.start_run(FLOW, "snapshots", run_id, "t")
                runs[number] = run_id
            await _run_lifecycle(store, runs[number])

    async def read(store: FlowStore, run_id: UUID) -> None:
        detail = await store.get_run_detail(run_id)
        if detail is None:
            return
        if problem := torn(detail):
            raise ContractViolation(f"get_run_detail shows a torn run: {problem}")
        context.assertions += 1
        seen.add(comparable(detail, exact_times=False))

    async def read_parts(store: FlowStore, run_id: UUID, key: str) -> None:
        run, step = await store.get_run(run_id), await store.get_step(run_id, key)
        problem = None if run is None else _torn_run(run)
        if problem is None and step is not None:
            problem = _torn_step(step)
        if problem is not None:
            raise ContractViolation(f"get_run or get_step shows a torn record: it {problem}")
        context.assertions += 1

    async def watch(number: int) -> None:
        generator = random.Random(f"{context.seed}/{number}")
        while True:
            await read(generator.choice(stores), generator.choice(runs))
            await asyncio.sleep(0)
            await read_parts(generator.choice(stores), generator.choice(runs), generator.choice("ab"))
            await asyncio.sleep(0)

    await _run_beside([write(n) for n in range(3)], [watch(n) for n in range(3)])
    if len(seen) < min_states:
        raise Inconclusive(f"the readers observed only {len(seen)} distinct states, {min_states} are needed")


def _rounds(context: CheckContext, rounds: int, enough: Callable[[], bool]) -> Iterator[int]:
    """Number a writer's rounds until the readers have seen enough states or time runs out."""
    until = time.monotonic() + WRITE_TIMEOUT * context.timeout_factor
    for count in itertools.count():
        if count >= rounds and (enough() or time.monotonic() > until):
            return
        yield count


async def _run_lifecycle(store: FlowStore, run_id: UUID) -> None:
    """Fail and complete two steps, complete the run, and reopen it by retries.

    At every moment the run is Succeeded only while both steps are.
    """
    for key in ("a", "b"):
        attempt = await store.record_step_start(run_id, key, "s", input_json=f"{key} in")
        await _yield_to_readers()
        await store.record_step_complete(run_id, key, StepStatus.FAILED, error_message="no", attempt=attempt)
        await _yield_to_readers()
        attempt = await store.record_step_start(run_id, key, "s")
        await _yield_to_readers()
        await store.record_step_complete(
            run_id, key, StepStatus.SUCCEEDED, output_json=f"{attempt}", attempt=attempt
        )
        await _yield_to_readers()
    expected = dict.fromkeys(("a", "b"), StepStatus.SUCCEEDED)
    if not await store.complete_run(run_id, RunStatus.SUCCEEDED, expected=expected):
        raise ContractViolation(
            "complete_run with the actual statuses as expected: expected True, got False", clause="RUN-2"
        )
    await _yield_to_readers()
    for key in ("b", "a"):
        await store.retry_step(run_id, key)
        await _yield_to_readers()


async def _yield_to_readers() -> None:
    """Yield to the readers: the operations of a store may never suspend."""
    await asyncio.sleep(0)


def torn(detail: FlowRunDetail) -> str | None:
    """Why a run's detail cannot come from one snapshot; None if it can."""
    if problem := _torn_run(detail):
        return f"the run {problem}"
    for step in detail.steps:
        if problem := _torn_step(step):
            return f"step {step.step_key!r} {problem}"
        if detail.status.is_terminal and step.status is not StepStatus.SUCCEEDED:
            return (
                f"the run is {detail.status.value} and its step {step.step_key!r} is {step.status.value}, "
                "but the run is terminal only while all its steps are Succeeded"
            )
    return None


def _torn_run(run: FlowRunRecord) -> str | None:
    if (run.completed_at is not None) != run.status.is_terminal:
        return f"is {run.status.value} with completed_at {run.completed_at}"
    return None


def _torn_step(step: FlowStepRecord) -> str | None:
    numbers = [attempt.attempt for attempt in step.attempts]
    if numbers != list(range(1, len(numbers) + 1)) or not numbers:
        return f"has attempts numbered {numbers}, not 1, 2, ..."
    if still_open := [one.attempt for one in step.attempts[:-1] if one.completed_at is None]:
        return f"has an open attempt {still_open[0]} that is not its last"
    last = step.attempts[-1]
    if (last.completed_at is None) != (last.status is StepStatus.RUNNING):
        return f"has attempt {last.attempt} {last.status.value} with completed_at {last.completed_at}"
    if step.attempt_count == len(numbers) + 1 and step.status is StepStatus.PENDING:
        # The step was reopened: attempt_count includes the next attempt, which has not started.
        left = [name for name in ("output_json", "error_message", "completed_at") if getattr(step, name)]
        return f"was reopened and still has {' and '.join(left)}" if left else None
    if step.attempt_count != len(numbers):
        return f"has attempt_count {step.attempt_count} and {len(numbers)} attempts"
    for name in ("status", "output_json", "error_message"):
        own, newest = comparable(getattr(step, name)), comparable(getattr(last, name))
        if own != newest:
            return f"has {name} {plain(own)}, and its newest attempt has {plain(newest)}"
    if (step.completed_at is not None) != step.status.is_terminal:
        return f"is {step.status.value} with completed_at {step.completed_at}"
    return None


@check("QRY-3", "QRY-1", needs=[Capability.DASHBOARD], kind=Kind.SNAPSHOT, rotation="torn reads")
async def pages_agree_with_their_counts(context: CheckContext) -> None:
    """get_runs_page beside writers returns rows and total_count from one snapshot."""
    stores = await context.workers(3)
    rounds = context.profile.of(8, 60, 600)
    totals: set[int] = set()
    min_states = min(MIN_STATES, rounds) // 2

    async def write(number: int) -> None:
        store = stores[number % len(stores)]
        for count in _rounds(context, rounds, lambda: len(totals) >= min_states):
            run_id = UUID(int=(number << 32) + count + 1)
            await store.start_run(FLOW, "snapshots", run_id, "t")
            if count % 2:
                await store.complete_run(run_id, RunStatus.FAILED)
            if count % 16 == 15 and context.clock is not None:
                await store.cleanup(context.clock.now + timedelta(days=1))
            await _yield_to_readers()

    async def watch(number: int) -> None:
        generator = random.Random(f"{context.seed}/{number}")
        while True:
            status = generator.choice((None, None, RunStatus.RUNNING, RunStatus.FAILED))
            skip, take = generator.choice(((0, context.page_size), (0, 3), (2, context.page_size)))
            page = await generator.choice(stores).get_runs_page(
                FLOW,
                status=status,
                skip=skip,
                take=take,
            )
            _check_page(
                context, page.total_count, [run.status.value for run in page.runs], status, skip, take
            )
            order = [(run.started_at, run.run_id.bytes) for run in page.runs]
            if order != sorted(set(order), reverse=True):
                message = "get_runs_page: expected distinct runs by started_at and run_id, both descending"
                raise ContractViolation(message, clause="QRY-1")
            totals.add(page.total_count)
            await asyncio.sleep(0)

    await _run_beside([write(n) for n in range(3)], [watch(n) for n in range(3)])
    if len(totals) < min_states:
        raise Inconclusive(
            f"the readers observed only {len(totals)} distinct counts, {min_states} are needed"
        )


@check("TAG-3", "TAG-2", "QRY-3", needs=[Capability.DASHBOARD], kind=Kind.SNAPSHOT, rotation="torn reads")
async def lists_by_tag_are_never_torn(context: CheckContext) -> None:
    """Beside writers, a page by tag has as many runs as its count, each with tags that changed together."""
    stores = await context.workers(3)
    rounds = context.profile.of(8, 40, 400)
    runs = [UUID(int=number) for number in (1, 2, 3, 4)]
    for run_id in runs:
        await stores[0].start_run(FLOW, "snapshots", run_id, "t", tags={"a": "0", "b": "0"})
    seen: set[object] = set()
    min_states = min(MIN_STATES, rounds) // 2

    async def write(number: int) -> None:
        store = stores[number % len(stores)]
        generator = random.Random(f"{context.seed}/{number}/writer")
        for _ in _rounds(context, rounds, lambda: len(seen) >= min_states):
            value = generator.choice("012")
            await store.set_tags(generator.choice(runs), {"a": value, "b": value})
            await _yield_to_readers()

    async def watch(number: int) -> None:
        generator = random.Random(f"{context.seed}/{number}")
        while True:
            wanted = {"a": generator.choice("012")}
            wanted |= generator.choice(({}, {"b": wanted["a"]}))
            take = generator.choice((context.page_size, 2))
            page = await generator.choice(stores).get_runs_page(FLOW, tags=wanted, take=take)
            context.assertions += 1
            listed = [dict(run.tags) for run in page.runs]
            if len(listed) != min(take, page.total_count):
                counted = f"{len(listed)} of {page.total_count} runs"
                raise ContractViolation(f"get_runs_page(tags={wanted}, take={take}) has {counted}")
            if any(tags["a"] != wanted["a"] for tags in listed):
                raise ContractViolation(f"get_runs_page(tags={wanted}) has a run with the tags {listed}")
            if any(tags["a"] != tags["b"] for tags in listed):
                message = f"set_tags changed a and b together, and a run has the tags {listed}"
                raise ContractViolation(message, clause="TAG-2")
            seen.add((wanted["a"], page.total_count, comparable(page, exact_times=False)))
            await asyncio.sleep(0)

    await _run_beside([write(n) for n in range(3)], [watch(n) for n in range(3)])
    if len(seen) < min_states:
        raise Inconclusive(f"the readers observed only {len(seen)} distinct pages, {min_states} are needed")


def _check_page(
    context: CheckContext, total: int, statuses: list[str], status: RunStatus | None, skip: int, take: int
) -> None:
    context.assertions += 1
    fitting = min(take, max(0, total - skip))
    if len(statuses) != fitting:
        raise ContractViolation(
            f"get_runs_page(skip={skip}, take={take}) with total_count {total}: "
            f"expected {fitting} rows, got {len(statuses)}"
        )
    if status is not None and set(statuses) - {status.value}:
        listed = " and ".join(sorted(set(statuses)))
        raise ContractViolation(
            f"get_runs_page(status={status.value!r}): expected only {status.value} runs, got {listed}"
        )


@check("RUN-3", kind=Kind.SNAPSHOT)
async def returned_records_never_change(context: CheckContext) -> None:
    """No returned record changes after later writes."""
    kept: list[tuple[str, object, object]] = []
    for number in range(context.profile.of(1, 5, 20)):
        run_id = UUID(int=1 + number)
        store = context.store
        kept.append(_record_copy("start_run", await store.start_run(FLOW, "snapshots", run_id, "t")))
        for write in _writes(store, run_id):
            await write()
            for name, invoke in _reads(store, run_id, context.capabilities):
                kept.append(_record_copy(name, await invoke()))
    for name, record, before in kept:
        context.expect_that(
            comparable(record) == before,
            f"a result of {name} changed after later writes",
        )


def _record_copy(name: str, record: object) -> tuple[str, object, object]:
    return name, record, comparable(record)


def _writes(store: FlowStore, run_id: UUID) -> list[Callable[[], Awaitable[object]]]:
    """Writes that change every visible part of a run."""
    failed: dict[str, object] = {"status": "Failed", "error_message": "no", "attempt": 1}
    calls: list[tuple[str, dict[str, object]]] = [
        ("try_record_dispatch", {"step_key": "a"}),
        ("annotate_dispatch", {"step_key": "a", "job_id": "job"}),
        ("try_claim_step", {"step_key": "a", "owner": "one"}),
        ("record_step_start", {"step_key": "a", "step_type": "s", "owner": "one"}),
        ("register_waiter", {"step_key": "a", "signal_name": "go"}),
        ("deliver_signal", {"signal_name": "go", "payload_json": "{}"}),
        ("record_step_complete", {"step_key": "a", **failed}),
        ("record_skipped_step", {"step_key": "b", "step_type": "s"}),
        ("request_cancel", {"reason": "enough"}),
        ("complete_run", {"status": "Failed"}),
        ("retry_step", {"step_key": "a", "reset": ["b"]}),
        ("remove_waiter", {"step_key": "a"}),
    ]
    if Capability.MAILBOX in store.capabilities:
        early: dict[str, object] = {"signal_name": "early", "payload_json": "{}", "buffer": True}
        calls += [("deliver_signal", early), ("register_waiter", {"step_key": "c", "signal_name": "early"})]
    return [lambda m=m, a=a: getattr(store, m)(run_id=run_id, **a) for m, a in calls]  # type: ignore[misc]


def _reads(
    store: FlowStore, run_id: UUID, capabilities: frozenset[Capability]
) -> list[tuple[str, Callable[[], Awaitable[object]]]]:
    of_run = [
        "get_run",
        "get_run_detail",
        "get_step_statuses",
        "get_step_claims",
        "get_claimed_step_keys",
        "get_dispatches",
        "get_dispatched_step_keys",
        "get_run_control",
    ]
    if Capability.WAITERS in capabilities:
        of_run.append("get_waiters")
    if Capability.MAILBOX in capabilities:
        of_run.append("get_buffered_signals")
    reads: list[tuple[str, Callable[[], Awaitable[object]]]] = [
        (name, lambda name=name: getattr(store, name)(run_id))  # type: ignore[misc]
        for name in of_run
    ]
    reads.append(("get_waiter", lambda: store.get_waiter(run_id, "a")))
    reads.append(("get_step", lambda: store.get_step(run_id, "a")))
    reads.append(("get_runs", lambda: store.get_runs()))
    reads.append(("get_active_runs", lambda: store.get_active_runs()))
    if Capability.DASHBOARD in capabilities:
        reads.append(("get_runs_page", lambda: store.get_runs_page()))
    return reads


async def _run_beside(writers: Sequence[Work], readers: Sequence[Work]) -> None:
    """Run readers until the writers have finished; raise the first error of either."""
    reading = [asyncio.create_task(reader) for reader in readers]
    writing: asyncio.Future[Any] = asyncio.gather(*writers)
    try:
        # A reader ends only by raising.
        await asyncio.wait([writing, *reading], return_when=asyncio.FIRST_COMPLETED)
        for task in reading:
            if task.done():
                task.result()
        await writing
    finally:
        for task in reading:
            task.cancel()
        writing.cancel()
        await asyncio.gather(writing, *reading, return_exceptions=True)
