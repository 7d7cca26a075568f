"""Verification of replays: each check fails when its invariant is violated."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest

from flowstore_core import FlowRunDetail, FlowStepRecord, FlowStore, StepStatus, new_run_id, open_store
from flowstore_replay import Engine, Requests, Summary, Task, Workflow, verify
from flowstore_replay.engine import StepContext
from flowstore_replay.work import RecordedWork, output_of
from tests.test_replay_crashes import QUEUE, complete

WORKFLOW = Workflow(
    name="pair",
    tasks=(
        Task(key="first", name="test", parents=(), seconds=0.0),
        Task(key="second", name="test", parents=("first",), seconds=0.0),
    ),
)


@asynccontextmanager
async def finished_run() -> AsyncIterator[tuple[FlowStore, UUID]]:
    async with open_store("memory://") as store:
        run_id = new_run_id()
        roots = Requests(WORKFLOW, QUEUE).roots
        await store.trigger_run(WORKFLOW.flow_id, "pair", run_id, "test", dispatch=roots)
        work = RecordedWork([run_id], speed=1, fail_rate=0, seed=0)
        await complete(Engine(store, WORKFLOW, work, queue=QUEUE, name="one"), store, [run_id])
        yield store, run_id


class TamperedStore:
    """A store wrapper that changes the result of get_run_detail."""

    def __init__(self, store: FlowStore, change: Callable[[FlowRunDetail], FlowRunDetail]) -> None:
        self._store = store
        self._change = change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def get_run_detail(self, run_id: UUID) -> FlowRunDetail | None:
        detail = await self._store.get_run_detail(run_id)
        return detail and self._change(detail)


def failed(summary: Summary) -> set[str]:
    return {check.name for check in summary.checks if not check.ok}


async def test_a_succeeded_run_passes() -> None:
    async with finished_run() as (store, run_id):
        summary = await verify(store, WORKFLOW, [run_id])
    assert summary.ok
    assert (summary.runs, summary.runs_succeeded) == (1, 1)
    assert (summary.steps, summary.steps_succeeded, summary.attempts) == (2, 2, 2)
    assert summary.seconds > 0
    assert summary.steps_per_second == pytest.approx(2 / summary.seconds)


async def test_a_missing_or_unfinished_run_fails() -> None:
    async with open_store("memory://") as store:
        run_id = new_run_id()
        assert failed(await verify(store, WORKFLOW, [run_id])) == {"every run succeeded"}
        await store.trigger_run(WORKFLOW.flow_id, "pair", run_id, "test")
        summary = await verify(store, WORKFLOW, [run_id])
        assert not summary.ok
        assert summary.seconds == 0
        assert summary.checks[0].findings == [f"run {run_id} is Running"]
        await store.try_claim_step(run_id, "first", owner="x", lease=timedelta(minutes=1))
        assert "no live claim is left" in failed(await verify(store, WORKFLOW, [run_id]))


def change_step(key: str, change: Callable[[FlowStepRecord], FlowStepRecord]) -> Callable[..., FlowRunDetail]:
    def changed(detail: FlowRunDetail) -> FlowRunDetail:
        steps = tuple(change(step) if step.step_key == key else step for step in detail.steps)
        return replace(detail, steps=steps)

    return changed


def duplicate_attempt(step: FlowStepRecord) -> FlowStepRecord:
    second = replace(step.attempts[0], attempt=2)
    return replace(step, attempts=(*step.attempts, second), attempt_count=2)


def missing_attempt(step: FlowStepRecord) -> FlowStepRecord:
    return replace(step, attempts=(replace(step.attempts[0], attempt=2),), attempt_count=2)


def open_attempt(step: FlowStepRecord) -> FlowStepRecord:
    before = replace(step.attempts[0], status=StepStatus.RUNNING, completed_at=None)
    return replace(step, attempts=(before, replace(step.attempts[0], attempt=2)), attempt_count=2)


def failed_attempt(step: FlowStepRecord) -> FlowStepRecord:
    before = replace(step.attempts[0], status=StepStatus.FAILED, error_message="unknown")
    return replace(step, attempts=(before, replace(step.attempts[0], attempt=2)), attempt_count=2)


ONCE = "every step succeeded exactly once, in its last attempt"
ACCOUNTED = "every attempt is numbered, closed and accounted for"


@pytest.mark.parametrize(
    ("change", "checks"),
    [
        (duplicate_attempt, {ONCE, ACCOUNTED}),
        (missing_attempt, {ACCOUNTED}),
        (open_attempt, {ACCOUNTED}),
        (failed_attempt, {ACCOUNTED}),
        (
            lambda step: replace(step, started_at=step.started_at - timedelta(hours=1)),
            {"no step started before its parents had succeeded"},
        ),
        (
            lambda step: replace(step, output_json="{}"),
            {"every output exists and follows from its parents' outputs"},
        ),
    ],
)
async def test_a_tampered_step_fails(
    change: Callable[[FlowStepRecord], FlowStepRecord], checks: set[str]
) -> None:
    async with finished_run() as (store, run_id):
        tampered: Any = TamperedStore(store, change_step("second", change))
        assert failed(await verify(tampered, WORKFLOW, [run_id])) == checks


async def test_a_missing_and_an_unknown_step_fail() -> None:
    async with finished_run() as (store, run_id):
        tampered: Any = TamperedStore(store, lambda detail: replace(detail, steps=detail.steps[:1]))
        assert failed(await verify(tampered, WORKFLOW, [run_id])) == {ONCE}
        tampered = TamperedStore(store, change_step("second", lambda step: replace(step, step_key="third")))
        assert ONCE in failed(await verify(tampered, WORKFLOW, [run_id]))


def wrong_output(step: FlowStepRecord) -> FlowStepRecord:
    wrong = '"something else"'
    return replace(step, output_json=wrong, attempts=(replace(step.attempts[0], output_json=wrong),))


async def test_a_wrong_output_fails_the_outputs_of_all_descendants() -> None:
    async with finished_run() as (store, run_id):
        tampered: Any = TamperedStore(store, change_step("first", wrong_output))
        summary = await verify(tampered, WORKFLOW, [run_id])
        assert failed(summary) == {"every output exists and follows from its parents' outputs"}
        findings = next(check for check in summary.checks if not check.ok).findings
        assert [finding.split(" of ")[0] for finding in findings] == ["step 'first'", "step 'second'"]


async def test_a_released_claim_or_dispatch_fails() -> None:
    async with finished_run() as (store, run_id):
        await store.release_step_claim(run_id, "first")
        await store.release_dispatch(run_id, "second")
        summary = await verify(store, WORKFLOW, [run_id])
        assert failed(summary) == {"every step was dispatched and claimed, and no other step was"}
        assert next(check for check in summary.checks if not check.ok).count == 2


async def test_findings_are_counted_and_the_first_are_kept() -> None:
    async with open_store("memory://") as store:
        summary = await verify(store, WORKFLOW, [new_run_id() for _ in range(20)])
    assert (summary.checks[0].count, len(summary.checks[0].findings)) == (20, 5)


def test_failures_depend_only_on_the_seed() -> None:
    task = WORKFLOW.tasks[0]
    run_ids = [new_run_id() for _ in range(50)]

    async def outcomes(seed: int, ids: list[UUID]) -> list[bool]:
        work = RecordedWork(ids, speed=1, fail_rate=0.5, seed=seed)
        contexts = [StepContext(run_id=run_id, task=task, attempt=1, inputs={}) for run_id in ids]
        return [
            isinstance(one, str) for one in await asyncio.gather(*map(work, contexts), return_exceptions=True)
        ]

    first = asyncio.run(outcomes(1, run_ids))
    assert first == asyncio.run(outcomes(1, [new_run_id() for _ in range(50)]))
    assert first != asyncio.run(outcomes(2, run_ids))
    assert 10 < sum(first) < 40


def test_an_output_depends_on_every_parents_output() -> None:
    second = WORKFLOW.tasks[1]
    assert output_of(second, {"first": "1"}) != output_of(second, {"first": "2"})
