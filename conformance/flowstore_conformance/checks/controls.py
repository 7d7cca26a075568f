"""CTL: control records, latches and deadlines."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from itertools import product
from typing import Any
from uuid import UUID

from flowstore_conformance.checks.compared_store import ComparedStore
from flowstore_conformance.checks.example_checks import example
from flowstore_conformance.checks.fixtures import (
    DAY,
    FLOW,
    MINUTE,
    SECOND,
    TICK,
    advance,
    assert_same,
    expect_fields,
    get_control,
    new_id,
    now,
    observe_all,
    outcome_of,
    run_numbers,
    run_step,
    start,
)
from flowstore_conformance.context import CheckContext
from flowstore_conformance.registry import check
from flowstore_core import Capability, FlowRunControlRecord, RunStatus, StepStatus

NOTHING_LATCHED: dict[str, Any] = {
    "cancel_requested": False,
    "cancel_reason": None,
    "cancel_requested_at": None,
    "timed_out_at": None,
}


@example("CTL-1")
async def configure_run_stores_a_control_record(context: CheckContext) -> None:
    """It may precede start_run, which keeps the record; it starts no run and registers no key."""
    store, run_id = context.store, new_id(context)
    at = advance(context, SECOND)
    given: dict[str, Any] = {"idempotency_key": "key", "timeout_at": at + MINUTE}
    await store.configure_run(run_id, FLOW, "manual", **given)
    wanted = FlowRunControlRecord(
        run_id=run_id, flow_id=FLOW, trigger_key="manual", created_at=at, **given, **NOTHING_LATCHED
    )
    context.expect(await store.get_run_control(run_id), wanted, "the control record")
    found = await store.find_run_id_by_idempotency_key(FLOW, "manual", "key")
    context.expect(found, None, "the run of the key that configure_run names")
    answer = await outcome_of(store.try_register_idempotency_key(FLOW, "manual", "key", new_id(context)))
    context.expect(answer, True, "registering the key that configure_run names for another run")
    context.expect(
        await store.get_run_status(run_id), None, "the status of a configured run that never started"
    )
    before = await store.get_run_control(run_id)
    advance(context, SECOND)
    await start(context, run_id=run_id)
    context.expect(await store.get_run_control(run_id), before, "the control record after start_run")


@example("CTL-1")
async def configure_run_overwrites_and_keeps_created_at_and_latches(context: CheckContext) -> None:
    """None overwrites too; created_at, a cancel and a time-out are kept; other runs stay unchanged."""
    store, run_id, other = context.store, await start(context), await start(context)
    for one in (run_id, other):
        await store.configure_run(one, FLOW, "manual", idempotency_key="key", timeout_at=now(context))
    other_control = await store.get_run_control(other)
    made = await get_control(context, run_id)
    flow_id = new_id(context)
    advance(context, SECOND)
    await store.configure_run(run_id, flow_id, "timer")
    overwritten = {"flow_id": flow_id, "trigger_key": "timer", "idempotency_key": None, "timeout_at": None}
    sentence = "the control record after configure_run with and without None"
    expect_fields(
        context, await get_control(context, run_id), sentence, **overwritten, created_at=made.created_at
    )
    await store.request_cancel(run_id, "user")
    await store.mark_timed_out(run_id, "late")
    before = await store.get_run_control(run_id)
    advance(context, SECOND)
    await store.configure_run(run_id, flow_id, "timer")
    after = await store.get_run_control(run_id)
    context.expect(after, before, "the latches after configure_run")
    context.expect(
        await outcome_of(store.request_cancel(run_id)), False, "a second cancel after configure_run"
    )
    context.expect(await store.get_run_control(other), other_control, "the control record of another run")


@example("CTL-1")
async def the_control_records_of_several_runs_are_read_at_once(context: CheckContext) -> None:
    """get_run_controls returns what get_run_control does, in the order of the ids, without absent records."""
    store = context.store
    runs = [await start(context) for _ in range(4)]
    for run_id in (runs[3], runs[0], runs[2]):
        advance(context, SECOND)
        await store.configure_run(
            run_id, FLOW, "manual", idempotency_key=str(run_id), timeout_at=now(context)
        )
    await store.request_cancel(runs[0], "enough")
    await store.mark_timed_out(runs[2], "late")
    early = new_id(context)
    await store.configure_run(early, FLOW, "timer")
    for order in (1, -1):
        asked = [runs[2], early, runs[1], runs[0], new_id(context)][::order]
        controls = [(run_id, await store.get_run_control(run_id)) for run_id in asked]
        wanted = [(run_id, control) for run_id, control in controls if control is not None]
        found = await store.get_run_controls([*asked, asked[0]])
        context.expect(list(found.items()), wanted, "the control records of several runs")
    context.expect(dict(await store.get_run_controls([])), {}, "the control records of no runs")
    many = [new_id(context) for _ in range(999)]
    found = await store.get_run_controls([*many, runs[0]])
    context.expect(list(found), [runs[0]], "the one control record of 1,000 runs")


# CTL-2


@example("CTL-2")
async def each_latch_is_set_by_one_call(context: CheckContext) -> None:
    """The first call of each latch returns True, later calls False; the user's reason takes precedence."""
    store = context.store
    for order in (("cancel", "time out"), ("time out", "cancel"), ("cancel",), ("time out",)):
        run_id = await start(context)
        await store.configure_run(run_id, FLOW, "manual")
        expect_fields(
            context,
            await get_control(context, run_id),
            "a control record before any latch",
            **NOTHING_LATCHED,
        )
        latch = {"cancel": store.request_cancel, "time out": store.mark_timed_out}
        at = {}
        for what in order:
            at[what] = advance(context, SECOND)
            context.expect(await outcome_of(latch[what](run_id, f"first {what}")), True, f"the first {what}")
        advance(context, SECOND)
        for what in order:
            context.expect(await outcome_of(latch[what](run_id, "again")), False, f"the second {what}")
        first = "cancel" if "cancel" in order else "time out"
        wanted = {
            "cancel_requested": True,
            "cancel_reason": f"first {first}",
            "cancel_requested_at": at[first],
            "timed_out_at": at.get("time out"),
        }
        expect_fields(
            context, await get_control(context, run_id), f"the latches after {' and '.join(order)}", **wanted
        )
    run_id = await start(context)
    await store.configure_run(run_id, FLOW, "manual")
    await store.mark_timed_out(run_id, "late")
    at["cancel"] = advance(context, SECOND)
    await store.request_cancel(run_id)
    wanted = {"cancel_requested": True, "cancel_reason": None, "cancel_requested_at": at["cancel"]}
    sentence = "the reason after a cancel without reason and a time-out"
    expect_fields(context, await get_control(context, run_id), sentence, **wanted)


@example("CTL-2")
async def request_cancel_creates_the_record_of_a_stored_run(context: CheckContext) -> None:
    """The record takes flow and trigger from the run; mark_timed_out creates none and returns False."""
    store = context.store
    flow_id = new_id(context)
    run_id = await start(context, flow_id=flow_id, trigger_key="timer")
    context.expect(
        await outcome_of(store.mark_timed_out(run_id, "late")), False, "a time-out without control record"
    )
    context.expect(await store.get_run_control(run_id), None, "the control record after mark_timed_out")
    at = advance(context, SECOND)
    context.expect(
        await outcome_of(store.request_cancel(run_id, "")), True, "a cancel without control record"
    )
    wanted = FlowRunControlRecord(
        run_id=run_id,
        flow_id=flow_id,
        trigger_key="timer",
        idempotency_key=None,
        timeout_at=None,
        cancel_requested=True,
        cancel_reason="",
        cancel_requested_at=at,
        timed_out_at=None,
        created_at=at,
    )
    sentence = "the control record that request_cancel creates"
    context.expect(await store.get_run_control(run_id), wanted, sentence)
    context.expect(await outcome_of(store.request_cancel(run_id)), False, "the second cancel")


@example("CTL-2")
async def latches_do_not_depend_on_the_run_status(context: CheckContext) -> None:
    """They can be set before a run starts and after it ends, and do not change its status."""
    store, early, ended = context.store, new_id(context), await start(context)
    await store.complete_run(ended, RunStatus.SUCCEEDED)
    for run_id, status in ((early, None), (ended, RunStatus.SUCCEEDED)):
        await store.configure_run(run_id, FLOW, "manual")
        context.expect(
            await outcome_of(store.request_cancel(run_id)), True, f"a cancel of a run with status {status}"
        )
        context.expect(
            await outcome_of(store.mark_timed_out(run_id)), True, f"a time-out of a run with status {status}"
        )
        context.expect(await store.get_run_status(run_id), status, "the run's status after both latches")
    await start(context, run_id=early)
    control = await get_control(context, early)
    context.expect(control.cancel_requested, True, "cancel_requested after a cancel before the start")


@example("CTL-2")
async def mark_timed_out_with_as_of_needs_an_elapsed_deadline(context: CheckContext) -> None:
    """With as_of it needs timeout_at <= as_of; without as_of the deadline does not matter."""
    store, run_id, bare, early = (
        context.store,
        await start(context),
        await start(context),
        await start(context),
    )
    deadline = now(context) + DAY
    await store.configure_run(run_id, FLOW, "manual", timeout_at=deadline)
    await store.configure_run(early, FLOW, "manual", timeout_at=deadline)
    await store.configure_run(bare, FLOW, "manual")
    before = await observe_all(context, run_id, bare)
    answer = await outcome_of(store.mark_timed_out(run_id, as_of=deadline - TICK))
    context.expect(answer, False, "a time-out as of a microsecond before the deadline")
    answer = await outcome_of(store.mark_timed_out(bare, as_of=deadline + 3650 * DAY))
    context.expect(answer, False, "a time-out with as_of of a run without deadline")
    after = await observe_all(context, run_id, bare)
    assert_same(context, after, before, "a refused time-out changes nothing")
    answer = await outcome_of(store.mark_timed_out(run_id, "late", as_of=deadline))
    context.expect(answer, True, "a time-out as of the deadline itself")
    control = await get_control(context, run_id)
    sentence = "timed_out_at with as_of"
    expect_fields(
        context, control, sentence, timed_out_at=now(context), cancel_reason="late", timeout_at=deadline
    )
    answer = await outcome_of(store.mark_timed_out(run_id, as_of=deadline))
    context.expect(answer, False, "the second time-out")
    answer = await outcome_of(store.mark_timed_out(early))
    context.expect(answer, True, "a time-out without as_of before the deadline")


# CTL-3


@example("CTL-3")
async def runs_to_stop_are_past_their_deadline_or_cancelled(context: CheckContext) -> None:
    """Only Running runs, by timeout_at and run_id, without deadline last; as_of replaces now."""
    store = context.store
    at = now(context) + DAY
    deadlines = {
        9: at - MINUTE,
        8: at,
        7: at,
        6: at + TICK,
        5: at - 2 * MINUTE,
        4: at + MINUTE,
        3: None,
        2: None,
        1: None,
    }
    for number, timeout_at in deadlines.items():
        run_id = await start(context, run_id=UUID(int=number))
        await store.configure_run(run_id, FLOW, "manual", timeout_at=timeout_at)
    await start(context, run_id=UUID(int=10))
    for number in (5, 4):
        await store.mark_timed_out(UUID(int=number))
    for number in (3, 2):
        await store.request_cancel(UUID(int=number))
    ended, orphan = await start(context), new_id(context)
    for run_id in (ended, orphan):
        await store.configure_run(run_id, FLOW, "manual", timeout_at=at - MINUTE)
        await store.request_cancel(run_id)
    await store.complete_run(ended, RunStatus.CANCELLED)
    wanted = [5, 9, 7, 8, 4, 2, 3]
    sentence = "get_runs_to_stop in the order of timeout_at, run_id"
    for take in (100, 4, 1, 0):
        found = await store.get_runs_to_stop(as_of=at, take=take)
        context.expect(run_numbers(found), wanted[:take], f"{sentence}, take={take}")
    found = await store.get_runs_to_stop(as_of=at - TICK)
    context.expect(run_numbers(found), [5, 9, 4, 2, 3], "as of a microsecond before the deadline of two runs")
    mixed = {run.run_id: run for run in await store.get_runs()}
    records = [mixed[UUID(int=number)] for number in (5, 9, 4, 2, 3)]
    context.expect(found, records, "the records of get_runs_to_stop")


@example("CTL-3", needs=[Capability.VIRTUAL_CLOCK])
async def without_as_of_deadlines_compare_with_the_stores_now(context: CheckContext) -> None:
    """A run is listed from its deadline on, exact to the microsecond."""
    store, run_id = context.store, await start(context)
    await store.configure_run(run_id, FLOW, "manual", timeout_at=now(context) + MINUTE)
    advance(context, MINUTE - TICK)
    for how, listed in (("a microsecond before the deadline", False), ("at the deadline", True)):
        found = [run.run_id for run in await store.get_runs_to_stop()]
        context.expect(run_id in found, listed, f"the run is among those to stop, {how}")
        advance(context, TICK)


@example("CTL-3")
async def a_reopened_run_is_to_stop_again(context: CheckContext) -> None:
    """A run is not listed while it has ended, and is listed after it was reopened and is to stop again."""
    store, at = context.store, now(context) + DAY
    causes: dict[str, Callable[[UUID], Awaitable[bool]]] = {
        "cancel": lambda run_id: store.request_cancel(run_id),
        "time-out": lambda run_id: store.mark_timed_out(run_id),
        "deadline": lambda run_id: store.extend_deadline(run_id, at),
    }
    for cause, stop in causes.items():
        run_id = await start(context)
        await store.configure_run(run_id, FLOW, "manual")
        await run_step(context, run_id, "charge", StepStatus.FAILED)
        for nth in ("first", "second"):
            await stop(run_id)
            found = [run.run_id for run in await store.get_runs_to_stop(as_of=at)]
            context.expect(run_id in found, True, f"the run is to stop after its {nth} {cause}")
            await store.complete_run(run_id, RunStatus.CANCELLED)
            found = [run.run_id for run in await store.get_runs_to_stop(as_of=at)]
            context.expect(run_id in found, False, f"the run is to stop after its {nth} {cause} and its end")
            await store.retry_step(run_id, "charge")


@example("CTL-3")
async def extending_a_deadline_undoes_the_time_out(context: CheckContext) -> None:
    """The time-out latch and its reason are cleared, a user's cancel stays; True if there is a control
    record."""
    store, run_id, timed_out = context.store, await start(context), await start(context)
    for one in (run_id, timed_out):
        await store.configure_run(one, FLOW, "manual", idempotency_key="key", timeout_at=now(context))
        await store.mark_timed_out(one, "late")
    await store.request_cancel(run_id, "user")
    before = await get_control(context, run_id)
    for days in (2, -2):
        deadline = now(context) + days * DAY
        context.expect(
            await outcome_of(store.extend_deadline(run_id, deadline)), True, "extending a deadline"
        )
        wanted = {
            "timeout_at": deadline,
            "timed_out_at": None,
            "cancel_requested": True,
            "cancel_reason": "user",
            "cancel_requested_at": before.cancel_requested_at,
            "created_at": before.created_at,
            "idempotency_key": "key",
        }
        sentence = "the control record after extending, with a cancel and a time-out"
        expect_fields(context, await get_control(context, run_id), sentence, **wanted)
    deadline = now(context) + DAY
    context.expect(
        await outcome_of(store.extend_deadline(timed_out, deadline)), True, "extending after a time-out"
    )
    sentence = "the control record after extending a timed-out run"
    expect_fields(
        context, await get_control(context, timed_out), sentence, **NOTHING_LATCHED, timeout_at=deadline
    )
    found = [run.run_id for run in await store.get_runs_to_stop(as_of=deadline - TICK)]
    listed = (run_id in found, timed_out in found)
    sentence = "get_runs_to_stop after extending deadlines"
    context.expect(listed, (True, False), sentence)
    answer = await outcome_of(store.mark_timed_out(timed_out, "later", as_of=deadline))
    context.expect(answer, True, "a time-out at the new deadline")
    reason = (await get_control(context, timed_out)).cancel_reason
    context.expect(reason, "later", "the reason of a time-out after extending")
    bare = await start(context)
    state = await observe_all(context, bare)
    context.expect(
        await outcome_of(store.extend_deadline(bare, deadline)),
        False,
        "extend_deadline without control record",
    )
    assert_same(
        context,
        await observe_all(context, bare),
        state,
        "extend_deadline without control record changes nothing",
    )


@check("CTL-2", "CTL-1", "CTL-3", needs=[Capability.DEADLINES], isolated=False)
async def control_operations_ignore_the_status_of_the_run(context: CheckContext) -> None:
    """Each has the same effect before a run starts, while it is Running, and after each end of it.

    With and without a control record, each is made twice.
    """
    compared, flow_id, deadline = ComparedStore.of(context), new_id(context), now(context) + DAY
    operations: dict[str, dict[str, Any]] = {
        "request_cancel": {"reason": "user"},
        "mark_timed_out": {"reason": "late"},
        "extend_deadline": {"timeout_at": deadline},
        "configure_run": {"flow_id": flow_id, "trigger_key": "timer", "idempotency_key": "key"},
    }
    statuses: tuple[RunStatus | None, ...] = (None, *RunStatus)
    configured = {"flow_id": flow_id, "trigger_key": "manual", "timeout_at": deadline}
    for status, has_record, (method, given) in product(statuses, (False, True), operations.items()):
        run_id = new_id(context)
        record = "a control record" if has_record else "no control record"
        compared.stage = f"with {record} and {status or 'no run'}"
        if has_record:
            await compared.call("configure_run", run_id=run_id, **configured)
        if status is not None:
            run = {"flow_id": flow_id, "flow_name": "orders", "run_id": run_id, "trigger_key": "manual"}
            await compared.call("start_run", **run)
        if status is not None and status.is_terminal:
            await compared.call("complete_run", run_id=run_id, status=status)
        for again in ("", ", repeated"):
            compared.stage += again
            await compared.call(method, run_id=run_id, **given)
            await compared.call("get_run_control", run_id=run_id)
        await compared.call("get_run_status", run_id=run_id)
