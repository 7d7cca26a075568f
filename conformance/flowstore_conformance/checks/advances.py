"""QUE-4 and QUE-6: advancing runs; and the requests of STP-6 and IDM-3, the failed attempts of STP-7."""

from __future__ import annotations

from collections.abc import Collection
from itertools import permutations
from typing import Any
from uuid import UUID

from flowstore_conformance.checks.example_checks import example
from flowstore_conformance.checks.fixtures import (
    FLOW,
    HOUR,
    MINUTE,
    SECOND,
    STRANGERS,
    TERMINAL_RUN_STATUSES,
    TERMINAL_STEP_STATUSES,
    advance,
    assert_same,
    expect_fields,
    get_run,
    get_step,
    new_id,
    now,
    observe,
    run_step,
    single,
    skip_steps,
    start,
    start_as_owners,
)
from flowstore_conformance.checks.queues import claim_one, enqueue, expect_claimed, new_queue
from flowstore_conformance.context import CheckContext
from flowstore_core import (
    Capability,
    ClaimLostError,
    EndedStep,
    FlowStoreError,
    RunAdvance,
    RunNotFoundError,
    RunStatus,
    StaleAttemptError,
    StepAlreadyCompletedError,
    StepNotFoundError,
    StepRequest,
    StepStatus,
)
from flowstore_core.queues import not_accepted

CLOCK = [Capability.VIRTUAL_CLOCK]
QUEUES = [Capability.QUEUES]
SUCCEEDED, FAILED, SKIPPED = StepStatus.SUCCEEDED, StepStatus.FAILED, StepStatus.SKIPPED
NOTHING = RunAdvance(dispatched=(), run_completed=False)


def request(
    step_key: str, *after: str, accept: Collection[StepStatus] = (SUCCEEDED,), **given: Any
) -> StepRequest:
    arguments = {"step_type": "http", "after": after, "accept": frozenset(accept), **given}
    return StepRequest(step_key=step_key, **arguments)


async def open_step(context: CheckContext, run_id: UUID, step_key: str = "charge", owner: str = "me") -> None:
    """Claim and start a step, as the owner ``me``."""
    await context.store.try_claim_step(run_id, step_key, owner=owner)
    await context.store.record_step_start(run_id, step_key, "http", owner=owner)


async def end(
    context: CheckContext,
    run_id: UUID,
    step_key: str = "charge",
    status: StepStatus = SUCCEEDED,
    *requests: StepRequest,
    **given: Any,
) -> RunAdvance:
    """Advance a run by the end of the first attempt of a step."""
    arguments: dict[str, Any] = {"attempt": 1, "dispatch": requests, **given}
    return await context.store.advance_run(run_id, step_key, status, **arguments)


def ended(run_id: UUID, step_key: str, status: StepStatus = SUCCEEDED, **given: Any) -> EndedStep:
    """The end of the first attempt of a step, by the owner ``me``."""
    arguments = {"attempt": 1, "owner": "me", **given}
    return EndedStep(run_id=run_id, step_key=step_key, status=status, **arguments)


async def statuses(context: CheckContext, run_id: UUID) -> dict[str, StepStatus]:
    return dict(await context.store.get_step_statuses(run_id))


# QUE-4: the outcome


@example("QUE-4")
async def advancing_records_the_outcome(context: CheckContext) -> None:
    """Status, output and error are those of the attempt and of the step; claim and dispatch stay."""
    store, queue = context.store, new_queue(context)
    for status in TERMINAL_STEP_STATUSES:
        run_id = await start(context)
        await enqueue(context, run_id, queue, "charge")
        step = await claim_one(context, queue)
        claims, dispatches = await store.get_step_claims(run_id), await store.get_dispatches(run_id)
        outcome = {"output_json": '{"n": 1}', "error_message": "e"}
        answer = await end(context, run_id, "charge", status, owner=step.owner, **outcome)
        context.expect(answer, NOTHING, f"advance_run as {status} without requests")
        found = await get_step(context, run_id)
        expect_fields(context, found, f"a step after advance_run as {status}", status=status, **outcome)
        attempt = single(found.attempts, "the attempt of the step")
        expect_fields(context, attempt, f"an attempt after advance_run as {status}", status=status, **outcome)
        context.expect_that(attempt.completed_at, "advance_run sets completed_at of the attempt")
        context.expect(await store.get_step_claims(run_id), claims, "the claims after advance_run")
        context.expect(await store.get_dispatches(run_id), dispatches, "the dispatches after advance_run")
        context.expect(await store.get_run_status(run_id), RunStatus.RUNNING, "the run after advance_run")


@example("QUE-4")
async def advancing_an_ended_attempt_again_changes_nothing(context: CheckContext) -> None:
    """The same outcome is a no-op, also after record_step_complete; another one raises."""
    store, run_id = context.store, await start(context)
    await run_step(context, run_id, "charge", FAILED, error_message="no")
    before = await observe(context, run_id)
    answer = await end(context, run_id, "charge", FAILED, error_message="no")
    context.expect(answer, NOTHING, "advance_run with the outcome that record_step_complete recorded")
    others: tuple[tuple[StepStatus, dict[str, Any]], ...] = (
        (FAILED, {}),
        (FAILED, {"error_message": "yes"}),
        (FAILED, {"error_message": "no", "output_json": "1"}),
        (SUCCEEDED, {"error_message": "no"}),
    )
    for status, given in others:
        call = end(context, run_id, "charge", status, request("next"), **given)
        await context.expect_error(call, StepAlreadyCompletedError, "advance_run with another outcome")
    assert_same(context, await observe(context, run_id), before, "advance_run of an ended attempt")
    await store.retry_step(run_id, "charge")
    call = end(context, run_id, "charge", FAILED, error_message="no")
    await context.expect_error(call, StaleAttemptError, "advance_run of a step that retry_step has reopened")


@example("QUE-4")
async def the_owner_must_have_started_the_attempt(context: CheckContext) -> None:
    """Not merely hold the claim; without owner the attempt number suffices."""
    store, run_id = context.store, await start(context)
    await start_as_owners(context, run_id)
    before = await observe(context, run_id)
    for key, owner, who in STRANGERS:
        call = end(context, run_id, key, SUCCEEDED, request("next"), owner=owner)
        error = await context.expect_error(call, ClaimLostError, f"advance_run by {who}")
        expect_fields(context, error, f"the error of advance_run by {who}", run_id=run_id, step_key=key)
    assert_same(context, await observe(context, run_id), before, "advance_run that raises ClaimLostError")
    await store.release_step_claim(run_id, "mine")
    context.expect(await end(context, run_id, "mine", owner="me"), NOTHING, "advance_run after a release")
    for key in ("ownerless", "taken", "again"):
        context.expect(await end(context, run_id, key), NOTHING, f"advance_run without owner ({key})")


@example("QUE-4")
async def the_errors_of_advance_run_have_an_order(context: CheckContext) -> None:
    """Unknown run, unknown step, stale attempt, lost claim, another outcome; nothing is settled after one."""
    run_id = await start(context)
    await run_step(context, run_id)
    before = await observe(context, run_id)
    cases: tuple[tuple[type[FlowStoreError], UUID, str, int], ...] = (
        (RunNotFoundError, new_id(context), "unknown", 2),
        (StepNotFoundError, run_id, "unknown", 2),
        (StaleAttemptError, run_id, "charge", 2),
        (ClaimLostError, run_id, "charge", 1),
    )
    for error, run, key, attempt in cases:
        given: dict[str, Any] = {"attempt": attempt, "owner": "other", "complete_as": RunStatus.SUCCEEDED}
        call = end(context, run, key, FAILED, request("next"), **given)
        await context.expect_error(call, error, f"advance_run where {error.__name__} comes first")
    call = end(context, run_id, "charge", FAILED, request("next"), complete_as=RunStatus.FAILED)
    await context.expect_error(call, StepAlreadyCompletedError, "advance_run with another outcome")
    assert_same(context, await observe(context, run_id), before, "advance_run that raises")


# QUE-4: requests


@example("QUE-4", needs=CLOCK)
async def a_request_dispatches_its_step(context: CheckContext) -> None:
    """With its queue, priority, step_type, input and due time; dispatched_at is now, job_id None."""
    store, queue, run_id = context.store, new_queue(context), await start(context)
    due = now(context) - MINUTE
    await open_step(context, run_id)
    given: dict[str, Any] = {"queue": queue, "priority": 7, "step_type": "mail", "input_json": "[]"}
    wanted = [request("b", due_at=due, **given), request("a", queue=f"{queue}/2"), request("c")]
    at = advance(context, SECOND)
    answer = await end(context, run_id, "charge", SUCCEEDED, *wanted, owner="me")
    expected = RunAdvance(dispatched=("b", "a", "c"), run_completed=False)
    context.expect(answer, expected, "advance_run with requests without after, in their order")
    plain, full, default = await store.get_dispatches(run_id)
    none: dict[str, Any] = {"priority": 0, "step_type": "http", "input_json": None, "due_at": None}
    shown = {"dispatched_at": at, "job_id": None}
    expect_fields(context, full, "the dispatch of a request", step_key="b", due_at=due, **given, **shown)
    expect_fields(context, plain, "the dispatch of a request", queue=f"{queue}/2", **none, **shown)
    expect_fields(context, default, "the dispatch of a request without queue", queue="default", **none)
    context.expect(await statuses(context, run_id), {"charge": SUCCEEDED}, "the statuses beside dispatches")
    step = await claim_one(context, queue)
    expect_fields(context, step, "the step of a request", step_key="b", due_at=due, attempt=1, **given)


@example("QUE-4", needs=CLOCK)
async def a_request_leaves_a_busy_step_alone(context: CheckContext) -> None:
    """A step that is dispatched, has a live claim, is Running or has ended; all others are dispatched."""
    store, run_id = context.store, await start(context)
    await open_step(context, run_id)
    await store.try_record_dispatch(run_id, "dispatched")
    await enqueue(context, run_id, "other queue", "queued", due_at=now(context) + HOUR)
    await store.try_claim_step(run_id, "held", owner="o")
    await store.try_claim_step(run_id, "leased", owner="o", lease=HOUR)
    await store.try_claim_step(run_id, "lease ended", owner="o", lease=SECOND)
    await store.record_step_start(run_id, "open", "http")
    for status in TERMINAL_STEP_STATUSES:
        await run_step(context, run_id, f"is {status}", status)
    await run_step(context, run_id, "polled", StepStatus.PENDING)
    await run_step(context, run_id, "reopened", FAILED)
    await store.retry_step(run_id, "reopened")
    await store.register_waiter(run_id, "waiting", "go")
    await skip_steps(context, run_id, "reset")
    await run_step(context, run_id, "again", FAILED)
    await store.retry_step(run_id, "again", reset=["reset"])
    await store.try_record_dispatch(run_id, "released")
    await store.release_dispatch(run_id, "released")
    advance(context, SECOND)
    busy = [
        "dispatched",
        "queued",
        "held",
        "leased",
        "open",
        *(f"is {each}" for each in TERMINAL_STEP_STATUSES),
    ]
    free = ["lease ended", "polled", "reopened", "waiting", "reset", "released", "new"]
    before = {each.step_key: each for each in await store.get_dispatches(run_id)}
    # Nor do unmet conditions matter for a busy step.
    asked = [*(request(key, "charge", accept=(FAILED,)) for key in busy), *map(request, free)]
    answer = await end(context, run_id, "charge", SUCCEEDED, *asked, owner="me")
    context.expect(answer.dispatched, tuple(free), "the dispatched steps of requests for busy and free steps")
    after = {each.step_key: each for each in await store.get_dispatches(run_id)}
    context.expect({key: after[key] for key in before}, before, "the dispatches of busy steps")
    context.expect(sorted(after), sorted([*before, *free]), "the keys with a dispatch")


@example("QUE-4")
async def a_request_waits_for_all_its_steps(context: CheckContext) -> None:
    """While a step in after is not terminal or not there, it stays behind; later calls must carry it."""
    store, run_id = context.store, await start(context)
    for key in ("a", "b"):
        await open_step(context, run_id, key)
    await store.try_record_dispatch(run_id, "dispatched")
    await run_step(context, run_id, "polled", StepStatus.PENDING)
    asked = [
        request("join", "a", "b"),
        request("after unknown", "a", "unknown"),
        request("after dispatched", "dispatched"),
        request("after polled", "polled", "a", accept=(SUCCEEDED, FAILED, SKIPPED)),
        request("after itself", "a"),
    ]
    answer = await end(context, run_id, "a", SUCCEEDED, *asked)
    context.expect(answer.dispatched, ("after itself",), "the dispatched steps while other steps go on")
    found = await store.get_dispatched_step_keys(run_id)
    context.expect(found, {"dispatched", "after itself"}, "the dispatches while requests stay behind")
    answer = await end(context, run_id, "b", SUCCEEDED)
    context.expect(answer, NOTHING, "advance_run without the request, which is not remembered")
    answer = await end(context, run_id, "b", SUCCEEDED, asked[0])
    context.expect(answer.dispatched, ("join",), "advance_run repeated with the request that stayed behind")
    answer = await end(context, run_id, "b", SUCCEEDED, asked[0])
    context.expect(answer.dispatched, (), "advance_run repeated with a request that is settled")


@example("QUE-4")
async def a_request_skips_a_step_whose_conditions_are_not_met(context: CheckContext) -> None:
    """Every status must be accepted; the reason names the first step in after whose status is not."""
    for status, accept in (
        (SUCCEEDED, (FAILED,)),
        (FAILED, (SUCCEEDED, SKIPPED)),
        (SKIPPED, (SUCCEEDED,)),
    ):
        run_id = await start(context)
        for key in ("a", "z"):
            await open_step(context, run_id, key)
        await end(context, run_id, "z", status)
        await run_step(context, run_id, "fine", accept[0])
        asked = request("next", "fine", "z", "a", accept=accept, step_type="mail", input_json="{}")
        answer = await end(context, run_id, "a", status, asked)
        context.expect(answer, NOTHING, f"advance_run with a request that does not accept {status}")
        step = await get_step(context, run_id, "next")
        skipped: dict[str, Any] = {"status": SKIPPED, "error_message": not_accepted("z", status)}
        skipped |= {"step_type": "mail", "input_json": None, "output_json": None, "attempt_count": 1}
        expect_fields(context, step, f"a step whose request does not accept {status}", **skipped)
        context.expect_that(step.completed_at, "a skipped step has a completed_at")
        met = request("met", "fine", "z", "a", accept=(*accept, status))
        answer = await end(context, run_id, "a", status, met)
        context.expect(answer.dispatched, ("met",), f"advance_run with a request that accepts {status}")


@example("QUE-4", needs=CLOCK)
async def a_skip_by_a_request_is_an_attempt_as_any_other(context: CheckContext) -> None:
    """Its number follows the earlier attempts; a claim whose lease has ended stays."""
    store, run_id = context.store, await start(context)
    await open_step(context, run_id)
    await store.try_claim_step(run_id, "next", owner="o", lease=SECOND)
    number = await store.record_step_start(run_id, "next", "http", owner="o")
    await store.record_step_complete(run_id, "next", StepStatus.PENDING, attempt=number)
    claims = await store.get_step_claims(run_id)
    advance(context, SECOND)
    await end(context, run_id, "charge", FAILED, request("next", "charge"))
    shown = [(each.attempt, each.status) for each in (await get_step(context, run_id, "next")).attempts]
    wanted = [(1, StepStatus.PENDING), (2, SKIPPED)]
    context.expect(shown, wanted, "the attempts of a step that a request skipped")
    context.expect(await store.get_step_claims(run_id), claims, "the claims after a request skipped a step")


@example("QUE-4")
async def requests_see_the_effects_of_those_before_them(context: CheckContext) -> None:
    """In topological order skips spread at once; in another order a request stays behind."""
    for order in permutations(("b", "c", "d")):
        run_id = await start(context)
        await open_step(context, run_id, "a")
        asked = {
            "b": request("b", "a"),
            "c": request("c", "b"),
            "d": request("d", "c", accept=(SKIPPED,)),
        }
        answer = await end(context, run_id, "a", FAILED, *(asked[key] for key in order))
        wanted, sentence = {"a": FAILED, "b": SKIPPED}, f"after requests in the order {', '.join(order)}"
        if order.index("b") < order.index("c"):
            wanted["c"] = SKIPPED
        runs = "c" in wanted and order.index("c") < order.index("d")
        context.expect(await statuses(context, run_id), wanted, f"the statuses {sentence}")
        context.expect(answer.dispatched, ("d",) if runs else (), f"the dispatched steps {sentence}")


@example("QUE-4")
async def the_last_of_several_parents_settles_the_join(context: CheckContext) -> None:
    """Whichever ends last; the statuses depend on how they ended, not on the order."""
    ends = {"a": SUCCEEDED, "b": FAILED, "c": SKIPPED}
    asked = (
        request("all fine", *ends),
        request("cleanup", *ends, accept=(SUCCEEDED, FAILED, SKIPPED)),
        request("report", "all fine", accept=(SKIPPED,)),
    )
    for order in permutations(ends):
        run_id = await start(context)
        for key in ends:
            await open_step(context, run_id, key)
        answers = [await end(context, run_id, key, ends[key], *asked) for key in order]
        sentence = f"after parents that ended in the order {', '.join(order)}"
        context.expect(answers[:2], [NOTHING, NOTHING], f"the first two advances {sentence}")
        context.expect(answers[2].dispatched, ("cleanup", "report"), f"the last advance {sentence}")
        wanted = {**ends, "all fine": SKIPPED}
        context.expect(await statuses(context, run_id), wanted, f"the statuses {sentence}")


@example("QUE-4")
async def on_a_terminal_run_only_the_outcome_is_recorded(context: CheckContext) -> None:
    """No request is settled, nothing is skipped, and the run stays as it ended."""
    for ended in TERMINAL_RUN_STATUSES:
        run_id = await start(context)
        await open_step(context, run_id)
        await context.store.complete_run(run_id, ended)
        asked = (request("next"), request("skipped", "charge", accept=(FAILED,)))
        answer = await end(context, run_id, "charge", SUCCEEDED, *asked, complete_as=RunStatus.SUCCEEDED)
        context.expect(answer, NOTHING, f"advance_run on a {ended} run")
        context.expect(await statuses(context, run_id), {"charge": SUCCEEDED}, f"the steps of a {ended} run")
        context.expect(await context.store.get_dispatches(run_id), (), f"the dispatches of a {ended} run")
        context.expect(await context.store.get_run_status(run_id), ended, f"the status of a {ended} run")


@example("QUE-4", needs=CLOCK)
async def a_repeated_advance_settles_what_is_missing(context: CheckContext) -> None:
    """It records nothing again, and its result tells what this call did."""
    store, run_id = context.store, await start(context)
    await open_step(context, run_id)
    asked = (request("kept"), request("lost"), request("skipped", "charge", accept=(FAILED,)))
    first = await end(context, run_id, "charge", SUCCEEDED, *asked, owner="me", output_json="1")
    context.expect(first.dispatched, ("kept", "lost"), "advance_run the first time")
    await store.release_dispatch(run_id, "lost")
    before = await get_run(context, run_id)
    advance(context, HOUR)
    again = await end(context, run_id, "charge", SUCCEEDED, *asked, owner="me", output_json="1")
    context.expect(again.dispatched, ("lost",), "advance_run repeated after a dispatch was released")
    context.expect(await get_run(context, run_id), before, "the steps after advance_run was repeated")


@example("QUE-4")
async def several_steps_end_each_for_itself(context: CheckContext) -> None:
    """advance_runs returns the results in the order of its steps; an error of one affects no other."""
    store, run_id, other = context.store, await start(context), await start(context)
    for one, key in ((run_id, "a"), (run_id, "b"), (run_id, "c"), (other, "a"), (other, "open")):
        await open_step(context, one, key)
    join = request("join", "a", "b")
    steps = [
        ended(run_id, "a", dispatch=(join,)),
        ended(other, "a", owner="you", dispatch=(request("lost"),)),
        ended(new_id(context), "a"),
        ended(run_id, "unknown", dispatch=(request("lost"),)),
        ended(run_id, "b", dispatch=(join, request("skipped", "a", accept=(FAILED,)))),
        ended(other, "a", FAILED, error_message="no", complete_as=RunStatus.SUCCEEDED),
        ended(run_id, "c", attempt=2),
        ended(other, "a", SUCCEEDED),
        ended(run_id, "a", dispatch=(join, request("late"))),
        ended(other, "open", complete_as=RunStatus.SUCCEEDED),
    ]
    results = await store.advance_runs(steps)
    found = [type(one) if isinstance(one, FlowStoreError) else one for one in results]
    wanted = [
        NOTHING,
        ClaimLostError,
        RunNotFoundError,
        StepNotFoundError,
        RunAdvance(dispatched=("join",), run_completed=False),
        NOTHING,
        StaleAttemptError,
        StepAlreadyCompletedError,
        RunAdvance(dispatched=("late",), run_completed=False),
        RunAdvance(dispatched=(), run_completed=True),
    ]
    context.expect(found, wanted, "the results of advance_runs")
    expect_fields(context, results[1], "an error that advance_runs returns", run_id=other, step_key="a")
    states = {"a": SUCCEEDED, "b": SUCCEEDED, "c": StepStatus.RUNNING, "skipped": SKIPPED}
    context.expect(await statuses(context, run_id), states, "the steps after advance_runs")
    context.expect(await statuses(context, other), {"a": FAILED, "open": SUCCEEDED}, "the other run's steps")
    keys = await store.get_dispatched_step_keys(run_id)
    context.expect(keys, frozenset({"join", "late"}), "the dispatches after advance_runs")
    context.expect(await store.get_run_status(other), RunStatus.FAILED, "the run that advance_runs ended")
    before = await observe(context, run_id)
    again = await store.advance_runs([steps[0], steps[4]])
    context.expect(list(again), [NOTHING, NOTHING], "advance_runs of steps that have ended")
    assert_same(context, await observe(context, run_id), before, "advance_runs repeated")


@example("QUE-4")
async def advance_runs_takes_up_to_1000_steps(context: CheckContext) -> None:
    """The results of many steps are in the order of the steps; no steps give no results."""
    store, run_id = context.store, await start(context)
    context.expect(tuple(await store.advance_runs([])), (), "advance_runs of no step")
    await open_step(context, run_id)
    unknown = [ended(run_id, f"unknown {number}") for number in range(499)]
    results = await store.advance_runs([*unknown, ended(run_id, "charge"), *unknown, *unknown[:1]])
    context.expect(len(results), 1000, "the number of results for 1,000 steps")
    numbers = [n for n, one in enumerate(results) if not isinstance(one, StepNotFoundError)]
    context.expect(numbers, [499], "the numbers of the steps that advance_runs has ended")
    context.expect(results[499], NOTHING, "the result of the step that advance_runs has ended")


# QUE-6


@example("QUE-6", needs=CLOCK)
async def the_last_advance_completes_the_run(context: CheckContext) -> None:
    """As complete_as says, at the time of the call; a repeated call completes nothing."""
    store = context.store
    for status in TERMINAL_RUN_STATUSES:
        run_id = await start(context)
        for key in ("a", "b"):
            await open_step(context, run_id, key)
        first = await end(context, run_id, "a", complete_as=status)
        context.expect(first, NOTHING, "advance_run with complete_as while another step is open")
        context.expect(await store.get_run_status(run_id), RunStatus.RUNNING, "a run with an open step")
        at = advance(context, SECOND)
        last = await end(context, run_id, "b", complete_as=status)
        done = RunAdvance(dispatched=(), run_completed=True)
        context.expect(last, done, f"advance_run of the last step with complete_as={status}")
        wanted = {"status": status, "completed_at": at}
        expect_fields(context, await get_run(context, run_id), "a completed run", **wanted)
        advance(context, SECOND)
        context.expect(await end(context, run_id, "b", complete_as=status), NOTHING, "advance_run repeated")
        expect_fields(context, await get_run(context, run_id), "a completed run", **wanted)
        context.expect(await store.complete_run(run_id, status), False, "completing the run again")


@example("QUE-6", needs=CLOCK)
async def work_that_is_left_keeps_a_run_running(context: CheckContext) -> None:
    """A step that is not terminal, or another key with a live claim or a dispatch; nothing else."""
    store = context.store

    async def expect(sentence: str, completes: bool, **given: Any) -> None:
        answer = await end(context, run_id, "charge", complete_as=RunStatus.SUCCEEDED, **given)
        context.expect(answer.run_completed, completes, f"completing a run with {sentence}")
        status = RunStatus.SUCCEEDED if completes else RunStatus.RUNNING
        context.expect(await store.get_run_status(run_id), status, f"the status of a run with {sentence}")

    run_id = await start(context)
    await enqueue(context, run_id, new_queue(context), "charge")
    await open_step(context, run_id)
    await store.record_step_start(run_id, "other", "http")
    await expect("an open step", completes=False)
    await store.record_step_complete(run_id, "other", StepStatus.PENDING)
    await expect("a Pending step", completes=False)
    await run_step(context, run_id, "other", SUCCEEDED)
    await store.try_record_dispatch(run_id, "next", due_at=now(context) + HOUR)
    await expect("a dispatch on a key that never started", completes=False)
    await store.release_dispatch(run_id, "next")
    await store.try_claim_step(run_id, "next", owner="o", lease=MINUTE)
    await expect("a claim on a key that never started", completes=False)
    await expect("a request that it dispatches", completes=False, dispatch=[request("requested")])
    await store.release_dispatch(run_id, "requested")
    await store.register_waiter(run_id, "next", "go")
    advance(context, MINUTE)
    # The claim on "next" has ended; "charge" keeps its own claim and dispatch.
    await expect("an ended claim, a waiter, and claim and dispatch of an ended step", completes=True)


@example("QUE-6")
async def failed_as_decides_when_a_step_failed(context: CheckContext) -> None:
    """Whichever step failed, and in whichever order; failed_as None completes as complete_as."""
    outcomes: tuple[tuple[dict[str, Any], RunStatus], ...] = (
        ({}, RunStatus.FAILED),
        ({"failed_as": RunStatus.CANCELLED}, RunStatus.CANCELLED),
        ({"failed_as": None}, RunStatus.SUCCEEDED),
        ({"failed_as": "Succeeded", "complete_as": "Cancelled"}, RunStatus.SUCCEEDED),
    )
    for given, status in outcomes:
        for order in (("good", "bad"), ("bad", "good")):
            run_id = await start(context)
            for key in order:
                await open_step(context, run_id, key)
            ends = {"good": SUCCEEDED, "bad": FAILED}
            asked = request("skipped", *sorted(ends))
            arguments = {"complete_as": RunStatus.SUCCEEDED, **given}
            for key in order:
                await end(context, run_id, key, ends[key], asked, **arguments)
            sentence = f"a run whose {order[1]} step ended last, with {arguments}"
            context.expect(await context.store.get_run_status(run_id), status, f"the status of {sentence}")
            wanted = {**ends, "skipped": SKIPPED}
            context.expect(await statuses(context, run_id), wanted, f"the steps of {sentence}")


@example("QUE-6")
async def skipped_steps_are_no_failure_and_a_request_behind_is_one(context: CheckContext) -> None:
    """A run of Succeeded and Skipped steps completes as complete_as; with a request left behind it failed."""
    asked = (request("skipped", "charge", accept=(FAILED,)), request("behind", "never started"))
    for requests, status in ((asked[:1], RunStatus.SUCCEEDED), (asked, RunStatus.FAILED)):
        run_id = await start(context)
        await open_step(context, run_id)
        answer = await end(context, run_id, "charge", SUCCEEDED, *requests, complete_as=RunStatus.SUCCEEDED)
        context.expect(answer, RunAdvance(dispatched=(), run_completed=True), "advance_run of the only step")
        found = await context.store.get_run_status(run_id)
        context.expect(found, status, f"the status of a run with {len(requests)} requests, the second behind")
    run_id = await start(context)
    await open_step(context, run_id)
    await end(context, run_id, "charge", SUCCEEDED, *asked, complete_as="Cancelled", failed_as=None)
    found = await context.store.get_run_status(run_id)
    context.expect(found, RunStatus.CANCELLED, "the status of a run with a request behind and failed_as None")


@example("QUE-6")
async def without_complete_as_a_run_stays_running(context: CheckContext) -> None:
    """Also when nothing is left; a repeated call with complete_as completes it."""
    run_id = await start(context)
    await open_step(context, run_id)
    context.expect(await end(context, run_id), NOTHING, "advance_run of the last step without complete_as")
    found = await context.store.get_run_status(run_id)
    context.expect(found, RunStatus.RUNNING, "a run after advance_run without complete_as")
    answer = await end(context, run_id, complete_as=RunStatus.SUCCEEDED)
    context.expect(answer.run_completed, True, "advance_run repeated with complete_as")


# Requests of retry_step and trigger_run


@example("STP-6", needs=QUEUES)
async def retrying_settles_requests(context: CheckContext) -> None:
    """After the step is reopened and keys are reset; a request may name the step itself and a reset key."""
    store, queue, run_id = context.store, new_queue(context), await start(context)
    await run_step(context, run_id, "charge", FAILED)
    await skip_steps(context, run_id, "ship", "report")
    await store.complete_run(run_id, RunStatus.FAILED)
    asked = [
        request("charge", queue=queue, input_json="1"),
        request("ship", "charge", queue=queue),
        request("report", queue=queue, priority=2),
        request("skipped", "charge", accept=(FAILED,)),
    ]
    await store.retry_step(run_id, "charge", reset=["ship", "report"], dispatch=asked)
    context.expect(await store.get_run_status(run_id), RunStatus.RUNNING, "the run after retry_step")
    context.expect(
        await statuses(context, run_id), {"charge": StepStatus.PENDING}, "the steps after retry_step"
    )
    found = await store.get_dispatched_step_keys(run_id)
    context.expect(found, {"charge", "report"}, "the keys that retry_step dispatched")
    step = await claim_one(context, queue, limit=1)
    expect_fields(context, step, "the step with the higher priority", step_key="report", attempt=2)
    step = await claim_one(context, queue)
    wanted = {"step_key": "charge", "attempt": 2, "input_json": "1"}
    expect_fields(context, step, "the step that was retried and dispatched", **wanted)


@example("STP-6", needs=QUEUES)
async def a_repeated_retry_settles_its_requests_again(context: CheckContext) -> None:
    """A dispatch that was made meanwhile is kept, one that is missing is made, also on a terminal run."""
    store, queue, run_id = context.store, new_queue(context), await start(context)
    await run_step(context, run_id, "charge", FAILED)
    await store.retry_step(run_id, "charge")
    await store.retry_step(run_id, "charge", attempt=1, dispatch=[request("charge", queue=queue)])
    first = await store.get_dispatches(run_id)
    context.expect(len(first), 1, "the dispatches after a repeated retry_step with a request")
    await store.retry_step(run_id, "charge", dispatch=[request("charge", queue="other", priority=9)])
    context.expect(await store.get_dispatches(run_id), first, "the dispatches after another retry_step")
    await store.release_dispatch(run_id, "charge")
    await store.complete_run(run_id, RunStatus.CANCELLED)
    await store.retry_step(run_id, "charge", dispatch=[request("charge", queue=queue)])
    await expect_claimed(context, queue, ["charge"], "the ready steps after retry_step on a cancelled run")


@example("IDM-3", needs=QUEUES)
async def the_trigger_dispatches_the_first_steps(context: CheckContext) -> None:
    """In its transaction, only with created=True: not for a taken key, nor where the call raises."""
    store, queue, run_id = context.store, new_queue(context), new_id(context)
    asked = [request("a", queue=queue, priority=1, input_json="1"), request("b", queue=queue)]

    async def trigger(run: UUID, *requests: StepRequest, key: str | None = "k") -> bool:
        where: dict[str, Any] = {"idempotency_key": key, "dispatch": requests}
        return (await store.trigger_run(FLOW, "orders", run, queue, **where)).created

    context.expect(await trigger(run_id, *asked), True, "trigger_run with a free key")
    dispatches = await store.get_dispatches(run_id)
    shown = [(each.step_key, each.queue, each.priority, each.input_json) for each in dispatches]
    context.expect(shown, [("a", queue, 1, "1"), ("b", queue, 0, None)], "the dispatches of trigger_run")
    context.expect(await trigger(run_id, request("c")), False, "trigger_run with a taken key")
    context.expect(await trigger(new_id(context), request("c")), False, "trigger_run with a taken key")
    context.expect(await store.get_dispatches(run_id), dispatches, "the dispatches after a second trigger")
    registered, other = new_id(context), new_id(context)
    await store.try_register_idempotency_key(FLOW, queue, "left", registered)
    context.expect(await trigger(other, *asked, key="left"), True, "trigger_run with a key without a run")
    found = await store.get_dispatched_step_keys(registered)
    context.expect(found, {"a", "b"}, "the dispatches of the run that was registered")
    context.expect(await store.get_dispatches(other), (), "the dispatches of the run id that was not used")
    await expect_claimed(context, queue, ["a", "a", "b", "b"], "the ready steps of two triggered runs")


# Failed attempts of reschedule_step


async def _reschedule(context: CheckContext, run_id: UUID, error: str = "no", **given: Any) -> None:
    arguments = {"attempt": 1, "error_message": error, **given}
    await context.store.reschedule_step(run_id, "charge", **arguments)


@example("STP-7", needs=[Capability.QUEUES, Capability.VIRTUAL_CLOCK])
async def a_failed_attempt_is_tried_again_later(context: CheckContext) -> None:
    """The attempt ends Failed, the step is reopened, and its dispatch replaced: the queue and input stay."""
    store, queue, run_id = context.store, new_queue(context), await start(context)
    given: dict[str, Any] = {"priority": 5, "step_type": "mail", "input_json": "[1]"}
    await enqueue(context, run_id, queue, "charge", **given)
    await claim_one(context, queue, lease=HOUR)
    await store.annotate_dispatch(run_id, "charge", "J1")
    await store.register_waiter(run_id, "charge", "go")
    at = advance(context, SECOND)
    due = at + MINUTE
    await _reschedule(context, run_id, "no", output_json="0", due_at=due)
    step = await get_step(context, run_id)
    shown: dict[str, Any] = {"status": StepStatus.PENDING, "error_message": None, "output_json": None}
    expect_fields(context, step, "a step whose failed attempt was rescheduled", attempt_count=2, **shown)
    attempt = single(step.attempts, "the attempt that was rescheduled")
    ended = {"status": FAILED, "error_message": "no", "output_json": "0", "completed_at": at}
    expect_fields(context, attempt, "the failed attempt that was rescheduled", **ended)
    context.expect(await store.get_step_claims(run_id), (), "the claims of a rescheduled step")
    context.expect(await store.get_waiter(run_id, "charge"), None, "the waiter of a rescheduled step")
    dispatch = single(await store.get_dispatches(run_id), "the dispatch")
    wanted = {"queue": queue, "dispatched_at": at, "due_at": due, "job_id": None, **given}
    expect_fields(context, dispatch, "the dispatch of a rescheduled step", **wanted)
    advance(context, MINUTE)
    again = await claim_one(context, queue)
    expect_fields(context, again, "the step that is tried again", attempt=2, due_at=due, **given)


@example("STP-7", needs=[Capability.QUEUES, Capability.VIRTUAL_CLOCK])
async def rescheduling_a_failed_attempt_again_changes_nothing(context: CheckContext) -> None:
    """Whatever its error, output and due time; also after record_step_complete as Failed."""
    store, queue, run_id = context.store, new_queue(context), await start(context)
    await enqueue(context, run_id, queue, "charge")
    await store.record_step_start(run_id, "charge", "http")
    await store.record_step_complete(run_id, "charge", FAILED, error_message="no", output_json="0")
    for given in ({}, {"output_json": "1"}):
        call = _reschedule(context, run_id, **given)
        await context.expect_error(call, StepAlreadyCompletedError, "rescheduling with another outcome")
    await _reschedule(context, run_id, output_json="0", due_at=now(context))
    before = await observe(context, run_id)
    advance(context, SECOND)
    await _reschedule(context, run_id, output_json="0", due_at=now(context))
    await _reschedule(context, run_id, "another", due_at=now(context))
    await _reschedule(context, run_id)
    assert_same(context, await observe(context, run_id), before, "rescheduling a failed attempt again")
    call = store.reschedule_step(run_id, "charge", attempt=1)
    await context.expect_error(call, StaleAttemptError, "rescheduling a reopened step without error")
    await store.record_step_start(run_id, "charge", "http")
    await context.expect_error(_reschedule(context, run_id), StaleAttemptError, "rescheduling an old attempt")
    await store.reschedule_step(run_id, "charge", attempt=2)
    call = _reschedule(context, run_id, attempt=2)
    sentence = "rescheduling with an error an attempt that was rescheduled without"
    await context.expect_error(call, StepAlreadyCompletedError, sentence)


@example("STP-7", needs=QUEUES)
async def a_failed_attempt_on_a_terminal_run_stays_failed(context: CheckContext) -> None:
    """Attempt and step end Failed, claim and dispatch go, and nothing is reopened."""
    store, queue, run_id = context.store, new_queue(context), await start(context)
    await enqueue(context, run_id, queue, "charge")
    await claim_one(context, queue)
    await store.complete_run(run_id, RunStatus.CANCELLED)
    for _ in range(2):
        await _reschedule(context, run_id)
        step = await get_step(context, run_id)
        shown = {"status": FAILED, "error_message": "no", "attempt_count": 1}
        expect_fields(context, step, "a step that failed on a terminal run", **shown)
        context.expect(await store.get_step_claims(run_id), (), "the claims of a step on a terminal run")
        context.expect(await store.get_dispatches(run_id), (), "the dispatches of a step on a terminal run")
        found = await store.get_run_status(run_id)
        context.expect(found, RunStatus.CANCELLED, "the status of a run after reschedule_step")


@example("STP-7", needs=QUEUES)
async def rescheduling_keeps_the_queue(context: CheckContext) -> None:
    """With and without error; where there was no queue, or no dispatch, the new dispatch names none."""
    store, queue = context.store, new_queue(context)
    none: dict[str, Any] = {"queue": None, "priority": 0, "step_type": None, "input_json": None}
    given: dict[str, Any] = {"queue": queue, "priority": 3, "step_type": "mail", "input_json": "{}"}

    async def expect(run_id: UUID, sentence: str, wanted: dict[str, Any]) -> None:
        for attempt, error in ((1, {}), (2, {"error_message": "no"})):
            more: dict[str, Any] = error
            number = await store.record_step_start(run_id, "charge", "http")
            await store.reschedule_step(run_id, "charge", attempt=number, **more)
            context.expect(number, attempt, "the attempt of a rescheduled step")
            dispatch = single(await store.get_dispatches(run_id), "the dispatch")
            expect_fields(context, dispatch, f"the dispatch after rescheduling {sentence}", **wanted)

    queued, plain, undispatched = [await start(context) for _ in range(3)]
    await store.try_record_dispatch(queued, "charge", **given)
    await store.try_record_dispatch(plain, "charge")
    await expect(queued, "a queued step", given)
    await expect(plain, "a step that was dispatched without queue", none)
    await expect(undispatched, "a step without dispatch", none)


@example("INP-4", needs=QUEUES)
async def limits_of_requests_are_inclusive(context: CheckContext) -> None:
    """1,000 requests with 10,000 after keys are accepted; so are lists, sets and plain strings in them."""
    store, run_id = context.store, await start(context)
    await open_step(context, run_id)
    ends = [f"step {number}" for number in range(10)]
    await skip_steps(context, run_id, *ends)
    accept: Any = {"Skipped", "Failed", "Succeeded"}
    after: Any = ends
    many = [
        StepRequest(step_key=f"next {n}", step_type="http", after=after, accept=accept) for n in range(1000)
    ]
    status: Any = "Succeeded"
    answer = await store.advance_run(run_id, "charge", status, attempt=1, dispatch=many)
    context.expect(len(answer.dispatched), 1000, "the steps that advance_run dispatched")
    context.expect(len(await store.get_dispatches(run_id)), 1000, "the dispatches of 1,000 requests")
