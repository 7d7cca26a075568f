"""RUN-1, RUN-2 and RUN-4: starting and completing runs, and operations on a terminal run."""

from __future__ import annotations

from typing import Any

from flowstore_conformance.checks.example_checks import example
from flowstore_conformance.checks.fixtures import (
    CLOSING_STATUSES,
    DAY,
    MINUTE,
    NOT_FOUND,
    SECOND,
    SIMILAR_KEYS,
    TERMINAL_RUN_STATUSES,
    TICK,
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
    single,
    skip_steps,
    start,
)
from flowstore_conformance.context import CheckContext
from flowstore_core import (
    Capability,
    FlowRunDetail,
    FlowRunRecord,
    RunAlreadyExistsError,
    RunCompletedError,
    RunStatus,
    SignalDeliveryStatus,
    StepAlreadyCompletedError,
    StepStatus,
)


@example("RUN-1")
async def start_run_stores_every_argument(context: CheckContext) -> None:
    """start_run stores a Running run with every argument and returns its record."""
    store = context.store
    # A flow of its own: other checks may have started more runs than a page holds.
    flow_id = new_id(context)
    given: dict[str, Any] = {"flow_id": flow_id, "flow_name": "orders", "trigger_key": "manual"}
    more = {"trigger_data": '{"a": 1}', "job_id": "job", "source_run_id": new_id(context)}
    begun = advance(context, SECOND)
    for optional in (more, dict.fromkeys(more)):
        given["run_id"] = run_id = new_id(context)
        wanted: dict[str, Any] = {**given, **optional, "status": RunStatus.RUNNING, "completed_at": None}
        record = FlowRunRecord(**wanted, started_at=begun)
        context.expect(
            await store.start_run(**given, **optional), record, "start_run returns the run's record"
        )
        stored = [run for run in await store.get_runs(flow_id) if run.run_id == run_id]
        context.expect(stored, [record], "the run in get_runs")
        detail = FlowRunDetail(**wanted, started_at=begun, steps=())
        shown = await store.get_run_detail(run_id)
        context.expect(shown, detail, "the run in get_run_detail, without steps")
        context.expect(await store.get_run_status(run_id), RunStatus.RUNNING, "the status of a started run")
        context.expect(await store.get_run_control(run_id), None, "the control record after start_run")


@example("RUN-1")
async def start_run_refuses_a_stored_id(context: CheckContext) -> None:
    """start_run with a stored id raises RunAlreadyExistsError and changes nothing."""
    store = context.store
    running, ended = await start(context), await start(context)
    await run_step(context, running)
    await store.complete_run(ended, RunStatus.FAILED)
    before = await observe_all(context, running, ended)
    advance(context, SECOND)
    for run_id, how in ((running, "a Running run"), (ended, "a terminal run")):
        call = store.start_run(new_id(context), "other", run_id, "other", trigger_data="other")
        sentence = f"start_run with the id of {how}"
        error = await context.expect_error(call, RunAlreadyExistsError, sentence)
        expect_fields(context, error, f"{sentence}: the error names the run", run_id=run_id)
    advance(context, -SECOND)
    after = await observe_all(context, running, ended)
    assert_same(context, after, before, "a refused start_run changes nothing")


@example("RUN-2")
async def the_first_terminal_status_wins(context: CheckContext) -> None:
    """complete_run returns True once; every later call returns False and changes nothing."""
    store = context.store
    for status in TERMINAL_RUN_STATUSES:
        run_id = await start(context)
        begun = await get_run(context, run_id)
        ended = advance(context, MINUTE)
        context.expect(
            await store.complete_run(run_id, status), True, f"completing a Running run as {status}"
        )
        wanted = {"status": status, "completed_at": ended, "started_at": begun.started_at}
        expect_fields(
            context, await get_run(context, run_id), "complete_run sets status and completed_at", **wanted
        )
        context.expect(await store.get_run_status(run_id), status, "get_run_status after complete_run")
        before = await observe_all(context, run_id)
        advance(context, MINUTE)
        for second in TERMINAL_RUN_STATUSES:
            nothing: dict[str, StepStatus] = {}
            for expected in (None, nothing):
                answer = await outcome_of(store.complete_run(run_id, second, expected=expected))
                context.expect(answer, False, f"complete_run as {second} of a {status} run")
        advance(context, -MINUTE)
        assert_same(context, await observe_all(context, run_id), before, "the first terminal status wins")


@example("RUN-2")
async def complete_run_with_expected_compares_every_status(context: CheckContext) -> None:
    """With expected, complete_run returns False and changes nothing if any key or status differs."""
    store, run_id = context.store, await start(context)
    statuses: dict[str, StepStatus] = {status.lower(): status for status in CLOSING_STATUSES}
    for key, status in statuses.items():
        await run_step(context, run_id, key, status)
    for key in ("running", *SIMILAR_KEYS):
        await store.record_step_start(run_id, key, "http")
        statuses[key] = StepStatus.RUNNING
    before = await observe_all(context, run_id)
    changes: tuple[dict[str, StepStatus | None], ...] = (
        {"succeeded": StepStatus.FAILED},
        {"running": StepStatus.PENDING},
        {"pending": None},
        {"skipped": None},
        {"unknown": StepStatus.SUCCEEDED},
        {"failed": None, "Failed": StepStatus.FAILED},
        dict.fromkeys(statuses),
    )
    for change in changes:
        expected = {key: status for key, status in {**statuses, **change}.items() if status is not None}
        answer = await outcome_of(store.complete_run(run_id, RunStatus.SUCCEEDED, expected=expected))
        context.expect(answer, False, f"complete_run expecting {change} with the statuses {statuses}")
    assert_same(
        context,
        await observe_all(context, run_id),
        before,
        "a complete_run that returns False changes nothing",
    )
    answer = await outcome_of(store.complete_run(run_id, RunStatus.SUCCEEDED, expected=statuses))
    context.expect(answer, True, "complete_run expecting exactly the statuses of the run")
    empty = await start(context)
    answer = await outcome_of(store.complete_run(empty, RunStatus.SUCCEEDED, expected={}))
    context.expect(answer, True, "complete_run expecting no steps of a run without steps")


@example("RUN-2")
async def complete_run_with_expected_refuses_other_claims_and_dispatches(context: CheckContext) -> None:
    """A run does not complete while a key outside expected is claimed or dispatched, or after a retry."""
    store = context.store
    steps = {"a": StepStatus.SUCCEEDED}
    run_id, at = await start(context), now(context)
    await store.try_record_dispatch(run_id, "a")
    await store.try_claim_step(run_id, "a", owner="me")
    await run_step(context, run_id, "a")
    holds: dict[str, tuple[str, dict[str, Any]]] = {
        "claimed": ("try_claim_step", {}),
        "claimed by an owner": ("try_claim_step", {"owner": "me"}),
        "dispatched": ("try_record_dispatch", {}),
        "dispatched and due": ("try_record_dispatch", {"due_at": at - DAY}),
        "dispatched and not yet due": ("try_record_dispatch", {"due_at": at + DAY}),
    }
    for how, (method, given) in holds.items():
        await getattr(store, method)(run_id, "b", **given)
        answer = await outcome_of(store.complete_run(run_id, RunStatus.SUCCEEDED, expected=steps))
        context.expect(answer, False, f"complete_run while a key outside expected is {how}")
        context.expect(
            await store.get_run_status(run_id),
            RunStatus.RUNNING,
            f"the status of a run while a key outside expected is {how}",
        )
        await store.release_step_claim(run_id, "b")
        await store.release_dispatch(run_id, "b")
    answer = await outcome_of(store.complete_run(run_id, RunStatus.SUCCEEDED, expected=steps))
    context.expect(answer, True, "complete_run while only keys in expected are claimed or dispatched")
    retried = await start(context)
    await run_step(context, retried, "a", StepStatus.FAILED)
    seen = await store.get_step_statuses(retried)
    await store.retry_step(retried, "a")
    answer = await outcome_of(store.complete_run(retried, RunStatus.FAILED, expected=seen))
    context.expect(answer, False, "complete_run expecting statuses from before a retry")
    await skip_steps(context, retried, "b")
    await store.retry_step(retried, "a", attempt=1)
    await run_step(context, retried, "a", StepStatus.FAILED)
    await store.retry_step(retried, "a", reset=["b"])
    pending = {"a": StepStatus.PENDING}
    answer = await outcome_of(store.complete_run(retried, RunStatus.FAILED, expected=pending))
    context.expect(answer, True, "complete_run with expected that omits a reset key")


@example("RUN-2", needs=[Capability.LEASES, Capability.VIRTUAL_CLOCK])
async def complete_run_with_expected_ignores_expired_claims(context: CheckContext) -> None:
    """A live claim on a key outside expected prevents completion; an expired claim does not."""
    store, run_id = context.store, await start(context)
    await store.try_claim_step(run_id, "b", owner="me", lease=MINUTE)
    advance(context, MINUTE - TICK)
    answer = await outcome_of(store.complete_run(run_id, RunStatus.SUCCEEDED, expected={}))
    context.expect(answer, False, "complete_run while a leased claim outside expected is live")
    advance(context, TICK)
    answer = await outcome_of(store.complete_run(run_id, RunStatus.SUCCEEDED, expected={}))
    context.expect(answer, True, "complete_run after the lease of the claim outside expected has ended")


# RUN-4


@example("RUN-4")
async def a_terminal_run_accepts_no_claim_dispatch_or_start(context: CheckContext) -> None:
    """On a terminal run claims and dispatches return False, also for the claim's owner, and starts raise."""
    store = context.store
    for status in TERMINAL_RUN_STATUSES:
        run_id = await start(context)
        await store.try_claim_step(run_id, "mine", owner="me")
        await run_step(context, run_id, "failed", StepStatus.FAILED)
        await store.complete_run(run_id, status)
        before = await observe_all(context, run_id)
        for key, owner in (("mine", "me"), ("new", "me"), ("new", None), ("failed", None)):
            answer = await outcome_of(store.try_claim_step(run_id, key, owner=owner))
            context.expect(answer, False, f"try_claim_step of {key!r} by {owner} on a {status} run")
            answer = await outcome_of(store.try_record_dispatch(run_id, key))
            context.expect(answer, False, f"try_record_dispatch of {key!r} on a {status} run")
        starts = (("failed", None), ("mine", None), ("mine", "me"), ("mine", "not me"), ("new", None))
        for key, owner in starts:
            call = store.record_step_start(run_id, key, "http", owner=owner)
            sentence = f"record_step_start of {key!r} by {owner} on a {status} run"
            error = await context.expect_error(call, RunCompletedError, sentence)
            expect_fields(context, error, f"{sentence}: the error names the run", run_id=run_id)
        assert_same(
            context,
            await observe_all(context, run_id),
            before,
            "refused calls on a terminal run change nothing",
        )


@example("RUN-4")
async def the_run_is_checked_before_the_step_and_the_step_before_the_claim(context: CheckContext) -> None:
    """A terminal step accepts no claim or dispatch, not even from its owner; a terminal run takes
    precedence."""
    store, run_id = context.store, await start(context)
    for status in CLOSING_STATUSES[:3]:
        await store.try_claim_step(run_id, status, owner="me")
        await run_step(context, run_id, status, status)
        await run_step(context, run_id, f"unclaimed {status}", status)
    before = await observe_all(context, run_id)
    for status in CLOSING_STATUSES[:3]:
        for key, owner in ((status.value, "me"), (status.value, None), (f"unclaimed {status}", "me")):
            answer = await outcome_of(store.try_claim_step(run_id, key, owner=owner))
            context.expect(answer, False, f"try_claim_step of a {status} step by {owner}")
        answer = await outcome_of(store.try_record_dispatch(run_id, status))
        context.expect(answer, False, f"try_record_dispatch of a {status} step")
    assert_same(
        context, await observe_all(context, run_id), before, "claiming a terminal step changes nothing"
    )
    call = store.record_step_start(run_id, "Succeeded", "http", owner="not me")
    sentence = "starting a finished step without owning its claim"
    await context.expect_error(call, StepAlreadyCompletedError, sentence)
    for status in (StepStatus.PENDING, StepStatus.RUNNING):
        await store.record_step_start(run_id, status, "http")
        if status is StepStatus.PENDING:
            await store.record_step_complete(run_id, status, status)
        sentence = f"of a {status} step"
        context.expect(
            await outcome_of(store.try_record_dispatch(run_id, status)), True, f"dispatching {sentence}"
        )
        context.expect(await outcome_of(store.try_claim_step(run_id, status)), True, f"claiming {sentence}")
    await store.complete_run(run_id, RunStatus.SUCCEEDED)
    call = store.record_step_start(run_id, "Succeeded", "http", owner="not me")
    await context.expect_error(call, RunCompletedError, "starting a finished step of a terminal run")


@example("RUN-4")
async def closing_skipping_and_waiting_stay_allowed_on_a_terminal_run(context: CheckContext) -> None:
    """A terminal run accepts completing an open attempt, skipping steps and registering waiters."""
    store = context.store
    for status in TERMINAL_RUN_STATUSES:
        run_id = await start(context)
        await store.record_step_start(run_id, "open", "http")
        await store.complete_run(run_id, status)
        ended = await get_run(context, run_id)
        at = advance(context, SECOND)
        sentence = f"on a {status} run"
        call = store.record_step_complete(run_id, "open", StepStatus.SUCCEEDED, output_json="1", attempt=1)
        context.expect(await outcome_of(call), None, f"completing an open attempt {sentence}")
        step = await get_step(context, run_id, "open")
        wanted = {"status": StepStatus.SUCCEEDED, "output_json": "1", "completed_at": at}
        expect_fields(context, step, f"a step completed {sentence}", **wanted)
        for key, owner in (("a", None), ("b", "me")):
            call = store.record_skipped_step(run_id, key, "http", "late", owner=owner)
            context.expect(await outcome_of(call), None, f"skipping {sentence}")
        skipped = {"a": StepStatus.SKIPPED, "b": StepStatus.SKIPPED, "open": StepStatus.SUCCEEDED}
        context.expect(await store.get_step_statuses(run_id), skipped, f"the steps skipped {sentence}")
        claim = single(await store.get_step_claims(run_id), f"the claim that a skip took {sentence}")
        context.expect(claim.owner, "me", f"the owner of the claim that a skip took {sentence}")
        context.expect(
            await outcome_of(store.register_waiter(run_id, "w", "go")), None, f"register_waiter {sentence}"
        )
        if Capability.OUTPUTS in context.capabilities:
            context.expect(
                await outcome_of(store.save_output(run_id, "x", "1")), None, f"save_output {sentence}"
            )
        if Capability.EVENTS in context.capabilities:
            context.expect(
                await outcome_of(store.append_event(run_id, "after")), 1, f"append_event {sentence}"
            )
        after = await get_run(context, run_id)
        wanted = {"status": status, "completed_at": ended.completed_at}
        expect_fields(context, after, "the run after writes to it while terminal", **wanted)


@example("RUN-4")
async def a_terminal_run_gets_no_delivery(context: CheckContext) -> None:
    """deliver_signal returns NOT_FOUND and changes nothing; after retry_step it delivers to the same
    waiter."""
    store = context.store
    for status in TERMINAL_RUN_STATUSES:
        run_id = await start(context)
        await run_step(context, run_id, "other", StepStatus.FAILED)
        await store.register_waiter(run_id, "before", "go")
        await store.complete_run(run_id, status)
        advance(context, SECOND)
        await store.register_waiter(run_id, "after", "stop")
        before = await observe_all(context, run_id)
        for name in ("go", "stop"):
            for delivery_id in (None, "id"):
                answer = await store.deliver_signal(run_id, name, "late", delivery_id=delivery_id)
                context.expect(answer, NOT_FOUND, f"a delivery of {name!r} to a {status} run")
        sentence = f"a delivery to a {status} run changes nothing"
        assert_same(context, await observe_all(context, run_id), before, sentence)
        await store.retry_step(run_id, "other")
        for name, key in (("go", "before"), ("stop", "after")):
            again = await store.deliver_signal(run_id, name, "now", delivery_id=f"id of {name}")
            found = (again.status, again.step_key)
            wanted = (SignalDeliveryStatus.DELIVERED, key)
            context.expect(found, wanted, f"a delivery of {name!r} to a reopened {status} run")
        again = await store.deliver_signal(run_id, "go", "now", delivery_id="id")
        already = SignalDeliveryStatus.ALREADY_DELIVERED
        context.expect(again.status, already, "a delivery with a delivery_id that a terminal run refused")
