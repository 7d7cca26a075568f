"""IDM: idempotency keys and the atomic trigger."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from typing import Any
from uuid import UUID

from flowstore_conformance.checks.example_checks import example
from flowstore_conformance.checks.fixtures import (
    DAY,
    HOUR,
    MINUTE,
    SECOND,
    advance,
    assert_same,
    call_at_once,
    expect_fields,
    expect_present,
    get_control,
    get_run,
    new_id,
    now,
    observe_all,
    outcome_of,
    run_step,
    second_store,
    start,
)
from flowstore_conformance.context import CheckContext
from flowstore_conformance.registry import Kind, check
from flowstore_core import (
    Capability,
    FlowRunRecord,
    FlowStore,
    RunAlreadyExistsError,
    RunStatus,
    TriggerResult,
)


@example("IDM-1")
async def a_key_is_scoped_by_flow_and_trigger(context: CheckContext) -> None:
    """The same key under another flow or trigger is a different key."""
    flow_id = new_id(context)
    store = context.store
    scopes = [
        (flow_id, "manual", "key"),
        (new_id(context), "manual", "key"),
        (flow_id, "timer", "key"),
        (flow_id, "manual", "other"),
        (flow_id, "key", "manual"),
    ]
    runs = [new_id(context) for _ in scopes]
    for scope, run_id in zip(scopes, runs, strict=True):
        found = await store.find_run_id_by_idempotency_key(*scope)
        context.expect(found, None, f"the run of {scope[1:]} with only keys of other scopes registered")
        answer = await outcome_of(store.try_register_idempotency_key(*scope, run_id))
        context.expect(answer, True, f"registering {scope[1:]} beside keys of other scopes")
    for scope, run_id in zip(scopes, runs, strict=True):
        found = await store.find_run_id_by_idempotency_key(*scope)
        context.expect(found, run_id, f"the run of {scope[1:]}")


@example("IDM-2")
async def the_first_run_of_a_key_wins(context: CheckContext) -> None:
    """The same run_id again returns True, any other False; find returns the winner; no run is started."""
    flow_id = new_id(context)
    store, first, second = context.store, new_id(context), await start(context)
    scope = (flow_id, "manual", "key")
    context.expect(await store.find_run_id_by_idempotency_key(*scope), None, "the run of a free key")
    for run_id, won in ((first, True), (second, False), (first, True), (second, False)):
        answer = await outcome_of(store.try_register_idempotency_key(*scope, run_id))
        context.expect(answer, won, f"registering for the {'first' if won else 'second'} run")
        context.expect(
            await store.find_run_id_by_idempotency_key(*scope), first, "the run of a registered key"
        )
    for number in range(3):
        answer = await outcome_of(
            store.try_register_idempotency_key(flow_id, "manual", f"more {number}", first)
        )
        context.expect(answer, True, "registering another key for the same run")
    context.expect(
        await store.get_run_status(first), None, "the status of a registered run that never started"
    )
    context.expect(await store.get_run_control(first), None, "the control record after registering a key")


# IDM-3


@example("IDM-3")
async def a_trigger_registers_key_control_and_run(context: CheckContext) -> None:
    """With a free key, or without a key, the run is started with its control record."""
    flow_id = new_id(context)
    store = context.store
    at = advance(context, SECOND)
    more: dict[str, Any] = {"trigger_data": "{}", "job_id": "job", "source_run_id": new_id(context)}
    control = {"idempotency_key": "key", "timeout_at": at + MINUTE}
    nothing = (dict.fromkeys(more), dict.fromkeys(control))
    # Without a key each call starts a new run.
    for optional, stop in ((more, control), nothing, nothing):
        run_id = new_id(context)
        result = await store.trigger_run(flow_id, "orders", run_id, "manual", **optional, **stop)
        run = FlowRunRecord(
            run_id=run_id,
            flow_id=flow_id,
            flow_name="orders",
            status=RunStatus.RUNNING,
            trigger_key="manual",
            started_at=at,
            completed_at=None,
            **optional,
        )
        context.expect(result, TriggerResult(run=run, created=True), "a trigger that starts a run")
        stored = [each for each in await store.get_runs() if each.run_id == run_id]
        context.expect(stored, [run], "the run that a trigger started")
        wanted = {"flow_id": flow_id, "trigger_key": "manual", "created_at": at, **stop}
        found = await get_control(context, run_id)
        expect_fields(
            context, found, "the control record of a triggered run", **wanted, cancel_requested=False
        )
        if stop["idempotency_key"] is not None:
            found_id = await store.find_run_id_by_idempotency_key(flow_id, "manual", "key")
            context.expect(found_id, run_id, "the run of the key that a trigger registered")


@example("IDM-3")
async def a_taken_key_returns_its_run(context: CheckContext) -> None:
    """created is False, the run's current record is returned, and nothing changes."""
    flow_id = new_id(context)
    store, first, second = context.store, new_id(context), new_id(context)
    await store.trigger_run(flow_id, "orders", first, "manual", trigger_data="one", idempotency_key="key")
    existing = await start(context)
    for status in (RunStatus.RUNNING, RunStatus.SUCCEEDED):
        if status is not RunStatus.RUNNING:
            await run_step(context, first)
            advance(context, SECOND)
            await store.complete_run(first, status)
        stored = [each for each in await store.get_runs() if each.run_id == first]
        before = await observe_all(context, first, second, existing)
        advance(context, SECOND)
        for requested in (second, first, existing):
            given: dict[str, Any] = {
                "trigger_data": "two",
                "timeout_at": now(context),
                "idempotency_key": "key",
            }
            result = await store.trigger_run(flow_id, "other", requested, "manual", **given)
            sentence = f"a trigger under the key of a {status} run"
            context.expect([result.run], stored, f"{sentence}: the returned run")
            context.expect(result.created, False, f"{sentence}: created")
        advance(context, -SECOND)
        after = await observe_all(context, first, second, existing)
        assert_same(context, after, before, "a trigger under a taken key changes nothing")


@example("IDM-3")
async def a_key_whose_run_never_started_starts_it(context: CheckContext) -> None:
    """The run starts under the registered run_id with this call's arguments: no key swallows triggers."""
    flow_id = new_id(context)
    store = context.store
    for asked_exists in (False, True):
        registered = new_id(context)
        requested = await start(context) if asked_exists else new_id(context)
        key = f"key {asked_exists}"
        await store.try_register_idempotency_key(flow_id, "manual", key, registered)
        before = await observe_all(context, requested)
        given: dict[str, Any] = {"trigger_data": "data", "job_id": "job", "source_run_id": new_id(context)}
        stop: dict[str, Any] = {"idempotency_key": key, "timeout_at": now(context) + DAY}
        result = await store.trigger_run(flow_id, "orders", requested, "manual", **given, **stop)
        sentence = "a trigger under the key of an unstarted run"
        context.expect(result.created, True, f"{sentence}: created")
        expect_fields(
            context, result.run, f"{sentence}: its run", run_id=registered, flow_name="orders", **given
        )
        expect_fields(
            context,
            await get_run(context, registered),
            f"{sentence}: the stored run",
            flow_name="orders",
            **given,
        )
        expect_fields(
            context, await get_control(context, registered), f"{sentence}: its control record", **stop
        )
        shown = await store.get_run_detail(requested)
        context.expect(shown, before[f"get_run_detail of {requested}"], f"{sentence}: the requested run_id")
        context.expect(
            await store.get_run_control(requested), None, "the control record of the requested run_id"
        )
        again = await store.trigger_run(flow_id, "orders", requested, "manual", idempotency_key=key)
        context.expect((again.created, again.run.run_id), (False, registered), f"{sentence}, repeated")


@example("IDM-3")
async def a_trigger_with_a_stored_run_id_registers_nothing(context: CheckContext) -> None:
    """Under a free key, or without a key, it raises RunAlreadyExistsError and changes nothing."""
    flow_id = new_id(context)
    store, run_id = context.store, await start(context)
    await run_step(context, run_id)
    before = await observe_all(context, run_id)
    for key in ("free", None):
        call = store.trigger_run(
            flow_id, "other", run_id, "manual", idempotency_key=key, timeout_at=now(context)
        )
        sentence = f"a trigger with the id of a stored run and the key {key!r}"
        error = await context.expect_error(call, RunAlreadyExistsError, sentence)
        expect_fields(context, error, f"{sentence}: the error", run_id=run_id)
    assert_same(context, await observe_all(context, run_id), before, "a refused trigger changes nothing")
    found = await store.find_run_id_by_idempotency_key(flow_id, "manual", "free")
    context.expect(found, None, "the run of the key after a refused trigger")


@example("IDM-3")
async def a_trigger_overwrites_an_earlier_control_record(context: CheckContext) -> None:
    """As configure_run does: created_at and latches are kept."""
    flow_id = new_id(context)
    store, run_id = context.store, new_id(context)
    old: dict[str, Any] = {"idempotency_key": "old", "timeout_at": now(context)}
    await store.configure_run(run_id, new_id(context), "timer", **old)
    await store.request_cancel(run_id, "user")
    made = (await get_control(context, run_id)).created_at
    advance(context, SECOND)
    await store.trigger_run(flow_id, "orders", run_id, "manual", idempotency_key="key")
    wanted: dict[str, Any] = {
        "flow_id": flow_id,
        "trigger_key": "manual",
        "idempotency_key": "key",
        "timeout_at": None,
        "created_at": made,
        "cancel_requested": True,
        "cancel_reason": "user",
    }
    expect_fields(
        context, await get_control(context, run_id), "a control record from before the trigger", **wanted
    )


# IDM-4


@example("IDM-4")
async def cleaning_up_a_run_ends_its_deduplication(context: CheckContext) -> None:
    """A key stays registered until its run is cleaned up; then it is free for another run."""
    flow_id = new_id(context)
    store, first, second = context.store, await start(context), new_id(context)
    keys = ("key", "another key")
    for key in keys:
        await store.try_register_idempotency_key(flow_id, "manual", key, first)
    await store.complete_run(first, RunStatus.SUCCEEDED)
    advance(context, 3650 * DAY)
    await store.cleanup(now(context) - 3650 * DAY - HOUR)
    for key in keys:
        answer = await outcome_of(store.try_register_idempotency_key(flow_id, "manual", key, second))
        context.expect(answer, False, "registering a key of a completed run for another run")
        found = await store.find_run_id_by_idempotency_key(flow_id, "manual", key)
        context.expect(found, first, "the run of a key before cleanup")
    await store.cleanup(now(context) + DAY)
    for key in keys:
        found = await store.find_run_id_by_idempotency_key(flow_id, "manual", key)
        context.expect(found, None, "the run of a key after cleanup")
    if Capability.TRIGGER in context.capabilities:
        result = await store.trigger_run(flow_id, "orders", second, "manual", idempotency_key="key")
        wanted = (True, second)
        context.expect((result.created, result.run.run_id), wanted, "a trigger under a key freed by cleanup")
    answer = await outcome_of(store.try_register_idempotency_key(flow_id, "manual", "another key", second))
    context.expect(answer, True, "registering a key freed by cleanup")


@example("IDM-4", needs=[Capability.VIRTUAL_CLOCK])
async def a_young_key_is_deleted_with_its_run(context: CheckContext) -> None:
    """A key of any age is deleted with its run: the hour of RET-4 is for runs that never started."""
    flow_id = new_id(context)
    store, run_id = context.store, await start(context)
    await store.try_register_idempotency_key(flow_id, "manual", "key", run_id)
    await store.complete_run(run_id, RunStatus.SUCCEEDED)
    await store.cleanup(now(context) + SECOND)
    found = await store.find_run_id_by_idempotency_key(flow_id, "manual", "key")
    context.expect(found, None, "the run of a new key after cleanup")


STEPS_OF_DELETED_RUN = 2_000
"""So many that some calls of another client end while the store deletes them."""


async def _record_dispatch(store: FlowStore, run_id: UUID, number: int) -> bool:
    return await store.try_record_dispatch(run_id, f"step {number}")


async def _start_long_run(context: CheckContext) -> UUID:
    """Start a run with many dispatches, or import it, if the store declares TRANSFER."""
    store, run_id = context.store, await start(context)
    if Capability.TRANSFER not in context.capabilities:
        await call_at_once(partial(_record_dispatch, store, run_id), range(STEPS_OF_DELETED_RUN))
        return run_id
    await _record_dispatch(store, run_id, 0)
    archive = expect_present(await store.export_run(run_id), "export_run of a stored run")
    [step], copy = archive.steps, new_id(context)
    dispatch = expect_present(step.dispatch, "the dispatch of an exported step")
    steps = [
        replace(step, run_id=copy, step_key=key, dispatch=replace(dispatch, run_id=copy, step_key=key))
        for key in (f"step {number}" for number in range(STEPS_OF_DELETED_RUN))
    ]
    archive = replace(archive, run=replace(archive.run, run_id=copy), steps=tuple(steps))
    context.expect(await store.import_run(archive), True, "import_run of a run with many dispatches")
    return copy


@check("IDM-4", kind=Kind.RACE, rotation="rivals of a deletion")
async def a_key_registered_during_a_deletion_ends_with_its_run(context: CheckContext) -> None:
    """If a read after a registration finds the run, a deletion under way ends the key with the run."""
    flow_id, store, other = new_id(context), context.store, await second_store(context)

    async def register_and_see(run_id: UUID) -> list[str]:
        """Register keys until the run is gone; return those after whose registration it was still there."""
        keys: list[str] = []
        while True:
            key = f"key {len(keys)} of {run_id}"
            # Calls of a store in memory do not let another task run.
            await asyncio.sleep(0)
            registered = await other.try_register_idempotency_key(flow_id, "manual", key, run_id)
            context.expect(registered, True, "registering a free key")
            if await other.get_run_status(run_id) is None:
                return keys
            keys.append(key)

    async def delete(run_id: UUID, *, by_cleanup: bool) -> None:
        if by_cleanup:
            context.expect(await store.cleanup(now(context) + DAY), 1, "a cleanup of one ended run")
        else:
            context.expect(await store.delete_run(run_id), True, "delete_run of an ended run")

    # The profile quick draws one of the two kinds of deletion.
    first = context.random.randrange(2)
    for number in range(first, first + context.profile.of(1, 6, 40)):
        by_cleanup = number % 2 == 0 or Capability.DELETION not in context.capabilities
        run_id = await _start_long_run(context)
        await store.complete_run(run_id, RunStatus.FAILED)
        keys, _ = await asyncio.gather(register_and_see(run_id), delete(run_id, by_cleanup=by_cleanup))
        for key in keys:
            found = await store.find_run_id_by_idempotency_key(flow_id, "manual", key)
            context.expect(found, None, "the run of a key that was registered before the run was deleted")
