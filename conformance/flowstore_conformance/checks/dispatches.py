"""CLM-1, CLM-3 and CLM-7 for the dispatch ledger; and the compensation of cancelled calls (CON-4)."""

from __future__ import annotations

import asyncio
from uuid import UUID

from flowstore_conformance import state_probe
from flowstore_conformance.checks.example_checks import example
from flowstore_conformance.checks.fixtures import (
    DAY,
    HOUR,
    MINUTE,
    SECOND,
    TERMINAL_STEP_STATUSES,
    advance,
    assert_same,
    expect_fields,
    get_run,
    get_step,
    new_id,
    now,
    observe_all,
    outcome_of,
    run_step,
    second_store,
    single,
    start,
)
from flowstore_conformance.context import CheckContext
from flowstore_conformance.registry import Kind, check
from flowstore_core import RunStatus, StepDispatch, StepStatus


@example("CLM-1")
async def one_dispatch_wins_until_it_is_released(context: CheckContext) -> None:
    """try_record_dispatch returns True once per key; losing returns False and changes nothing."""
    store, run_id, other = context.store, await start(context), await start(context)
    first = now(context)
    answer = await outcome_of(store.try_record_dispatch(run_id, "b", due_at=first + MINUTE))
    context.expect(answer, True, "dispatching a free key")
    second = advance(context, SECOND)
    context.expect(
        await outcome_of(store.try_record_dispatch(run_id, "a")), True, "dispatching another free key"
    )
    answer = await outcome_of(store.try_record_dispatch(other, "b"))
    context.expect(answer, True, "dispatching the same key of another run")
    exact_times = {"a": (second, None), "b": (first, first + MINUTE)}
    wanted = tuple(
        StepDispatch(run_id=run_id, step_key=key, dispatched_at=at, due_at=due, job_id=None)
        for key, (at, due) in exact_times.items()
    )
    context.expect(await store.get_dispatches(run_id), wanted, "get_dispatches by step_key")
    advance(context, HOUR)
    for due_at in (None, now(context)):
        answer = await outcome_of(store.try_record_dispatch(run_id, "b", due_at=due_at))
        context.expect(answer, False, "dispatching a dispatched key")
    context.expect(await store.get_dispatches(run_id), wanted, "a losing dispatch changes nothing")
    context.expect(await store.get_dispatched_step_keys(run_id), {"a", "b"}, "get_dispatched_step_keys")
    context.expect(await store.get_step_statuses(run_id), {}, "the statuses with a dispatched key")
    context.expect(
        (await get_run(context, run_id)).steps, (), "the steps of get_run_detail with a dispatched key"
    )


@example("CLM-1")
async def a_step_is_dispatched_in_every_open_state(context: CheckContext) -> None:
    """A key can be dispatched unstarted, Running and Pending, claimed or not, but not after its end."""
    store, run_id = context.store, await start(context)
    for claimed in ("", " and claimed"):
        for state in ("unstarted", "Running", "Pending", *TERMINAL_STEP_STATUSES):
            key = f"{state}{claimed}"
            if claimed:
                await store.try_claim_step(run_id, key, owner="me")
            if state == "Running":
                await store.record_step_start(run_id, key, "http")
            elif state != "unstarted":
                await run_step(context, run_id, key, StepStatus(state))
            answer = await outcome_of(store.try_record_dispatch(run_id, key))
            context.expect(answer, state not in TERMINAL_STEP_STATUSES, f"dispatching a step that is {key}")


@example("CLM-3")
async def releasing_a_dispatch_frees_only_that_key(context: CheckContext) -> None:
    """Releasing is idempotent and keeps the claim; the next dispatch is new, without the old job_id."""
    store, run_id, other = context.store, await start(context), await start(context)
    for one, key in ((run_id, "a"), (run_id, "b"), (other, "a")):
        await store.try_record_dispatch(one, key, due_at=now(context))
        await store.annotate_dispatch(one, key, "job")
    await store.try_claim_step(run_id, "a", owner="me")
    for again in ("", " again"):
        context.expect(
            await outcome_of(store.release_dispatch(run_id, "a")), None, f"releasing a dispatch{again}"
        )
        context.expect(
            await store.get_dispatched_step_keys(run_id), {"b"}, f"the dispatched keys after a release{again}"
        )
    context.expect(await store.get_dispatched_step_keys(other), {"a"}, "the dispatched keys of another run")
    context.expect(await store.get_claimed_step_keys(run_id), {"a"}, "the claims after releasing a dispatch")
    context.expect(
        await outcome_of(store.try_record_dispatch(run_id, "a")), True, "dispatching a released key"
    )
    fresh = [one for one in await store.get_dispatches(run_id) if one.step_key == "a"]
    dispatch = single(fresh, "the dispatch after a release")
    expect_fields(context, dispatch, "the new dispatch after a release", job_id=None, due_at=None)
    due = now(context) + HOUR
    await store.release_dispatch(run_id, "a")
    await store.try_record_dispatch(run_id, "a", due_at=due)
    fresh = [one for one in await store.get_dispatches(run_id) if one.step_key == "a"]
    dispatch = single(fresh, "the third dispatch of a key")
    expect_fields(context, dispatch, "the new dispatch of a claimed key", due_at=due)


@example("CLM-3")
async def dispatches_outlive_steps_and_runs(context: CheckContext) -> None:
    """Starting, completing and skipping a step, and completing the run, keep its dispatch."""
    store, run_id = context.store, await start(context)
    keys = {
        *(status.value for status in TERMINAL_STEP_STATUSES),
        "running",
        "pending",
        "unstarted",
        "skipped",
    }
    for key in keys:
        await store.try_record_dispatch(run_id, key)
    for status in (*TERMINAL_STEP_STATUSES, StepStatus.PENDING):
        await run_step(context, run_id, "pending" if status is StepStatus.PENDING else status, status)
    await store.record_step_start(run_id, "running", "http")
    await store.record_skipped_step(run_id, "skipped", "http")
    for how in ("in the ledger", "in the ledger of a terminal run"):
        context.expect(await store.get_dispatched_step_keys(run_id), keys, f"the keys {how}")
        found = [dispatch.step_key for dispatch in await store.get_dispatches(run_id)]
        context.expect(found, sorted(keys), f"the dispatches {how}")
        await store.complete_run(run_id, RunStatus.SUCCEEDED)


# CLM-7


@example("CLM-7")
async def annotating_sets_only_job_id(context: CheckContext) -> None:
    """It changes only the job_id of an existing dispatch, creates none, and never raises."""
    store, run_id, other = context.store, await start(context), await start(context)
    due = now(context) + DAY
    for one in (run_id, other):
        await store.try_record_dispatch(one, "charge", due_at=due)
        await store.record_step_start(one, "charge", "http", job_id="of the attempt")
    await store.try_claim_step(run_id, "claimed")
    await run_step(context, run_id, "started")
    before, dispatch = (
        await observe_all(context, run_id, other),
        single(await store.get_dispatches(run_id), "dispatch"),
    )
    advance(context, MINUTE)
    for key in ("claimed", "started", "unknown", "Charge"):
        call = store.annotate_dispatch(run_id, key, "job")
        context.expect(await outcome_of(call), None, f"annotating a missing dispatch ({key})")
    context.expect(
        await outcome_of(store.annotate_dispatch(new_id(context), "charge", "job")), None, "unknown run"
    )
    advance(context, -MINUTE)
    after = await observe_all(context, run_id, other)
    assert_same(context, after, before, "annotating a missing dispatch changes nothing")
    await store.try_record_dispatch(run_id, "claimed")
    ledger = {each.step_key: each.job_id for each in await store.get_dispatches(run_id)}
    context.expect(
        ledger["claimed"], None, "the job_id of a dispatch that was annotated before it was recorded"
    )
    await store.release_dispatch(run_id, "claimed")
    for job_id in ("job 1", "job 2"):
        advance(context, MINUTE)
        await store.annotate_dispatch(run_id, "charge", job_id)
        found = single(await store.get_dispatches(run_id), "the annotated dispatch")
        kept = {"dispatched_at": dispatch.dispatched_at, "due_at": dispatch.due_at}
        expect_fields(context, found, "the annotated dispatch", job_id=job_id, **kept)
    other_dispatch = single(await store.get_dispatches(other), "the dispatch of another run")
    context.expect(other_dispatch.job_id, None, "the job_id of the same key in another run")
    step = await get_step(context, run_id)
    for record in (step, step.attempts[0]):
        context.expect(record.job_id, "of the attempt", "the job_id of the attempt")
    context.expect((await get_run(context, run_id)).job_id, None, "the job_id of the run")


# CON-4


@check("CON-4", kind=Kind.CANCELLATION, isolated=False, rotation="cancelled rivals")
async def compensation_never_removes_another_callers_claim(context: CheckContext) -> None:
    """Of many calls for one key, most of them cancelled, the caller that got True holds it at the end."""
    stores = [context.store, await second_store(context)]
    run_id = await start(context)
    for round_number in range(context.profile.of(2, 4, 20)):
        for invoke, read in (
            ("try_claim_step", "get_claimed_step_keys"),
            ("try_record_dispatch", "get_dispatched_step_keys"),
        ):
            keys = [f"{round_number} {number:02}" for number in range(8)] * 4
            context.random.shuffle(keys)
            tasks = [
                asyncio.ensure_future(outcome_of(getattr(stores[number % 2], invoke)(run_id, key)))
                for number, key in enumerate(keys)
            ]
            await asyncio.gather(*(_cancel_some(context, task) for task in tasks))
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            won = sorted(key for key, answer in zip(keys, answers, strict=True) if answer is True)
            context.expect(won, sorted(set(won)), f"the winners of {invoke} beside cancelled calls")
            # After an error the key may be held or not.
            doubtful = {key for key, answer in zip(keys, answers, strict=True) if isinstance(answer, str)}
            left = await _wait_for_keys(context, read, run_id, set(keys) - doubtful, set(won) - doubtful)
            sentence = f"{read}, of the contended keys after the cancelled calls were compensated"
            context.expect(left, set(won) - doubtful, sentence)


async def _cancel_some(context: CheckContext, task: asyncio.Future[object]) -> None:
    """Cancel three of four calls at different iterations of the event loop, some before they begin."""
    iterations = context.random.choice((0, 0, 1, 2, 3, 5, 8, 13, 21, 34, 55))
    if context.random.random() < 0.25:
        return
    for _ in range(iterations):
        await asyncio.sleep(0)
    task.cancel()


async def _wait_for_keys(
    context: CheckContext, read: str, run_id: UUID, probes: set[str], wanted: set[str]
) -> set[str]:
    """Poll the claimed or dispatched keys until they are as expected or time runs out; return them."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + state_probe.SETTLE_SECONDS
    while True:
        held: frozenset[str] = await getattr(context.store, read)(run_id)
        if held & probes == wanted or loop.time() > deadline:
            return set(held & probes)
        await asyncio.sleep(0.01)
