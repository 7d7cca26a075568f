"""STP-6: retry_step reopens a step and its run."""

from __future__ import annotations

from typing import Any

from flowstore_conformance.checks.example_checks import example
from flowstore_conformance.checks.fixtures import (
    CLOSING_STATUSES,
    DAY,
    FLOW,
    SECOND,
    TERMINAL_RUN_STATUSES,
    advance,
    assert_same,
    expect_fields,
    get_control,
    get_run,
    get_step,
    new_id,
    now,
    observe,
    observe_all,
    outcome_of,
    run_step,
    skip_steps,
    start,
)
from flowstore_conformance.context import CheckContext
from flowstore_core import Capability, RunStatus, StaleAttemptError, StepNotFoundError, StepStatus
from flowstore_core.steps import superseded_by

PENDING, SKIPPED = StepStatus.PENDING, StepStatus.SKIPPED


@example("STP-6")
async def a_retried_step_is_pending_and_cleared(context: CheckContext) -> None:
    """Output, error and completion are cleared, attempt_count counts the next attempt, attempts stay."""
    store, run_id = context.store, await start(context)
    cleared: dict[str, Any] = {"output_json": None, "error_message": None, "completed_at": None}
    for status in CLOSING_STATUSES:
        begun = advance(context, SECOND)
        await store.record_step_start(run_id, status, "http", input_json="in", job_id="job")
        advance(context, SECOND)
        result: dict[str, Any] = {"output_json": "out", "error_message": "error"}
        await store.record_step_complete(run_id, status, status, **result)
        attempts = (await get_step(context, run_id, status)).attempts
        advance(context, SECOND)
        await store.retry_step(run_id, status)
        step = await get_step(context, run_id, status)
        kept = {"started_at": begun, "step_type": "http", "input_json": "in", "job_id": "job"}
        sentence = f"a retried {status} step"
        expect_fields(context, step, sentence, status=PENDING, attempt_count=2, **cleared, **kept)
        context.expect(step.attempts, attempts, f"the attempts of {sentence}")
    await store.record_step_start(run_id, "open", "http")
    ended = advance(context, SECOND)
    await store.retry_step(run_id, "open")
    step = await get_step(context, run_id, "open")
    expect_fields(context, step, "a retried Running step", status=PENDING, attempt_count=2, **cleared)
    context.expect(len(step.attempts), 1, "the number of attempts of a retried Running step")
    closed = {"status": StepStatus.FAILED, "error_message": superseded_by(2), "completed_at": ended}
    expect_fields(context, step.attempts[0], "an open attempt after a retry", **closed)
    wanted = dict.fromkeys((*CLOSING_STATUSES, "open"), PENDING)
    context.expect(await store.get_step_statuses(run_id), wanted, "the statuses of retried steps")


@example("STP-6")
async def a_retry_removes_claim_dispatch_and_undelivered_waiter(context: CheckContext) -> None:
    """A retry removes the step's claim, dispatch and undelivered waiter; a delivered waiter stays."""
    store, run_id = context.store, await start(context)
    for key in ("charge", "other"):
        await store.try_record_dispatch(run_id, key)
        await store.try_claim_step(run_id, key, owner="me")
        await store.record_step_start(run_id, key, "http", owner="me")
        await store.register_waiter(run_id, key, "go")
    kept = await store.get_waiter(run_id, "other")
    await store.retry_step(run_id, "charge")
    claims = [claim.step_key for claim in await store.get_step_claims(run_id)]
    context.expect(claims, ["other"], "the claims after a retry of 'charge'")
    context.expect(await store.get_dispatched_step_keys(run_id), {"other"}, "the dispatches after a retry")
    context.expect(await store.get_waiter(run_id, "charge"), None, "the undelivered waiter of a retried step")
    context.expect(await store.get_waiter(run_id, "other"), kept, "the waiter of another step")
    context.expect(
        await outcome_of(store.try_record_dispatch(run_id, "charge")), True, "dispatching after a retry"
    )
    answer = await outcome_of(store.try_claim_step(run_id, "charge", owner="next"))
    context.expect(answer, True, "claiming after a retry")
    number = await outcome_of(store.record_step_start(run_id, "charge", "http", owner="next"))
    context.expect(number, 2, "starting after a retry")
    await store.register_waiter(run_id, "charge", "came")
    await store.deliver_signal(run_id, "came", "payload")
    delivered = await store.get_waiter(run_id, "charge")
    await store.retry_step(run_id, "charge")
    context.expect(
        await store.get_waiter(run_id, "charge"), delivered, "the delivered waiter of a retried step"
    )
    if Capability.WAITERS in context.capabilities:
        await store.record_step_start(run_id, "expired", "http")
        await store.register_waiter(run_id, "expired", "go", expires_at=now(context) - DAY)
        await store.expire_waiter(run_id, "expired")
        await store.retry_step(run_id, "expired")
        found = await store.get_waiter(run_id, "expired")
        context.expect(found, None, "the expired waiter of a retried step")


@example("STP-6")
async def the_run_of_a_retried_step_is_running_again(context: CheckContext) -> None:
    """The run is Running without completed_at; a terminal run loses its latches and an elapsed deadline."""
    store = context.store
    # Elapsed means timeout_at <= now; with a virtual clock exact to the microsecond.
    elapsed = now(context) if context.clock is not None else now(context) - DAY
    for status, deadline, left in zip(
        TERMINAL_RUN_STATUSES,
        (elapsed, None, now(context) + DAY),
        (None, None, now(context) + DAY),
        strict=True,
    ):
        run_id = await start(context)
        await run_step(context, run_id, "charge", StepStatus.FAILED)
        await store.configure_run(run_id, FLOW, "manual", idempotency_key="key", timeout_at=deadline)
        await store.request_cancel(run_id, "user")
        await store.mark_timed_out(run_id, "late")
        made = (await get_control(context, run_id)).created_at
        begun = (await get_run(context, run_id)).started_at
        await store.complete_run(run_id, status)
        context.expect(await store.get_run_status(run_id), status, "the status of a completed run")
        await store.retry_step(run_id, "charge")
        found = await store.get_run_status(run_id)
        context.expect(found, RunStatus.RUNNING, f"the status of a {status} run after a retry")
        run = await get_run(context, run_id)
        wanted = {"status": RunStatus.RUNNING, "completed_at": None, "started_at": begun}
        expect_fields(context, run, f"a {status} run after a retry", **wanted)
        active = [each.run_id for each in await store.get_active_runs()]
        context.expect_that(run_id in active, "a run that a retry reopened is in get_active_runs")
        latches: dict[str, Any] = {
            "cancel_requested": False,
            "cancel_reason": None,
            "cancel_requested_at": None,
            "timed_out_at": None,
        }
        kept = {"timeout_at": left, "idempotency_key": "key", "created_at": made}
        sentence = "the control record of a reopened run"
        expect_fields(context, await get_control(context, run_id), sentence, **latches, **kept)
        context.expect(await outcome_of(store.request_cancel(run_id)), True, "a cancel of a reopened run")
        context.expect(await outcome_of(store.mark_timed_out(run_id)), True, "a time-out of a reopened run")
        answer = await outcome_of(store.complete_run(run_id, RunStatus.SUCCEEDED))
        context.expect(answer, True, "completing a reopened run")


@example("STP-6")
async def a_retry_in_a_running_run_keeps_its_latches(context: CheckContext) -> None:
    """A retry in a Running run keeps its control record, and creates none."""
    store, run_id, bare = context.store, await start(context), await start(context)
    await store.configure_run(run_id, FLOW, "manual", timeout_at=now(context) - DAY)
    await store.request_cancel(run_id, "user")
    await store.mark_timed_out(run_id, "late")
    before = await store.get_run_control(run_id)
    for one in (run_id, bare):
        await run_step(context, one, "charge", StepStatus.FAILED)
        await store.retry_step(one, "charge")
    after = await store.get_run_control(run_id)
    context.expect(after, before, "the control record of a Running run after a retry")
    await store.complete_run(bare, RunStatus.FAILED)
    await store.retry_step(bare, "charge")
    context.expect(
        await store.get_run_control(bare), None, "the control record after a retry of an unconfigured run"
    )


@example("STP-6")
async def a_repeated_retry_before_the_start_changes_nothing(context: CheckContext) -> None:
    """With or without attempt, a claim, dispatch and waiter made since the first retry are kept."""
    store, run_id = context.store, await start(context)
    await run_step(context, run_id, "charge", StepStatus.FAILED)
    await skip_steps(context, run_id, "after")
    await store.retry_step(run_id, "charge", attempt=1)
    await store.try_record_dispatch(run_id, "charge")
    await store.try_claim_step(run_id, "charge", owner="me")
    await store.register_waiter(run_id, "charge", "go")
    before = await observe_all(context, run_id)
    advance(context, SECOND)
    for attempt in (None, 1):
        call = store.retry_step(run_id, "charge", attempt=attempt, reset=["after"])
        context.expect(await outcome_of(call), None, f"a repeated retry with attempt={attempt}")
    advance(context, -SECOND)
    sentence = "a repeated retry before the start changes nothing"
    assert_same(context, await observe_all(context, run_id), before, sentence)


@example("STP-6")
async def a_repeated_retry_reopens_a_run_completed_in_between(context: CheckContext) -> None:
    """The run is Running, its latches and an elapsed deadline are cleared; everything else is kept."""
    store = context.store
    for attempt in (None, 1):
        run_id = await start(context)
        await run_step(context, run_id, "charge", StepStatus.FAILED)
        await skip_steps(context, run_id, "after")
        await store.retry_step(run_id, "charge")
        await store.try_record_dispatch(run_id, "charge")
        await store.try_claim_step(run_id, "charge", owner="me")
        await store.register_waiter(run_id, "charge", "go")
        before = await observe(context, run_id)
        await store.configure_run(run_id, FLOW, "manual", timeout_at=now(context) - DAY)
        await store.request_cancel(run_id)
        await store.complete_run(run_id, RunStatus.CANCELLED)
        await store.retry_step(run_id, "charge", attempt=attempt, reset=["after"])
        control = await get_control(context, run_id)
        sentence = "the control record of a run that a repeated retry reopened"
        expect_fields(context, control, sentence, cancel_requested=False, timeout_at=None)
        del before["get_run_control"]
        sentence = "a repeated retry changes only the status of the run"
        assert_same(context, await observe(context, run_id), before, sentence)


@example("STP-6")
async def a_retry_of_a_stale_attempt_is_refused(context: CheckContext) -> None:
    """attempt must be the last one started, else StaleAttemptError: a double click retries once."""
    store, run_id = context.store, await start(context)
    for number in (1, 2):
        await run_step(context, run_id, "charge", StepStatus.FAILED)
        call = store.retry_step(run_id, "charge", attempt=number)
        context.expect(await outcome_of(call), None, f"retrying attempt {number}, the last one started")
        step = await get_step(context, run_id)
        expect_fields(
            context, step, "a step retried after each attempt", status=PENDING, attempt_count=number + 1
        )
    await run_step(context, run_id, "failed", StepStatus.FAILED)
    await skip_steps(context, run_id, "after")
    await store.complete_run(run_id, RunStatus.FAILED)
    before = await observe_all(context, run_id)
    cases = (("charge", 1, 2), ("charge", 3, 2), ("failed", 2, 1), ("failed", 2**63 - 1, 1))
    for key, attempt, last in cases:
        call = store.retry_step(run_id, key, attempt=attempt, reset=["after"])
        sentence = f"retrying attempt {attempt} of a step with last attempt {last}"
        error = await context.expect_error(call, StaleAttemptError, sentence)
        named = {"run_id": run_id, "step_key": key, "attempt": attempt, "last_attempt": last}
        expect_fields(context, error, f"{sentence}: the error", **named)
    assert_same(context, await observe_all(context, run_id), before, "a refused retry changes nothing")


@example("STP-6")
async def reset_makes_skipped_keys_unstarted(context: CheckContext) -> None:
    """Reset keys leave statuses, details, claims and dispatches; keys that are not Skipped are ignored."""
    store, run_id = context.store, await start(context)
    await run_step(context, run_id, "charge", SKIPPED)
    await store.try_record_dispatch(run_id, "ship")
    await store.record_skipped_step(run_id, "ship", "http", "no", owner="planner")
    await store.register_waiter(run_id, "ship", "go")
    await skip_steps(context, run_id, "mail", "stays skipped")
    others = {"done": StepStatus.SUCCEEDED, "failed": StepStatus.FAILED, "pending": PENDING}
    for key, status in others.items():
        await store.try_claim_step(run_id, key, owner="me")
        await run_step(context, run_id, key, status)
        await store.register_waiter(run_id, key, "go")
    await store.record_step_start(run_id, "running", "http")
    await store.try_record_dispatch(run_id, "dispatched")
    kept = {step.step_key: step for step in (await get_run(context, run_id)).steps}
    await store.complete_run(run_id, RunStatus.FAILED)
    reset = ["ship", "mail", *others, "running", "dispatched", "unknown", "charge"]
    await store.retry_step(run_id, "charge", reset=reset)
    statuses = {**others, "charge": PENDING, "running": StepStatus.RUNNING, "stays skipped": SKIPPED}
    found = await store.get_step_statuses(run_id)
    context.expect(found, statuses, f"the statuses after a retry of 'charge' that resets {reset}")
    steps = {step.step_key: step for step in (await get_run(context, run_id)).steps}
    context.expect(sorted(steps), sorted(statuses), "the steps of get_run_detail after a reset")
    for key in (*others, "running", "stays skipped"):
        context.expect(steps[key], kept[key], f"the step {key!r} after a retry of another step")
    claims = [claim.step_key for claim in await store.get_step_claims(run_id)]
    context.expect(claims, sorted(others), "the claims after a reset")
    context.expect(
        await store.get_dispatched_step_keys(run_id), {"dispatched"}, "the dispatches after a reset"
    )
    context.expect(await store.get_waiter(run_id, "ship"), None, "the waiter of a reset key")
    for key in others:
        context.expect_that(
            await store.get_waiter(run_id, key), f"the waiter of {key!r} is kept by a reset of another key"
        )


@example("STP-6")
async def a_reset_key_is_not_found_until_its_next_start(context: CheckContext) -> None:
    """Completing, retrying and rescheduling it raise StepNotFoundError; claiming and dispatching work."""
    store, run_id = context.store, await start(context)
    await run_step(context, run_id, "charge", StepStatus.FAILED)
    await skip_steps(context, run_id, "ship")
    await store.retry_step(run_id, "charge", reset=["ship"])
    before = await observe_all(context, run_id)
    for attempt in (None, 1):
        sentence = f"attempt {attempt} of a reset key"
        call = store.record_step_complete(run_id, "ship", SKIPPED, attempt=attempt)
        await context.expect_error(call, StepNotFoundError, f"record_step_complete of {sentence}")
        call = store.retry_step(run_id, "ship", attempt=attempt)
        await context.expect_error(call, StepNotFoundError, f"retry_step of {sentence}")
    if Capability.RECOVERY in context.capabilities:
        call = store.reschedule_step(run_id, "ship", attempt=1)
        await context.expect_error(call, StepNotFoundError, "reschedule_step of a reset key")
    assert_same(context, await observe_all(context, run_id), before, "a StepNotFoundError changes nothing")
    context.expect(
        await outcome_of(store.try_record_dispatch(run_id, "ship")), True, "dispatching a reset key"
    )
    answer = await outcome_of(store.try_claim_step(run_id, "ship", owner="me"))
    context.expect(answer, True, "claiming a reset key")
    statuses = await store.get_step_statuses(run_id)
    context.expect(statuses, {"charge": PENDING}, "the statuses with a dispatched and claimed reset key")


@example("STP-6")
async def a_reset_key_keeps_its_attempts_and_numbering(context: CheckContext) -> None:
    """Its next attempt takes the next number, and the earlier attempts are visible again."""
    store, run_id = context.store, await start(context)
    await run_step(context, run_id, "charge", StepStatus.FAILED)
    await run_step(context, run_id, "ship", PENDING, error_message="first")
    await store.record_skipped_step(run_id, "ship", "http", "reason", owner="planner")
    before = await get_step(context, run_id, "ship")
    advance(context, SECOND)
    await store.retry_step(run_id, "charge", reset=["ship"])
    number = await outcome_of(store.record_step_start(run_id, "ship", "grpc"))
    context.expect(number, 3, "the next attempt of a reset key with two attempts")
    after = await get_step(context, run_id, "ship")
    context.expect(after.attempts[:2], before.attempts, "the earlier attempts of a restarted reset key")
    wanted = {"status": StepStatus.RUNNING, "attempt_count": 3, "started_at": before.started_at}
    expect_fields(context, after, "a step restarted after a reset", **wanted)
    call = store.record_step_complete(run_id, "ship", StepStatus.FAILED, attempt=3)
    context.expect(await outcome_of(call), None, "completing it")
    await store.retry_step(run_id, "ship", attempt=3)
    for expected in (4, 5):
        await store.record_skipped_step(run_id, "ship", "http", "reason", owner="planner")
        step = await get_step(context, run_id, "ship")
        sentence = "the attempts after a reset and the same skip"
        expect_fields(context, step, sentence, attempt_count=expected, status=SKIPPED)
        await run_step(context, run_id, f"other {expected}", StepStatus.FAILED)
        await store.retry_step(run_id, f"other {expected}", reset=["ship"])


@example("STP-6")
async def a_key_that_never_started_cannot_be_retried(context: CheckContext) -> None:
    """Retrying an unstarted key raises StepNotFoundError; the run, reset keys and other runs stay
    unchanged."""
    store, run_id, other = context.store, await start(context), await start(context)
    await store.try_record_dispatch(run_id, "dispatched")
    await skip_steps(context, run_id, "skipped")
    await run_step(context, run_id, "charge", StepStatus.FAILED)
    for one in (run_id, other):
        await run_step(context, one, "same key", StepStatus.FAILED)
        await store.complete_run(one, RunStatus.FAILED)
    before = await observe_all(context, run_id, other)
    for key in ("dispatched", "unknown", "Charge"):
        call = store.retry_step(run_id, key, reset=["skipped"])
        await context.expect_error(call, StepNotFoundError, f"retrying a key that never started ({key})")
    after = await observe_all(context, run_id, other)
    assert_same(context, after, before, "a refused retry changes nothing")
    before = await observe(context, other)
    await store.retry_step(run_id, "same key")
    sentence = "the step of the same key in another run"
    assert_same(context, await observe(context, other), before, sentence)
    context.expect(
        await store.get_run_status(new_id(context)),
        None,
        "the status of an unknown run after a refused retry",
    )
