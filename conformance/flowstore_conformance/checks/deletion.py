"""RET-5: delete_run deletes one terminal run whole, and nothing else."""

from __future__ import annotations

from flowstore_conformance.checks.example_checks import example
from flowstore_conformance.checks.fixtures import (
    DAY,
    FLOW,
    HOUR,
    TERMINAL_RUN_STATUSES,
    assert_same,
    expect_fields,
    new_id,
    now,
    observe,
    observe_all,
    outcome_of,
    run_step,
    second_store,
    single,
    start,
)
from flowstore_conformance.checks.retention import (
    expect_empty_start,
    expect_nothing_left,
    start_populated_run,
)
from flowstore_conformance.context import CheckContext
from flowstore_core import Capability, RunNotCompletedError, RunNotFoundError, RunStatus, StepStatus

DELETION = {Capability.DELETION}


@example("RET-5", needs=DELETION)
async def delete_run_is_true_for_the_call_that_deleted(context: CheckContext) -> None:
    """Runs of every terminal status are deleted, at any age; the next call, from any store, is False."""
    store, other = context.store, await second_store(context)
    for status in TERMINAL_RUN_STATUSES:
        run_id = await start(context)
        await store.complete_run(run_id, status)
        context.expect(await other.delete_run(run_id), True, f"delete_run of a run that is {status}")
        for one in (store, other):
            context.expect(await one.delete_run(run_id), False, "delete_run of a deleted run")
            context.expect(await one.get_run(run_id), None, "a deleted run")
    context.expect(await store.delete_run(new_id(context)), False, "delete_run of an unknown run")


@example("RET-5", needs=DELETION)
async def everything_of_the_run_is_deleted(context: CheckContext) -> None:
    """No read and no list shows any of it, and its keys are free; lists are as if it had never been."""
    run_id, unknown = new_id(context), new_id(context)
    nothing, empty = await observe(context, unknown), await observe_all(context)
    await start_populated_run(context, run_id)
    context.expect(await outcome_of(context.store.delete_run(run_id)), True, "delete_run")
    assert_same(context, await observe(context, run_id), nothing, "no read shows any state of a deleted run")
    assert_same(context, await observe_all(context), empty, "no list shows a deleted run")
    await expect_nothing_left(context, run_id)
    if Capability.DASHBOARD in context.capabilities:
        buckets = await context.store.get_run_timeseries("day", now(context) - DAY, now(context) + DAY)
        totals = [bucket.total for bucket in buckets]
        context.expect(sum(totals), 0, "the runs in a timeseries after the only run was deleted")


@example("RET-5", needs=DELETION)
async def the_id_of_a_deleted_run_starts_empty(context: CheckContext) -> None:
    """A run started again has no old attempts, numbers, deliveries, claims or latches."""
    run_id, fresh = new_id(context), new_id(context)
    await start_populated_run(context, run_id)
    await context.store.delete_run(run_id)
    await expect_empty_start(context, run_id, fresh)


@example("RET-5", needs=DELETION)
async def a_running_run_is_refused(context: CheckContext) -> None:
    """A Running run raises RunNotCompletedError, also after a retry reopened it, and stays unchanged."""
    store, run_id = context.store, await start(context)
    await store.try_register_idempotency_key(FLOW, "manual", f"{run_id}", run_id)
    await run_step(context, run_id, "charge", StepStatus.FAILED)
    for reopened in (False, True):
        if reopened:
            await store.complete_run(run_id, RunStatus.FAILED)
            await store.retry_step(run_id, "charge")
        before = await observe_all(context, run_id)
        sentence = f"delete_run of a run that {'retry_step has reopened' if reopened else 'is Running'}"
        error = await context.expect_error(store.delete_run(run_id), RunNotCompletedError, sentence)
        expect_fields(context, error, f"the error of {sentence}", run_id=run_id)
        assert_same(context, await observe_all(context, run_id), before, "a refused deletion changes nothing")
    found = await store.find_run_id_by_idempotency_key(FLOW, "manual", f"{run_id}")
    context.expect(found, run_id, "the run of a key of a Running run")
    await store.complete_run(run_id, RunStatus.FAILED)
    context.expect(await store.delete_run(run_id), True, "delete_run after the end of the run")


@example("RET-5", needs=DELETION)
async def other_runs_stay_as_they_are(context: CheckContext) -> None:
    """Derived runs and runs of the same flow keep everything; derived runs keep the dangling source."""
    store, gone, kept = context.store, new_id(context), new_id(context)
    await start_populated_run(context, gone)
    await start_populated_run(context, kept)
    derived = await start(context, source_run_id=gone)
    await run_step(context, derived, "charge", StepStatus.FAILED, output_json="out")
    before = {one: await observe(context, one) for one in (kept, derived)}
    context.expect(await store.delete_run(gone), True, "delete_run of one of several runs")
    for one, shown in before.items():
        assert_same(context, await observe(context, one), shown, "other runs stay unchanged")
    sources = [run.run_id for run in await store.get_derived_runs(gone)]
    context.expect(sources, [derived], "the runs derived from a deleted run")
    found = await store.find_run_id_by_idempotency_key(FLOW, "manual", f"more of {kept}")
    context.expect(found, kept, "the run of a key of another run")
    again = await store.deliver_signal(kept, "go", "{}", delivery_id="id")
    context.expect(again.step_key, "wait", "a repeated delivery_id of another run")


@example("RET-5", needs=DELETION)
async def a_run_that_never_started_is_left_to_cleanup(context: CheckContext) -> None:
    """A control record and a key without a run are not a run: the call is False, and they stay."""
    store, never = context.store, new_id(context)
    await store.configure_run(never, FLOW, "manual", idempotency_key="key")
    await store.try_register_idempotency_key(FLOW, "manual", f"{never}", never)
    before = await store.get_run_control(never)
    context.expect(await store.delete_run(never), False, "delete_run of a control record without a run")
    context.expect(await store.get_run_control(never), before, "the control record after delete_run")
    found = await store.find_run_id_by_idempotency_key(FLOW, "manual", f"{never}")
    context.expect(found, never, "the run of a key whose run never started, after delete_run")


@example("RET-5", needs={*DELETION, Capability.QUEUES})
async def late_calls_find_no_run(context: CheckContext) -> None:
    """The worker of a deleted run is refused, and none of its queued steps is left."""
    store, run_id, queue = context.store, await start(context), f"queue {new_id(context)}"
    for key in ("charge", "ship"):
        await store.try_record_dispatch(run_id, key, queue=queue, step_type="http")
    claimed = single(await store.claim_next_steps([queue], lease=HOUR), "the claimed step")
    await store.complete_run(run_id, RunStatus.CANCELLED)
    await store.delete_run(run_id)
    call = store.advance_run(
        run_id, claimed.step_key, StepStatus.SUCCEEDED, attempt=claimed.attempt, owner=claimed.owner
    )
    await context.expect_error(call, RunNotFoundError, "advance_run by a worker of a deleted run")
    renewed = await store.renew_step_claim(run_id, claimed.step_key, claimed.owner, HOUR)
    context.expect(renewed, False, "renewing a claim of a deleted run")
    context.expect(await store.claim_next_steps([queue], lease=HOUR), (), "the steps of a deleted run")
    queues = [one.queue for one in await store.get_queues()]
    context.expect(queue in queues, False, "whether get_queues counts steps of a deleted run")
