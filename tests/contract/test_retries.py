"""STP-6: retry_step reopens a step and its run."""

from __future__ import annotations

from uuid import UUID

import pytest

from flowstore_core import (
    Capability,
    FlowStore,
    RunStatus,
    StaleAttemptError,
    StepNotFoundError,
    StepStatus,
)
from tests.conftest import OpenAnother
from tests.contract.scenes import (
    FLOW,
    MINUTE,
    new_run,
    outcomes,
    picture,
    run_step,
    the_attempts,
    the_step,
    together,
)
from tests.virtual_clock import VirtualClock

CLOSED = [StepStatus.SUCCEEDED, StepStatus.FAILED, StepStatus.SKIPPED, StepStatus.PENDING]


async def _a_failed_run(store: FlowStore) -> UUID:
    run_id = await new_run(store)
    await run_step(store, run_id, "charge", StepStatus.FAILED, error_message="declined")
    await store.complete_run(run_id, RunStatus.FAILED)
    return run_id


@pytest.mark.parametrize("status", CLOSED)
async def test_stp_6_the_step_becomes_pending_and_cleared(
    store: FlowStore, clock: VirtualClock, status: StepStatus
) -> None:
    run_id = await new_run(store)
    started = clock()
    await store.record_step_start(run_id, "charge", "http", input_json="in", job_id="job")
    clock.advance(seconds=1)
    await store.record_step_complete(run_id, "charge", status, output_json="out", error_message="error")
    before = await the_attempts(store, run_id)
    clock.advance(seconds=1)
    await store.retry_step(run_id, "charge")
    step = await the_step(store, run_id)
    assert (step.status, step.output_json, step.error_message) == (StepStatus.PENDING, None, None)
    assert (step.started_at, step.completed_at) == (started, None)
    assert (step.step_type, step.input_json, step.job_id) == ("http", "in", "job")
    assert step.attempt_count == 2
    assert step.attempts == before
    assert await store.get_step_statuses(run_id) == {"charge": StepStatus.PENDING}


async def test_stp_6_an_open_attempt_is_closed_as_failed(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    await store.record_step_start(run_id, "charge", "http")
    now = clock.advance(seconds=1)
    await store.retry_step(run_id, "charge")
    (attempt,) = await the_attempts(store, run_id)
    assert (attempt.status, attempt.completed_at) == (StepStatus.FAILED, now)
    assert "2" in (attempt.error_message or "")


async def test_stp_6_claim_dispatch_and_undelivered_waiter_go(store: FlowStore) -> None:
    run_id = await new_run(store)
    for key in ("charge", "other"):
        await store.try_record_dispatch(run_id, key)
        await store.try_claim_step(run_id, key, owner="me")
        await store.record_step_start(run_id, key, "http", owner="me")
        await store.register_waiter(run_id, key, "go")
    await store.retry_step(run_id, "charge")
    assert [claim.step_key for claim in await store.get_step_claims(run_id)] == ["other"]
    assert await store.get_dispatched_step_keys(run_id) == {"other"}
    assert await store.get_waiter(run_id, "charge") is None
    assert await store.get_waiter(run_id, "other") is not None
    assert await store.try_record_dispatch(run_id, "charge")
    assert await store.try_claim_step(run_id, "charge", owner="next")


async def test_stp_6_a_delivered_waiter_stays(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.record_step_start(run_id, "charge", "http")
    await store.register_waiter(run_id, "charge", "go")
    await store.deliver_signal(run_id, "go", "payload")
    before = await store.get_waiter(run_id, "charge")
    await store.retry_step(run_id, "charge")
    assert await store.get_waiter(run_id, "charge") == before
    assert before is not None


@pytest.mark.needs(Capability.WAITERS)
async def test_stp_6_an_expired_waiter_goes(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    await store.record_step_start(run_id, "charge", "http")
    await store.register_waiter(run_id, "charge", "go", expires_at=clock())
    await store.expire_waiter(run_id, "charge")
    await store.retry_step(run_id, "charge")
    assert await store.get_waiter(run_id, "charge") is None


@pytest.mark.parametrize("status", [RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.CANCELLED])
async def test_stp_6_the_run_is_running_again(
    store: FlowStore, clock: VirtualClock, status: RunStatus
) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id, "charge", StepStatus.FAILED)
    await store.complete_run(run_id, status)
    (before,) = await store.get_runs()
    clock.advance(minutes=1)
    await store.retry_step(run_id, "charge")
    (after,) = await store.get_runs()
    assert (after.status, after.completed_at) == (RunStatus.RUNNING, None)
    assert after.started_at == before.started_at
    assert await store.get_active_runs() == (after,)
    assert await store.complete_run(run_id, RunStatus.SUCCEEDED) is True


async def test_stp_6_latches_and_an_elapsed_deadline_of_a_terminal_run_are_cleared(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await _a_failed_run(store)
    await store.configure_run(run_id, FLOW, "manual", idempotency_key="key", timeout_at=clock() + MINUTE)
    before = await store.get_run_control(run_id)
    clock.advance(minutes=1)
    await store.request_cancel(run_id, "user")
    await store.mark_timed_out(run_id, "late")
    await store.retry_step(run_id, "charge")
    control = await store.get_run_control(run_id)
    assert control is not None
    assert before is not None
    assert (control.cancel_requested, control.cancel_reason, control.cancel_requested_at) == (
        False,
        None,
        None,
    )
    assert (control.timed_out_at, control.timeout_at) == (None, None)
    assert (control.idempotency_key, control.created_at) == ("key", before.created_at)
    # The latches are latches again.
    assert await store.request_cancel(run_id) is True
    assert await store.mark_timed_out(run_id) is True


async def test_stp_6_a_deadline_to_come_stays(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await _a_failed_run(store)
    deadline = clock() + MINUTE
    await store.configure_run(run_id, FLOW, "manual", timeout_at=deadline)
    clock.advance(seconds=59)
    await store.retry_step(run_id, "charge")
    control = await store.get_run_control(run_id)
    assert control is not None
    assert control.timeout_at == deadline


async def test_stp_6_the_latches_of_a_running_run_stay(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id, "charge", StepStatus.FAILED)
    await store.configure_run(run_id, FLOW, "manual", timeout_at=clock())
    await store.request_cancel(run_id, "user")
    await store.mark_timed_out(run_id, "late")
    before = await store.get_run_control(run_id)
    clock.advance(minutes=1)
    await store.retry_step(run_id, "charge")
    assert await store.get_run_control(run_id) == before


async def test_stp_6_a_control_record_without_deadline_is_cleared_too(store: FlowStore) -> None:
    run_id = await _a_failed_run(store)
    await store.configure_run(run_id, FLOW, "manual", idempotency_key="key")
    before = await store.get_run_control(run_id)
    await store.request_cancel(run_id, "user")
    await store.retry_step(run_id, "charge")
    assert await store.get_run_control(run_id) == before


async def test_stp_6_a_run_without_control_record_gets_none(store: FlowStore) -> None:
    run_id = await _a_failed_run(store)
    await store.retry_step(run_id, "charge")
    assert await store.get_run_control(run_id) is None


@pytest.mark.parametrize("attempt", [None, 1])
async def test_stp_6_again_before_the_start_changes_nothing(
    store: FlowStore, clock: VirtualClock, attempt: int | None
) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id, "charge", StepStatus.FAILED)
    await store.record_skipped_step(run_id, "after", "http")
    await store.retry_step(run_id, "charge", attempt=attempt)
    await store.try_record_dispatch(run_id, "charge")
    await store.try_claim_step(run_id, "charge", owner="me")
    await store.register_waiter(run_id, "charge", "go")
    before = await picture(store, run_id)
    clock.advance(seconds=1)
    await store.retry_step(run_id, "charge", attempt=attempt, reset=["after"])
    clock.advance(seconds=-1)
    assert await picture(store, run_id) == before


@pytest.mark.parametrize("attempt", [None, 1])
async def test_stp_6_again_after_the_run_became_terminal_it_is_running_again(
    store: FlowStore, clock: VirtualClock, attempt: int | None
) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id, "charge", StepStatus.FAILED)
    await store.retry_step(run_id, "charge")
    await store.try_record_dispatch(run_id, "charge")
    await store.try_claim_step(run_id, "charge", owner="me")
    before = await picture(store, run_id)
    await store.configure_run(run_id, FLOW, "manual", timeout_at=clock())
    await store.request_cancel(run_id)
    await store.complete_run(run_id, RunStatus.CANCELLED)
    await store.retry_step(run_id, "charge", attempt=attempt)
    control = await store.get_run_control(run_id)
    assert control is not None
    assert (control.cancel_requested, control.timeout_at) == (False, None)
    after = await picture(store, run_id)
    assert after[str(run_id)].pop("control") is not None
    assert before[str(run_id)].pop("control") is None
    assert after == before


async def test_stp_6_after_the_next_start_a_retry_reopens_again(store: FlowStore) -> None:
    run_id = await new_run(store)
    for number in (1, 2, 3):
        assert await run_step(store, run_id, "charge", StepStatus.FAILED) == number
        await store.retry_step(run_id, "charge", attempt=number)
        step = await the_step(store, run_id)
        assert (step.status, step.attempt_count) == (StepStatus.PENDING, number + 1)
    assert [a.attempt for a in (await the_step(store, run_id)).attempts] == [1, 2, 3]


@pytest.mark.parametrize("attempt", [1, 3, 2**63 - 1])
async def test_stp_6_an_attempt_that_is_not_the_last_is_a_double_click(
    store: FlowStore, attempt: int
) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id, "charge", StepStatus.FAILED)
    await run_step(store, run_id, "charge", StepStatus.FAILED)
    await store.complete_run(run_id, RunStatus.FAILED)
    before = await picture(store, run_id)
    with pytest.raises(StaleAttemptError) as caught:
        await store.retry_step(run_id, "charge", attempt=attempt)
    error = caught.value
    assert (error.run_id, error.step_key, error.attempt, error.last_attempt) == (run_id, "charge", attempt, 2)
    assert await picture(store, run_id) == before


async def test_stp_6_the_attempt_to_come_is_not_the_last_one_started(store: FlowStore) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id, "charge", StepStatus.FAILED)
    await store.retry_step(run_id, "charge")
    with pytest.raises(StaleAttemptError):
        await store.retry_step(run_id, "charge", attempt=2)


async def test_stp_6_double_clicks_at_once_reopen_once(store: FlowStore, open_another: OpenAnother) -> None:
    stores = [store, await open_another()]
    run_id = await _a_failed_run(store)
    await together(stores[n % 2].retry_step(run_id, "charge", attempt=1) for n in range(8))
    step = await the_step(store, run_id)
    assert (step.status, step.attempt_count, len(step.attempts)) == (StepStatus.PENDING, 2, 1)


async def test_stp_6_a_late_double_click_meets_the_started_attempt(
    store: FlowStore, open_another: OpenAnother
) -> None:
    other = await open_another()
    for _ in range(5):
        run_id = await _a_failed_run(store)
        await store.retry_step(run_id, "charge", attempt=1)
        number, clicked = await outcomes(
            [
                store.record_step_start(run_id, "charge", "http"),
                other.retry_step(run_id, "charge", attempt=1),
            ]
        )
        assert number == 2
        assert clicked is None or isinstance(clicked, StaleAttemptError)
        assert (await the_step(store, run_id)).status is StepStatus.RUNNING


async def test_stp_6_reset_makes_skipped_keys_unstarted(store: FlowStore) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id, "charge", StepStatus.FAILED)
    await store.record_skipped_step(run_id, "ship", "http", "charge failed", owner="planner")
    await store.record_skipped_step(run_id, "mail", "http", "charge failed")
    await store.register_waiter(run_id, "ship", "go")
    await store.complete_run(run_id, RunStatus.FAILED)
    await store.retry_step(run_id, "charge", reset=["ship"])
    assert await store.get_step_statuses(run_id) == {
        "charge": StepStatus.PENDING,
        "mail": StepStatus.SKIPPED,
    }
    detail = await store.get_run_detail(run_id)
    assert detail is not None
    assert [step.step_key for step in detail.steps] == ["charge", "mail"]
    assert await store.get_step_claims(run_id) == ()
    assert await store.get_dispatches(run_id) == ()
    assert await store.get_waiter(run_id, "ship") is None


async def test_stp_6_a_reset_steps_attempts_and_numbering_wait_for_its_next_start(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id, "charge", StepStatus.FAILED)
    await run_step(store, run_id, "ship", StepStatus.PENDING, error_message="first")
    await store.record_skipped_step(run_id, "ship", "http", "second")
    before = await the_step(store, run_id, "ship")
    clock.advance(seconds=1)
    await store.retry_step(run_id, "charge", reset=["ship"])
    assert await store.record_step_start(run_id, "ship", "grpc") == 3
    after = await the_step(store, run_id, "ship")
    assert after.attempts[:2] == before.attempts
    assert (after.status, after.attempt_count) == (StepStatus.RUNNING, 3)
    assert after.started_at == before.started_at
    await store.record_step_complete(run_id, "ship", StepStatus.SUCCEEDED, attempt=3)


async def test_stp_6_a_reset_step_is_not_found_until_its_next_start(store: FlowStore) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id, "charge", StepStatus.FAILED)
    await store.record_skipped_step(run_id, "ship", "http")
    await store.retry_step(run_id, "charge", reset=["ship"])
    before = await picture(store, run_id)
    for attempt in (None, 1):
        with pytest.raises(StepNotFoundError):
            await store.record_step_complete(run_id, "ship", StepStatus.SKIPPED, attempt=attempt)
        with pytest.raises(StepNotFoundError):
            await store.retry_step(run_id, "ship", attempt=attempt)
    with pytest.raises(StepNotFoundError):
        await store.reschedule_step(run_id, "ship", attempt=1)
    assert await picture(store, run_id) == before


async def test_stp_6_a_reset_step_can_be_dispatched_claimed_and_skipped_again(store: FlowStore) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id, "charge", StepStatus.FAILED)
    await store.record_skipped_step(run_id, "ship", "http", "reason", owner="planner")
    await store.retry_step(run_id, "charge", reset=["ship"])
    assert await store.try_record_dispatch(run_id, "ship")
    assert await store.try_claim_step(run_id, "ship", owner="worker")
    assert await store.get_step_statuses(run_id) == {"charge": StepStatus.PENDING}
    assert await store.record_step_start(run_id, "ship", "http", owner="worker") == 2
    await store.record_step_complete(run_id, "ship", StepStatus.FAILED)
    await store.retry_step(run_id, "ship")
    await store.record_skipped_step(run_id, "ship", "http", "reason", owner="planner")
    assert (await the_step(store, run_id, "ship")).attempt_count == 3


async def test_stp_6_a_reset_step_skipped_by_the_same_owner_and_reason_is_skipped_anew(
    store: FlowStore,
) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id, "charge", StepStatus.FAILED)
    await store.record_skipped_step(run_id, "ship", "http", "reason", owner="planner")
    await store.retry_step(run_id, "charge", reset=["ship"])
    await store.record_skipped_step(run_id, "ship", "http", "reason", owner="planner")
    assert (await the_step(store, run_id, "ship")).attempt_count == 2


async def test_stp_6_other_keys_in_reset_are_ignored(store: FlowStore) -> None:
    run_id = await new_run(store)
    statuses = {
        "charge": StepStatus.SKIPPED,
        "done": StepStatus.SUCCEEDED,
        "failed": StepStatus.FAILED,
        "pending": StepStatus.PENDING,
    }
    for key, status in statuses.items():
        await store.try_claim_step(run_id, key, owner="me")
        await run_step(store, run_id, key, status)
    await store.record_step_start(run_id, "running", "http")
    await store.try_record_dispatch(run_id, "dispatched")
    reset = [*statuses, "running", "dispatched", "unknown"]
    await store.retry_step(run_id, "charge", reset=reset)
    assert await store.get_step_statuses(run_id) == {
        **statuses,
        "charge": StepStatus.PENDING,
        "running": StepStatus.RUNNING,
    }
    assert await store.get_dispatched_step_keys(run_id) == {"dispatched"}
    assert [c.step_key for c in await store.get_step_claims(run_id)] == ["done", "failed", "pending"]


@pytest.mark.parametrize("reset", [{"a", "b"}, ["a", "b", "a"], ("b", "a"), frozenset({"a", "b"})])
async def test_stp_6_reset_is_any_collection_of_keys(store: FlowStore, reset: list[str]) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id, "charge", StepStatus.FAILED)
    for key in ("a", "b", "c"):
        await store.record_skipped_step(run_id, key, "http")
    await store.retry_step(run_id, "charge", reset=reset)
    assert await store.get_step_statuses(run_id) == {"charge": StepStatus.PENDING, "c": StepStatus.SKIPPED}


async def test_stp_6_a_key_that_never_started_cannot_be_retried(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.try_record_dispatch(run_id, "dispatched")
    await store.record_skipped_step(run_id, "skipped", "http")
    await store.complete_run(run_id, RunStatus.FAILED)
    before = await picture(store, run_id)
    for key in ("dispatched", "unknown"):
        with pytest.raises(StepNotFoundError) as caught:
            await store.retry_step(run_id, key, attempt=1, reset=["skipped"])
        assert (caught.value.run_id, caught.value.step_key) == (run_id, key)
    assert await picture(store, run_id) == before


async def test_stp_6_other_steps_and_runs_stay_as_they_are(store: FlowStore) -> None:
    run_id, other = await new_run(store), await new_run(store)
    await run_step(store, run_id, "charge", StepStatus.FAILED)
    await run_step(store, run_id, "before", StepStatus.SUCCEEDED, output_json="kept")
    await run_step(store, other, "charge", StepStatus.FAILED)
    await store.complete_run(other, RunStatus.FAILED)
    kept = await the_step(store, run_id, "before")
    before = (await picture(store, other))[str(other)]
    await store.retry_step(run_id, "charge")
    assert await the_step(store, run_id, "before") == kept
    assert (await picture(store, other))[str(other)] == before
