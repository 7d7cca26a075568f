"""The engine of docs/durable-engine.md, as written: on every backend, and when a worker dies."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest

from flowstore_core import (
    Capability,
    FlowRunDetail,
    FlowStore,
    RunStatus,
    SignalDeliveryStatus,
    StepStatus,
    open_store,
)

PAGE = (Path(__file__).parents[1] / "docs" / "durable-engine.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
FLOW = UUID(int=7)
pytestmark = pytest.mark.needs(Capability.QUEUES, Capability.WATCH)

QUEUES = ("default",)
SECONDS = 60.0
"""The time limit of a flow, generous enough for a loaded machine."""


@pytest.fixture
def engine() -> SimpleNamespace:
    """Everything that the page defines, with short pauses."""
    names: dict[str, Any] = {}
    exec(compile("\n\n".join(BLOCKS), "durable-engine.md", "exec"), names)
    page = SimpleNamespace(**names)
    page.names = names
    names.update(PAUSE=timedelta(milliseconds=50), BACK_OFF=timedelta(milliseconds=5))
    return page


@asynccontextmanager
async def workers(engine: SimpleNamespace, store: FlowStore, number: int = 2) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(engine.work(store, QUEUES, f"worker {n}")) for n in range(number)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def wait_until(
    condition: Callable[[FlowRunDetail], bool], store: FlowStore, run_id: UUID
) -> FlowRunDetail:
    async with asyncio.timeout(SECONDS):
        while True:
            detail = await store.get_run_detail(run_id)
            assert detail is not None
            if condition(detail):
                return detail
            await asyncio.sleep(0.02)


def is_over(detail: FlowRunDetail) -> bool:
    return detail.status.is_terminal


def outputs(detail: FlowRunDetail) -> dict[str, str | None]:
    return {step.step_key: step.output_json for step in detail.steps}


def test_the_engine_has_at_most_60_lines_of_code() -> None:
    lines = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert len(lines) <= 60


async def test_a_flow_that_depends_on_data(engine: SimpleNamespace, namespace: str) -> None:
    async with open_store(namespace) as store, workers(engine, store):
        items = ["pen", "ink", "paper"]
        run_id = await engine.start(store, FLOW, engine.call(engine.order, "order", items))
        detail = await wait_until(is_over, store, run_id)
        assert detail.status is RunStatus.SUCCEEDED
        assert outputs(detail) == {
            "order": "null",
            **{f"reserve {item}": f'"{item}"' for item in items},
            "ship": '"3 parcels"',
        }
        assert [step.attempt_count for step in detail.steps] == [1] * 5


async def test_a_failed_step_skips_its_successors_and_fails_the_run(
    engine: SimpleNamespace, namespace: str
) -> None:
    async def reserve(store: FlowStore, claimed: Any) -> Any:
        if claimed.step_key == "reserve ink":
            raise LookupError("no ink")
        return await engine.reserve(store, claimed)

    engine.STEPS["reserve"] = reserve
    async with open_store(namespace) as store, workers(engine, store):
        run_id = await engine.start(store, FLOW, engine.call(engine.order, "order", ["pen", "ink"]))
        detail = await wait_until(is_over, store, run_id)
        assert detail.status is RunStatus.FAILED
        failed = next(step for step in detail.steps if step.step_key == "reserve ink")
        assert (failed.status, failed.attempt_count) == (StepStatus.FAILED, engine.MAX_ATTEMPTS)
        assert failed.error_message == "LookupError: no ink"


@pytest.mark.parametrize(
    ("function", "value", "output", "attempts"),
    [("charge", None, '"charged"', 3), ("remind", None, '"reminded"', 2), ("careful", None, '"done"', 1)],
)
async def test_a_step_that_runs_again(
    function: str, value: object, output: str, attempts: int, engine: SimpleNamespace, namespace: str
) -> None:
    async with open_store(namespace) as store, workers(engine, store):
        first = engine.call(engine.STEPS[function], "first", value)
        detail = await wait_until(is_over, store, await engine.start(store, FLOW, first))
        assert detail.status is RunStatus.SUCCEEDED
        assert (detail.steps[0].output_json, detail.steps[0].attempt_count) == (output, attempts)


@pytest.mark.parametrize(("seconds", "deliver"), [(600, True), (0.1, False)], ids=["signal", "time-out"])
async def test_a_step_that_waits_for_a_signal(
    seconds: float, deliver: bool, engine: SimpleNamespace, namespace: str
) -> None:
    async with open_store(namespace) as store, workers(engine, store):
        run_id = await engine.start(store, FLOW, engine.call(engine.approve, "approve", seconds))
        if deliver:
            await wait_until(
                lambda detail: [one.status for one in detail.steps] == ["Pending"], store, run_id
            )
            await store.deliver_signal(run_id, "approval", '"yes"')
        detail = await wait_until(is_over, store, run_id)
        assert detail.steps[0].output_json == ('"yes"' if deliver else '"nobody answered"')


async def test_a_signal_that_comes_before_the_step_waits(engine: SimpleNamespace, namespace: str) -> None:
    async with open_store(namespace) as store:
        run_id = await engine.start(store, FLOW, engine.call(engine.approve, "approve", 600))
        for _ in range(2):
            result = await engine.answer(store, run_id, "approval", "early", "one id")
            assert result.status is SignalDeliveryStatus.BUFFERED
        async with workers(engine, store):
            detail = await wait_until(is_over, store, run_id)
        assert (detail.steps[0].output_json, detail.steps[0].attempt_count) == ('"early"', 2)


async def test_a_child_run(engine: SimpleNamespace, namespace: str) -> None:
    async with open_store(namespace) as store, workers(engine, store):
        run_id = await engine.start(store, FLOW, engine.call(engine.parent, "parent"))
        detail = await wait_until(is_over, store, run_id)
        assert outputs(detail) == {"parent": '"from the child"'}
        (child,) = await store.get_derived_runs(run_id)
        await wait_until(is_over, store, child.run_id)


async def test_a_cancelled_run(engine: SimpleNamespace, namespace: str) -> None:
    async with open_store(namespace) as store:
        run_id = await engine.start(store, FLOW, engine.call(engine.careful, "careful"))
        await store.request_cancel(run_id)
        async with workers(engine, store):
            detail = await wait_until(is_over, store, run_id)
        assert outputs(detail) == {"careful": '"nothing was done"'}


async def test_the_step_of_a_dead_worker_is_done_by_another(engine: SimpleNamespace, namespace: str) -> None:
    engine.names["LEASE"] = timedelta(milliseconds=200)
    begun = asyncio.Event()

    async def hang(store: FlowStore, claimed: Any) -> Any:
        if claimed.attempt == 1:
            begun.set()
            await asyncio.Event().wait()
        return engine.Done(output=claimed.attempt)

    engine.STEPS["hang"] = hang
    async with open_store(namespace) as store:
        run_id = await engine.start(store, FLOW, engine.call(hang, "a"))
        dead = asyncio.create_task(engine.work(store, QUEUES, "dead"))
        await asyncio.wait_for(begun.wait(), SECONDS)
        # Cancelling the task stops the renewals, as the death of the process would.
        dead.cancel()
        await asyncio.gather(dead, return_exceptions=True)
        async with workers(engine, store):
            detail = await wait_until(is_over, store, run_id)
        assert detail.status is RunStatus.SUCCEEDED
        assert outputs(detail) == {"a": "2"}
        assert [attempt.status for attempt in detail.steps[0].attempts] == ["Failed", "Succeeded"]
