"""STP-4 and STP-5: completing and skipping steps."""

from __future__ import annotations

from itertools import product
from typing import Any

from flowstore_conformance.checks.example_checks import example
from flowstore_conformance.checks.fixtures import (
    CLOSING_STATUSES,
    DAY,
    MINUTE,
    SECOND,
    STRANGERS,
    TERMINAL_STEP_STATUSES,
    advance,
    assert_same,
    expect_fields,
    get_step,
    observe_all,
    outcome_of,
    run_step,
    single,
    skip_steps,
    start,
    start_as_owners,
)
from flowstore_conformance.context import CheckContext
from flowstore_core import (
    Capability,
    ClaimLostError,
    RunStatus,
    StaleAttemptError,
    StepAlreadyCompletedError,
    StepStatus,
)
from flowstore_core.steps import superseded_by

# STP-4


@example("STP-4")
async def completing_gives_attempt_and_step_the_same_outcome(context: CheckContext) -> None:
    """Status, output and error apply to both; closed as Pending, only the attempt has a completed_at."""
    store, run_id = context.store, await start(context)
    for status in CLOSING_STATUSES:
        for attempt in (None, 1):
            key = f"{status} {attempt}"
            begun = advance(context, SECOND)
            await store.try_record_dispatch(run_id, key)
            await store.record_step_start(run_id, key, "http", input_json="in", job_id="job")
            ended = advance(context, SECOND)
            result: dict[str, Any] = {"output_json": "out", "error_message": "error"}
            await store.record_step_complete(run_id, key, status, **result, attempt=attempt)
            step = await get_step(context, run_id, key)
            alike = {**result, "status": status, "input_json": "in", "job_id": "job", "started_at": begun}
            context.expect(len(step.attempts), 1, f"the number of attempts after closing one as {status}")
            closed = step.attempts[0]
            expect_fields(context, closed, f"an attempt closed as {status}", **alike, completed_at=ended)
            own = None if status is StepStatus.PENDING else ended
            sentence = f"the step of an attempt closed as {status}"
            expect_fields(context, step, sentence, **alike, completed_at=own, attempt_count=1)
    wanted = {f"{status} {attempt}": status for status in CLOSING_STATUSES for attempt in (None, 1)}
    context.expect(await store.get_step_statuses(run_id), wanted, "get_step_statuses after completing")
    context.expect(
        await store.get_dispatched_step_keys(run_id), set(wanted), "the dispatches after completing"
    )


@example("STP-4")
async def repeating_an_outcome_is_a_no_op_and_changing_it_is_refused(context: CheckContext) -> None:
    """The same status, output and error change nothing; any other raises StepAlreadyCompletedError."""
    store, run_id = context.store, await start(context)
    outcome: dict[str, Any] = {"output_json": "out", "error_message": None}
    for status in CLOSING_STATUSES:
        await store.record_step_start(run_id, status, "http")
        await store.record_step_complete(run_id, status, status, **outcome)
    before = await observe_all(context, run_id)
    advance(context, SECOND)
    changes: tuple[dict[str, Any], ...] = (
        {"output_json": "other"},
        {"output_json": "OUT"},
        {"output_json": "out "},
        {"output_json": None},
        {"error_message": ""},
        {"error_message": "error"},
    )
    for number, status in enumerate(CLOSING_STATUSES):
        for attempt in (None, 1):
            sentence = f"the repeated outcome {status} of attempt {attempt}"
            call = store.record_step_complete(run_id, status, status, attempt=attempt, **outcome)
            context.expect(await outcome_of(call), None, sentence)
        other_status: dict[str, Any] = {"status": CLOSING_STATUSES[number - 1]}
        for change in (*changes, other_status):
            probes: dict[str, Any] = {"status": status, "attempt": 1, **outcome, **change}
            call = store.record_step_complete(run_id, status, **probes)
            sentence = f"a different outcome ({change}) of an attempt closed as {status}"
            error = await context.expect_error(call, StepAlreadyCompletedError, sentence)
            expect_fields(context, error, f"{sentence}: the error", run_id=run_id, step_key=status.value)
    advance(context, -SECOND)
    assert_same(
        context, await observe_all(context, run_id), before, "completing a closed attempt changes nothing"
    )


TEXTS = (None, "", "text")


@example("STP-4")
async def outcomes_with_different_texts_differ(context: CheckContext) -> None:
    """None, "" and other texts are different outputs and errors, in each place and for each status."""
    store, run_id = context.store, await start(context)
    pairs = list(product(TEXTS, TEXTS))
    for number, (output, error) in enumerate(pairs):
        status, key = CLOSING_STATUSES[number % len(CLOSING_STATUSES)], f"{output!r} {error!r}"
        await store.record_step_start(run_id, key, "http")
        given: dict[str, Any] = {"output_json": output, "error_message": error}
        await store.record_step_complete(run_id, key, status, **given)
        # The step has this outcome only: first the same again, then others, then the same again.
        for other in ((output, error), *pairs, (output, error)):
            again: dict[str, Any] = {"output_json": other[0], "error_message": other[1]}
            found = await outcome_of(store.record_step_complete(run_id, key, status, attempt=1, **again))
            wanted = None if other == (output, error) else "<StepAlreadyCompletedError raised>"
            context.expect(found, wanted, f"completing with {again} after {status} with {given}")
        step = await get_step(context, run_id, key)
        expect_fields(context, step, f"a step closed as {status} with {given}", status=status, **given)


@example("STP-4")
async def a_result_of_a_stale_attempt_is_refused(context: CheckContext) -> None:
    """Any attempt but the last, and any attempt of a reopened step, raises StaleAttemptError."""
    store, run_id = context.store, await start(context)
    for _ in range(3):
        await store.record_step_start(run_id, "running", "http")
    await run_step(context, run_id, "failed", StepStatus.FAILED)
    await store.record_step_start(run_id, "failed", "http")
    for status in CLOSING_STATUSES:
        await run_step(context, run_id, f"reopened {status}", status)
        await store.retry_step(run_id, f"reopened {status}")
    before = await observe_all(context, run_id)
    cases: list[tuple[str, int | None, StepStatus, int]] = [
        *(("running", attempt, StepStatus.SUCCEEDED, 3) for attempt in (1, 2, 4, 2**31, 2**63 - 1)),
        ("failed", 1, StepStatus.FAILED, 2),
        *((f"reopened {status}", n, status, 1) for status in CLOSING_STATUSES for n in (None, 1, 2)),
        ("reopened Failed", 1, StepStatus.SUCCEEDED, 1),
    ]
    for key, attempt, status, last in cases:
        call = store.record_step_complete(run_id, key, status, attempt=attempt)
        sentence = f"completing attempt {attempt} of a step ({key}) with last attempt {last}"
        error = await context.expect_error(call, StaleAttemptError, sentence)
        named = {"run_id": run_id, "step_key": key, "attempt": attempt, "last_attempt": last}
        expect_fields(context, error, f"{sentence}: the error", **named)
    assert_same(context, await observe_all(context, run_id), before, "a refused stale result changes nothing")
    await store.record_step_start(run_id, "reopened Failed", "http")
    call = store.record_step_complete(run_id, "reopened Failed", StepStatus.SUCCEEDED, attempt=2)
    context.expect(await outcome_of(call), None, "completing a reopened step after its next start")


@example("STP-4")
async def an_attempt_is_closed_for_the_owner_that_started_it(context: CheckContext) -> None:
    """Not for one that merely holds the claim; without owner the attempt number suffices."""
    store, run_id = context.store, await start(context)
    await start_as_owners(context, run_id)
    before = await observe_all(context, run_id)
    for key, owner, who in STRANGERS:
        for attempt in (None, 1):
            call = store.record_step_complete(run_id, key, StepStatus.SUCCEEDED, attempt=attempt, owner=owner)
            sentence = f"record_step_complete(attempt={attempt}) by {who}"
            error = await context.expect_error(call, ClaimLostError, sentence)
            expect_fields(context, error, f"{sentence}: the error", run_id=run_id, step_key=key)
    call = store.record_step_complete(run_id, "mine", StepStatus.SUCCEEDED, attempt=2, owner="other")
    await context.expect_error(call, StaleAttemptError, "a stale attempt of another owner")
    assert_same(context, await observe_all(context, run_id), before, "a result that raises ClaimLostError")
    await store.release_step_claim(run_id, "mine")
    for name in ("the result of the owner after a release", "the same result again"):
        call = store.record_step_complete(run_id, "mine", StepStatus.SUCCEEDED, attempt=1, owner="me")
        context.expect(await outcome_of(call), None, name)
    call = store.record_step_complete(run_id, "mine", StepStatus.FAILED, attempt=1, owner="other")
    await context.expect_error(call, ClaimLostError, "another result of another owner")
    for key in ("ownerless", "taken", "again"):
        await store.record_step_complete(run_id, key, StepStatus.SUCCEEDED, attempt=1)
    wanted = dict.fromkeys(("again", "mine", "ownerless", "taken"), StepStatus.SUCCEEDED)
    context.expect(await store.get_step_statuses(run_id), wanted, "get_step_statuses after all results")


@example("STP-4", needs=[Capability.DELETION])
async def an_owner_of_a_deleted_run_ends_no_attempt_of_its_successor(context: CheckContext) -> None:
    """The attempts of both runs have the number 1; the owner tells them apart."""
    store, run_id = context.store, await start(context)
    for owner in ("before", "after"):
        if owner == "after":
            await store.complete_run(run_id, RunStatus.CANCELLED)
            await store.delete_run(run_id)
            await start(context, run_id=run_id)
        await store.try_claim_step(run_id, "charge", owner=owner)
        await store.record_step_start(run_id, "charge", "http", owner=owner)
    call = store.record_step_complete(run_id, "charge", StepStatus.SUCCEEDED, attempt=1, owner="before")
    await context.expect_error(call, ClaimLostError, "a result from the deleted run")
    step = await get_step(context, run_id, "charge")
    context.expect(step.status, StepStatus.RUNNING, "the step of the run that has its id now")


# STP-5


@example("STP-5")
async def a_skip_is_one_attempt_that_starts_and_ends_skipped(context: CheckContext) -> None:
    """The attempt's error_message is the reason; an open attempt is closed first; Pending steps can be
    skipped."""
    store, run_id = context.store, await start(context)
    await store.record_step_start(run_id, "open", "http", input_json="in", job_id="job")
    await run_step(context, run_id, "pending", StepStatus.PENDING, output_json="out")
    await run_step(context, run_id, "reopened", StepStatus.FAILED, output_json="out")
    await store.retry_step(run_id, "reopened")
    at = advance(context, SECOND)
    for key, reason in (("new", "a reason"), ("open", None), ("pending", ""), ("reopened", "a reason")):
        await store.record_skipped_step(run_id, key, "skip", reason)
        step = await get_step(context, run_id, key)
        number = 1 if key == "new" else 2
        context.expect([one.attempt for one in step.attempts], [1, 2][:number], f"the attempts ({key})")
        wanted: dict[str, Any] = {
            "step_type": "skip",
            "status": StepStatus.SKIPPED,
            "input_json": None,
            "output_json": None,
            "job_id": None,
            "error_message": reason,
            "completed_at": at,
        }
        sentence = f"a skipped step ({key}) with reason {reason!r}"
        expect_fields(context, step, sentence, **wanted, attempt_count=number)
        expect_fields(context, step.attempts[-1], f"the attempt of {sentence}", **wanted, started_at=at)
    first = (await get_step(context, run_id, "open")).attempts[0]
    closed = {"status": StepStatus.FAILED, "error_message": superseded_by(2), "completed_at": at}
    expect_fields(
        context, first, "the open attempt that a skip closed", **closed, output_json=None, input_json="in"
    )
    context.expect(await store.get_step_claims(run_id), (), "the claims after a skip without owner")
    call = store.record_step_complete(run_id, "open", StepStatus.SUCCEEDED, attempt=1)
    await context.expect_error(call, StaleAttemptError, "completing an attempt that a skip closed")


@example("STP-5")
async def a_skip_with_owner_takes_the_claim(context: CheckContext) -> None:
    """A skip takes a free claim and keeps the owner's claim; another owner's claim raises ClaimLostError."""
    store, run_id = context.store, await start(context)
    lease = {"lease": DAY} if Capability.LEASES in context.capabilities else {}
    await store.try_claim_step(run_id, "mine", owner="me", **lease)
    await store.try_claim_step(run_id, "theirs", owner="them")
    await store.try_claim_step(run_id, "anonymous")
    before = await observe_all(context, run_id)
    for key in ("theirs", "anonymous"):
        call = store.record_skipped_step(run_id, key, "http", "reason", owner="me")
        sentence = f"skipping while another owner holds the claim ({key})"
        error = await context.expect_error(call, ClaimLostError, sentence)
        expect_fields(context, error, f"{sentence}: the error", run_id=run_id, step_key=key)
    assert_same(context, await observe_all(context, run_id), before, "a refused skip changes nothing")
    own = [claim for claim in await store.get_step_claims(run_id) if claim.step_key == "mine"]
    at = advance(context, SECOND)
    await store.record_skipped_step(run_id, "free", "http", "reason", owner="me")
    await store.record_skipped_step(run_id, "mine", "http", "reason", owner="me")
    await store.record_skipped_step(run_id, "theirs", "http", "reason")
    claims = {claim.step_key: claim for claim in await store.get_step_claims(run_id)}
    context.expect(sorted(claims), ["anonymous", "free", "mine", "theirs"], "the claims after skipping")
    taken = {"owner": "me", "claimed_at": at, "expires_at": None}
    expect_fields(context, claims["free"], "the claim after a skip with owner took a free key", **taken)
    context.expect([claims["mine"]], own, "the owner's claim after its skip")
    context.expect(claims["theirs"].owner, "them", "the claim of another owner after a skip without owner")
    answer = await outcome_of(store.try_claim_step(run_id, "free", owner="redelivered"))
    context.expect(answer, False, "claiming a skipped step")


@example("STP-5", needs=[Capability.LEASES, Capability.VIRTUAL_CLOCK])
async def a_skip_with_owner_takes_an_expired_claim(context: CheckContext) -> None:
    """A skip takes over an expired claim: claimed_at is now and there is no lease."""
    store, run_id = context.store, await start(context)
    await store.try_claim_step(run_id, "charge", owner="old", lease=MINUTE)
    at = advance(context, MINUTE)
    call = store.record_skipped_step(run_id, "charge", "http", "reason", owner="new")
    context.expect(await outcome_of(call), None, "skipping as an owner after another owner's lease has ended")
    claim = single(await store.get_step_claims(run_id), "the claim after the skip")
    wanted = {"owner": "new", "claimed_at": at, "expires_at": None}
    expect_fields(context, claim, "the claim after a skip with owner replaced an expired claim", **wanted)


@example("STP-5")
async def skips_with_different_reasons_differ(context: CheckContext) -> None:
    """An owner that repeats its skip with None, "" or another reason is refused, unless it is the same."""
    store, run_id = context.store, await start(context)
    for reason in TEXTS:
        await store.record_skipped_step(run_id, f"{reason!r}", "http", reason, owner="me")
        for other in (reason, *TEXTS, reason):
            call = store.record_skipped_step(run_id, f"{reason!r}", "http", other, owner="me")
            wanted = None if other == reason else "<StepAlreadyCompletedError raised>"
            context.expect(await outcome_of(call), wanted, f"a skip for {other!r} after one for {reason!r}")
        step = await get_step(context, run_id, f"{reason!r}")
        context.expect(step.error_message, reason, "the reason after repeated skips")


@example("STP-5")
async def a_skip_is_repeatable_by_its_owner_for_its_reason(context: CheckContext) -> None:
    """Repeating a skip with the same owner and reason is a no-op; other skips of a terminal step raise."""
    store, run_id = context.store, await start(context)
    await store.record_skipped_step(run_id, "a", "http", "reason", owner="me")
    await store.record_skipped_step(run_id, "b", "http", owner="me")
    await skip_steps(context, run_id, "ownerless")
    for status in TERMINAL_STEP_STATUSES:
        await store.try_claim_step(run_id, status, owner="me")
        await run_step(context, run_id, status, status)
    # Equal to the skip except for its status.
    for status in (StepStatus.SUCCEEDED, StepStatus.FAILED):
        await store.try_claim_step(run_id, f"like {status}", owner="me")
        await store.record_step_start(run_id, f"like {status}", "http", owner="me")
        await store.record_step_complete(run_id, f"like {status}", status, error_message="reason")
    before = await observe_all(context, run_id)
    advance(context, SECOND)
    for key, reason in (("a", "reason"), ("b", None)):
        call = store.record_skipped_step(run_id, key, "http", reason, owner="me")
        context.expect(await outcome_of(call), None, f"a repeated skip by the same owner ({reason!r})")
    refused: list[tuple[str, str | None, str | None]] = [
        ("a", "other", "me"),
        ("a", None, "me"),
        ("a", "reason", "other"),
        ("a", "reason", None),
        ("b", "", "me"),
        ("ownerless", "not needed", None),
        ("ownerless", "not needed", "me"),
        ("like Succeeded", "reason", "me"),
        ("like Failed", "reason", "me"),
        *((status.value, None, owner) for status in TERMINAL_STEP_STATUSES for owner in (None, "other")),
    ]
    for key, reason, owner in refused:
        call = store.record_skipped_step(run_id, key, "http", reason, owner=owner)
        sentence = f"skipping a terminal step ({key}) by {owner} for {reason!r}"
        await context.expect_error(call, StepAlreadyCompletedError, sentence)
    advance(context, -SECOND)
    assert_same(
        context, await observe_all(context, run_id), before, "skipping a terminal step changes nothing"
    )
