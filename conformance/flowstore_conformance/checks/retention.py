"""RET: cleanup deletes completed runs whole, and nothing else."""

from __future__ import annotations

import asyncio
from uuid import UUID

from flowstore_conformance.checks.example_checks import example
from flowstore_conformance.checks.fixtures import (
    DAY,
    FLOW,
    HOUR,
    SECOND,
    TERMINAL_RUN_STATUSES,
    TICK,
    advance,
    assert_same,
    expect_present,
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
from flowstore_conformance.registry import check
from flowstore_conformance.write_scenarios import TAGS
from flowstore_core import (
    Capability,
    RunNotFoundError,
    RunStatus,
    SignalDeliveryStatus,
    StepNotFoundError,
    StepStatus,
)


async def start_populated_run(context: CheckContext, run_id: UUID) -> None:
    """Start a completed run with something of every kind that belongs to a run."""
    store, can = context.store, context.capabilities
    await store.configure_run(run_id, FLOW, "manual", idempotency_key="key", timeout_at=now(context))
    for key in ("key", "more"):
        await store.try_register_idempotency_key(FLOW, "manual", f"{key} of {run_id}", run_id)
    await start(context, run_id=run_id)
    if Capability.TAGS in can:
        await store.set_tags(run_id, TAGS)
    await store.try_record_dispatch(run_id, "charge")
    await store.try_claim_step(run_id, "charge", owner="me")
    await run_step(context, run_id, "charge", StepStatus.PENDING, output_json="needle")
    await run_step(context, run_id, "charge", StepStatus.FAILED, output_json="out")
    await skip_steps(context, run_id, "skipped", "reset")
    await store.retry_step(run_id, "charge", reset=["reset"])
    await run_step(context, run_id, "charge", StepStatus.FAILED, error_message="needle")
    await store.try_record_dispatch(run_id, "only dispatched")
    await store.try_claim_step(run_id, "only claimed")
    for key in ("wait", "wait more"):
        await store.register_waiter(run_id, key, "go")
    await store.deliver_signal(run_id, "go", "payload", delivery_id="id")
    if Capability.MAILBOX in can:
        for payload in ("one", "two"):
            await store.deliver_signal(run_id, "early", payload, delivery_id=payload, buffer=True)
    if Capability.OUTPUTS in can:
        await store.save_output(run_id, "out", "1")
    if Capability.EVENTS in can:
        await store.append_event(run_id, "done")
    await store.request_cancel(run_id, "enough")
    await store.mark_timed_out(run_id)
    await store.complete_run(run_id, RunStatus.CANCELLED)


async def _completed_at(context: CheckContext, run_id: UUID) -> object:
    return expect_present((await get_run(context, run_id)).completed_at, "completed_at of a terminal run")


@example("RET-1")
async def runs_completed_strictly_before_the_cutoff_are_deleted(context: CheckContext) -> None:
    """completed_at decides, exact to the microsecond, for every status; the result counts only runs."""
    store = context.store
    runs = []
    for status in TERMINAL_RUN_STATUSES:
        run_id = await start(context)
        await store.configure_run(run_id, FLOW, "manual")
        advance(context, SECOND)
        await store.complete_run(run_id, status)
        runs.append(run_id)
    last = expect_present((await get_run(context, runs[-1])).completed_at, "completed_at of a terminal run")
    began_early = await start(context)
    advance(context, 30 * DAY)
    context.expect(
        await outcome_of(store.cleanup(last - 3650 * DAY)), 0, "a cleanup with a cutoff before all runs"
    )
    if context.clock is not None:
        context.expect(
            await outcome_of(store.cleanup(last)), 2, "a cleanup with a run completed exactly at the cutoff"
        )
        left = {run.run_id for run in await store.get_runs()}
        context.expect(left, {runs[-1], began_early}, "the runs after cleanup")
        context.expect(await outcome_of(store.cleanup(last)), 0, "a repeated cleanup")
        context.expect(
            await outcome_of(store.cleanup(last + TICK)), 1, "a cleanup with a cutoff one microsecond later"
        )
    else:
        context.expect(await outcome_of(store.cleanup(last + TICK)), 3, "a cleanup of three completed runs")
    await store.complete_run(began_early, RunStatus.SUCCEEDED)
    completed = expect_present(
        (await get_run(context, began_early)).completed_at, "completed_at of a terminal run"
    )
    answer = await outcome_of(store.cleanup(completed))
    context.expect(answer, 0, "a cleanup with a cutoff between start and completion of a run")
    context.expect(await outcome_of(store.cleanup(completed + TICK)), 1, "a cleanup of the last run")
    context.expect(await store.get_runs(), (), "the runs after cleanup")
    context.expect(await outcome_of(store.cleanup(completed + DAY)), 0, "a cleanup without a run")


@example("RET-1")
async def everything_that_belongs_to_a_run_is_deleted_with_it(context: CheckContext) -> None:
    """No read shows any of it, writing to it raises RunNotFoundError, and its keys are free."""
    store, run_id, unknown = context.store, new_id(context), new_id(context)
    nothing = await observe(context, unknown)
    empty = await observe_all(context)
    await start_populated_run(context, run_id)
    context.expect(
        await outcome_of(store.cleanup(now(context) + DAY)),
        1,
        "a cleanup of one run with every kind of state",
    )
    assert_same(context, await observe(context, run_id), nothing, "no read shows any state of a deleted run")
    assert_same(context, await observe_all(context), empty, "no list shows a deleted run")
    await expect_nothing_left(context, run_id)


async def expect_nothing_left(context: CheckContext, run_id: UUID) -> None:
    """Expect that the only run of the namespace, which start_populated_run started, is deleted."""
    store = context.store
    for key in ("charge", "wait", "wait more", "skipped"):
        context.expect(await store.get_waiter(run_id, key), None, f"the waiter {key!r} of a deleted run")
    if Capability.OUTPUTS in context.capabilities:
        context.expect(await store.get_output(run_id, "out"), None, "an output of a deleted run")
    for key in ("key", "more"):
        found = await store.find_run_id_by_idempotency_key(FLOW, "manual", f"{key} of {run_id}")
        context.expect(found, None, "an idempotency key of a deleted run")
    if Capability.DASHBOARD in context.capabilities:
        for search in (None, "orders", "needle"):
            page = await store.get_runs_page(search=search)
            context.expect(
                (page.runs, page.total_count), ((), 0), f"a page searching {search!r} after cleanup"
            )
    delivery = await store.deliver_signal(run_id, "go", "{}", delivery_id="id")
    context.expect(delivery.status, SignalDeliveryStatus.NOT_FOUND, "a remembered delivery_id after cleanup")
    context.expect(await outcome_of(store.request_cancel(run_id)), False, "a cancel after cleanup")
    call = store.record_step_complete(run_id, "charge", StepStatus.FAILED)
    await context.expect_error(call, RunNotFoundError, "writing to a deleted run")


@example("RET-1")
async def a_deleted_run_id_starts_empty(context: CheckContext) -> None:
    """A run started again has no old attempts, numbers, deliveries, claims or latches."""
    store, run_id, fresh = context.store, new_id(context), new_id(context)
    await start_populated_run(context, run_id)
    await store.cleanup(now(context) + DAY)
    await expect_empty_start(context, run_id, fresh)


async def expect_empty_start(context: CheckContext, run_id: UUID, fresh: UUID) -> None:
    """Start a run under the id of a deleted one, which start_populated_run started, and expect it empty."""
    store = context.store
    for one in (run_id, fresh):
        await start(context, run_id=one)
    restarted, other = await observe(context, run_id), await observe(context, fresh)
    context.expect((await get_run(context, run_id)).steps, (), "the steps of a restarted run id")
    for shown in (restarted, other):
        del shown["get_run_detail"]
    assert_same(context, restarted, other, "a run restarted under a deleted id is empty")
    for key in ("skipped", "reset", "charge"):
        call = store.record_step_complete(run_id, key, StepStatus.SKIPPED)
        await context.expect_error(call, StepNotFoundError, f"completing the deleted step {key!r}")
        number = await outcome_of(store.record_step_start(run_id, key, "http"))
        context.expect(number, 1, f"the first attempt of the step {key!r} of a restarted run id")
        attempts = [attempt.attempt for attempt in (await get_step(context, run_id, key)).attempts]
        context.expect(attempts, [1], f"the attempts of the step {key!r} of a restarted run id")
    for key in ("only claimed", "only dispatched"):
        context.expect(
            await outcome_of(store.try_claim_step(run_id, key, owner="x")),
            True,
            f"claiming {key!r} of a restarted run id",
        )
        context.expect(
            await outcome_of(store.try_record_dispatch(run_id, key)),
            True,
            f"dispatching {key!r} of a restarted run id",
        )
    if Capability.EVENTS in context.capabilities:
        context.expect(
            await outcome_of(store.append_event(run_id, "again")), 1, "the first event of a restarted run id"
        )
        context.expect(len(await store.get_run_events(run_id)), 1, "the events of a restarted run id")
    await store.register_waiter(run_id, "new", "go")
    delivery = await store.deliver_signal(run_id, "go", "new", delivery_id="id")
    found = (delivery.status, delivery.step_key)
    sentence = "a delivery with a delivery_id of the deleted run"
    context.expect(found, (SignalDeliveryStatus.DELIVERED, "new"), sentence)
    if Capability.MAILBOX in context.capabilities:
        await store.register_waiter(run_id, "early", "early")
        delivery = await store.deliver_signal(run_id, "early", "new", delivery_id="one", buffer=True)
        found = (delivery.status, delivery.step_key)
        sentence = "a delivery of a signal that the deleted run had buffered"
        context.expect(found, (SignalDeliveryStatus.DELIVERED, "early"), sentence)


@example("RET-1")
async def other_runs_stay_unchanged(context: CheckContext) -> None:
    """Running and newer runs, derived runs and their keys stay unchanged."""
    store, gone, kept = context.store, new_id(context), new_id(context)
    await start_populated_run(context, gone)
    derived = await start(context, source_run_id=gone)
    await run_step(context, derived, "charge", StepStatus.FAILED, output_json="out")
    await store.try_register_idempotency_key(FLOW, "manual", "derived", derived)
    runs = [derived]
    cutoff = now(context) + DAY
    if context.clock is not None:
        cutoff = advance(context, SECOND)
        await start_populated_run(context, kept)
        runs.append(kept)
    before = {one: await observe(context, one) for one in runs}
    context.expect(await outcome_of(store.cleanup(cutoff)), 1, "a cleanup of one of several runs")
    for one in runs:
        assert_same(context, await observe(context, one), before[one], "other runs stay unchanged")
    found = await store.find_run_id_by_idempotency_key(FLOW, "manual", "derived")
    context.expect(found, derived, "the run of a kept key")
    sources = [run.run_id for run in await store.get_derived_runs(gone)]
    context.expect(sources, [derived], "the runs derived from a deleted run")
    if kept in runs:
        for key in ("key", "more"):
            found = await store.find_run_id_by_idempotency_key(FLOW, "manual", f"{key} of {kept}")
            context.expect(found, kept, "the run of a key of a kept completed run")
        again = await store.deliver_signal(kept, "go", "{}", delivery_id="id")
        context.expect(again.step_key, "wait", "a repeated delivery_id of a kept run")


@check("RET-2")
async def running_runs_are_never_touched(context: CheckContext) -> None:
    """Running runs of any age keep everything; a run that a retry reopened is Running."""
    store, run_id, reopened = context.store, await start(context), await start(context)
    for one in (run_id, reopened):
        await run_step(context, one, "charge", StepStatus.FAILED)
        await store.configure_run(one, FLOW, "manual", idempotency_key="key")
        await store.try_register_idempotency_key(FLOW, "manual", str(one), one)
    await store.complete_run(reopened, RunStatus.FAILED)
    advance(context, DAY)
    await store.retry_step(reopened, "charge")
    before = await observe_all(context, run_id, reopened)
    advance(context, 3650 * DAY)
    context.expect(await outcome_of(store.cleanup(now(context) + DAY)), 0, "a cleanup with only Running runs")
    advance(context, -3650 * DAY)
    after = await observe_all(context, run_id, reopened)
    assert_same(context, after, before, "Running runs stay unchanged")
    for one in (run_id, reopened):
        found = await store.find_run_id_by_idempotency_key(FLOW, "manual", str(one))
        context.expect(found, one, "the run of a key of a Running run")


@check("RET-3")
async def one_cleanup_deletes_more_runs_than_a_batch(context: CheckContext) -> None:
    """One call deletes every completed run before the cutoff and counts each once."""
    store = context.store
    count = context.profile.of(20, 40, 40)
    runs = [new_id(context) for _ in range(count + 5)]

    async def run(number: int) -> None:
        await start(context, run_id=runs[number])
        if number < count:
            await store.complete_run(runs[number], RunStatus.SUCCEEDED)

    for at in range(0, len(runs), 50):
        await asyncio.gather(*(run(number) for number in range(at, min(at + 50, len(runs)))))
    context.expect(
        await outcome_of(store.cleanup(now(context) + DAY)), count, f"a cleanup of {count} completed runs"
    )
    left = {run.run_id for run in await store.get_runs(take=context.page_size)}
    context.expect(left, set(runs[count:]), "the Running runs after cleanup")


@check("RET-4", needs=[Capability.VIRTUAL_CLOCK])
async def old_keys_and_controls_without_run_are_deleted(context: CheckContext) -> None:
    """They are deleted once older than the cutoff and at least an hour old, and not counted."""
    store, never = context.store, [new_id(context) for _ in range(3)]
    kept = {status: new_id(context) for status in RunStatus}
    for run_id in (*never, *kept.values()):
        await store.try_register_idempotency_key(FLOW, "manual", str(run_id), run_id)
        await store.configure_run(run_id, FLOW, "manual", idempotency_key="key")
    made = now(context)
    advance(context, HOUR - TICK)
    # These runs end at or after every cutoff below.
    for status, run_id in kept.items():
        await start(context, run_id=run_id)
        if status is not RunStatus.RUNNING:
            await store.complete_run(run_id, status)
    rest = {run_id: await observe(context, run_id) for run_id in kept.values()}
    for passed, how, cutoff, stays in (
        (0 * TICK, "a microsecond before they are an hour old", made + HOUR - TICK, True),
        (TICK, "an hour old, not older than the cutoff", made, True),
        (0 * TICK, "an hour old and older than the cutoff", made + TICK, False),
    ):
        advance(context, passed)
        context.expect(
            await outcome_of(store.cleanup(cutoff)), 0, "a cleanup of keys and control records without run"
        )
        for run_id in never:
            found = await store.find_run_id_by_idempotency_key(FLOW, "manual", str(run_id))
            context.expect(
                found, run_id if stays else None, f"the run of a key whose run never started, {how}"
            )
            control = await store.get_run_control(run_id)
            sentence = f"whether a control record without run exists, {how}"
            context.expect(control is not None, stays, sentence)
    for status, run_id in kept.items():
        found = await store.find_run_id_by_idempotency_key(FLOW, "manual", str(run_id))
        context.expect(found, run_id, f"the run of an old key of a stored run, which is {status}")
        sentence = f"a stored run, which is {status}, with an old control record"
        assert_same(context, await observe(context, run_id), rest[run_id], sentence)
    # Two keys of one run can have different ages.
    both = {"old": None, "young": never[0]}
    for key in both:
        await store.try_register_idempotency_key(FLOW, "manual", key, never[0])
        advance(context, 2 * HOUR)
    advance(context, -2 * HOUR)
    for passed, left in ((0 * HOUR, both), (2 * HOUR, dict.fromkeys(both)), (HOUR, dict.fromkeys(both))):
        advance(context, passed)
        await store.cleanup(now(context))
        for key, run in left.items():
            found = await store.find_run_id_by_idempotency_key(FLOW, "manual", key)
            context.expect(found, run, f"the run of the {key} key of a run that never started")
    answer = await outcome_of(store.try_register_idempotency_key(FLOW, "manual", "young", new_id(context)))
    context.expect(answer, True, "registering a deleted key for another run")


@check("RET-4")
async def fresh_keys_and_controls_stay_for_an_hour(context: CheckContext) -> None:
    """Whatever the cutoff, a key or control record for a run about to start is kept."""
    store, run_id = context.store, new_id(context)
    await store.try_register_idempotency_key(FLOW, "manual", "key", run_id)
    await store.configure_run(run_id, FLOW, "manual")
    control = await store.get_run_control(run_id)
    context.expect(
        await outcome_of(store.cleanup(now(context) + DAY)), 0, "a cleanup with a cutoff in the future"
    )
    found = await store.find_run_id_by_idempotency_key(FLOW, "manual", "key")
    context.expect(found, run_id, "the run of a new key whose run has not started")
    context.expect(await store.get_run_control(run_id), control, "a new control record without run")
