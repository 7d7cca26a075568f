"""STP-1 to STP-3: starting steps."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from flowstore_conformance.checks.example_checks import example
from flowstore_conformance.checks.fixtures import (
    MINUTE,
    SECOND,
    TICK,
    advance,
    assert_same,
    expect_fields,
    get_step,
    observe_all,
    outcome_of,
    run_step,
    start,
)
from flowstore_conformance.context import CheckContext
from flowstore_core import (
    Capability,
    ClaimLostError,
    FlowStepAttemptRecord,
    FlowStepRecord,
    StepAlreadyCompletedError,
    StepStatus,
)
from flowstore_core.steps import superseded_by

NO_TIME = timedelta(0)
MAY_START = (StepStatus.FAILED, StepStatus.PENDING)
FINISHED = (StepStatus.SUCCEEDED, StepStatus.SKIPPED)

# STP-1


@example("STP-1")
async def a_start_opens_attempt_1(context: CheckContext) -> None:
    """The first start opens attempt 1; the step is Running and shows every argument."""
    store, run_id = context.store, await start(context)
    at = advance(context, SECOND)
    number = await store.record_step_start(run_id, "charge", "http", input_json='{"n": 1}', job_id="job")
    context.expect(number, 1, "record_step_start returns the number of the attempt")
    both: dict[str, Any] = {
        "run_id": run_id,
        "step_key": "charge",
        "step_type": "http",
        "status": StepStatus.RUNNING,
        "input_json": '{"n": 1}',
        "output_json": None,
        "error_message": None,
        "job_id": "job",
        "started_at": at,
        "completed_at": None,
    }
    attempt = FlowStepAttemptRecord(**both, attempt=1)
    wanted = FlowStepRecord(**both, attempt_count=1, attempts=(attempt,))
    context.expect(await get_step(context, run_id), wanted, "a started step and its attempt")
    statuses = await store.get_step_statuses(run_id)
    context.expect(statuses, {"charge": StepStatus.RUNNING}, "get_step_statuses after a start")


@example("STP-1")
async def the_next_attempt_clears_output_error_and_completion(context: CheckContext) -> None:
    """A restarted step shows only its new attempt; the previous attempt keeps its values."""
    store, run_id = context.store, await start(context)
    for status in MAY_START:
        first = advance(context, SECOND)
        given = {"input_json": "in 1", "job_id": "job 1"}
        await store.record_step_start(run_id, status, "http", **given)
        ended = advance(context, SECOND)
        result: dict[str, Any] = {"output_json": "out", "error_message": "error"}
        await store.record_step_complete(run_id, status, status, **result)
        second = advance(context, SECOND)
        number = await store.record_step_start(run_id, status, "grpc")
        context.expect(number, 2, f"the start after an attempt that ended {status}")
        step = await get_step(context, run_id, status)
        cleared: dict[str, Any] = {"output_json": None, "error_message": None, "completed_at": None}
        fresh = {"status": StepStatus.RUNNING, "step_type": "grpc", "input_json": None, "job_id": None}
        sentence = f"a step restarted after {status}"
        expect_fields(context, step, sentence, **cleared, **fresh, started_at=first, attempt_count=2)
        context.expect([one.attempt for one in step.attempts], [1, 2], f"the attempts of {sentence}")
        exact_times = {"started_at": first, "completed_at": ended}
        before = {**given, **result, **exact_times, "attempt": 1, "status": status, "step_type": "http"}
        expect_fields(context, step.attempts[0], "the previous attempt", **before)
        after = {**cleared, **fresh, "attempt": 2, "started_at": second}
        expect_fields(context, step.attempts[1], "the new attempt", **after)


@example("STP-1")
async def an_open_attempt_is_superseded_by_the_next(context: CheckContext) -> None:
    """Only the last attempt may be open: a start closes an open one as Failed, naming its successor."""
    store, run_id = context.store, await start(context)
    starts = []
    for number in (1, 2, 3):
        starts.append(advance(context, SECOND))
        given = await store.record_step_start(run_id, "charge", "http", input_json=str(number))
        context.expect(given, number, "attempts are numbered 1, 2, ... without gaps")
    step = await get_step(context, run_id)
    sentence = "the attempts of three starts without completion"
    context.expect([one.attempt for one in step.attempts], [1, 2, 3], sentence)
    for attempt, ended in zip(step.attempts, starts[1:], strict=False):
        wanted: dict[str, Any] = {
            "status": StepStatus.FAILED,
            "output_json": None,
            "error_message": superseded_by(attempt.attempt + 1),
            "completed_at": ended,
            "input_json": str(attempt.attempt),
        }
        expect_fields(context, attempt, f"the superseded attempt {attempt.attempt}", **wanted)
    for record in (step, step.attempts[2]):
        wanted = {"status": StepStatus.RUNNING, "error_message": None, "completed_at": None}
        expect_fields(context, record, "the open attempt and its step", **wanted)
    context.expect((step.attempt_count, step.started_at), (3, starts[0]), "attempt_count and started_at")


@example("STP-1")
async def attempts_are_numbered_per_step_without_gaps(context: CheckContext) -> None:
    """Each step of each run numbers its own attempts, and a refused start uses no number."""
    store, run_id, other = context.store, await start(context), await start(context)
    context.expect(
        [await run_step(context, run_id, "a", StepStatus.FAILED) for _ in "12"], [1, 2], "numbering"
    )
    context.expect(await run_step(context, run_id, "b"), 1, "the first attempt of another step")
    context.expect(await run_step(context, other, "a"), 1, "the first attempt in another run")
    for _ in range(2):
        call = store.record_step_start(run_id, "a", "http", owner="nobody")
        await context.expect_error(call, ClaimLostError, "a start as an owner without claim")
    number = await run_step(context, run_id, "a")
    context.expect(number, 3, "the attempt number after two refused starts")
    for expected in range(1, 13):
        context.expect(
            await run_step(context, run_id, "poll", StepStatus.PENDING), expected, "a dozen attempts"
        )
    step = await get_step(context, run_id, "poll")
    context.expect([one.attempt for one in step.attempts], list(range(1, 13)), "the order of the attempts")


# STP-2


@example("STP-2")
async def finished_steps_do_not_start_again(context: CheckContext) -> None:
    """Starting a Succeeded or Skipped step raises and changes nothing; retry_step reopens the step."""
    store, run_id = context.store, await start(context)
    for status in FINISHED:
        await store.try_claim_step(run_id, status, owner="me")
        await run_step(context, run_id, status, status)
    before = await observe_all(context, run_id)
    for status in FINISHED:
        for owner in (None, "me", "other"):
            call = store.record_step_start(run_id, status, "http", owner=owner)
            sentence = f"starting a {status} step"
            error = await context.expect_error(call, StepAlreadyCompletedError, sentence)
            expect_fields(context, error, f"{sentence}: the error", run_id=run_id, step_key=status.value)
    assert_same(context, await observe_all(context, run_id), before, "a refused start changes nothing")
    for status in FINISHED:
        await store.retry_step(run_id, status)
        number = await outcome_of(store.record_step_start(run_id, status, "http"))
        context.expect(number, 2, f"starting a reopened {status} step")


@example("STP-2")
async def failed_and_pending_steps_may_start_again(context: CheckContext) -> None:
    """A Failed or Pending step starts again without a retry."""
    store, run_id = context.store, await start(context)
    for status in MAY_START:
        await run_step(context, run_id, status, status)
        number = await outcome_of(store.record_step_start(run_id, status, "http"))
        context.expect(number, 2, f"starting a {status} step again")


# STP-3


@example("STP-3")
async def starting_as_an_owner_needs_that_owners_claim(context: CheckContext) -> None:
    """A start with owner raises ClaimLostError and changes nothing without that owner's unexpired claim."""
    store, run_id = context.store, await start(context)
    await store.try_claim_step(run_id, "theirs", owner="them")
    await store.try_claim_step(run_id, "anonymous")
    await store.try_record_dispatch(run_id, "dispatched")
    await store.try_claim_step(run_id, "released", owner="me")
    await store.record_step_start(run_id, "released", "http", owner="me")
    await store.release_step_claim(run_id, "released")
    before = await observe_all(context, run_id)
    for key in ("theirs", "anonymous", "dispatched", "released", "unclaimed"):
        call = store.record_step_start(run_id, key, "http", owner="me")
        sentence = f"starting as an owner without the claim ({key})"
        error = await context.expect_error(call, ClaimLostError, sentence)
        expect_fields(context, error, f"{sentence}: the error", run_id=run_id, step_key=key)
    assert_same(context, await observe_all(context, run_id), before, "a refused start changes nothing")
    await store.try_claim_step(run_id, "mine", owner="me")
    number = await outcome_of(store.record_step_start(run_id, "mine", "http", owner="me"))
    context.expect(number, 1, "starting as the owner of the claim")
    call = store.record_step_start(run_id, "theirs", "http")
    context.expect(await outcome_of(call), 1, "a start without owner needs no claim")


@example("STP-3")
async def a_start_is_repeatable_under_the_same_claim(context: CheckContext) -> None:
    """A repeated start under the same claim returns the open attempt and changes nothing."""
    store, run_id = context.store, await start(context)
    await run_step(context, run_id, "charge", StepStatus.PENDING)
    await store.try_record_dispatch(run_id, "charge")
    await store.try_claim_step(run_id, "charge", owner="me")
    claims = await store.get_step_claims(run_id)
    number = await store.record_step_start(run_id, "charge", "http", input_json="in", owner="me")
    context.expect(number, 2, "the first start under a claim")
    context.expect(await store.get_step_claims(run_id), claims, "the claims after a start")
    context.expect(await store.get_dispatched_step_keys(run_id), {"charge"}, "the dispatches after a start")
    before = await observe_all(context, run_id)
    advance(context, SECOND)
    again = await store.record_step_start(run_id, "charge", "grpc", input_json="else", owner="me")
    context.expect(again, 2, "a repeated start under the same claim")
    advance(context, -SECOND)
    assert_same(context, await observe_all(context, run_id), before, "a repeated start changes nothing")
    for status in MAY_START:
        await store.record_step_complete(run_id, "charge", status)
        number += 1
        for how in ("the first", "the second"):
            found = await outcome_of(store.record_step_start(run_id, "charge", "http", owner="me"))
            context.expect(
                found, number, f"{how} start under the same claim after an attempt closed as {status}"
            )


@example("STP-3")
async def a_new_claim_starts_a_new_attempt(context: CheckContext) -> None:
    """After a new claim, also by the same token, or without owner, a start opens the next attempt."""
    store, run_id = context.store, await start(context)
    for number, owner in enumerate(("me", "me", "other"), 1):
        await store.try_claim_step(run_id, "charge", owner=owner)
        found = await store.record_step_start(run_id, "charge", "http", owner=owner)
        context.expect(found, number, f"a start by {owner!r} under a new claim after a release")
        await store.release_step_claim(run_id, "charge", owner=owner)
    await store.try_claim_step(run_id, "mixed", owner="me")
    for number, by in enumerate((None, "me", None, "me"), 1):
        found = await store.record_step_start(run_id, "mixed", "http", owner=by)
        context.expect(found, number, f"a start by {by} after a start by another owner")


@example("STP-3", needs=[Capability.LEASES, Capability.VIRTUAL_CLOCK])
async def an_expired_claim_does_not_start_a_step(context: CheckContext) -> None:
    """A start under an expired or taken-over claim raises; under a new claim it opens the next attempt."""
    store, run_id = context.store, await start(context)
    await store.try_claim_step(run_id, "charge", owner="old", lease=MINUTE)
    await store.record_step_start(run_id, "charge", "http", owner="old")
    advance(context, MINUTE)
    before = await observe_all(context, run_id)
    call = store.record_step_start(run_id, "charge", "http", owner="old")
    await context.expect_error(call, ClaimLostError, "starting under a claim at the end of its lease")
    assert_same(context, await observe_all(context, run_id), before, "a refused start changes nothing")
    await store.try_claim_step(run_id, "charge", owner="old", lease=MINUTE)
    number = await store.record_step_start(run_id, "charge", "http", owner="old")
    context.expect(number, 2, "a start under a new claim of the same token after expiry")
    advance(context, MINUTE)
    await store.try_claim_step(run_id, "charge", owner="new", lease=MINUTE)
    call = store.record_step_start(run_id, "charge", "http", owner="old")
    await context.expect_error(call, ClaimLostError, "starting under a claim that another owner took over")
    number = await store.record_step_start(run_id, "charge", "http", owner="new")
    context.expect(number, 3, "a start by the owner that took the claim over")


@example("STP-3", needs=[Capability.LEASES, Capability.VIRTUAL_CLOCK])
async def a_start_needs_a_lease_that_ends_later(context: CheckContext) -> None:
    """Until a microsecond before its lease ends an owner may start a step, whatever its earlier attempts."""
    store, run_id = context.store, await start(context)
    attempts = {"first": 0, "open": 1, "pending": 1, "failed": 1, "retried": 1}
    for left in (TICK, NO_TIME):
        for key in attempts:
            if key != "first":
                await store.record_step_start(run_id, f"{key} {left}", "http")
            if key in ("failed", "retried"):
                await store.record_step_complete(run_id, f"{key} {left}", StepStatus.FAILED)
            if key == "pending":
                await store.record_step_complete(run_id, f"{key} {left}", StepStatus.PENDING)
            if key == "retried":
                await store.retry_step(run_id, f"{key} {left}")
            await store.try_claim_step(run_id, f"{key} {left}", owner="me", lease=MINUTE)
        advance(context, MINUTE - left)
        for key, last in attempts.items():
            # CLM-4: a Failed step keeps its claim, but it could not be claimed.
            wanted = "<ClaimLostError raised>" if key == "failed" or not left else last + 1
            found = await outcome_of(store.record_step_start(run_id, f"{key} {left}", "http", owner="me"))
            context.expect(found, wanted, f"a start as the owner of a lease that ends in {left} ({key})")
