"""RUN: starting and completing runs, and what a terminal run still allows."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any
from uuid import uuid4

import pytest

from flowstore_core import (
    Capability,
    FlowRunDetail,
    FlowRunRecord,
    FlowStore,
    RunAlreadyExistsError,
    RunCompletedError,
    RunStatus,
    SignalDeliveryStatus,
    StepAlreadyCompletedError,
    StepStatus,
)
from tests.conftest import OpenAnother
from tests.contract.scenes import FLOW, MINUTE, new_run, outcomes, picture, run_step, the_step, together
from tests.virtual_clock import VirtualClock

TERMINAL = [RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.CANCELLED]


async def test_run_1_start_run_stores_a_running_run(store: FlowStore, clock: VirtualClock) -> None:
    run_id, source = uuid4(), uuid4()
    started = await store.start_run(
        FLOW, "orders", run_id, "manual", trigger_data='{"a": 1}', job_id="job", source_run_id=source
    )
    expected: dict[str, Any] = {
        "run_id": run_id,
        "flow_id": FLOW,
        "flow_name": "orders",
        "status": RunStatus.RUNNING,
        "trigger_key": "manual",
        "trigger_data": '{"a": 1}',
        "job_id": "job",
        "started_at": clock(),
        "completed_at": None,
        "source_run_id": source,
    }
    assert started == FlowRunRecord(**expected)
    assert await store.get_runs() == (FlowRunRecord(**expected),)
    assert await store.get_run_detail(run_id) == FlowRunDetail(**expected, steps=())
    assert await store.get_run_status(run_id) is RunStatus.RUNNING


async def test_run_1_what_is_not_given_is_none(store: FlowStore) -> None:
    run = await store.start_run(FLOW, "orders", uuid4(), "manual")
    assert (run.trigger_data, run.job_id, run.source_run_id, run.completed_at) == (None, None, None, None)
    assert await store.get_run_control(run.run_id) is None


async def test_run_1_a_run_id_that_exists_changes_nothing(store: FlowStore) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id)
    before = await picture(store, run_id)
    with pytest.raises(RunAlreadyExistsError) as caught:
        await store.start_run(uuid4(), "other", run_id, "other", trigger_data="other")
    assert caught.value.run_id == run_id
    assert await picture(store, run_id) == before


async def test_run_1_a_completed_run_is_not_started_again(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.complete_run(run_id, RunStatus.FAILED)
    with pytest.raises(RunAlreadyExistsError):
        await new_run(store, run_id=run_id)
    assert await store.get_run_status(run_id) is RunStatus.FAILED


async def test_run_1_exactly_one_of_many_starts_one_run(store: FlowStore, open_another: OpenAnother) -> None:
    stores = [store, await open_another(), await open_another()]
    for _ in range(5):
        run_id = uuid4()
        answers = await outcomes(
            stores[n % 3].start_run(FLOW, f"flow {n}", run_id, "manual") for n in range(9)
        )
        (won,) = [answer for answer in answers if not isinstance(answer, BaseException)]
        lost = [answer for answer in answers if isinstance(answer, BaseException)]
        assert [type(error) for error in lost] == [RunAlreadyExistsError] * 8
        detail = await store.get_run_detail(run_id)
        assert detail is not None
        assert detail.flow_name == won.flow_name


@pytest.mark.parametrize("status", TERMINAL)
async def test_run_2_complete_run_sets_status_and_time(
    store: FlowStore, clock: VirtualClock, status: RunStatus
) -> None:
    run_id = await new_run(store)
    (before,) = await store.get_runs()
    now = clock.advance(minutes=3)
    assert await store.complete_run(run_id, status) is True
    (after,) = await store.get_runs()
    assert (after.status, after.completed_at) == (status, now)
    assert (after.started_at, after.flow_name) == (before.started_at, before.flow_name)
    assert await store.get_run_status(run_id) is status


async def test_run_2_the_status_may_be_a_plain_str(store: FlowStore) -> None:
    run_id = await new_run(store)
    assert await store.complete_run(run_id, "Cancelled")  # type: ignore[arg-type]
    status = await store.get_run_status(run_id)
    assert status is RunStatus.CANCELLED


@pytest.mark.parametrize("second", TERMINAL)
async def test_run_2_the_first_terminal_status_wins(
    store: FlowStore, clock: VirtualClock, second: RunStatus
) -> None:
    run_id = await new_run(store)
    assert await store.complete_run(run_id, RunStatus.FAILED)
    before = await picture(store, run_id)
    clock.advance(minutes=1)
    for _ in range(2):
        assert await store.complete_run(run_id, second) is False
        assert await store.complete_run(run_id, second, expected={}) is False
    clock.now -= MINUTE
    assert await picture(store, run_id) == before


async def test_run_2_exactly_one_of_many_completes(store: FlowStore, open_another: OpenAnother) -> None:
    stores = [store, await open_another(), await open_another()]
    for _ in range(5):
        run_id = await new_run(store)
        asked = [TERMINAL[n % 3] for n in range(12)]
        won = await together(
            stores[n % len(stores)].complete_run(run_id, status) for n, status in enumerate(asked)
        )
        assert sum(won) == 1
        assert await store.get_run_status(run_id) is asked[won.index(True)]


async def _steps_of_every_status(store: FlowStore) -> tuple[Any, dict[str, StepStatus]]:
    run_id = await new_run(store)
    statuses = {
        "pending": StepStatus.PENDING,
        "succeeded": StepStatus.SUCCEEDED,
        "failed": StepStatus.FAILED,
        "skipped": StepStatus.SKIPPED,
    }
    for key, status in statuses.items():
        await run_step(store, run_id, key, status)
    await store.record_step_start(run_id, "running", "http")
    return run_id, {**statuses, "running": StepStatus.RUNNING}


async def test_run_2_expected_completes_when_the_statuses_are_exactly_these(store: FlowStore) -> None:
    run_id, statuses = await _steps_of_every_status(store)
    assert await store.complete_run(run_id, RunStatus.SUCCEEDED, expected=statuses) is True
    assert await store.get_run_status(run_id) is RunStatus.SUCCEEDED


async def test_run_2_expected_takes_plain_str(store: FlowStore) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id, "a")
    assert await store.complete_run(run_id, RunStatus.SUCCEEDED, expected={"a": "Succeeded"})  # type: ignore[dict-item]


async def test_run_2_expected_nothing_completes_a_run_without_steps(store: FlowStore) -> None:
    run_id = await new_run(store)
    assert await store.complete_run(run_id, RunStatus.SUCCEEDED, expected={}) is True


@pytest.mark.parametrize(
    "change",
    [
        {"succeeded": StepStatus.FAILED},
        {"running": StepStatus.PENDING},
        {"pending": None},
        {"failed": None},
        {"unknown": StepStatus.SUCCEEDED},
        {"Failed": StepStatus.FAILED},
    ],
)
async def test_run_2_expected_refuses_any_difference(
    store: FlowStore, change: dict[str, StepStatus | None]
) -> None:
    run_id, statuses = await _steps_of_every_status(store)
    before = await picture(store, run_id)
    expected = {key: status for key, status in {**statuses, **change}.items() if status is not None}
    assert await store.complete_run(run_id, RunStatus.SUCCEEDED, expected=expected) is False
    assert await store.complete_run(run_id, RunStatus.SUCCEEDED, expected={}) is False
    assert await picture(store, run_id) == before


async def test_run_2_expected_refuses_while_another_key_is_dispatched(store: FlowStore) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id, "a")
    expected = {"a": StepStatus.SUCCEEDED}
    await store.try_record_dispatch(run_id, "b")
    assert await store.complete_run(run_id, RunStatus.SUCCEEDED, expected=expected) is False
    await store.release_dispatch(run_id, "b")
    assert await store.complete_run(run_id, RunStatus.SUCCEEDED, expected=expected) is True


async def test_run_2_expected_refuses_while_another_key_is_claimed(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "b", owner="me")
    assert await store.complete_run(run_id, RunStatus.SUCCEEDED, expected={}) is False
    await store.release_step_claim(run_id, "b")
    assert await store.complete_run(run_id, RunStatus.SUCCEEDED, expected={}) is True


@pytest.mark.needs(Capability.LEASES)
async def test_run_2_expected_looks_at_live_claims_alone(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "b", owner="me", lease=MINUTE)
    assert await store.complete_run(run_id, RunStatus.SUCCEEDED, expected={}) is False
    clock.advance(minutes=1)
    assert await store.complete_run(run_id, RunStatus.SUCCEEDED, expected={}) is True


async def test_run_2_expected_ignores_claims_and_dispatches_of_the_keys_in_it(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.try_record_dispatch(run_id, "a")
    await store.try_claim_step(run_id, "a", owner="me")
    await run_step(store, run_id, "a", StepStatus.PENDING)
    expected = {"a": StepStatus.PENDING}
    assert await store.complete_run(run_id, RunStatus.SUCCEEDED, expected=expected) is True


async def test_run_2_expected_refuses_when_a_step_was_just_retried(store: FlowStore) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id, "a", StepStatus.FAILED)
    seen = await store.get_step_statuses(run_id)
    await store.retry_step(run_id, "a")
    assert await store.complete_run(run_id, RunStatus.FAILED, expected=seen) is False
    assert await store.get_run_status(run_id) is RunStatus.RUNNING


async def test_run_2_a_run_never_finishes_under_a_step_that_was_dispatched(
    store: FlowStore, open_another: OpenAnother
) -> None:
    other = await open_another()
    both = set()
    for _ in range(20):
        run_id = await new_run(store)
        completed, dispatched = await together(
            [
                store.complete_run(run_id, RunStatus.SUCCEEDED, expected={}),
                other.try_record_dispatch(run_id, "late"),
            ]
        )
        both.add((completed, dispatched))
    assert both <= {(True, False), (False, True)}


async def test_run_3_returned_records_are_snapshots(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    await store.try_record_dispatch(run_id, "a")
    await store.try_claim_step(run_id, "a", owner="me")
    await store.record_step_start(run_id, "a", "http")
    await store.configure_run(run_id, FLOW, "manual", timeout_at=clock() + MINUTE)
    await store.register_waiter(run_id, "a", "go", expires_at=clock() + MINUTE)
    await store.save_output(run_id, "x", "1")
    await store.append_event(run_id, "begun")

    taken = await picture(store, run_id)
    page = await store.get_runs_page()
    shown = repr((taken, page))
    statuses, outputs = await store.get_step_statuses(run_id), await store.get_outputs(run_id)

    clock.advance(minutes=2)
    await store.deliver_signal(run_id, "go", "{}")
    await store.save_output(run_id, "x", "2")
    await store.save_output(run_id, "y", "2")
    await store.append_event(run_id, "more")
    await store.request_cancel(run_id)
    await store.release_dispatch(run_id, "a")
    await store.release_step_claim(run_id, "a")
    await store.record_step_complete(run_id, "a", StepStatus.SUCCEEDED, output_json="done")
    await store.record_skipped_step(run_id, "b", "http")
    await store.complete_run(run_id, RunStatus.SUCCEEDED)

    assert repr((taken, page)) == shown
    assert dict(statuses) == {"a": StepStatus.RUNNING}
    assert dict(outputs) == {"x": "1"}


async def test_run_3_records_and_mappings_are_read_only(store: FlowStore) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id, "a")
    await store.save_output(run_id, "x", "1")
    (run,) = await store.get_runs()
    step = await the_step(store, run_id, "a")
    for record in (run, step, step.attempts[0]):
        with pytest.raises(FrozenInstanceError):
            record.run_id = uuid4()  # type: ignore[misc]
        assert not hasattr(record, "__dict__")
    for mapping in (await store.get_step_statuses(run_id), await store.get_outputs(run_id)):
        with pytest.raises(TypeError):
            mapping["a"] = "b"  # type: ignore[index]


async def test_run_3_collections_are_tuples_and_sets_are_frozen(store: FlowStore) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id, "a")
    page = await store.get_runs_page()
    detail = await store.get_run_detail(run_id)
    assert detail is not None
    lists = [
        await store.get_runs(),
        await store.get_active_runs(),
        await store.get_derived_runs(run_id),
        await store.get_step_claims(run_id),
        await store.get_dispatches(run_id),
        await store.get_waiters(run_id),
        await store.get_run_events(run_id),
        await store.get_stalled_steps(),
        await store.get_runs_to_stop(),
        page.runs,
        detail.steps,
        detail.steps[0].attempts,
    ]
    assert [type(value) for value in lists] == [tuple] * len(lists)
    assert type(await store.get_claimed_step_keys(run_id)) is frozenset
    assert type(await store.get_dispatched_step_keys(run_id)) is frozenset


async def test_run_3_values_have_the_types_of_the_records(store: FlowStore) -> None:
    run_id = await new_run(store, source_run_id=uuid4())
    await run_step(store, run_id, "a")
    detail = await store.get_run_detail(run_id)
    assert detail is not None
    assert type(detail) is FlowRunDetail
    # A driver's own subclass of UUID would not pickle where that driver is not installed.
    for value in (detail.run_id, detail.flow_id, detail.source_run_id, detail.steps[0].run_id):
        assert type(value).__module__ == "uuid"
    assert type(detail.status) is RunStatus
    assert type(detail.steps[0].status) is StepStatus
    assert type(detail.steps[0].attempts[0].status) is StepStatus
    assert [type(value) for value in (await store.get_step_statuses(run_id)).values()] == [StepStatus]
    assert type(await store.get_run_status(run_id)) is RunStatus


@pytest.mark.parametrize("status", TERMINAL)
async def test_run_4_no_step_starts_on_a_terminal_run(store: FlowStore, status: RunStatus) -> None:
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "b", owner="me")
    await run_step(store, run_id, "a", StepStatus.FAILED)
    await store.complete_run(run_id, status)
    before = await picture(store, run_id)
    for key, owner in (("a", None), ("b", None), ("b", "me"), ("b", "not me"), ("new", None)):
        with pytest.raises(RunCompletedError) as caught:
            await store.record_step_start(run_id, key, "http", owner=owner)
        assert caught.value.run_id == run_id
    assert await picture(store, run_id) == before


async def test_run_4_the_run_is_checked_before_the_step_and_the_step_before_the_claim(
    store: FlowStore,
) -> None:
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "a", owner="me")
    await run_step(store, run_id, "a")
    with pytest.raises(StepAlreadyCompletedError):
        await store.record_step_start(run_id, "a", "http", owner="not me")
    await store.complete_run(run_id, RunStatus.SUCCEEDED)
    with pytest.raises(RunCompletedError):
        await store.record_step_start(run_id, "a", "http", owner="not me")


@pytest.mark.parametrize("status", TERMINAL)
async def test_run_4_completing_an_open_attempt_stays_allowed(
    store: FlowStore, clock: VirtualClock, status: RunStatus
) -> None:
    run_id = await new_run(store)
    await store.record_step_start(run_id, "a", "http")
    await store.complete_run(run_id, status)
    now = clock.advance(seconds=1)
    await store.record_step_complete(run_id, "a", StepStatus.SUCCEEDED, output_json="done", attempt=1)
    step = await the_step(store, run_id, "a")
    assert (step.status, step.output_json, step.completed_at) == (StepStatus.SUCCEEDED, "done", now)
    assert await store.get_run_status(run_id) is status


async def test_run_4_skipping_stays_allowed(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.complete_run(run_id, RunStatus.CANCELLED)
    await store.record_skipped_step(run_id, "a", "http", "cancelled")
    await store.record_skipped_step(run_id, "b", "http", "cancelled", owner="me")
    assert await store.get_step_statuses(run_id) == {"a": StepStatus.SKIPPED, "b": StepStatus.SKIPPED}
    assert [claim.owner for claim in await store.get_step_claims(run_id)] == ["me"]


async def test_run_4_waiters_stay_allowed(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.complete_run(run_id, RunStatus.SUCCEEDED)
    await store.register_waiter(run_id, "a", "go")
    delivered = await store.deliver_signal(run_id, "go", "{}")
    assert delivered.status is SignalDeliveryStatus.DELIVERED
    assert await store.remove_waiter(run_id, "a") is not None


async def test_run_4_outputs_and_events_stay_allowed(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.complete_run(run_id, RunStatus.SUCCEEDED)
    await store.save_output(run_id, "x", "1")
    assert await store.append_event(run_id, "after") == 1
    assert await store.get_output(run_id, "x") == "1"
