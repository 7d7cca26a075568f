"""How tests set a scene, and how they look at all of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from datetime import timedelta
from typing import Any, TypeVar
from uuid import UUID, uuid4

from flowstore_core import FlowStepAttemptRecord, FlowStepRecord, FlowStore, RunStatus, StepStatus

T = TypeVar("T")

FLOW = UUID("f10a0000-0000-4000-8000-000000000001")
MINUTE = timedelta(minutes=1)


async def new_run(store: FlowStore, **overrides: Any) -> UUID:
    """Start a run and return its id."""
    run_id: UUID = overrides.pop("run_id", None) or uuid4()
    arguments = {"flow_id": FLOW, "flow_name": "orders", "trigger_key": "manual", **overrides}
    await store.start_run(run_id=run_id, **arguments)
    return run_id


async def run_step(
    store: FlowStore,
    run_id: UUID,
    step_key: str = "charge",
    status: StepStatus = StepStatus.SUCCEEDED,
    *,
    output_json: str | None = None,
    error_message: str | None = None,
) -> int:
    """Start a step, close the attempt and return its number."""
    attempt = await store.record_step_start(run_id, step_key, "http")
    await store.record_step_complete(
        run_id, step_key, status, output_json=output_json, error_message=error_message, attempt=attempt
    )
    return attempt


async def the_step(store: FlowStore, run_id: UUID, step_key: str = "charge") -> FlowStepRecord:
    """The step as get_run_detail shows it."""
    detail = await store.get_run_detail(run_id)
    assert detail is not None
    (found,) = [step for step in detail.steps if step.step_key == step_key]
    return found


async def the_attempts(
    store: FlowStore, run_id: UUID, step_key: str = "charge"
) -> tuple[FlowStepAttemptRecord, ...]:
    return (await the_step(store, run_id, step_key)).attempts


async def picture(store: FlowStore, *run_ids: UUID) -> dict[str, Any]:
    """All that a store shows of some runs, and of all runs together: equal pictures, equal stores."""
    shown: dict[str, Any] = {
        "runs": await store.get_runs(take=1000),
        "active": await store.get_active_runs(),
        "statistics": await store.get_statistics(),
        "stalled": await store.get_stalled_steps(take=1000),
        "to stop": await store.get_runs_to_stop(take=1000),
    }
    for run_id in run_ids:
        shown[str(run_id)] = {
            "detail": await store.get_run_detail(run_id),
            "status": await store.get_run_status(run_id),
            "steps": dict(await store.get_step_statuses(run_id)),
            "claims": await store.get_step_claims(run_id),
            "claimed": await store.get_claimed_step_keys(run_id),
            "dispatches": await store.get_dispatches(run_id),
            "dispatched": await store.get_dispatched_step_keys(run_id),
            "control": await store.get_run_control(run_id),
            "waiters": await store.get_waiters(run_id),
            "outputs": dict(await store.get_outputs(run_id)),
            "events": await store.get_run_events(run_id, take=1000),
            "derived": await store.get_derived_runs(run_id),
        }
    return shown


async def together(calls: Iterable[Awaitable[T]]) -> list[T]:
    """The results of calls that run at the same time; the first error, if any is raised."""
    return list(await asyncio.gather(*calls))


async def outcomes(calls: Iterable[Awaitable[T]]) -> list[T | BaseException]:
    """The results and the errors of calls that run at the same time."""
    return list(await asyncio.gather(*calls, return_exceptions=True))


async def assert_sound(store: FlowStore, *run_ids: UUID) -> None:
    """What is true of a run at any moment, whatever happened to it and whatever is going on."""
    for run_id in run_ids:
        detail = await store.get_run_detail(run_id)
        if detail is None:
            continue
        assert (detail.completed_at is None) is (detail.status is RunStatus.RUNNING)
        for step in detail.steps:
            last = step.attempts[-1]
            numbers = [attempt.attempt for attempt in step.attempts]
            assert numbers == list(range(1, len(numbers) + 1))
            open_ones = [a.attempt for a in step.attempts if a.status is StepStatus.RUNNING]
            assert open_ones == [a.attempt for a in step.attempts if a.completed_at is None]
            reopened = step.attempt_count == len(numbers) + 1
            if reopened:
                assert open_ones == []
                assert (step.status, step.output_json, step.error_message) == (StepStatus.PENDING, None, None)
            else:
                assert step.attempt_count == len(numbers)
                assert open_ones in ([], [last.attempt])
                assert (step.status, step.output_json, step.error_message) == (
                    last.status,
                    last.output_json,
                    last.error_message,
                )
            assert (step.completed_at is not None) is step.status.is_terminal
            assert step.started_at == step.attempts[0].started_at
        for waiter in await store.get_waiters(run_id):
            assert waiter.delivered_at is None or waiter.expired_at is None
            assert (waiter.delivered_at is None) is (waiter.payload_json is None)
        events = await store.get_run_events(run_id, take=1000)
        assert [event.sequence for event in events] == sorted({event.sequence for event in events})
