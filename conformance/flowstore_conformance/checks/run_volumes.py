"""A run with more steps, attempts, events, outputs and waiters than a page or batch holds; see volumes.py."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence, Sized
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar
from uuid import UUID

from flowstore_conformance.checks.fixtures import (
    DAY,
    SECOND,
    TICK,
    advance,
    assert_same,
    expect_present,
    get_run,
    get_step,
    new_id,
    now,
    observe,
    outcome_of,
    second_store,
    start,
)
from flowstore_conformance.checks.volumes import expect_items, expect_result, in_groups
from flowstore_conformance.context import CheckContext, ContractViolation, Profile
from flowstore_conformance.registry import Kind, check
from flowstore_core import (
    ArchivedDelivery,
    Capability,
    FlowSignalWaiter,
    RunArchive,
    RunStatus,
    SignalDeliveryStatus,
    StepStatus,
)

T = TypeVar("T", bound=Any)


async def _expect_deleted_whole(context: CheckContext, run_id: UUID, what: str, *, read: str) -> None:
    """Delete a completed run at once, and expect that nothing of it is left when its id starts again.

    ``read`` names a fast read that shows the state of which the run has much.
    """
    store = context.store
    unknown = await observe(context, new_id(context))
    await store.complete_run(run_id, RunStatus.CANCELLED)
    await _expect_deleted_at_once(
        context,
        run_id,
        getattr(store, read),
        store.cleanup(now(context) + DAY),
        f"{read} during the cleanup of {what}",
        clause="RET-3",
    )
    gone = await observe(context, run_id)
    assert_same(context, gone, unknown, f"no read shows anything of {what} after its cleanup", clause="RET-1")
    await start(context, run_id=run_id)
    again = await observe(context, run_id)
    for shown in (again, unknown):
        for read in ("get_run_detail", "get_run_status"):
            shown.pop(read, None)
    assert_same(context, again, unknown, f"the deleted id of {what} starts empty", clause="RET-1")
    expect_result(
        context,
        len((await get_run(context, run_id)).steps),
        0,
        f"steps of the deleted {what}",
        clause="RET-1",
    )


async def _expect_deleted_at_once(
    context: CheckContext,
    run_id: UUID,
    read: Callable[[UUID], Awaitable[Sized]],
    deletion: Coroutine[Any, Any, object],
    what: str,
    *,
    clause: str,
) -> None:
    """Read a run until its deletion ends: its status and the given state go at one moment."""
    store = context.store
    whole = len(await read(run_id))
    deleting = asyncio.ensure_future(deletion)
    try:
        while not deleting.done():
            before = await store.get_run_status(run_id)
            found = len(await read(run_id))
            after = await store.get_run_status(run_id)
            context.assertions += 1
            # A status that is read before or after the state limits the order of the two deletions.
            is_torn = (
                found not in (0, whole) or (found and before is None) or (not found and after is not None)
            )
            if whole and is_torn:
                shown = f"{found:,} of {whole:,}; the status before was {before}, and after {after}"
                raise ContractViolation(f"{what}: expected all or nothing, got {shown}", clause=clause)
            await asyncio.sleep(0)
    finally:
        await deleting


def _is_skipped(number: int) -> bool:
    """Whether a step of a_run_holds_thousands_of_steps is skipped."""
    return number % 10 != 1


WRITTEN = 150
"""So many steps, and all that are not skipped, are written one by one; the others are imported, except in the
profile thorough."""
RESTARTED_IN_STANDARD = 1_100
"""The number of reset steps that the profile standard starts again."""


async def _import_skipped(
    context: CheckContext, owners: Mapping[str, str], outputs: Sequence[tuple[str, str]] = ()
) -> UUID:
    """Import a Running run with outputs, and skipped steps that are claimed and dispatched; return its id."""
    store, model = context.store, await start(context)
    await store.try_claim_step(model, "step", owner="owner")
    await store.try_record_dispatch(model, "step")
    await store.record_skipped_step(model, "step", "http", "reason", owner="owner")
    archive = expect_present(await store.export_run(model), "export_run of a stored run")
    [step], run_id = archive.steps, new_id(context)

    def of_key(record: T, key: str, **changes: object) -> T:
        return replace(record, run_id=run_id, step_key=key, **changes)

    steps = [
        of_key(
            step,
            key,
            started_owner=owner,
            attempts=tuple(of_key(one, key, error_message=f"reason of {key}") for one in step.attempts),
            claim=of_key(expect_present(step.claim, "the claim of an exported step"), key, owner=owner),
            dispatch=of_key(expect_present(step.dispatch, "the dispatch of an exported step"), key),
        )
        for key, owner in owners.items()
    ]
    run = replace(archive.run, run_id=run_id)
    archive = replace(archive, run=run, steps=tuple(steps), outputs=tuple(outputs))
    context.expect(await store.import_run(archive), True, f"import_run of a run with {len(steps):,} steps")
    return run_id


@check(
    "QRY-3",
    "UNK",
    "CLM-3",
    "CLM-4",
    "STP-6",
    "RUN-2",
    "RET-1",
    "RET-3",
    "CON-1",
    "RUN-4",
    kind=Kind.VOLUME,
    isolated=False,
)
async def a_run_holds_thousands_of_steps(context: CheckContext) -> None:
    """Reads list all steps, claims and dispatches of a run; reset and expected cover all of its steps."""
    store, count = context.store, context.profile.of(1_150, 10_500, 40_000)
    keys = [f"step {number:06}" for number in range(count)]
    # More than a thousand in each profile, because reset concerns only them.
    skipped = [key for number, key in enumerate(keys) if _is_skipped(number)]
    kept = sorted({*keys}.difference(skipped))
    owners = {key: f"owner of {key}" for key in keys}
    written = list(range(count))
    if context.profile is not Profile.THOROUGH and Capability.TRANSFER in context.capabilities:
        written = [number for number in written if number < WRITTEN or not _is_skipped(number)]
        imported = sorted({*keys}.difference(keys[number] for number in written))
        run_id = await _import_skipped(context, {key: owners[key] for key in imported})
    else:
        run_id = await start(context)

    async def fill(number: int) -> tuple[object, ...]:
        key = keys[number]
        claimed = await store.try_claim_step(run_id, key, owner=owners[key])
        dispatched = await store.try_record_dispatch(run_id, key)
        if _is_skipped(number):
            await store.record_skipped_step(run_id, key, "http", f"reason of {key}", owner=owners[key])
            return claimed, dispatched, 1
        attempt = await store.record_step_start(run_id, key, "http", job_id=key, owner=owners[key])
        await store.record_step_complete(run_id, key, StepStatus.PENDING, output_json=f"output of {key}")
        return claimed, dispatched, attempt

    results = await in_groups(lambda number: fill(written[number]), len(written))
    of = f"of a run with {count:,} steps"
    expect_items(
        context, results, [(True, True, 1)] * len(written), f"claims, dispatches, starts {of}", clause="CON-1"
    )
    await _expect_steps(context, run_id, keys, of)
    claims = [(claim.step_key, claim.owner) for claim in await store.get_step_claims(run_id)]
    expect_items(context, claims, owners.items(), f"get_step_claims {of}", clause="CLM-4")
    claimed = sorted(await store.get_claimed_step_keys(run_id))
    expect_items(context, claimed, kept, f"get_claimed_step_keys {of}, some of them Skipped", clause="CLM-4")
    dispatches = [dispatch.step_key for dispatch in await store.get_dispatches(run_id)]
    expect_items(context, dispatches, keys, f"get_dispatches {of}", clause="CLM-3")
    dispatches = sorted(await store.get_dispatched_step_keys(run_id))
    expect_items(context, dispatches, keys, f"get_dispatched_step_keys {of}", clause="CLM-3")

    await _expect_compared(context, run_id, keys[-1])
    # Keys without a step lengthen the list to its limit, and are ignored.
    longest = context.profile.of(2_500, 100_000, 100_000)
    # In the order of keys, half of them come before the steps.
    unknown = [
        f"{'absent' if number % 2 else 'unknown'} {number}" for number in range(longest - len(skipped))
    ]
    half = len(unknown) // 2
    reset = [skipped[0], *unknown[:half], *skipped[1:-1], *unknown[half:], skipped[-1]]
    await store.retry_step(run_id, kept[0], reset=reset)
    of = f"after retry_step with {len(reset):,} keys in reset, of which {len(skipped):,} are Skipped steps"
    statuses = await store.get_step_statuses(run_id)
    expect_items(context, statuses, kept, f"get_step_statuses {of}", clause="STP-6")
    found = [claim.step_key for claim in await store.get_step_claims(run_id)]
    expect_items(context, found, kept[1:], f"get_step_claims {of}", clause="STP-6")
    found = [dispatch.step_key for dispatch in await store.get_dispatches(run_id)]
    expect_items(context, found, kept[1:], f"get_dispatches {of}", clause="STP-6")
    if context.profile is Profile.STANDARD:
        skipped = sorted(context.random.sample(skipped, RESTARTED_IN_STANDARD))
    restarted = await in_groups(
        lambda number: store.record_step_start(run_id, skipped[number], "http"), len(skipped)
    )
    expect_items(context, restarted, [2] * len(skipped), f"the next attempts {of}", clause="STP-6")

    await _end_while_steps_change(context, run_id)
    expected = dict(await store.get_step_statuses(run_id))
    await _expect_one_winner_beside_completions(context, run_id, kept[:2], owners[kept[1]], expected)
    await _expect_deleted_whole(
        context, run_id, f"a run with {len(expected):,} steps", read="get_dispatched_step_keys"
    )


async def _expect_compared(context: CheckContext, run_id: UUID, last_key: str) -> None:
    """Complete a run with many expected steps: it fails if they differ from the run's own."""
    store = context.store
    expected = dict(await store.get_step_statuses(run_id))
    for what, differing in (
        ("the last status differs", {**expected, last_key: StepStatus.FAILED}),
        ("the last key is missing", {key: status for key, status in expected.items() if key != last_key}),
        ("it names one more key", {**expected, "another": StepStatus.PENDING}),
    ):
        won = await store.complete_run(run_id, RunStatus.FAILED, expected=differing)
        what = f"complete_run with {len(differing):,} expected steps: {what}"
        expect_result(context, won, False, what, clause="RUN-2")
    won = await store.complete_run(run_id, RunStatus.FAILED, expected=expected)
    what = f"complete_run with the right {len(expected):,} expected steps"
    expect_result(context, won, True, what, clause="RUN-2")


async def _end_while_steps_change(context: CheckContext, run_id: UUID) -> None:
    """Complete a run with many expected steps while one of them changes, and leave the run Running.

    If the call returns True, the run was terminal before the step changed. So it is terminal for a read that
    follows the change.
    """
    store, random = context.store, context.random
    statuses = dict(await store.get_step_statuses(run_id))
    begun = time.monotonic()
    await store.complete_run(run_id, RunStatus.FAILED, expected={**statuses, "unknown": StepStatus.FAILED})
    # The changes meet different moments of the call.
    longest = time.monotonic() - begun
    for number in range(context.profile.of(8, 4, 24)):
        key = f"changing {number}"
        await store.record_step_start(run_id, key, "http")
        statuses = dict(await store.get_step_statuses(run_id))
        ending = asyncio.ensure_future(store.complete_run(run_id, RunStatus.FAILED, expected=statuses))
        await asyncio.sleep(random.random() * longest)
        await store.record_step_complete(run_id, key, StepStatus.FAILED)
        status = await store.get_run_status(run_id)
        won = await ending
        what = f"complete_run with {len(statuses):,} expected steps, one of which changed before the run did"
        expect_result(context, won and status is RunStatus.RUNNING, False, what, clause="RUN-2")
        if won:
            await store.retry_step(run_id, key)


async def _expect_one_winner_beside_completions(
    context: CheckContext,
    run_id: UUID,
    pending: Sequence[str],
    owner: str,
    expected: Mapping[str, StepStatus],
) -> None:
    """Complete a run while another call changes a step, again and again: only one of the two succeeds.

    Comparing many steps takes long, so the other call comes in the middle. The first of two Pending steps is
    retried to reopen the run, the second one is claimed by ``owner``.
    """
    store, other = context.store, await second_store(context)
    unclaimed, claimed, new = *pending, "new key"
    calls: dict[str, tuple[Callable[[], Awaitable[object]], Callable[[], Awaitable[object]]]] = {
        f"record_step_start of {key}": (
            partial(other.record_step_start, run_id, step_key, "http", owner=by),
            partial(store.record_step_complete, run_id, step_key, StepStatus.PENDING),
        )
        for key, step_key, by in (("a Pending step", unclaimed, None), ("a claimed step", claimed, owner))
    }
    calls["try_claim_step of a new key"] = (
        partial(other.try_claim_step, run_id, new),
        partial(store.release_step_claim, run_id, new),
    )
    calls["try_record_dispatch of a new key"] = (
        partial(other.try_record_dispatch, run_id, new),
        partial(store.release_dispatch, run_id, new),
    )
    loop = asyncio.get_running_loop()
    duration = 0.0

    async def delayed(call: Callable[[], Awaitable[object]]) -> object:
        await asyncio.sleep(context.random.random() * duration)
        return await outcome_of(call())

    # In the other profiles the run has many more steps.
    for what, (call, undo) in list(calls.items()) * context.profile.of(4, 2, 5):
        changing = asyncio.ensure_future(delayed(call))
        began = loop.time()
        completed = await store.complete_run(run_id, RunStatus.FAILED, expected=expected)
        duration = loop.time() - began
        changed = await changing
        refused = changed is False or isinstance(changed, str)
        expect_result(
            context,
            (completed, "refused" if refused else "done"),
            (completed, "refused" if completed else "done"),
            f"complete_run with the statuses of {len(expected):,} steps in expected beside {what}, of which "
            "the first prevents the other: whether the run was completed, and the step changed",
            clause="CON-1",
        )
        if completed:
            await store.retry_step(run_id, unclaimed)
        else:
            await undo()


async def _expect_steps(context: CheckContext, run_id: UUID, keys: Sequence[str], of: str) -> None:
    """Compare the statuses, steps and attempts of a_run_holds_thousands_of_steps."""
    pending, skipped = StepStatus.PENDING, StepStatus.SKIPPED
    wanted = [(key, skipped if _is_skipped(number) else pending) for number, key in enumerate(keys)]
    statuses = await context.store.get_step_statuses(run_id)
    expect_items(context, statuses.items(), wanted, f"get_step_statuses {of}", clause="UNK")
    detail = await get_run(context, run_id)
    steps = sorted(detail.steps, key=lambda step: step.step_key)
    if context.exact_times:
        expect_items(context, detail.steps, steps, f"the order of get_run_detail {of}", clause="QRY-3")
    for name, of_records in (
        ("steps", steps),
        ("attempts", [attempt for step in steps for attempt in step.attempts]),
    ):
        found = [(one.step_key, one.job_id, one.output_json, one.error_message) for one in of_records]
        details = [
            (key, None, None, f"reason of {key}")
            if _is_skipped(number)
            else (key, key, f"output of {key}", None)
            for number, key in enumerate(keys)
        ]
        expect_items(context, found, details, f"the {name} in get_run_detail {of}", clause="QRY-3")


@check("STP-1", "QRY-3", "RET-1", "RET-3", kind=Kind.VOLUME, rotation="volume of a run", isolated=False)
async def a_step_holds_thousands_of_attempts(context: CheckContext) -> None:
    """Attempts of one step are numbered without gaps, keep their own input, and are all listed."""
    store, run_id = context.store, await start(context)
    count = context.profile.of(120, 1_300, 33_000)
    started = await in_groups(
        lambda number: store.record_step_start(run_id, "charge", "http", input_json=f"input {number}"), count
    )
    numbers = range(1, count + 1)
    what = f"the numbers that {count:,} calls of record_step_start return for one step"
    expect_items(context, sorted(started), numbers, what, clause="STP-1")
    step = await get_step(context, run_id)
    expect_result(context, step.attempt_count, count, f"attempt_count after {count:,} starts", clause="STP-1")
    found = [(attempt.attempt, attempt.input_json) for attempt in step.attempts]
    inputs = {attempt: f"input {number}" for number, attempt in enumerate(started)}
    wanted = [(attempt, inputs[attempt]) for attempt in numbers]
    expect_items(context, found, wanted, "number and input of its attempts", clause="QRY-3")
    alone = expect_present(await store.get_step(run_id, "charge"), "get_step of a step in get_run_detail")
    expect_items(context, alone.attempts, step.attempts, "its attempts in get_step", clause="QRY-3")
    open_attempts = [attempt.attempt for attempt in step.attempts if attempt.status is StepStatus.RUNNING]
    expect_result(
        context, open_attempts, [count], f"the open attempts after {count:,} starts", clause="STP-1"
    )
    await store.record_step_complete(run_id, "charge", StepStatus.FAILED, attempt=count)
    await _expect_deleted_whole(context, run_id, f"a run with {count:,} attempts", read="get_step_statuses")


@check("EVT-1", "RET-1", "RET-3", kind=Kind.VOLUME, rotation="volume of a run", isolated=False)
async def a_run_holds_thousands_of_events(context: CheckContext) -> None:
    """Each event has its own sequence, and pages of every size return each event once."""
    store, run_id = context.store, await start(context)
    count = context.profile.of(120, 1_300, 33_000)
    sequences = await in_groups(
        lambda number: store.append_event(run_id, f"type {number}", message=f"message {number}"), count
    )
    expect_result(
        context, len(set(sequences)), count, f"distinct sequences of {count:,} events", clause="EVT-1"
    )
    wanted = [
        (sequence, f"type {number}", f"message {number}")
        for sequence, number in sorted(zip(sequences, range(count), strict=True))
    ]
    for take in (context.page_size, context.page_size - 1, min(context.page_size, 256)):
        found: list[tuple[int, str, str | None]] = []
        after = 0
        while page := await store.get_run_events(run_id, after=after, take=take):
            expect_result(
                context,
                len(page),
                min(take, count - len(found)),
                f"the size of a page of get_run_events(after={after}, take={take}) of {count:,} events",
                clause="EVT-1",
            )
            found += [(event.sequence, event.event_type, event.message) for event in page]
            after = page[-1].sequence
        expect_items(context, found, wanted, f"the events on pages of {take}", clause="EVT-1")
    await _expect_deleted_whole(context, run_id, f"a run with {count:,} events", read="get_run_events")


@check("EVT-2", "RET-1", "RET-3", kind=Kind.VOLUME, rotation="volume of a run", isolated=False)
async def a_run_holds_thousands_of_outputs(context: CheckContext) -> None:
    """get_outputs returns every output, also of more bytes than a message or page of a database holds."""
    store, run_id = context.store, await start(context)
    count = context.profile.of(1_100, 2_600, 10_500)
    filler = "0123456789abcdef" * context.profile.of(16, 160, 160)
    values = {f"key {number:05}": f"{number} {filler}" for number in range(count)}
    keys = list(values)
    await in_groups(lambda number: store.save_output(run_id, keys[number], values[keys[number]]), count)
    found = await store.get_outputs(run_id)
    what = f"get_outputs of {count:,} outputs of {len(filler):,} characters"
    expect_items(context, found.items(), values.items(), what, clause="EVT-2")
    paged: dict[str, str] = {}
    while page := await store.get_outputs(
        run_id, prefix="key", after=max(paged, default=None), take=context.page_size
    ):
        paged |= page
    expect_items(
        context,
        paged.items(),
        values.items(),
        f"the pages of {context.page_size:,} of {what}",
        clause="EVT-2",
    )
    for number in range(0, count, count // 7):
        value = await store.get_output(run_id, keys[number])
        expect_result(context, value, values[keys[number]], f"output {number:,} of {count:,}", clause="EVT-2")
    await _expect_deleted_whole(context, run_id, f"a run with {count:,} outputs", read="get_outputs")


DELIVERED_IN_STANDARD = 450
"""The number of waiters to which the profile standard delivers; it imports the others as delivered."""


async def _import_delivered(context: CheckContext, keys: Sequence[str], names: Sequence[str]) -> UUID:
    """Import a run with waiters that were delivered to, the oldest first, and return its id."""
    run = expect_present(await context.store.get_run(await start(context)), "get_run of a stored run")
    run_id = new_id(context)
    advance(context, SECOND)
    moment = run.started_at + SECOND
    waiters = [
        FlowSignalWaiter(
            run_id=run_id,
            step_key=key,
            signal_name=names[number],
            created_at=run.started_at + number * TICK,
            expires_at=None,
            delivered_at=moment,
            payload_json=f"payload {number}",
            expired_at=None,
        )
        for number, key in enumerate(keys)
    ]
    deliveries = [
        ArchivedDelivery(delivery_id=f"delivery {number}", step_key=key, delivered_at=moment)
        for number, key in enumerate(keys)
    ]
    archive = RunArchive(
        run=replace(run, run_id=run_id),
        waiters=tuple(sorted(waiters, key=lambda waiter: waiter.step_key)),
        deliveries=tuple(sorted(deliveries, key=lambda delivery: delivery.delivery_id)),
    )
    context.expect(await context.store.import_run(archive), True, f"import_run of {len(keys):,} waiters")
    return run_id


@check(
    "SIG-2",
    "SIG-3",
    "RET-1",
    "RET-3",
    kind=Kind.VOLUME,
    isolated=False,
    rotation="steps and waiters of a run",
)
async def a_run_holds_thousands_of_waiters(context: CheckContext) -> None:
    """Each delivery finds the oldest open waiter of its name; every delivery id is remembered."""
    store, count = context.store, context.profile.of(60, 1_300, 4_200)
    keys = [f"step {number:05}" for number in range(count)]
    names = ["stop" if number % 10 == 1 else "go" for number in range(count)]
    alike = names.count("go")
    # The newest waiters have the first keys.
    in_order = keys[::-1]
    imported = 0
    if context.profile is Profile.STANDARD and Capability.TRANSFER in context.capabilities:
        imported = count - DELIVERED_IN_STANDARD
        run_id = await _import_delivered(context, in_order[:imported], names)
    else:
        run_id = await start(context)

    async def register(number: int) -> None:
        await store.register_waiter(run_id, in_order[number], names[number])

    for number in (imported, imported + 1):
        await register(number)
        advance(context, SECOND)
    await in_groups(lambda number: register(imported + 2 + number), count - imported - 2)
    wanted = list(zip(keys, reversed(names), strict=True))
    if Capability.WAITERS in context.capabilities:
        found = [(waiter.step_key, waiter.signal_name) for waiter in await store.get_waiters(run_id)]
        expect_items(context, found, wanted, f"get_waiters of {count:,} waiters", clause="QRY-1")

    async def deliver(number: int) -> Any:
        return await store.deliver_signal(
            run_id, names[number], f"payload {number}", delivery_id=f"delivery {number}"
        )

    first = [await deliver(number) for number in (imported, imported + 1)]
    oldest = in_order[imported : imported + 2]
    what = f"the oldest of {alike:,} waiters of one name"
    expect_items(context, [one.step_key for one in first], oldest, what, clause="SIG-2")
    results = [*first, *await in_groups(lambda number: deliver(imported + 2 + number), count - imported - 2)]
    reached = [*in_order[:imported], *(one.step_key or "" for one in results)]
    what = f"the waiters that {count:,} deliveries reached"
    expect_items(context, sorted(reached), keys, what, clause="SIG-3")
    payloads = {key: f"payload {number}" for number, key in enumerate(reached)}
    waiters = await in_groups(lambda number: store.get_waiter(run_id, keys[number]), count)
    kept = [(waiter.step_key, waiter.payload_json) for waiter in waiters if waiter is not None]
    what = f"the payloads of {count:,} deliveries"
    expect_items(context, kept, ((key, payloads[key]) for key in keys), what, clause="SIG-2")
    again = await in_groups(deliver, count)
    what = f"{count:,} repeated deliveries by step key"
    expect_items(context, [one.step_key for one in again], reached, what, clause="SIG-2")
    late = await store.deliver_signal(run_id, "go", "late")
    expect_result(
        context,
        (late.status, late.step_key),
        (SignalDeliveryStatus.ALREADY_DELIVERED, keys[-1]),
        f"a delivery after {alike:,} waiters of its name were delivered to",
        clause="SIG-3",
    )
    read = "get_waiters" if Capability.WAITERS in context.capabilities else "get_step_statuses"
    await _expect_deleted_whole(context, run_id, f"a run with {count:,} waiters", read=read)


@check(
    "RET-5",
    needs=[Capability.DELETION, Capability.OUTPUTS],
    kind=Kind.VOLUME,
    isolated=False,
    rotation="volume of a run",
)
async def a_long_run_is_deleted_at_one_moment(context: CheckContext) -> None:
    """delete_run of a run with many steps and outputs shows readers all of it or nothing."""
    store, count = context.store, context.profile.of(300, 2_600, 10_500)
    if context.profile is Profile.STANDARD and Capability.TRANSFER in context.capabilities:
        saved = [(f"key {number:05}", "1") for number in range(count)]
        run_id = await _import_skipped(context, {f"step {n:05}": "owner" for n in range(count)}, saved)
    else:
        run_id = await start(context)
        await in_groups(lambda number: store.record_skipped_step(run_id, f"step {number}", "http"), count)
        await in_groups(lambda number: store.save_output(run_id, f"key {number}", "1"), count)
    await store.complete_run(run_id, RunStatus.SUCCEEDED)
    read = context.random.choice((store.get_step_statuses, store.get_outputs))
    what = f"{read.__name__} during delete_run of a run with {count:,} steps and {count:,} outputs"
    await _expect_deleted_at_once(context, run_id, read, store.delete_run(run_id), what, clause="RET-5")
    statuses, outputs = await store.get_step_statuses(run_id), await store.get_outputs(run_id)
    left = len(statuses) + len(outputs)
    expect_result(context, left, 0, "the number of steps and outputs after delete_run", clause="RET-5")
