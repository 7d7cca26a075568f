"""STP-1 to STP-5: starting, completing and skipping steps."""

from __future__ import annotations

from typing import Any

from flowstore_conformance.bench import Bench
from flowstore_conformance.checks.examples import example
from flowstore_conformance.checks.scenes import (
    DAY,
    MINUTE,
    OUTCOMES,
    SECOND,
    STEP_ENDS,
    expect_alike,
    has,
    later,
    look,
    only,
    run_step,
    skip_step,
    start,
    the_step,
    told,
)
from flowstore_core import (
    Capability,
    ClaimLostError,
    FlowStepAttemptRecord,
    FlowStepRecord,
    StaleAttemptError,
    StepAlreadyCompletedError,
    StepStatus,
)
from flowstore_core.steps import superseded_by

MAY_START = (StepStatus.FAILED, StepStatus.PENDING)
FINISHED = (StepStatus.SUCCEEDED, StepStatus.SKIPPED)

# STP-1


@example("STP-1")
async def a_start_opens_attempt_1(bench: Bench) -> None:
    """The first start opens attempt 1, and the step shows it as Running with all that was given."""
    store, run_id = bench.store, await start(bench)
    at = later(bench, SECOND)
    number = await store.record_step_start(run_id, "charge", "http", input_json='{"n": 1}', job_id="job")
    bench.expect(number, 1, "record_step_start returns the number of the attempt")
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
    bench.expect(await the_step(bench, run_id), wanted, "a started step and its attempt")
    statuses = await store.get_step_statuses(run_id)
    bench.expect(statuses, {"charge": StepStatus.RUNNING}, "get_step_statuses after a start")


@example("STP-1")
async def the_next_attempt_clears_output_error_and_completion(bench: Bench) -> None:
    """A step that starts again shows its new attempt alone; the one before keeps all it had."""
    store, run_id = bench.store, await start(bench)
    for status in MAY_START:
        first = later(bench, SECOND)
        given = {"input_json": "in 1", "job_id": "job 1"}
        await store.record_step_start(run_id, status, "http", **given)
        ended = later(bench, SECOND)
        result: dict[str, Any] = {"output_json": "out", "error_message": "error"}
        await store.record_step_complete(run_id, status, status, **result)
        second = later(bench, SECOND)
        number = await store.record_step_start(run_id, status, "grpc")
        bench.expect(number, 2, f"the start after an attempt that ended {status}")
        step = await the_step(bench, run_id, status)
        cleared: dict[str, Any] = {"output_json": None, "error_message": None, "completed_at": None}
        fresh = {"status": StepStatus.RUNNING, "step_type": "grpc", "input_json": None, "job_id": None}
        sentence = f"a step that starts again after {status}"
        has(bench, step, sentence, **cleared, **fresh, started_at=first, attempt_count=2)
        bench.expect([one.attempt for one in step.attempts], [1, 2], f"the attempts of {sentence}")
        times = {"started_at": first, "completed_at": ended}
        before = {**given, **result, **times, "attempt": 1, "status": status, "step_type": "http"}
        has(bench, step.attempts[0], "an attempt that another followed", **before)
        after = {**cleared, **fresh, "attempt": 2, "started_at": second}
        has(bench, step.attempts[1], "the attempt that followed", **after)


@example("STP-1")
async def an_open_attempt_is_superseded_by_the_next(bench: Bench) -> None:
    """At most one attempt is open, the last: one still open is closed as Failed, naming its successor."""
    store, run_id = bench.store, await start(bench)
    starts = []
    for number in (1, 2, 3):
        starts.append(later(bench, SECOND))
        given = await store.record_step_start(run_id, "charge", "http", input_json=str(number))
        bench.expect(given, number, "attempts are numbered 1, 2, ... without gaps")
    step = await the_step(bench, run_id)
    sentence = "three starts without an end between make three attempts"
    bench.expect([one.attempt for one in step.attempts], [1, 2, 3], sentence)
    for attempt, ended in zip(step.attempts, starts[1:], strict=False):
        wanted: dict[str, Any] = {
            "status": StepStatus.FAILED,
            "output_json": None,
            "error_message": superseded_by(attempt.attempt + 1),
            "completed_at": ended,
            "input_json": str(attempt.attempt),
        }
        has(bench, attempt, f"attempt {attempt.attempt}, which another followed while it was open", **wanted)
    for record in (step, step.attempts[2]):
        wanted = {"status": StepStatus.RUNNING, "error_message": None, "completed_at": None}
        has(bench, record, "the last attempt is open, and the step Running", **wanted)
    bench.expect((step.attempt_count, step.started_at), (3, starts[0]), "attempt_count and started_at")


@example("STP-1")
async def attempts_are_numbered_per_step_of_a_run_without_gaps(bench: Bench) -> None:
    """Each step of each run counts its own attempts, and a start that is refused takes no number."""
    store, run_id, other = bench.store, await start(bench), await start(bench)
    bench.expect([await run_step(bench, run_id, "a", StepStatus.FAILED) for _ in "12"], [1, 2], "numbering")
    bench.expect(await run_step(bench, run_id, "b"), 1, "another step counts its own attempts")
    bench.expect(await run_step(bench, other, "a"), 1, "another run counts its own attempts")
    for _ in range(2):
        call = store.record_step_start(run_id, "a", "http", owner="nobody")
        await bench.expect_error(call, ClaimLostError, "a start as an owner without claim")
    number = await run_step(bench, run_id, "a")
    bench.expect(number, 3, "the start after two that were refused")
    for expected in range(1, 13):
        bench.expect(await run_step(bench, run_id, "poll", StepStatus.PENDING), expected, "a dozen attempts")
    step = await the_step(bench, run_id, "poll")
    bench.expect([one.attempt for one in step.attempts], list(range(1, 13)), "attempts go by number")


# STP-2


@example("STP-2")
async def finished_steps_do_not_start_again(bench: Bench) -> None:
    """A Succeeded or Skipped step refuses to start and changes nothing; retry_step reopens it."""
    store, run_id = bench.store, await start(bench)
    for status in FINISHED:
        await store.try_claim_step(run_id, status, owner="me")
        await run_step(bench, run_id, status, status)
    before = await look(bench, run_id)
    for status in FINISHED:
        for owner in (None, "me", "other"):
            call = store.record_step_start(run_id, status, "http", owner=owner)
            sentence = f"starting a {status} step"
            error = await bench.expect_error(call, StepAlreadyCompletedError, sentence)
            has(bench, error, f"{sentence}: the error", run_id=run_id, step_key=status.value)
    expect_alike(bench, await look(bench, run_id), before, "a start that is refused changes nothing")
    for status in FINISHED:
        await store.retry_step(run_id, status)
        number = await told(store.record_step_start(run_id, status, "http"))
        bench.expect(number, 2, f"starting a {status} step that retry_step reopened")


@example("STP-2")
async def failed_and_pending_steps_may_start_again(bench: Bench) -> None:
    """A Failed or a Pending step starts again without a retry."""
    store, run_id = bench.store, await start(bench)
    for status in MAY_START:
        await run_step(bench, run_id, status, status)
        number = await told(store.record_step_start(run_id, status, "http"))
        bench.expect(number, 2, f"starting a {status} step again")


# STP-3


@example("STP-3")
async def starting_as_an_owner_needs_that_owners_claim(bench: Bench) -> None:
    """Without an unexpired claim of just that owner a start raises ClaimLostError, changing nothing."""
    store, run_id = bench.store, await start(bench)
    await store.try_claim_step(run_id, "theirs", owner="them")
    await store.try_claim_step(run_id, "anonymous")
    await store.try_record_dispatch(run_id, "dispatched")
    await store.try_claim_step(run_id, "released", owner="me")
    await store.record_step_start(run_id, "released", "http", owner="me")
    await store.release_step_claim(run_id, "released")
    before = await look(bench, run_id)
    for key in ("theirs", "anonymous", "dispatched", "released", "unclaimed"):
        call = store.record_step_start(run_id, key, "http", owner="me")
        sentence = f"starting as an owner who does not hold the claim ({key})"
        error = await bench.expect_error(call, ClaimLostError, sentence)
        has(bench, error, f"{sentence}: the error", run_id=run_id, step_key=key)
    expect_alike(bench, await look(bench, run_id), before, "a start that is refused changes nothing")
    await store.try_claim_step(run_id, "mine", owner="me")
    number = await told(store.record_step_start(run_id, "mine", "http", owner="me"))
    bench.expect(number, 1, "starting as the owner of the claim")
    call = store.record_step_start(run_id, "theirs", "http")
    bench.expect(await told(call), 1, "a start without owner needs no claim")


@example("STP-3")
async def a_start_is_repeatable_under_the_same_claim(bench: Bench) -> None:
    """While its attempt is open, the same claim's start again returns that attempt and changes nothing."""
    store, run_id = bench.store, await start(bench)
    await run_step(bench, run_id, "charge", StepStatus.PENDING)
    await store.try_record_dispatch(run_id, "charge")
    await store.try_claim_step(run_id, "charge", owner="me")
    claims = await store.get_step_claims(run_id)
    number = await store.record_step_start(run_id, "charge", "http", input_json="in", owner="me")
    bench.expect(number, 2, "the first start under a claim")
    bench.expect(await store.get_step_claims(run_id), claims, "a start keeps the claim as it is")
    bench.expect(await store.get_dispatched_step_keys(run_id), {"charge"}, "a start keeps the dispatch")
    before = await look(bench, run_id)
    later(bench, SECOND)
    again = await store.record_step_start(run_id, "charge", "grpc", input_json="else", owner="me")
    bench.expect(again, 2, "the same start said again under the same claim")
    later(bench, -SECOND)
    expect_alike(bench, await look(bench, run_id), before, "a start said again changes nothing")
    for status in MAY_START:
        await store.record_step_complete(run_id, "charge", status)
        number += 1
        for how in ("the first", "the second"):
            found = await told(store.record_step_start(run_id, "charge", "http", owner="me"))
            bench.expect(found, number, f"{how} start under a claim whose attempt was closed as {status}")


@example("STP-3")
async def another_claim_starts_another_attempt(bench: Bench) -> None:
    """A claim won anew starts the next attempt, by the same token too; so does a start of nobody's."""
    store, run_id = bench.store, await start(bench)
    for number, owner in enumerate(("me", "me", "other"), 1):
        await store.try_claim_step(run_id, "charge", owner=owner)
        found = await store.record_step_start(run_id, "charge", "http", owner=owner)
        bench.expect(found, number, f"the start of {owner!r} under a claim that was released and won anew")
        await store.release_step_claim(run_id, "charge", owner=owner)
    await store.try_claim_step(run_id, "mixed", owner="me")
    for number, by in enumerate((None, "me", None, "me"), 1):
        found = await store.record_step_start(run_id, "mixed", "http", owner=by)
        bench.expect(found, number, f"a start by {by} after one by another")


@example("STP-3", needs=[Capability.LEASES, Capability.VIRTUAL_CLOCK])
async def an_expired_claim_does_not_start(bench: Bench) -> None:
    """Past its lease, or taken over, a claim does not start a step; won anew it starts the next attempt."""
    store, run_id = bench.store, await start(bench)
    await store.try_claim_step(run_id, "charge", owner="old", lease=MINUTE)
    await store.record_step_start(run_id, "charge", "http", owner="old")
    later(bench, MINUTE)
    before = await look(bench, run_id)
    call = store.record_step_start(run_id, "charge", "http", owner="old")
    await bench.expect_error(call, ClaimLostError, "starting under a claim whose lease has just ended")
    expect_alike(bench, await look(bench, run_id), before, "a start that is refused changes nothing")
    await store.try_claim_step(run_id, "charge", owner="old", lease=MINUTE)
    number = await store.record_step_start(run_id, "charge", "http", owner="old")
    bench.expect(number, 2, "a start under a claim that expired and was won anew by the same token")
    later(bench, MINUTE)
    await store.try_claim_step(run_id, "charge", owner="new", lease=MINUTE)
    call = store.record_step_start(run_id, "charge", "http", owner="old")
    await bench.expect_error(call, ClaimLostError, "starting under a claim that another took over")
    number = await store.record_step_start(run_id, "charge", "http", owner="new")
    bench.expect(number, 3, "a start of the owner that took the claim over")


# STP-4


@example("STP-4")
async def completing_closes_the_attempt_and_the_step_alike(bench: Bench) -> None:
    """Status, output and error go to both; closed as Pending, the attempt has an end, the step none."""
    store, run_id = bench.store, await start(bench)
    for status in OUTCOMES:
        for attempt in (None, 1):
            key = f"{status} {attempt}"
            begun = later(bench, SECOND)
            await store.try_record_dispatch(run_id, key)
            await store.record_step_start(run_id, key, "http", input_json="in", job_id="job")
            ended = later(bench, SECOND)
            result: dict[str, Any] = {"output_json": "out", "error_message": "error"}
            await store.record_step_complete(run_id, key, status, **result, attempt=attempt)
            step = await the_step(bench, run_id, key)
            alike = {**result, "status": status, "input_json": "in", "job_id": "job", "started_at": begun}
            bench.expect(len(step.attempts), 1, f"the number of attempts once one was closed as {status}")
            closed = step.attempts[0]
            has(bench, closed, f"an attempt closed as {status}", **alike, completed_at=ended)
            own = None if status is StepStatus.PENDING else ended
            sentence = f"the step of an attempt closed as {status}"
            has(bench, step, sentence, **alike, completed_at=own, attempt_count=1)
    wanted = {f"{status} {attempt}": status for status in OUTCOMES for attempt in (None, 1)}
    bench.expect(await store.get_step_statuses(run_id), wanted, "get_step_statuses after completing")
    bench.expect(await store.get_dispatched_step_keys(run_id), set(wanted), "completing keeps the dispatch")


@example("STP-4")
async def the_same_outcome_again_is_a_no_op_and_another_is_refused(bench: Bench) -> None:
    """Status, output and error alike change nothing; any other raises StepAlreadyCompletedError."""
    store, run_id = bench.store, await start(bench)
    outcome: dict[str, Any] = {"output_json": "out", "error_message": None}
    for status in OUTCOMES:
        await store.record_step_start(run_id, status, "http")
        await store.record_step_complete(run_id, status, status, **outcome)
    before = await look(bench, run_id)
    later(bench, SECOND)
    changes: tuple[dict[str, Any], ...] = (
        {"output_json": "other"},
        {"output_json": "OUT"},
        {"output_json": "out "},
        {"output_json": None},
        {"error_message": ""},
        {"error_message": "error"},
    )
    for number, status in enumerate(OUTCOMES):
        for attempt in (None, 1):
            sentence = f"the same outcome ({status}) again for attempt {attempt}"
            call = store.record_step_complete(run_id, status, status, attempt=attempt, **outcome)
            bench.expect(await told(call), None, sentence)
        another: dict[str, Any] = {"status": OUTCOMES[number - 1]}
        for change in (*changes, another):
            asked: dict[str, Any] = {"status": status, "attempt": 1, **outcome, **change}
            call = store.record_step_complete(run_id, status, **asked)
            sentence = f"another outcome ({change}) on an attempt closed as {status}"
            error = await bench.expect_error(call, StepAlreadyCompletedError, sentence)
            has(bench, error, f"{sentence}: the error", run_id=run_id, step_key=status.value)
    later(bench, -SECOND)
    expect_alike(bench, await look(bench, run_id), before, "completing a closed attempt changes nothing")


@example("STP-4")
async def a_result_of_an_attempt_that_is_not_current_is_refused(bench: Bench) -> None:
    """Any attempt but the last, and any at all of a reopened step, raises StaleAttemptError."""
    store, run_id = bench.store, await start(bench)
    for _ in range(3):
        await store.record_step_start(run_id, "running", "http")
    await run_step(bench, run_id, "failed", StepStatus.FAILED)
    await store.record_step_start(run_id, "failed", "http")
    for status in OUTCOMES:
        await run_step(bench, run_id, f"reopened {status}", status)
        await store.retry_step(run_id, f"reopened {status}")
    before = await look(bench, run_id)
    cases: list[tuple[str, int | None, StepStatus, int]] = [
        *(("running", attempt, StepStatus.SUCCEEDED, 3) for attempt in (1, 2, 4, 2**31, 2**63 - 1)),
        ("failed", 1, StepStatus.FAILED, 2),
        *((f"reopened {status}", n, status, 1) for status in OUTCOMES for n in (None, 1, 2)),
        ("reopened Failed", 1, StepStatus.SUCCEEDED, 1),
    ]
    for key, attempt, status, last in cases:
        call = store.record_step_complete(run_id, key, status, attempt=attempt)
        sentence = f"completing attempt {attempt} of a step ({key}) whose last is {last}"
        error = await bench.expect_error(call, StaleAttemptError, sentence)
        named = {"run_id": run_id, "step_key": key, "attempt": attempt, "last_attempt": last}
        has(bench, error, f"{sentence}: the error", **named)
    expect_alike(bench, await look(bench, run_id), before, "a stale result changes nothing")
    await store.record_step_start(run_id, "reopened Failed", "http")
    call = store.record_step_complete(run_id, "reopened Failed", StepStatus.SUCCEEDED, attempt=2)
    bench.expect(await told(call), None, "completing a reopened step once it has started again")


# STP-5


@example("STP-5")
async def a_skip_is_one_attempt_that_starts_and_ends_skipped(bench: Bench) -> None:
    """The reason is its error_message; an open attempt is closed first, and Pending steps are skipped too."""
    store, run_id = bench.store, await start(bench)
    await store.record_step_start(run_id, "open", "http", input_json="in", job_id="job")
    await run_step(bench, run_id, "pending", StepStatus.PENDING, output_json="out")
    await run_step(bench, run_id, "reopened", StepStatus.FAILED, output_json="out")
    await store.retry_step(run_id, "reopened")
    at = later(bench, SECOND)
    for key, reason in (("new", "a reason"), ("open", None), ("pending", ""), ("reopened", "a reason")):
        await store.record_skipped_step(run_id, key, "skip", reason)
        step = await the_step(bench, run_id, key)
        number = 1 if key == "new" else 2
        bench.expect([one.attempt for one in step.attempts], [1, 2][:number], f"the attempts ({key})")
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
        has(bench, step, sentence, **wanted, attempt_count=number)
        has(bench, step.attempts[-1], f"the attempt of {sentence}", **wanted, started_at=at)
    first = (await the_step(bench, run_id, "open")).attempts[0]
    closed = {"status": StepStatus.FAILED, "error_message": superseded_by(2), "completed_at": at}
    has(bench, first, "an open attempt that a skip closed", **closed, output_json=None, input_json="in")
    bench.expect(await store.get_step_claims(run_id), (), "a skip without owner takes no claim")
    call = store.record_step_complete(run_id, "open", StepStatus.SUCCEEDED, attempt=1)
    await bench.expect_error(call, StaleAttemptError, "completing an attempt that a skip closed")


@example("STP-5")
async def with_owner_a_skip_takes_the_claim(bench: Bench) -> None:
    """A free claim is taken, the owner's own kept, and another's raises ClaimLostError, changing nothing."""
    store, run_id = bench.store, await start(bench)
    lease = {"lease": DAY} if Capability.LEASES in bench.capabilities else {}
    await store.try_claim_step(run_id, "mine", owner="me", **lease)
    await store.try_claim_step(run_id, "theirs", owner="them")
    await store.try_claim_step(run_id, "anonymous")
    before = await look(bench, run_id)
    for key in ("theirs", "anonymous"):
        call = store.record_skipped_step(run_id, key, "http", "reason", owner="me")
        sentence = f"skipping as an owner while another holds the claim ({key})"
        error = await bench.expect_error(call, ClaimLostError, sentence)
        has(bench, error, f"{sentence}: the error", run_id=run_id, step_key=key)
    expect_alike(bench, await look(bench, run_id), before, "a skip that is refused changes nothing")
    own = [claim for claim in await store.get_step_claims(run_id) if claim.step_key == "mine"]
    at = later(bench, SECOND)
    await store.record_skipped_step(run_id, "free", "http", "reason", owner="me")
    await store.record_skipped_step(run_id, "mine", "http", "reason", owner="me")
    await store.record_skipped_step(run_id, "theirs", "http", "reason")
    claims = {claim.step_key: claim for claim in await store.get_step_claims(run_id)}
    bench.expect(sorted(claims), ["anonymous", "free", "mine", "theirs"], "the claims after skipping")
    taken = {"owner": "me", "claimed_at": at, "expires_at": None}
    has(bench, claims["free"], "a free claim that a skip with owner took", **taken)
    bench.expect([claims["mine"]], own, "the owner's own claim stays as it is")
    bench.expect(claims["theirs"].owner, "them", "a skip without owner leaves another's claim")
    answer = await told(store.try_claim_step(run_id, "free", owner="redelivered"))
    bench.expect(answer, False, "claiming a step that was skipped")


@example("STP-5", needs=[Capability.LEASES, Capability.VIRTUAL_CLOCK])
async def with_owner_a_skip_takes_an_expired_claim(bench: Bench) -> None:
    """An expired claim is taken over: claimed_at now, and no lease."""
    store, run_id = bench.store, await start(bench)
    await store.try_claim_step(run_id, "charge", owner="old", lease=MINUTE)
    at = later(bench, MINUTE)
    call = store.record_skipped_step(run_id, "charge", "http", "reason", owner="new")
    bench.expect(await told(call), None, "skipping as an owner when another's lease has ended")
    claim = only(await store.get_step_claims(run_id), "the claim that the skip took")
    wanted = {"owner": "new", "claimed_at": at, "expires_at": None}
    has(bench, claim, "an expired claim that a skip with owner took", **wanted)


@example("STP-5")
async def a_skip_is_repeatable_by_its_owner_for_its_reason(bench: Bench) -> None:
    """The same owner and reason again is a no-op; any other skip of a terminal step is refused."""
    store, run_id = bench.store, await start(bench)
    await store.record_skipped_step(run_id, "a", "http", "reason", owner="me")
    await store.record_skipped_step(run_id, "b", "http", owner="me")
    await skip_step(bench, run_id, "nobody's")
    for status in STEP_ENDS:
        await store.try_claim_step(run_id, status, owner="me")
        await run_step(bench, run_id, status, status)
    before = await look(bench, run_id)
    later(bench, SECOND)
    for key, reason in (("a", "reason"), ("b", None)):
        call = store.record_skipped_step(run_id, key, "http", reason, owner="me")
        bench.expect(await told(call), None, f"the same skip again by the same owner ({reason!r})")
    refused: list[tuple[str, str | None, str | None]] = [
        ("a", "other", "me"),
        ("a", None, "me"),
        ("a", "reason", "other"),
        ("a", "reason", None),
        ("b", "", "me"),
        ("nobody's", "not needed", None),
        ("nobody's", "not needed", "me"),
        *((status.value, None, owner) for status in STEP_ENDS for owner in (None, "other")),
    ]
    for key, reason, owner in refused:
        call = store.record_skipped_step(run_id, key, "http", reason, owner=owner)
        sentence = f"skipping a terminal step ({key}) by {owner} for {reason!r}"
        await bench.expect_error(call, StepAlreadyCompletedError, sentence)
    later(bench, -SECOND)
    expect_alike(bench, await look(bench, run_id), before, "skipping a terminal step changes nothing")
