"""STP-1 to STP-5: starting, completing and skipping steps."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import pytest

from flowstore_core import (
    Capability,
    ClaimLostError,
    FlowStepAttemptRecord,
    FlowStepRecord,
    FlowStore,
    RunStatus,
    StaleAttemptError,
    StepAlreadyCompletedError,
    StepNotFoundError,
    StepStatus,
)
from tests.conftest import OpenAnother
from tests.contract.scenes import (
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

OUTCOMES = [StepStatus.SUCCEEDED, StepStatus.FAILED, StepStatus.SKIPPED, StepStatus.PENDING]
TERMINAL = [StepStatus.SUCCEEDED, StepStatus.FAILED, StepStatus.SKIPPED]


# STP-1


async def test_stp_1_a_start_opens_attempt_1(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    now = clock.advance(seconds=5)
    attempt = await store.record_step_start(run_id, "charge", "http", input_json='{"n": 1}', job_id="job")
    assert attempt == 1
    assert await the_step(store, run_id) == FlowStepRecord(
        run_id=run_id,
        step_key="charge",
        step_type="http",
        status=StepStatus.RUNNING,
        input_json='{"n": 1}',
        output_json=None,
        error_message=None,
        job_id="job",
        started_at=now,
        completed_at=None,
        attempt_count=1,
        attempts=(
            FlowStepAttemptRecord(
                run_id=run_id,
                step_key="charge",
                attempt=1,
                step_type="http",
                status=StepStatus.RUNNING,
                input_json='{"n": 1}',
                output_json=None,
                error_message=None,
                job_id="job",
                started_at=now,
                completed_at=None,
            ),
        ),
    )
    assert await store.get_step_statuses(run_id) == {"charge": StepStatus.RUNNING}


@pytest.mark.parametrize("status", [StepStatus.FAILED, StepStatus.PENDING])
async def test_stp_1_a_new_attempt_clears_output_error_and_completion(
    store: FlowStore, clock: VirtualClock, status: StepStatus
) -> None:
    run_id = await new_run(store)
    first_start = clock()
    await store.record_step_start(run_id, "charge", "http", input_json="in 1", job_id="job 1")
    first_end = clock.advance(seconds=1)
    await store.record_step_complete(run_id, "charge", status, output_json="out 1", error_message="error 1")
    second_start = clock.advance(seconds=1)
    assert await store.record_step_start(run_id, "charge", "grpc", input_json="in 2", job_id="job 2") == 2

    step = await the_step(store, run_id)
    assert (step.status, step.output_json, step.error_message) == (StepStatus.RUNNING, None, None)
    assert (step.started_at, step.completed_at) == (first_start, None)
    assert (step.step_type, step.input_json, step.job_id) == ("grpc", "in 2", "job 2")
    assert step.attempt_count == 2
    one, two = step.attempts
    assert (one.attempt, one.status, one.output_json, one.error_message) == (1, status, "out 1", "error 1")
    assert (one.step_type, one.input_json, one.job_id) == ("http", "in 1", "job 1")
    assert (one.started_at, one.completed_at) == (first_start, first_end)
    assert (two.attempt, two.status, two.started_at, two.completed_at) == (
        2,
        StepStatus.RUNNING,
        second_start,
        None,
    )


async def test_stp_1_nothing_given_is_nothing_kept_from_the_attempt_before(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.record_step_start(run_id, "charge", "http", input_json="in", job_id="job")
    await store.record_step_complete(run_id, "charge", StepStatus.FAILED)
    await store.record_step_start(run_id, "charge", "http")
    step = await the_step(store, run_id)
    assert (step.input_json, step.job_id) == (None, None)
    assert [(a.input_json, a.job_id) for a in step.attempts] == [("in", "job"), (None, None)]


async def test_stp_1_an_open_attempt_is_closed_as_failed_naming_its_successor(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    for number in (1, 2, 3):
        clock.advance(seconds=1)
        assert await store.record_step_start(run_id, "charge", "http") == number
    one, two, three = await the_attempts(store, run_id)
    assert (one.status, two.status, three.status) == (
        StepStatus.FAILED,
        StepStatus.FAILED,
        StepStatus.RUNNING,
    )
    assert "2" in (one.error_message or "")
    assert "3" in (two.error_message or "")
    assert (one.completed_at, two.completed_at) == (two.started_at, three.started_at)
    assert three.completed_at is None
    assert (await the_step(store, run_id)).status is StepStatus.RUNNING


async def test_stp_1_numbers_are_gapless_under_concurrency(
    store: FlowStore, open_another: OpenAnother
) -> None:
    stores = [store, await open_another(), await open_another()]
    run_id = await new_run(store)
    numbers = await together(
        stores[n % 3].record_step_start(run_id, "charge", "http", input_json=str(n)) for n in range(30)
    )
    assert sorted(numbers) == list(range(1, 31))
    attempts = await the_attempts(store, run_id)
    assert [attempt.attempt for attempt in attempts] == list(range(1, 31))
    # Each caller's input lies under the number that it was told.
    assert [a.input_json for a in attempts] == [str(numbers.index(n)) for n in range(1, 31)]
    # At most one is open, and it is the last.
    assert [a.completed_at is None for a in attempts] == [False] * 29 + [True]


async def test_stp_1_steps_and_runs_number_their_attempts_apart(store: FlowStore) -> None:
    run_id, other = await new_run(store), await new_run(store)
    assert [await run_step(store, run_id, "a", StepStatus.FAILED) for _ in range(3)] == [1, 2, 3]
    assert await run_step(store, run_id, "b") == 1
    assert await run_step(store, other, "a") == 1


async def test_stp_1_failed_attempts_that_fail_to_start_leave_no_gap(store: FlowStore) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id, "charge", StepStatus.FAILED)
    for _ in range(3):
        with pytest.raises(ClaimLostError):
            await store.record_step_start(run_id, "charge", "http", owner="nobody")
    assert await run_step(store, run_id, "charge") == 2


# STP-2


@pytest.mark.parametrize("status", [StepStatus.SUCCEEDED, StepStatus.SKIPPED])
async def test_stp_2_a_succeeded_or_skipped_step_does_not_start_again(
    store: FlowStore, status: StepStatus
) -> None:
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "charge", owner="me")
    await run_step(store, run_id, "charge", status)
    before = await picture(store, run_id)
    for owner in (None, "me", "other"):
        with pytest.raises(StepAlreadyCompletedError) as caught:
            await store.record_step_start(run_id, "charge", "http", owner=owner)
        assert (caught.value.run_id, caught.value.step_key) == (run_id, "charge")
    assert await picture(store, run_id) == before


@pytest.mark.parametrize("status", [StepStatus.FAILED, StepStatus.PENDING])
async def test_stp_2_a_failed_or_pending_step_may_start_again(store: FlowStore, status: StepStatus) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id, "charge", status)
    assert await store.record_step_start(run_id, "charge", "http") == 2


async def test_stp_2_a_reopened_step_starts_again(store: FlowStore) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id, "charge", StepStatus.SUCCEEDED)
    await store.retry_step(run_id, "charge")
    assert await store.record_step_start(run_id, "charge", "http") == 2


# STP-3


async def test_stp_3_a_start_with_owner_needs_that_owners_claim(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "theirs", owner="them")
    await store.try_claim_step(run_id, "anonymous")
    await store.try_record_dispatch(run_id, "dispatched")
    before = await picture(store, run_id)
    for key in ("theirs", "anonymous", "dispatched", "unclaimed"):
        with pytest.raises(ClaimLostError) as caught:
            await store.record_step_start(run_id, key, "http", owner="me")
        assert (caught.value.run_id, caught.value.step_key) == (run_id, key)
    assert await picture(store, run_id) == before
    await store.try_claim_step(run_id, "mine", owner="me")
    assert await store.record_step_start(run_id, "mine", "http", owner="me") == 1


@pytest.mark.needs(Capability.LEASES)
async def test_stp_3_an_expired_claim_does_not_start(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "charge", owner="me", lease=MINUTE)
    clock.advance(minutes=1)
    with pytest.raises(ClaimLostError):
        await store.record_step_start(run_id, "charge", "http", owner="me")
    assert await store.get_step_statuses(run_id) == {}


@pytest.mark.needs(Capability.LEASES)
async def test_stp_3_a_worker_whose_claim_was_taken_over_cannot_start(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "charge", owner="old", lease=MINUTE)
    clock.advance(minutes=1)
    await store.try_claim_step(run_id, "charge", owner="new", lease=MINUTE)
    assert await store.record_step_start(run_id, "charge", "http", owner="new") == 1
    with pytest.raises(ClaimLostError):
        await store.record_step_start(run_id, "charge", "http", owner="old")


async def test_stp_3_said_again_under_the_same_claim_it_returns_the_same_number(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id, "charge", StepStatus.FAILED)
    await store.retry_step(run_id, "charge")
    await store.try_claim_step(run_id, "charge", owner="me")
    assert await store.record_step_start(run_id, "charge", "http", input_json="in", owner="me") == 2
    before = await the_step(store, run_id)
    clock.advance(seconds=1)
    assert await store.record_step_start(run_id, "charge", "grpc", input_json="else", owner="me") == 2
    assert await the_step(store, run_id) == before


async def test_stp_3_many_starts_of_one_claim_at_once_open_one_attempt(
    store: FlowStore, open_another: OpenAnother
) -> None:
    stores = [store, await open_another()]
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "charge", owner="me")
    numbers = await together(
        stores[n % 2].record_step_start(run_id, "charge", "http", owner="me") for n in range(16)
    )
    assert numbers == [1] * 16
    assert len(await the_attempts(store, run_id)) == 1


@pytest.mark.parametrize("status", [StepStatus.FAILED, StepStatus.PENDING])
async def test_stp_3_once_the_attempt_is_closed_the_same_claim_starts_the_next(
    store: FlowStore, status: StepStatus
) -> None:
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "charge", owner="me")
    assert await store.record_step_start(run_id, "charge", "http", owner="me") == 1
    await store.record_step_complete(run_id, "charge", status)
    assert await store.record_step_start(run_id, "charge", "http", owner="me") == 2
    assert await store.record_step_start(run_id, "charge", "http", owner="me") == 2


async def test_stp_3_a_new_claim_by_the_same_token_starts_a_new_attempt(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "charge", owner="me")
    assert await store.record_step_start(run_id, "charge", "http", owner="me") == 1
    await store.release_step_claim(run_id, "charge", owner="me")
    await store.try_claim_step(run_id, "charge", owner="me")
    assert await store.record_step_start(run_id, "charge", "http", owner="me") == 2


async def test_stp_3_the_next_claims_owner_starts_a_new_attempt(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "charge", owner="old")
    await store.record_step_start(run_id, "charge", "http", owner="old")
    await store.release_step_claim(run_id, "charge")
    await store.try_claim_step(run_id, "charge", owner="new")
    assert await store.record_step_start(run_id, "charge", "http", owner="new") == 2


async def test_stp_3_an_attempt_started_without_owner_is_not_the_claims(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "charge", owner="me")
    assert await store.record_step_start(run_id, "charge", "http") == 1
    assert await store.record_step_start(run_id, "charge", "http", owner="me") == 2
    assert await store.record_step_start(run_id, "charge", "http", owner="me") == 2
    assert await store.record_step_start(run_id, "charge", "http") == 3


async def test_stp_3_starting_keeps_claim_and_dispatch(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.try_record_dispatch(run_id, "charge")
    await store.try_claim_step(run_id, "charge", owner="me")
    claims, dispatches = await store.get_step_claims(run_id), await store.get_dispatches(run_id)
    await store.record_step_start(run_id, "charge", "http", owner="me")
    await store.record_step_complete(run_id, "charge", StepStatus.SUCCEEDED)
    assert await store.get_step_claims(run_id) == claims
    assert await store.get_dispatches(run_id) == dispatches


# STP-4


@pytest.mark.parametrize("status", OUTCOMES)
async def test_stp_4_completing_closes_the_attempt_and_the_step_alike(
    store: FlowStore, clock: VirtualClock, status: StepStatus
) -> None:
    run_id = await new_run(store)
    await store.record_step_start(run_id, "charge", "http", input_json="in")
    now = clock.advance(seconds=7)
    await store.record_step_complete(
        run_id, "charge", status, output_json="out", error_message="error", attempt=1
    )
    step = await the_step(store, run_id)
    (attempt,) = step.attempts
    for record in (step, attempt):
        assert (record.status, record.output_json, record.error_message) == (status, "out", "error")
        assert record.input_json == "in"
    assert attempt.completed_at == now
    assert step.completed_at == (None if status is StepStatus.PENDING else now)
    assert await store.get_step_statuses(run_id) == {"charge": status}


async def test_stp_4_attempt_none_is_the_last_started(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.record_step_start(run_id, "charge", "http")
    await store.record_step_start(run_id, "charge", "http")
    await store.record_step_complete(run_id, "charge", StepStatus.SUCCEEDED, output_json="two")
    assert [a.output_json for a in await the_attempts(store, run_id)] == [None, "two"]


@pytest.mark.parametrize("status", OUTCOMES)
async def test_stp_4_the_same_outcome_again_is_a_no_op(
    store: FlowStore, clock: VirtualClock, status: StepStatus
) -> None:
    run_id = await new_run(store)
    await store.record_step_start(run_id, "charge", "http")
    outcome: dict[str, Any] = {"output_json": "out", "error_message": "error"}
    await store.record_step_complete(run_id, "charge", status, **outcome)
    before = await the_step(store, run_id)
    clock.advance(seconds=1)
    await store.record_step_complete(run_id, "charge", status, **outcome)
    await store.record_step_complete(run_id, "charge", status, attempt=1, **outcome)
    assert await the_step(store, run_id) == before


@pytest.mark.parametrize("status", OUTCOMES)
@pytest.mark.parametrize(
    "change",
    [
        {"output_json": "other"},
        {"output_json": "OUT"},
        {"output_json": "out "},
        {"output_json": None},
        {"error_message": ""},
        {"error_message": "error"},
        {"status": "another"},
    ],
)
async def test_stp_4_another_outcome_on_a_closed_attempt_is_refused(
    store: FlowStore, status: StepStatus, change: dict[str, str | None]
) -> None:
    run_id = await new_run(store)
    await store.record_step_start(run_id, "charge", "http")
    await store.record_step_complete(run_id, "charge", status, output_json="out")
    before = await picture(store, run_id)
    other = OUTCOMES[(OUTCOMES.index(status) + 1) % len(OUTCOMES)] if "status" in change else status
    asked: dict[str, Any] = {"output_json": "out", "error_message": None, **change, "status": other}
    for attempt in (None, 1):
        with pytest.raises(StepAlreadyCompletedError) as caught:
            await store.record_step_complete(run_id, "charge", attempt=attempt, **asked)
        assert (caught.value.run_id, caught.value.step_key) == (run_id, "charge")
    assert await picture(store, run_id) == before


@pytest.mark.parametrize("attempt", [1, 2, 4, 2**31, 2**63 - 1])
async def test_stp_4_an_attempt_that_is_not_the_last_is_stale(store: FlowStore, attempt: int) -> None:
    run_id = await new_run(store)
    for _ in range(3):
        await store.record_step_start(run_id, "charge", "http")
    before = await picture(store, run_id)
    with pytest.raises(StaleAttemptError) as caught:
        await store.record_step_complete(run_id, "charge", StepStatus.SUCCEEDED, attempt=attempt)
    error = caught.value
    assert (error.run_id, error.step_key, error.attempt, error.last_attempt) == (run_id, "charge", attempt, 3)
    assert await picture(store, run_id) == before


async def test_stp_4_a_superseded_attempts_own_outcome_is_stale_too(store: FlowStore) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id, "charge", StepStatus.FAILED)
    await store.record_step_start(run_id, "charge", "http")
    with pytest.raises(StaleAttemptError):
        await store.record_step_complete(run_id, "charge", StepStatus.FAILED, attempt=1)


@pytest.mark.parametrize("attempt", [None, 1, 2])
async def test_stp_4_no_attempt_can_be_closed_while_the_step_is_reopened(
    store: FlowStore, attempt: int | None
) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id, "charge", StepStatus.FAILED)
    await store.retry_step(run_id, "charge")
    before = await picture(store, run_id)
    for status in (StepStatus.FAILED, StepStatus.SUCCEEDED):
        with pytest.raises(StaleAttemptError) as caught:
            await store.record_step_complete(run_id, "charge", status, attempt=attempt)
        assert (caught.value.attempt, caught.value.last_attempt) == (attempt, 1)
    assert await picture(store, run_id) == before
    await store.record_step_start(run_id, "charge", "http")
    await store.record_step_complete(run_id, "charge", StepStatus.SUCCEEDED, attempt=2)


async def test_stp_4_a_key_that_never_started_has_nothing_to_complete(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.try_record_dispatch(run_id, "charge")
    await store.try_claim_step(run_id, "charge", owner="me")
    for attempt in (None, 1):
        with pytest.raises(StepNotFoundError) as caught:
            await store.record_step_complete(run_id, "charge", StepStatus.SUCCEEDED, attempt=attempt)
        assert (caught.value.run_id, caught.value.step_key) == (run_id, "charge")


async def test_stp_4_of_racing_outcomes_one_wins_whole(store: FlowStore, open_another: OpenAnother) -> None:
    stores = [store, await open_another(), await open_another()]
    run_id = await new_run(store)
    for round_ in range(6):
        key = f"step {round_}"
        await store.record_step_start(run_id, key, "http")
        answers = await outcomes(
            stores[n % 3].record_step_complete(
                run_id, key, OUTCOMES[n % 3], output_json=f"out {n}", error_message=f"error {n}", attempt=1
            )
            for n in range(9)
        )
        (winner,) = [n for n, answer in enumerate(answers) if answer is None]
        lost = [answer for answer in answers if answer is not None]
        assert [type(error) for error in lost] == [StepAlreadyCompletedError] * 8
        step = await the_step(store, run_id, key)
        assert (step.status, step.output_json, step.error_message) == (
            OUTCOMES[winner % 3],
            f"out {winner}",
            f"error {winner}",
        )


async def test_stp_4_completing_many_times_alike_at_once_succeeds(
    store: FlowStore, open_another: OpenAnother
) -> None:
    other = await open_another()
    run_id = await new_run(store)
    await store.record_step_start(run_id, "charge", "http")
    await together(
        one.record_step_complete(run_id, "charge", StepStatus.SUCCEEDED, output_json="out", attempt=1)
        for one in (store, other) * 6
    )
    assert (await the_step(store, run_id)).status is StepStatus.SUCCEEDED


# STP-5


async def test_stp_5_skipping_records_one_attempt_that_starts_and_ends(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    now = clock.advance(seconds=3)
    await store.record_skipped_step(run_id, "charge", "http", "not needed")
    step = await the_step(store, run_id)
    (attempt,) = step.attempts
    for record in (step, attempt):
        assert (record.step_type, record.status) == ("http", StepStatus.SKIPPED)
        assert (record.input_json, record.output_json, record.job_id) == (None, None, None)
        assert record.error_message == "not needed"
        assert (record.started_at, record.completed_at) == (now, now)
    assert (attempt.attempt, step.attempt_count) == (1, 1)
    assert await store.get_step_claims(run_id) == ()


async def test_stp_5_a_reason_may_be_missing_or_empty(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.record_skipped_step(run_id, "a", "http")
    await store.record_skipped_step(run_id, "b", "http", "")
    assert (await the_step(store, run_id, "a")).error_message is None
    assert (await the_step(store, run_id, "b")).error_message == ""


async def test_stp_5_an_open_attempt_is_closed_as_superseded(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    await store.record_step_start(run_id, "charge", "http", input_json="in")
    now = clock.advance(seconds=1)
    await store.record_skipped_step(run_id, "charge", "http", "cancelled")
    one, two = await the_attempts(store, run_id)
    assert (one.status, one.completed_at, one.input_json) == (StepStatus.FAILED, now, "in")
    assert "2" in (one.error_message or "")
    assert (two.status, two.error_message) == (StepStatus.SKIPPED, "cancelled")
    with pytest.raises(StaleAttemptError):
        await store.record_step_complete(run_id, "charge", StepStatus.SUCCEEDED, attempt=1)


async def test_stp_5_a_pending_or_reopened_step_can_be_skipped(store: FlowStore) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id, "pending", StepStatus.PENDING)
    await run_step(store, run_id, "reopened", StepStatus.FAILED)
    await store.retry_step(run_id, "reopened")
    for key in ("pending", "reopened"):
        await store.record_skipped_step(run_id, key, "http", "enough")
        step = await the_step(store, run_id, key)
        assert (step.status, step.attempt_count, len(step.attempts)) == (StepStatus.SKIPPED, 2, 2)


@pytest.mark.parametrize("status", TERMINAL)
async def test_stp_5_a_terminal_step_cannot_be_skipped(store: FlowStore, status: StepStatus) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id, "charge", status)
    before = await picture(store, run_id)
    for owner in (None, "me"):
        with pytest.raises(StepAlreadyCompletedError):
            await store.record_skipped_step(run_id, "charge", "http", "late", owner=owner)
    assert await picture(store, run_id) == before


@pytest.mark.parametrize("status", [StepStatus.SUCCEEDED, StepStatus.FAILED])
async def test_stp_5_an_outcome_that_reads_like_the_skip_is_another(
    store: FlowStore, status: StepStatus
) -> None:
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "charge", owner="me")
    await store.record_step_start(run_id, "charge", "http", owner="me")
    await store.record_step_complete(run_id, "charge", status, error_message="reason")
    with pytest.raises(StepAlreadyCompletedError):
        await store.record_skipped_step(run_id, "charge", "http", "reason", owner="me")


async def test_stp_5_skipping_again_without_owner_is_refused(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.record_skipped_step(run_id, "charge", "http", "reason")
    with pytest.raises(StepAlreadyCompletedError):
        await store.record_skipped_step(run_id, "charge", "http", "reason")


async def test_stp_5_with_owner_it_takes_a_free_claim(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    await store.record_skipped_step(run_id, "charge", "http", "reason", owner="me")
    (claim,) = await store.get_step_claims(run_id)
    assert (claim.owner, claim.claimed_at, claim.expires_at) == ("me", clock(), None)
    assert not await store.try_claim_step(run_id, "charge", owner="other")


async def test_stp_5_with_owner_it_keeps_the_owners_own_claim(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "charge", owner="me", lease=MINUTE)
    before = await store.get_step_claims(run_id)
    clock.advance(seconds=1)
    await store.record_skipped_step(run_id, "charge", "http", "reason", owner="me")
    assert await store.get_step_claims(run_id) == before


async def test_stp_5_with_owner_it_is_refused_while_another_holds_the_claim(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "theirs", owner="them")
    await store.try_claim_step(run_id, "anonymous")
    before = await picture(store, run_id)
    for key in ("theirs", "anonymous"):
        with pytest.raises(ClaimLostError):
            await store.record_skipped_step(run_id, key, "http", "reason", owner="me")
    assert await picture(store, run_id) == before


async def test_stp_5_without_owner_anothers_claim_stays(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "charge", owner="them")
    before = await store.get_step_claims(run_id)
    await store.record_skipped_step(run_id, "charge", "http", "reason")
    assert await store.get_step_claims(run_id) == before


@pytest.mark.needs(Capability.LEASES)
async def test_stp_5_with_owner_it_takes_an_expired_claim(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "charge", owner="old", lease=MINUTE)
    now = clock.advance(minutes=1)
    await store.record_skipped_step(run_id, "charge", "http", "reason", owner="new")
    (claim,) = await store.get_step_claims(run_id)
    assert (claim.owner, claim.claimed_at, claim.expires_at) == ("new", now, None)


async def test_stp_5_the_same_owner_and_reason_again_is_a_no_op(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    await store.record_skipped_step(run_id, "a", "http", "reason", owner="me")
    await store.record_skipped_step(run_id, "b", "http", owner="me")
    before = await store.get_run_detail(run_id)
    clock.advance(seconds=1)
    await store.record_skipped_step(run_id, "a", "http", "reason", owner="me")
    await store.record_skipped_step(run_id, "b", "http", owner="me")
    assert await store.get_run_detail(run_id) == before


async def test_stp_5_another_owner_or_reason_is_refused(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.record_skipped_step(run_id, "charge", "http", "reason", owner="me")
    for owner, reason in (("me", "other"), ("me", None), ("other", "reason"), (None, "reason")):
        with pytest.raises(StepAlreadyCompletedError):
            await store.record_skipped_step(run_id, "charge", "http", reason, owner=owner)


async def test_stp_5_of_many_owners_one_skips(store: FlowStore, open_another: OpenAnother) -> None:
    stores = [store, await open_another(), await open_another()]
    run_id = await new_run(store)
    for round_ in range(5):
        key = f"step {round_}"
        answers = await outcomes(
            stores[n % 3].record_skipped_step(run_id, key, "http", "reason", owner=f"owner {n}")
            for n in range(9)
        )
        (winner,) = [n for n, answer in enumerate(answers) if answer is None]
        lost = [type(answer) for answer in answers if answer is not None]
        # Whoever comes after the winner finds the step terminal.
        assert lost == [StepAlreadyCompletedError] * 8
        claims = {claim.step_key: claim.owner for claim in await store.get_step_claims(run_id)}
        assert claims[key] == f"owner {winner}"
        assert len(await the_attempts(store, run_id, key)) == 1


async def test_stp_5_a_claim_and_a_skip_race_for_one_step(
    store: FlowStore, open_another: OpenAnother
) -> None:
    other = await open_another()
    run_id = await new_run(store)
    for round_ in range(10):
        key = f"step {round_}"
        claimed, skipped = await outcomes(
            [
                store.try_claim_step(run_id, key, owner="worker"),
                other.record_skipped_step(run_id, key, "http", "reason", owner="planner"),
            ]
        )
        owners = {claim.step_key: claim.owner for claim in await store.get_step_claims(run_id)}
        if claimed is True:
            assert isinstance(skipped, ClaimLostError)
            assert owners[key] == "worker"
        else:
            assert (claimed, skipped) == (False, None)
            assert owners[key] == "planner"


async def test_stp_statuses_are_by_key_in_code_point_order(store: FlowStore) -> None:
    run_id = await new_run(store)
    keys = ["b", "a", "B", "é", "e", "Z", "_", "a b", "\U0001f600", "\uffff", "10", "9"]
    for key in keys:
        await run_step(store, run_id, key)
    assert list(await store.get_step_statuses(run_id)) == sorted(keys)


async def test_stp_statuses_of_an_unknown_run_are_empty(store: FlowStore) -> None:
    unknown: UUID = uuid4()
    assert await store.get_step_statuses(unknown) == {}
    assert await store.get_run_detail(unknown) is None
    assert await store.get_run_status(unknown) is None


async def test_stp_completing_a_step_leaves_the_run_running(store: FlowStore) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id, "only", StepStatus.FAILED)
    assert await store.get_run_status(run_id) is RunStatus.RUNNING
