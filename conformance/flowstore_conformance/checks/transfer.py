"""XFR: a run moves between stores whole, as it was, once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from flowstore_conformance.archives import full_archive, new_archive, under_another_id
from flowstore_conformance.checks.arguments import expect_refused
from flowstore_conformance.checks.example_checks import example
from flowstore_conformance.checks.fixtures import (
    DAY,
    FLOW,
    HOUR,
    MINUTE,
    SECOND,
    TICK,
    advance,
    assert_same,
    call_at_once,
    expect_fields,
    expect_present,
    get_run,
    new_id,
    now,
    observe,
    observe_all,
    run_step,
    single,
    skip_steps,
    start,
)
from flowstore_conformance.context import CheckContext
from flowstore_conformance.history import Call, comparable
from flowstore_conformance.registry import Kind, check
from flowstore_conformance.state_probe import invoke, outcome_of
from flowstore_conformance.write_scenarios import available
from flowstore_core import (
    Capability,
    ConflictError,
    FlowStore,
    InvalidArgumentError,
    RunAlreadyExistsError,
    RunArchive,
    RunStatus,
    StallReason,
    StepStatus,
)
from flowstore_core.timeseries import EARLIEST, LATEST

TRANSFER = {Capability.TRANSFER}
CLOCK = {*TRANSFER, Capability.VIRTUAL_CLOCK}


async def _export(context: CheckContext, run_id: UUID, *, store: FlowStore | None = None) -> RunArchive:
    return expect_present(await (store or context.store).export_run(run_id), "export_run of a stored run")


async def _import(context: CheckContext, archive: RunArchive, what: str = "a new run") -> None:
    context.expect(await context.store.import_run(archive), True, f"import_run of {what}")


def _queue_of(run_id: UUID) -> str:
    return f"queue {run_id}"


# XFR-1


@check("XFR-1", "XFR-2", "XFR-3", needs=CLOCK, rotation="transfers")
async def every_state_is_the_same_after_a_transfer(context: CheckContext) -> None:
    """After each kind of write, the run in the importing store shows what it showed in the exporting one."""
    async with context.new_namespace() as target:
        if target.clock is not None:
            target.clock.now = now(context)
        scenarios = available(context.capabilities)
        # The exports are compared for every scenario. The reads take most of the time.
        read = context.random.sample(sorted(scenarios), len(scenarios) // context.profile.of(3, 1, 1))
        for name, factory in scenarios.items():
            run_id, flow_id = new_id(context), new_id(context)
            setup, call = factory(run_id, flow_id)
            for one in (*setup, call):
                await invoke(context.store, one)
            archive = await context.store.export_run(run_id)
            if archive is None:
                continue
            context.expect(await target.store.import_run(archive), True, f"import_run after {name}")
            again = await _export(target, run_id)
            context.expect(again, archive, f"the export of an imported run, after {name}")
            shown = RunArchive.from_json(archive.to_json())
            context.expect(
                shown, archive, f"an archive that was written as JSON and read again, after {name}"
            )
            if name not in read:
                continue
            before = await observe(context, run_id)
            after = await observe(context, run_id, store=target.store)
            _end_claims(before, archive)
            assert_same(target, after, before, f"every read is the same after a transfer, after {name}")
        await _expect_same_lists(context, target)


def _end_claims(shown: dict[str, Any], archive: RunArchive) -> None:
    """Change the reads of the exporting store to those with the claims that the export ended."""
    claims = {step.step_key: step.claim for step in archive.steps}
    shown["get_step_claims"] = tuple(claims[one.step_key] for one in shown["get_step_claims"])
    if "get_claimed_step_keys" in shown:
        shown["get_claimed_step_keys"] = frozenset()


async def _expect_same_lists(context: CheckContext, target: CheckContext) -> None:
    """Compare the reads of all runs; those of queues and stalls also depend on the ends of claims."""
    lists = [await observe_all(context, store=one.store) for one in (context, target)]
    for read in ("get_stalled_steps", "get_queues"):
        for shown in lists:
            shown.pop(read, None)
    assert_same(target, lists[1], lists[0], "lists and sums include imported runs")
    if Capability.DASHBOARD in context.capabilities:
        window = (datetime(2001, 1, 1, tzinfo=UTC), datetime(2001, 3, 1, tzinfo=UTC))
        for since, until in (window, (now(context) - DAY, now(context) + DAY)):
            series = [await one.store.get_run_timeseries("day", since, until) for one in (context, target)]
            target.expect(series[1], series[0], "the timeseries of imported runs")


@check("XFR-1", "STP-6", "STP-7", "SIG-2", "EVT-1", needs={*CLOCK, Capability.DELETION}, isolated=False)
async def operations_continue_where_they_were(context: CheckContext) -> None:
    """Operations whose results depend on state that no read shows give the same after a transfer."""
    async with context.new_namespace() as target:
        assert target.clock is not None
        run_id = new_id(context)
        for one in _hidden_state(run_id):
            await invoke(context.store, one)
        await _import(target, await _export(context, run_id))
        target.clock.now = now(context)
        for call in _continuations(run_id):
            outcomes = [await outcome_of(one.store, call, exact_times=True) for one in (context, target)]
            target.expect(outcomes[1], outcomes[0], f"{call.method} of an imported run")
            advance(context, SECOND)
            advance(target, SECOND)
        archives = [await _export(one, run_id) for one in (context, target)]
        target.expect(archives[1], archives[0], "the run after these calls")


def _on(run_id: UUID, method: str, **arguments: Any) -> Call:
    return Call(method=method, arguments={"run_id": run_id, **arguments})


def _hidden_state(run_id: UUID) -> Sequence[Call]:
    """A run with state that no read shows."""

    def on(method: str, **arguments: Any) -> Call:
        return _on(run_id, method, **arguments)

    def step(method: str, step_key: str, **arguments: Any) -> Call:
        return on(method, step_key=step_key, **arguments)

    return (
        Call(
            method="start_run",
            arguments={"flow_id": FLOW, "flow_name": "orders", "run_id": run_id, "trigger_key": "manual"},
        ),
        on("configure_run", flow_id=FLOW, trigger_key="manual"),
        step("try_claim_step", "skipped", owner="s"),
        step("record_skipped_step", "skipped", step_type="http", reason="no", owner="s"),
        step("try_claim_step", "ended", owner="e"),
        step("record_step_start", "ended", step_type="http", owner="e"),
        step("record_step_complete", "ended", status="Failed", attempt=1),
        step("record_skipped_step", "reset", step_type="http"),
        step("record_step_start", "reopened", step_type="http", input_json="{ }"),
        step("record_step_complete", "reopened", status="Failed", error_message="no"),
        step("retry_step", "reopened", reset=["reset"]),
        step("record_step_start", "polled", step_type="http"),
        step("reschedule_step", "polled", attempt=1),
        step("record_step_start", "tried", step_type="http"),
        step("reschedule_step", "tried", attempt=1, error_message="no"),
        step("register_waiter", "wait", signal_name="go"),
        on("deliver_signal", signal_name="go", payload_json="{ }", delivery_id="d"),
        step("remove_waiter", "wait"),
        on("append_event", event_type="e"),
        on("mark_timed_out", reason="late"),
        on("request_cancel", reason="enough"),
    )


def _continuations(run_id: UUID) -> Sequence[Call]:
    """Calls that show this state."""

    def step(method: str, step_key: str, **arguments: Any) -> Call:
        return _on(run_id, method, step_key=step_key, **arguments)

    ended = {"status": "Failed", "attempt": 1}
    return (
        step("record_skipped_step", "skipped", step_type="http", reason="no", owner="s"),
        step("advance_run", "ended", owner="e", **ended),
        step("advance_run", "ended", owner="other", **ended),
        step("try_claim_step", "ended", owner="other"),
        step("record_step_start", "reset", step_type="http"),
        step("record_step_complete", "reopened", status="Failed", error_message="no", attempt=1),
        step("record_step_start", "reopened", step_type="http"),
        step("reschedule_step", "polled", attempt=1, due_at=LATEST),
        step("reschedule_step", "tried", attempt=1, error_message="another", due_at=LATEST),
        _on(run_id, "deliver_signal", signal_name="other", payload_json="{ }", delivery_id="d"),
        _on(run_id, "append_event", event_type="e"),
        _on(run_id, "request_cancel", reason="again"),
        # Clears the time-out, so the reason of the user is left.
        _on(run_id, "extend_deadline", timeout_at=LATEST),
        _on(run_id, "get_run_control"),
    )


@example("XFR-1", needs=TRANSFER)
async def times_keep_their_microseconds(context: CheckContext) -> None:
    """Times of an archive are stored exactly, at both ends of the range and in the future too."""
    for moment in (EARLIEST, EARLIEST + TICK, datetime(1969, 12, 31, 23, 59, 59, 999_999, UTC), LATEST):
        run_id = new_id(context)
        archive = new_archive(run_id, FLOW, moment)
        await _import(context, archive)
        context.expect((await get_run(context, run_id)).started_at, moment, "started_at of an imported run")
        context.expect(await _export(context, run_id), archive, f"the export of a run of {moment}")


@example("XFR-1", needs=TRANSFER)
async def an_imported_run_is_in_every_list(context: CheckContext) -> None:
    """Pages, searches, statistics, derived runs and runs to stop include it; deleting it removes it."""
    store, can, run_id, source = context.store, context.capabilities, new_id(context), new_id(context)
    archive = under_another_id(full_archive(source), run_id)
    archive = replace(archive, run=replace(archive.run, source_run_id=source))
    before = await observe_all(context)
    await _import(context, archive)
    context.expect(single(await store.get_derived_runs(source), "the derived runs"), archive.run, "the run")
    running = [one.run_id for one in await store.get_active_runs()]
    context.expect(run_id in running, True, "whether get_active_runs lists an imported Running run")
    if Capability.DEADLINES in can:
        to_stop = [one.run_id for one in await store.get_runs_to_stop(take=context.page_size)]
        context.expect(run_id in to_stop, True, "whether get_runs_to_stop lists an imported cancelled run")
    await store.complete_run(run_id, RunStatus.FAILED)
    if Capability.DASHBOARD in can:
        for text in (f"{run_id}", "not needed", "[1]"):
            found = await store.get_runs_page(archive.run.flow_id, search=text, take=context.page_size)
            wanted = [] if text == "not needed" else [run_id]
            context.expect(
                [one.run_id for one in found.runs if one.run_id == run_id],
                wanted,
                f"an imported run in a search for {text!r}, which a reset step does not show",
            )
    if Capability.DELETION in can:
        await store.delete_run(run_id)
        assert_same(context, await observe_all(context), before, "nothing is left of a deleted imported run")
        await _import(context, archive, "a run that was deleted")


# XFR-2


@example("XFR-2", needs={*CLOCK, Capability.LEASES})
async def open_claims_end_at_the_export(context: CheckContext) -> None:
    """A claim on a step that is not terminal ends now, or has ended before; one on a terminal step stays."""
    store, run_id = context.store, await start(context)
    claimed_at = now(context)
    await store.try_claim_step(run_id, "ended", owner="me", lease=MINUTE)
    for key, lease in (("forever", None), ("leased", DAY)):
        await store.try_claim_step(run_id, key, owner="me", lease=lease)
    await store.try_claim_step(run_id, "unowned")
    await store.try_claim_step(run_id, "done", owner="me", lease=DAY)
    await store.record_step_start(run_id, "leased", "http", owner="me")
    await run_step(context, run_id, "done", StepStatus.FAILED)
    at = advance(context, HOUR)
    before = await observe_all(context, run_id)
    archive = await _export(context, run_id)
    claims = {step.step_key: step.claim for step in archive.steps if step.claim is not None}
    ends = {key: claim.expires_at for key, claim in claims.items()}
    wanted = {
        "ended": claimed_at + MINUTE,
        "forever": at,
        "leased": at,
        "unowned": at,
        "done": claimed_at + DAY,
    }
    context.expect(ends, wanted, "the ends of claims in an archive")
    owners = {key: claim.owner for key, claim in claims.items()}
    context.expect(owners, {**dict.fromkeys(wanted, "me"), "unowned": None}, "the owners of claims")
    assert_same(context, await observe_all(context, run_id), before, "an export changes nothing")


@example("XFR-2", needs=TRANSFER)
async def both_latches_are_exported(context: CheckContext) -> None:
    """The control record has both latches and both reasons, of which get_run_control shows only one."""
    store, run_id = context.store, await start(context)
    await store.configure_run(run_id, FLOW, "cron", idempotency_key="key", timeout_at=now(context))
    await store.mark_timed_out(run_id, "late")
    await store.request_cancel(run_id, "enough")
    control = expect_present((await _export(context, run_id)).control, "the control record in an archive")
    wanted = {
        **{"run_id": run_id, "flow_id": FLOW, "trigger_key": "cron", "idempotency_key": "key"},
        **{"cancel_reason": "enough", "timed_out_reason": "late"},
    }
    expect_fields(context, control, "the control record in an archive", **wanted)
    shown = expect_present(await store.get_run_control(run_id), "get_run_control")
    times = (control.timeout_at, control.timed_out_at, control.cancel_requested_at, control.created_at)
    reads = (shown.timeout_at, shown.timed_out_at, shown.cancel_requested_at, shown.created_at)
    context.expect(times, reads, "the times of the control record in an archive")


@example("XFR-2", needs=TRANSFER)
async def a_run_that_is_not_stored_is_none(context: CheckContext) -> None:
    """export_run is None for an unknown id, and for one that has only a control record or a key."""
    store, unknown, never = context.store, new_id(context), new_id(context)
    await store.configure_run(never, FLOW, "manual")
    await store.try_register_idempotency_key(FLOW, "manual", f"{never}", never)
    for run_id in (unknown, never):
        context.expect(await store.export_run(run_id), None, "export_run of a run that is not stored")


@example("XFR-2", needs={*CLOCK, Capability.QUEUES, Capability.RECOVERY})
async def imported_steps_are_ready_or_stalled_at_once(context: CheckContext) -> None:
    """No engine is waited for: claims of the exporting store's workers have ended."""
    store, run_id, copy = context.store, await start(context), new_id(context)
    queue = _queue_of(copy)
    await store.try_record_dispatch(run_id, "queued", queue=queue, step_type="http", priority=3)
    claimed = single(await store.claim_next_steps([queue], lease=DAY), "the claimed step")
    await store.try_claim_step(run_id, "held", owner="me")
    await store.try_record_dispatch(run_id, "waiting", queue=queue, step_type="http")
    await store.register_waiter(run_id, "waiting", "go")
    await store.try_record_dispatch(run_id, "late", queue=queue, step_type="http", due_at=LATEST)
    archive = under_another_id(await _export(context, run_id), copy)
    await _import(context, archive)
    stalled = {
        one.step_key: (one.reason, one.since)
        for one in await store.get_stalled_steps(take=context.page_size)
        if one.run_id == copy
    }
    at = now(context)
    wanted = dict.fromkeys(("held", "queued"), (StallReason.LEASE_EXPIRED, at))
    context.expect(stalled, wanted, "the stalled steps of an imported run")
    counts = single([one for one in await store.get_queues() if one.queue == queue], "the queue")
    expect_fields(context, counts, "the queue of an imported run", ready=1, waiting=2, scheduled=2, running=1)
    again = single(await store.claim_next_steps([queue], lease=HOUR, limit=9), "the steps that are ready")
    expect_fields(
        context, again, "the step of an imported run", run_id=copy, step_key="queued", attempt=2, priority=3
    )
    held = await store.renew_step_claim(copy, "queued", claimed.owner, HOUR)
    context.expect(held, False, "renewing the claim of the exporting store's worker")
    await store.deliver_signal(copy, "go", "{}")
    ready = single(await store.claim_next_steps([queue], lease=HOUR, limit=9), "the step that got its signal")
    expect_fields(context, ready, "the delivered step", run_id=copy, step_key="waiting")


@check("XFR-2", needs=TRANSFER, kind=Kind.RACE, isolated=False, rotation="transfers")
async def an_export_is_one_snapshot(context: CheckContext) -> None:
    """Exports of a run that another store writes show each write after those before it, in all parts."""
    reading, writing = await context.workers(2)
    run_id = await start(context)
    count = context.profile.of(150, 250, 3_000)

    async def write() -> None:
        for number in range(1, count + 1):
            await writing.save_output(run_id, "number", f"{number}")
            await writing.append_event(run_id, "written")
            await asyncio.sleep(0)

    written = asyncio.ensure_future(write())
    try:
        while not written.done():
            archive = await _export(context, run_id, store=reading)
            events, saved = len(archive.events), int(dict(archive.outputs).get("number", "0"))
            context.expect_that(
                saved in (events, events + 1),
                f"an export has the output of write {saved} and the event of write {events}, made after it",
            )
            await asyncio.sleep(0)
    finally:
        await written


# XFR-3


@example("XFR-3", needs=TRANSFER)
async def the_same_run_is_imported_once(context: CheckContext) -> None:
    """The first import is True, every other False; a different run with the id is refused and stays."""
    store, run_id = context.store, new_id(context)
    archive = full_archive(run_id)
    await _import(context, archive)
    shown = await observe_all(context, run_id)
    for what in ("the same archive", "an archive whose claims ended at another time"):
        context.expect(await store.import_run(archive), False, f"import_run of {what}")
        archive = _with_other_ends(archive)
    for changed in (
        replace(archive, outputs=()),
        replace(archive, events=archive.events[:1]),
        replace(archive, idempotency_keys=archive.idempotency_keys[:1]),
        replace(archive, deliveries=()),
        replace(archive, control=None),
        replace(archive, waiters=archive.waiters[1:]),
        replace(archive, steps=archive.steps[1:]),
        replace(archive, steps=(*archive.steps[:-1], replace(archive.steps[-1], rescheduled=False))),
        replace(archive, run=replace(archive.run, trigger_data="")),
    ):
        error = await context.expect_error(
            store.import_run(changed), RunAlreadyExistsError, "import_run of another run with the id"
        )
        expect_fields(context, error, "its error", run_id=run_id)
    assert_same(context, await observe_all(context, run_id), shown, "these calls change nothing")


def _with_other_ends(archive: RunArchive) -> RunArchive:
    steps = [
        step
        if step.claim is None
        else replace(step, claim=replace(step.claim, expires_at=step.claim.claimed_at + TICK))
        for step in archive.steps
    ]
    return replace(archive, steps=tuple(steps))


@example("XFR-3", needs=TRANSFER)
async def an_export_is_the_same_run_in_its_own_store(context: CheckContext) -> None:
    """Importing a run into the store that exported it is False, also while its claims are held."""
    store, run_id = context.store, await start(context)
    await store.try_claim_step(run_id, "held", owner="me")
    await skip_steps(context, run_id, "done")
    archive = await _export(context, run_id)
    advance(context, HOUR)
    context.expect(await store.import_run(archive), False, "import_run into the exporting store")
    held = await store.try_claim_step(run_id, "held", owner="other")
    context.expect(held, False, "claiming a step that the original still holds")
    await store.release_step_claim(run_id, "held")
    await context.expect_error(
        store.import_run(archive), RunAlreadyExistsError, "import_run after the run has changed"
    )


@example("XFR-3", needs=TRANSFER)
async def a_key_of_another_run_refuses_the_import(context: CheckContext) -> None:
    """One taken key of several refuses the whole import, and nothing of it is stored."""
    store, run_id, holder = context.store, new_id(context), new_id(context)
    archive = full_archive(run_id)
    taken = archive.idempotency_keys[1]
    await store.try_register_idempotency_key(taken.flow_id, taken.trigger_key, taken.idempotency_key, holder)
    before = await observe_all(context, run_id)
    error = await context.expect_error(
        store.import_run(archive), ConflictError, "import_run with a taken key"
    )
    expect_fields(context, error, "its error", run_id=run_id)
    assert_same(context, await observe_all(context, run_id), before, "a refused import stores nothing")
    for key, wanted in zip(archive.idempotency_keys, (None, holder), strict=True):
        scope = (key.flow_id, key.trigger_key, key.idempotency_key)
        found = await store.find_run_id_by_idempotency_key(*scope)
        context.expect(found, wanted, "the run of a key after a refused import")


@example("XFR-3", needs=TRANSFER)
async def orphans_of_the_id_are_replaced(context: CheckContext) -> None:
    """A control record and keys of a run that never started give way to those of the archive."""
    store, run_id = context.store, new_id(context)
    archive = full_archive(run_id)
    for number, keep in ((0, archive), (1, replace(archive, control=None, idempotency_keys=()))):
        one = under_another_id(keep, new_id(context))
        await store.configure_run(one.run_id, new_id(context), "cron", timeout_at=now(context))
        await store.request_cancel(one.run_id, "orphan")
        for key in (f"{one.run_id}", *(key.idempotency_key for key in one.idempotency_keys)):
            await store.try_register_idempotency_key(FLOW, "manual", key, one.run_id)
        await _import(context, one, "a run whose control record and key are stored")
        context.expect(await _export(context, one.run_id), one, f"the imported run, number {number}")
        found = await store.find_run_id_by_idempotency_key(FLOW, "manual", f"{one.run_id}")
        context.expect(found, None, "the run of a key that is not in the archive")


@check("XFR-3", "CON-1", needs=TRANSFER, kind=Kind.RACE, isolated=False, rotation="transfers")
async def many_imports_at_once_store_each_run_once(context: CheckContext) -> None:
    """Of concurrent imports of one run one is True; of runs with one key one is stored; all others are."""
    count = context.profile.of(40, 150, 500)
    stores = await context.workers(2)
    kinds = ("alone", "alone", "twice", "changed", "shares a key")
    archives: list[tuple[str, RunArchive]] = []
    for number in range(count):
        archive = full_archive(new_id(context))
        kind = kinds[number % len(kinds)]
        archives.append((kind, archive))
        if kind == "twice":
            archives.append((kind, archive))
        if kind == "changed":
            archives.append((kind, replace(archive, outputs=())))
        if kind == "shares a key":
            rival = under_another_id(archive, new_id(context))
            archives.append((kind, replace(rival, idempotency_keys=archive.idempotency_keys)))
    context.random.shuffle(archives)

    async def one(number: int) -> object:
        return await stores[number % len(stores)].import_run(archives[number][1])

    outcomes = await call_at_once(one, range(len(archives)))
    seen: dict[tuple[str, Any], list[object]] = {}
    for (kind, archive), outcome in zip(archives, outcomes, strict=True):
        group = archive.idempotency_keys[0] if kind == "shares a key" else archive.run_id
        shown = type(outcome).__name__ if isinstance(outcome, Exception) else outcome
        seen.setdefault((kind, group), []).append(shown)
    wanted = {
        "alone": {True: 1},
        "twice": {True: 1, False: 1},
        "changed": {True: 1, "RunAlreadyExistsError": 1},
        "shares a key": {True: 1, "ConflictError": 1},
    }
    for (kind, _), found in seen.items():
        counts = {shown: found.count(shown) for shown in found}
        context.expect(counts, wanted[kind], f"the results of concurrent imports, of a run that is {kind!r}")
    for (_, archive), outcome in zip(archives, outcomes, strict=True):
        if outcome is True:
            context.expect(await _export(context, archive.run_id), archive, "an imported run")


@check("XFR-3", "XFR-2", needs=TRANSFER, kind=Kind.VOLUME, isolated=False, rotation="transfers")
async def a_long_run_appears_at_one_moment(context: CheckContext) -> None:
    """An import of a run with many parts shows readers all of it or nothing, and keeps each part."""
    store, run_id = context.store, new_id(context)
    count = context.profile.of(300, 2_600, 10_500)
    archive = _long_archive(run_id, count)
    importing = asyncio.ensure_future(store.import_run(archive))
    try:
        while not importing.done():
            before = await store.get_run_status(run_id)
            found = len(await store.get_step_statuses(run_id))
            after = await store.get_run_status(run_id)
            torn = found not in (0, count) or (not found and before is not None) or (found and after is None)
            context.expect_that(not torn, f"a read during an import shows {found:,} of {count:,} steps")
            await asyncio.sleep(0)
    finally:
        imported = await importing
    context.expect(imported, True, "import_run of a long run")
    context.expect(
        comparable(await _export(context, run_id)), comparable(archive), "the export of a long run"
    )


def _long_archive(run_id: UUID, count: int) -> RunArchive:
    archive = full_archive(run_id)
    done, event = archive.steps[2], archive.events[0]
    attempt = single(done.attempts, "the attempt")
    steps = []
    for number in range(count):
        key = f"step {number:06}"
        attempts = (replace(attempt, step_key=key),)
        steps.append(replace(done, step_key=key, attempts=attempts, dispatch=None))
    return replace(
        archive,
        steps=tuple(steps),
        outputs=tuple((f"key {number:06}", f"{number}") for number in range(count)),
        events=tuple(replace(event, sequence=number + 1) for number in range(count)),
    )


# XFR-4


@check("XFR-4", needs=TRANSFER, kind=Kind.HOSTILE)
async def impossible_archives_are_refused(context: CheckContext) -> None:
    """import_run refuses archives that no operations could have made, and values out of their limits."""
    await expect_refused(context, ("archive",), "impossible archives are refused")


@example("XFR-4", needs=TRANSFER)
async def archives_are_json_and_back(context: CheckContext) -> None:
    """An archive that was written as JSON and read again imports the same run; later versions are refused."""
    archive = full_archive(new_id(context))
    text = archive.to_json()
    read = RunArchive.from_json(text)
    context.expect(read, archive, "an archive that was written as JSON and read again")
    await _import(context, read)
    context.expect(await _export(context, archive.run_id), archive, "the export of a run from JSON")
    for bad in ("", "[]", "{", text.replace('"version":1', '"version":2'), text[:-1] + ',"more":1}'):
        try:
            RunArchive.from_json(bad)
        except InvalidArgumentError as error:
            context.expect(error.argument.partition(".")[0], "archive", "the argument of the error")
        else:
            context.expect_that(False, f"from_json accepts {bad[:40]!r}")


@example("XFR-4", needs=TRANSFER)
async def the_order_of_parts_does_not_matter(context: CheckContext) -> None:
    """An archive whose parts are in another order is imported, and exported in the order of the contract."""
    archive = full_archive(new_id(context))
    reversed_parts: dict[str, Any] = {
        part: tuple(reversed(getattr(archive, part)))
        for part in ("idempotency_keys", "steps", "waiters", "deliveries", "outputs")
    }
    await _import(context, replace(archive, **reversed_parts))
    context.expect(await _export(context, archive.run_id), archive, "the export of such a run")
