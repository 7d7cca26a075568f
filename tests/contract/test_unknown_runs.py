"""UNK: what each operation says of a run, or a step, that the store does not hold."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import pytest

from flowstore_core import (
    FlowStore,
    RunNotFoundError,
    RunStatus,
    SignalDeliveryResult,
    SignalDeliveryStatus,
    StepNotFoundError,
    StepStatus,
)
from tests.contract.scenes import FLOW, MINUTE, new_run, picture, run_step
from tests.virtual_clock import VirtualClock

Call = Callable[[FlowStore, UUID], Awaitable[Any]]

_MOMENT = datetime(2026, 3, 14, tzinfo=UTC)

RAISING: dict[str, Call] = {
    "record_step_start": lambda store, run: store.record_step_start(run, "a", "http"),
    "record_step_start with owner": lambda store, run: store.record_step_start(run, "a", "http", owner="me"),
    "record_step_complete": lambda store, run: store.record_step_complete(run, "a", StepStatus.FAILED),
    "record_skipped_step": lambda store, run: store.record_skipped_step(run, "a", "http"),
    "record_skipped_step with owner": lambda store, run: store.record_skipped_step(
        run, "a", "http", owner="me"
    ),
    "complete_run": lambda store, run: store.complete_run(run, RunStatus.SUCCEEDED),
    "complete_run expecting": lambda store, run: store.complete_run(run, RunStatus.SUCCEEDED, expected={}),
    "retry_step": lambda store, run: store.retry_step(run, "a"),
    "retry_step with attempt": lambda store, run: store.retry_step(run, "a", attempt=1, reset=["b"]),
    "try_record_dispatch": lambda store, run: store.try_record_dispatch(run, "a"),
    "try_claim_step": lambda store, run: store.try_claim_step(run, "a"),
    "try_claim_step with owner": lambda store, run: store.try_claim_step(run, "a", owner="me", lease=MINUTE),
    "register_waiter": lambda store, run: store.register_waiter(run, "a", "go"),
    "reschedule_step": lambda store, run: store.reschedule_step(run, "a", attempt=1),
    "append_event": lambda store, run: store.append_event(run, "event"),
    "save_output": lambda store, run: store.save_output(run, "a", "1"),
}

EMPTY: dict[str, tuple[Call, Any]] = {
    "get_run_detail": (lambda store, run: store.get_run_detail(run), None),
    "get_run_status": (lambda store, run: store.get_run_status(run), None),
    "get_run_control": (lambda store, run: store.get_run_control(run), None),
    "get_waiter": (lambda store, run: store.get_waiter(run, "a"), None),
    "get_output": (lambda store, run: store.get_output(run, "a"), None),
    "get_outputs": (lambda store, run: store.get_outputs(run), {}),
    "get_step_statuses": (lambda store, run: store.get_step_statuses(run), {}),
    "get_claimed_step_keys": (lambda store, run: store.get_claimed_step_keys(run), frozenset()),
    "get_dispatched_step_keys": (lambda store, run: store.get_dispatched_step_keys(run), frozenset()),
    "get_step_claims": (lambda store, run: store.get_step_claims(run), ()),
    "get_dispatches": (lambda store, run: store.get_dispatches(run), ()),
    "get_waiters": (lambda store, run: store.get_waiters(run), ()),
    "get_run_events": (lambda store, run: store.get_run_events(run), ()),
    "get_derived_runs": (lambda store, run: store.get_derived_runs(run), ()),
    "get_runs": (lambda store, run: store.get_runs(run), ()),
    # No-ops.
    "release_step_claim": (lambda store, run: store.release_step_claim(run, "a"), None),
    "release_step_claim of": (lambda store, run: store.release_step_claim(run, "a", owner="me"), None),
    "release_dispatch": (lambda store, run: store.release_dispatch(run, "a"), None),
    "annotate_dispatch": (lambda store, run: store.annotate_dispatch(run, "a", "job"), None),
    "remove_waiter": (lambda store, run: store.remove_waiter(run, "a"), None),
    "expire_waiter": (lambda store, run: store.expire_waiter(run, "a"), None),
    # Answers.
    "deliver_signal": (
        lambda store, run: store.deliver_signal(run, "go", "{}", delivery_id="id"),
        SignalDeliveryResult(status=SignalDeliveryStatus.NOT_FOUND, step_key=None, delivered_at=None),
    ),
    "request_cancel": (lambda store, run: store.request_cancel(run, "reason"), False),
    "mark_timed_out": (lambda store, run: store.mark_timed_out(run, "reason"), False),
    "mark_timed_out as_of": (lambda store, run: store.mark_timed_out(run, as_of=_MOMENT), False),
    "renew_step_claim": (lambda store, run: store.renew_step_claim(run, "a", "me", MINUTE), False),
    "extend_deadline": (lambda store, run: store.extend_deadline(run, _MOMENT), False),
}


@pytest.mark.parametrize("name", RAISING)
async def test_unk_writing_the_state_of_an_unknown_run_raises(store: FlowStore, name: str) -> None:
    unknown = uuid4()
    other = await new_run(store)
    await run_step(store, other, "a", StepStatus.FAILED)
    before = await picture(store, unknown, other)
    with pytest.raises(RunNotFoundError) as caught:
        await RAISING[name](store, unknown)
    assert caught.value.run_id == unknown
    assert isinstance(caught.value, LookupError)
    assert await picture(store, unknown, other) == before


@pytest.mark.parametrize("name", EMPTY)
async def test_unk_reading_or_releasing_of_an_unknown_run_finds_nothing(store: FlowStore, name: str) -> None:
    call, answer = EMPTY[name]
    unknown = uuid4()
    other = await new_run(store)
    before = await picture(store, unknown, other)
    assert await call(store, unknown) == answer
    assert await picture(store, unknown, other) == before


async def test_unk_a_control_record_alone_is_no_run(store: FlowStore, clock: VirtualClock) -> None:
    run_id = uuid4()
    await store.configure_run(run_id, FLOW, "manual", timeout_at=clock())
    await store.try_register_idempotency_key(FLOW, "manual", "key", run_id)
    for call in RAISING.values():
        with pytest.raises(RunNotFoundError):
            await call(store, run_id)
    assert await store.get_run_status(run_id) is None
    assert await store.get_runs_to_stop() == ()


@pytest.mark.parametrize("how", ["never mentioned", "dispatched", "claimed", "waiting"])
async def test_unk_a_known_run_without_the_step(store: FlowStore, how: str) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id, "other", StepStatus.FAILED)
    if how == "dispatched":
        await store.try_record_dispatch(run_id, "a")
    elif how == "claimed":
        await store.try_claim_step(run_id, "a", owner="me")
    elif how == "waiting":
        await store.register_waiter(run_id, "a", "go")
    before = await picture(store, run_id)
    for name in ("record_step_complete", "retry_step", "retry_step with attempt", "reschedule_step"):
        with pytest.raises(StepNotFoundError) as caught:
            await RAISING[name](store, run_id)
        assert (caught.value.run_id, caught.value.step_key) == (run_id, "a")
        assert isinstance(caught.value, LookupError)
    assert await picture(store, run_id) == before
