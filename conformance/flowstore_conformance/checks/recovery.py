"""STP-7 and STP-8: rescheduling a step atomically, and finding stalled steps."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from flowstore_conformance.checks.example_checks import example
from flowstore_conformance.checks.fixtures import (
    DAY,
    HOUR,
    MINUTE,
    SECOND,
    STRANGERS,
    TERMINAL_STEP_STATUSES,
    TICK,
    advance,
    assert_same,
    expect_fields,
    get_run,
    get_step,
    now,
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
    StalledStep,
    StallReason,
    StepAlreadyCompletedError,
    StepDispatch,
    StepNotFoundError,
    StepStatus,
)

# STP-7


@example("STP-7")
async def rescheduling_closes_releases_and_dispatches(context: CheckContext) -> None:
    """The attempt is closed as Pending, the claim is removed, and a new dispatch with due_at is recorded."""
    store, run_id = context.store, await start(context)
    await store.try_record_dispatch(run_id, "poll", due_at=now(context))
    await store.annotate_dispatch(run_id, "poll", "job")
    await store.try_claim_step(run_id, "poll", owner="me")
    for key in ("poll", "undispatched"):
        await store.record_step_start(run_id, key, "http", owner="me" if key == "poll" else None)
    at = advance(context, SECOND)
    due = {"poll": at + MINUTE, "undispatched": None}
    for key, due_at in due.items():
        await store.reschedule_step(run_id, key, attempt=1, output_json="not yet", due_at=due_at)
        step = await get_step(context, run_id, key)
        alike = {"status": StepStatus.PENDING, "output_json": "not yet", "error_message": None}
        expect_fields(context, step.attempts[0], "a rescheduled attempt", **alike, completed_at=at)
        expect_fields(context, step, "a rescheduled step", **alike, completed_at=None, attempt_count=1)
    context.expect(await store.get_step_claims(run_id), (), "the claims after rescheduling")
    dispatches = tuple(
        StepDispatch(run_id=run_id, step_key=key, dispatched_at=at, due_at=due_at, job_id=None)
        for key, due_at in due.items()
    )
    sentence = "the new dispatch after rescheduling"
    context.expect(await store.get_dispatches(run_id), dispatches, sentence)
    answer = await outcome_of(store.try_claim_step(run_id, "poll", owner="next"))
    context.expect(answer, True, "claiming a rescheduled step")
    number = await outcome_of(store.record_step_start(run_id, "poll", "http", owner="next"))
    context.expect(number, 2, "starting a rescheduled step")


@example("STP-7")
async def rescheduling_again_is_a_no_op(context: CheckContext) -> None:
    """A repeated call for the closed attempt changes nothing, whatever its other arguments."""
    store, run_id = context.store, await start(context)
    await store.record_step_start(run_id, "poll", "http")
    await store.reschedule_step(run_id, "poll", attempt=1, output_json="out", due_at=now(context))
    await store.try_claim_step(run_id, "poll", owner="next")
    await store.annotate_dispatch(run_id, "poll", "job")
    await store.record_step_start(run_id, "released", "http")
    await store.reschedule_step(run_id, "released", attempt=1)
    await store.release_dispatch(run_id, "released")
    before = await observe_all(context, run_id)
    advance(context, SECOND)
    for output, due_at in (("out", now(context)), ("other", now(context) + MINUTE), (None, None)):
        for key in ("poll", "released"):
            call = store.reschedule_step(run_id, key, attempt=1, output_json=output, due_at=due_at)
            context.expect(await outcome_of(call), None, "repeating reschedule_step for the closed attempt")
    advance(context, -SECOND)
    assert_same(context, await observe_all(context, run_id), before, "a repeated reschedule changes nothing")
    await store.record_step_start(run_id, "poll", "http")
    await store.reschedule_step(run_id, "poll", attempt=2, due_at=now(context) + DAY)
    dispatch = single(await store.get_dispatches(run_id), "the dispatch after rescheduling the next attempt")
    context.expect(dispatch.due_at, now(context) + DAY, "due_at after rescheduling the next attempt")


@example("STP-7")
async def an_attempt_is_rescheduled_by_the_owner_that_started_it(context: CheckContext) -> None:
    """Not by one that merely holds the claim, with an error or without."""
    store, run_id = context.store, await start(context)
    await start_as_owners(context, run_id)
    before = await observe_all(context, run_id)
    ways: list[dict[str, Any]] = [{}]
    if Capability.QUEUES in context.capabilities:
        ways.append({"error_message": "no"})
    for key, owner, who in STRANGERS:
        for given in ways:
            sentence = f"reschedule_step({key!r}, {', '.join(given)}) by {who}"
            call = store.reschedule_step(run_id, key, attempt=1, owner=owner, **given)
            error = await context.expect_error(call, ClaimLostError, sentence)
            expect_fields(context, error, f"{sentence}: the error", run_id=run_id, step_key=key)
    assert_same(context, await observe_all(context, run_id), before, "a refused reschedule_step")
    for name in ("by its owner", "by its owner, repeated"):
        call = store.reschedule_step(run_id, "mine", attempt=1, output_json="1", owner="me")
        context.expect(await outcome_of(call), None, f"reschedule_step {name}")
    step = await get_step(context, run_id, "mine")
    context.expect((step.status, step.output_json), (StepStatus.PENDING, "1"), "the step")


@example("STP-7")
async def each_attempt_is_rescheduled_once(context: CheckContext) -> None:
    """Of each attempt the first reschedule is applied, also after completing as Pending, and no other."""
    store, run_id = context.store, await start(context)
    for attempt in range(1, 5):
        await store.record_step_start(run_id, "poll", "http")
        if attempt % 2 == 0:
            await store.record_step_complete(run_id, "poll", StepStatus.PENDING)
        for number in (1, 2):
            await store.release_dispatch(run_id, "poll")
            await store.reschedule_step(run_id, "poll", attempt=attempt)
            found = await store.get_dispatched_step_keys(run_id)
            wanted = {"poll"} if number == 1 else set()
            context.expect(found, wanted, f"the dispatches after reschedule {number} of attempt {attempt}")
    await store.retry_step(run_id, "poll")
    await run_step(context, run_id, "poll", StepStatus.PENDING)
    await store.reschedule_step(run_id, "poll", attempt=5)
    found = await store.get_dispatched_step_keys(run_id)
    context.expect(found, {"poll"}, "the dispatches after rescheduling the attempt after a retry")


@example("STP-7")
async def rescheduling_works_after_completing_as_pending(context: CheckContext) -> None:
    """The claim is removed and the dispatch replaced; the output recorded at completion stays."""
    store, run_id = context.store, await start(context)
    await store.try_record_dispatch(run_id, "poll")
    await store.try_claim_step(run_id, "poll", owner="me")
    await store.record_step_start(run_id, "poll", "http", owner="me")
    ended = advance(context, SECOND)
    await store.record_step_complete(run_id, "poll", StepStatus.PENDING, output_json="first")
    at = advance(context, SECOND)
    await store.reschedule_step(run_id, "poll", attempt=1, output_json="second", due_at=at + MINUTE)
    step = await get_step(context, run_id, "poll")
    wanted: dict[str, Any] = {"output_json": "first", "completed_at": ended, "error_message": None}
    expect_fields(context, step.attempts[0], "an attempt closed as Pending before rescheduling", **wanted)
    context.expect(step.output_json, "first", "the step's output after rescheduling")
    context.expect(await store.get_step_claims(run_id), (), "the claims after rescheduling")
    dispatch = single(await store.get_dispatches(run_id), "the dispatch after rescheduling")
    expect_fields(context, dispatch, "the dispatch after rescheduling", dispatched_at=at, due_at=at + MINUTE)
    before = await observe_all(context, run_id)
    await store.reschedule_step(run_id, "poll", attempt=1)
    assert_same(context, await observe_all(context, run_id), before, "a repeated reschedule changes nothing")


@example("STP-7")
async def rescheduling_refuses_stale_and_closed_attempts(context: CheckContext) -> None:
    """Stale attempts, reopened steps, attempts closed as another status and unstarted keys are refused."""
    store, run_id = context.store, await start(context)
    for status in TERMINAL_STEP_STATUSES:
        await run_step(context, run_id, status, status)
    await store.record_step_start(run_id, "poll", "http")
    await store.reschedule_step(run_id, "poll", attempt=1)
    await store.record_step_start(run_id, "poll", "http")
    await run_step(context, run_id, "reopened", StepStatus.PENDING)
    await store.retry_step(run_id, "reopened")
    await store.try_record_dispatch(run_id, "dispatched")
    before = await observe_all(context, run_id)
    for status in TERMINAL_STEP_STATUSES:
        sentence = f"rescheduling an attempt closed as {status}"
        call = store.reschedule_step(run_id, status, attempt=1)
        error = await context.expect_error(call, StepAlreadyCompletedError, sentence)
        expect_fields(context, error, f"{sentence}: the error", run_id=run_id, step_key=status.value)
    for key, attempt, last in (("poll", 1, 2), ("poll", 3, 2), ("reopened", 1, 1), ("reopened", 2, 1)):
        sentence = f"rescheduling attempt {attempt} of {key!r} with last attempt {last}"
        call = store.reschedule_step(run_id, key, attempt=attempt)
        error = await context.expect_error(call, StaleAttemptError, sentence)
        expect_fields(context, error, f"{sentence}: the error", attempt=attempt, last_attempt=last)
    call = store.reschedule_step(run_id, "dispatched", attempt=1)
    await context.expect_error(call, StepNotFoundError, "rescheduling an unstarted key")
    assert_same(context, await observe_all(context, run_id), before, "a refused reschedule changes nothing")


@example("STP-7")
async def rescheduling_on_a_terminal_run_dispatches_nothing(context: CheckContext) -> None:
    """The attempt is closed, the claim and the old dispatch are removed, and the run stays terminal."""
    store, run_id = context.store, await start(context)
    await store.try_record_dispatch(run_id, "poll")
    await store.try_claim_step(run_id, "poll", owner="me")
    await store.record_step_start(run_id, "poll", "http", owner="me")
    await store.complete_run(run_id, RunStatus.CANCELLED)
    await store.reschedule_step(run_id, "poll", attempt=1, due_at=now(context) + MINUTE)
    step = await get_step(context, run_id, "poll")
    context.expect(
        step.attempts[0].status,
        StepStatus.PENDING,
        "the status of the attempt after rescheduling on a terminal run",
    )
    context.expect(await store.get_step_claims(run_id), (), "the claims after rescheduling on a terminal run")
    context.expect(
        await store.get_dispatches(run_id), (), "the dispatches after rescheduling on a terminal run"
    )
    context.expect(
        (await get_run(context, run_id)).status,
        RunStatus.CANCELLED,
        "the status of a terminal run after rescheduling",
    )


# STP-8


def _stalled(run_id: UUID, key: str, status: StepStatus, reason: StallReason, since: datetime) -> StalledStep:
    return StalledStep(run_id=run_id, step_key=key, status=status, reason=reason, since=since)


async def _get_stalled(context: CheckContext, as_of: datetime | None, *runs: UUID) -> list[StalledStep]:
    """The stalled steps of some runs."""
    found = await context.store.get_stalled_steps(as_of=as_of, take=context.page_size)
    return [stalled for stalled in found if stalled.run_id in runs]


@example("STP-8", needs=[Capability.LEASES, Capability.VIRTUAL_CLOCK])
async def an_expired_lease_stalls_from_its_end(context: CheckContext) -> None:
    """LEASE_EXPIRED counts from expires_at, with or without dispatch; a claim without lease never stalls."""
    store, run_id = context.store, await start(context)
    expires = now(context) + MINUTE
    await store.try_record_dispatch(run_id, "claimed")
    await store.try_claim_step(run_id, "claimed", owner="me", lease=MINUTE)
    await store.try_claim_step(run_id, "running", owner="me", lease=2 * MINUTE)
    await store.record_step_start(run_id, "running", "http", owner="me")
    await store.try_record_dispatch(run_id, "no lease")
    await store.try_claim_step(run_id, "no lease", owner="me")
    await store.try_claim_step(run_id, "ownerless")
    await store.record_step_start(run_id, "ownerless", "http")
    claimed = _stalled(run_id, "claimed", StepStatus.PENDING, StallReason.LEASE_EXPIRED, expires)
    running = _stalled(run_id, "running", StepStatus.RUNNING, StallReason.LEASE_EXPIRED, expires + MINUTE)
    for as_of, wanted in (
        (expires - TICK, ()),
        (expires, (claimed,)),
        (expires + MINUTE, (claimed, running)),
        (expires + 3650 * DAY, (claimed, running)),
    ):
        found = await _get_stalled(context, as_of, run_id)
        context.expect(found, wanted, f"the stalled steps with leases that end at {expires}, as of {as_of}")
    for wanted in ((), (claimed,)):
        found = await _get_stalled(context, None, run_id)
        context.expect(found, wanted, f"the stalled steps without as_of, at {now(context)}")
        advance(context, MINUTE)


@example("STP-8", needs=[Capability.VIRTUAL_CLOCK])
async def a_dispatch_stalls_when_it_is_due(context: CheckContext) -> None:
    """DISPATCH_DUE counts from due_at, else dispatched_at, for unstarted keys and unclaimed steps alike."""
    store, run_id = context.store, await start(context)
    at = now(context)
    await store.try_record_dispatch(run_id, "long due", due_at=at - MINUTE)
    await store.try_record_dispatch(run_id, "now")
    await store.try_record_dispatch(run_id, "running", due_at=at + MINUTE)
    await store.record_step_start(run_id, "running", "http")
    due = StallReason.DISPATCH_DUE
    old = _stalled(run_id, "long due", StepStatus.PENDING, due, at - MINUTE)
    new = _stalled(run_id, "now", StepStatus.PENDING, due, at)
    running = _stalled(run_id, "running", StepStatus.RUNNING, due, at + MINUTE)
    for as_of, wanted in (
        (at - MINUTE - TICK, ()),
        (at - TICK, (old,)),
        (at, (old, new)),
        (at + MINUTE - TICK, (old, new)),
        (at + MINUTE, (old, new, running)),
    ):
        found = await _get_stalled(context, as_of, run_id)
        context.expect(found, wanted, f"the stalled steps with dispatches made at {at}, as of {as_of}")


@example("STP-8", needs=[Capability.VIRTUAL_CLOCK])
async def a_missing_dispatch_stalls_from_the_last_attempt(context: CheckContext) -> None:
    """NOT_DISPATCHED counts from the end of the last attempt, else its start; as_of may lie in the past."""
    store, run_id = context.store, await start(context)
    begun = now(context)
    for key in ("open", "pending", "reopened"):
        await store.record_step_start(run_id, key, "http")
    ended = advance(context, 10 * SECOND)
    await store.try_record_dispatch(run_id, "pending")
    await store.record_step_complete(run_id, "pending", StepStatus.PENDING)
    await store.release_dispatch(run_id, "pending")
    await store.record_step_complete(run_id, "reopened", StepStatus.FAILED)
    advance(context, 10 * SECOND)
    await store.retry_step(run_id, "reopened")
    reason = StallReason.NOT_DISPATCHED
    still_open = _stalled(run_id, "open", StepStatus.RUNNING, reason, begun)
    pending = _stalled(run_id, "pending", StepStatus.PENDING, reason, ended)
    reopened = _stalled(run_id, "reopened", StepStatus.PENDING, reason, ended)
    for as_of, wanted in (
        (begun - TICK, ()),
        (begun, (still_open,)),
        (ended - TICK, (still_open,)),
        (ended, (still_open, pending, reopened)),
    ):
        found = await _get_stalled(context, as_of, run_id)
        context.expect(
            found, wanted, f"the undispatched steps started at {begun}, ended at {ended}, as of {as_of}"
        )


@example("STP-8")
async def terminal_and_empty_keys_are_not_stalled(context: CheckContext) -> None:
    """Terminal steps, steps of terminal runs, and keys with neither claim nor dispatch are not listed."""
    store, run_id, finished = context.store, await start(context), await start(context)
    for status in TERMINAL_STEP_STATUSES:
        await store.try_record_dispatch(run_id, status)
        await run_step(context, run_id, status, status)
    await store.try_record_dispatch(run_id, "released")
    await store.try_claim_step(run_id, "released", owner="me")
    await store.release_step_claim(run_id, "released")
    await store.release_dispatch(run_id, "released")
    await run_step(context, run_id, "charge", StepStatus.FAILED)
    await skip_steps(context, run_id, "reset")
    await store.retry_step(run_id, "charge", reset=["reset"])
    await store.try_claim_step(run_id, "charge")
    await store.try_record_dispatch(finished, "dispatched")
    await store.record_step_start(finished, "open", "http")
    await store.complete_run(finished, RunStatus.CANCELLED)
    # A day ahead, to tolerate skew of the store's own clock.
    found = await _get_stalled(context, now(context) + DAY, run_id, finished)
    context.expect(found, (), "get_stalled_steps without a stalled step")
    await store.try_record_dispatch(run_id, "reset")
    found = await _get_stalled(context, now(context) + DAY, run_id, finished)
    sentence = "a dispatched reset key"
    stalled = single(found, sentence)
    wanted = {"step_key": "reset", "status": StepStatus.PENDING, "reason": StallReason.DISPATCH_DUE}
    expect_fields(context, stalled, sentence, **wanted)


@example("STP-8")
async def a_waiting_step_is_not_stalled(context: CheckContext) -> None:
    """A step with an undelivered, unexpired waiter whose expires_at has not passed is not listed."""
    store, run_id, other = context.store, await start(context), await start(context)
    horizon = now(context) + 10 * DAY
    keys = ("delivered", "elapsed", "ever", "other run's", "removed")
    for key in keys:
        await store.record_step_start(run_id, key, "wait")
    await store.try_record_dispatch(run_id, "dispatched")
    await store.register_waiter(run_id, "dispatched", "go")
    await store.register_waiter(run_id, "ever", "go")
    await store.register_waiter(run_id, "elapsed", "go", expires_at=horizon)
    await store.register_waiter(run_id, "delivered", "came")
    await store.deliver_signal(run_id, "came", "{}")
    await store.register_waiter(run_id, "removed", "go")
    await store.remove_waiter(run_id, "removed")
    await store.register_waiter(other, "other run's", "go")
    wanted = ["delivered", "other run's", "removed"]
    if Capability.WAITERS in context.capabilities:
        await store.record_step_start(run_id, "expired", "wait")
        await store.register_waiter(run_id, "expired", "go", expires_at=now(context) - DAY)
        await store.expire_waiter(run_id, "expired")
        wanted.insert(1, "expired")
    found = sorted(each.step_key for each in await _get_stalled(context, horizon - TICK, run_id, other))
    context.expect(found, wanted, "the stalled steps beside waiting steps")
    found = sorted(each.step_key for each in await _get_stalled(context, horizon, run_id, other))
    context.expect(found, sorted([*wanted, "elapsed"]), "the stalled steps as of the expires_at of a waiter")


@example("STP-8", needs=[Capability.LEASES, Capability.VIRTUAL_CLOCK, Capability.WAITERS])
async def a_stall_never_begins_before_the_end_of_a_wait(context: CheckContext) -> None:
    """since is at least the due time of the dispatch and the expires_at of an undelivered waiter."""
    store, run_id, at = context.store, await start(context), now(context)
    due, end = at + HOUR, at + DAY
    waiting = {"expired": end, "leased and expired": end, "late and expired": end}
    for key in waiting:
        await store.record_step_start(run_id, key, "wait")
        await store.register_waiter(run_id, key, "go", expires_at=end)
    await store.try_record_dispatch(run_id, "late and expired", due_at=due)
    for key in ("leased and expired", "leased and late"):
        await store.try_claim_step(run_id, key, owner="me", lease=MINUTE)
    await store.try_record_dispatch(run_id, "leased and late", due_at=due)
    await store.record_step_start(run_id, "delivered", "wait")
    await store.register_waiter(run_id, "delivered", "came", expires_at=end)
    await store.deliver_signal(run_id, "came", "{}")
    wanted = {**waiting, "leased and late": due, "delivered": at}
    advance(context, DAY)
    for key in waiting:
        await store.expire_waiter(run_id, key)
    for as_of in (due - TICK, due, end - TICK, end):
        found = {each.step_key: each.since for each in await _get_stalled(context, as_of, run_id)}
        listed = {key: since for key, since in wanted.items() if since <= as_of}
        context.expect(found, listed, "since of steps that waited for a due time or a signal")


@example("STP-8", needs=[Capability.VIRTUAL_CLOCK])
async def stalled_steps_are_ordered_by_since_run_and_key(context: CheckContext) -> None:
    """The order is since, run_id, step_key by code point; take limits the list."""
    # Older than the steps of other examples.
    store, at = context.store, advance(context, -3650 * DAY)
    first, second = UUID(int=2), UUID(int=1)
    keys = ("b", "a", "Z", "\u00e9", "\U0001f600", "\uffff")
    for run_id in (first, second):
        await start(context, run_id=run_id)
        for key in keys:
            await store.try_record_dispatch(run_id, key, due_at=at)
    await store.try_record_dispatch(first, "oldest", due_at=at - TICK)
    await store.record_step_start(second, "middle", "http")
    wanted = [
        (2, "oldest"),
        *((1, key) for key in sorted([*keys, "middle"])),
        *((2, k) for k in sorted(keys)),
    ]
    for take in (context.page_size, 1, 3, 0):
        found = await store.get_stalled_steps(as_of=at, take=take)
        order = [(each.run_id.int, each.step_key) for each in found]
        context.expect(
            order,
            wanted[:take],
            f"get_stalled_steps with take={take} in the order of since, run_id, step_key",
        )
