"""Larger numbers of everything than a batch, a page, a parameter list or a result window holds.

Backends often split long lists at 100, 500, 999, 1,000, 1,024, 2,000, 2,048, 10,000 or 32,766 items. Every
list and count is compared with the writes, whole and page by page.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from datetime import datetime
from typing import Any, TypeVar
from uuid import UUID

from flowstore_conformance.checks.fixtures import (
    DAY,
    FLOW,
    HOUR,
    MINUTE,
    SECOND,
    TICK,
    advance,
    assert_same,
    get_run,
    get_step,
    new_id,
    now,
    observe,
    require_clock,
    run_step,
    start,
)
from flowstore_conformance.checks.registry import Kind, check
from flowstore_conformance.context import CheckContext, ContractViolation
from flowstore_conformance.diffing import brief
from flowstore_core import (
    Capability,
    FlowRunRecord,
    RunPosition,
    RunStatus,
    RunTimeseriesGranularity,
    SignalDeliveryStatus,
    StepStatus,
)

T = TypeVar("T")

_CONCURRENT = 100
"""Concurrent calls while a check fills its namespace."""

_PAGE = 1000
"""The largest take."""


async def _in_groups(call: Callable[[int], Awaitable[T]], count: int) -> list[T]:
    """Make ``count`` calls, many of them concurrently, and return the results in order."""
    results: list[T] = []
    for at in range(0, count, _CONCURRENT):
        results += await asyncio.gather(*(call(number) for number in range(at, min(at + _CONCURRENT, count))))
    return results


def expect_items(
    context: CheckContext, found: Iterable[Hashable], wanted: Iterable[Hashable], what: str, *, clause: str
) -> None:
    """Compare a long list with the expected one; a violation names what is missing, repeated or misplaced."""
    context.assertions += 1
    got, want = list(found), list(wanted)
    if got == want:
        return
    faults = [f"{what}: expected {len(want):,} items, got {len(got):,}"]
    lacking, excess = Counter(want) - Counter(got), Counter(got) - Counter(want)
    if lacking:
        first = next(number for number, item in enumerate(want) if item in lacking)
        number, item = lacking.total(), brief(repr(want[first]))
        faults.append(f"{number:,} are missing, the first being {item} (item {first + 1:,})")
    known = set(want)
    unexpected = [item for item in excess if item not in known]
    repeated = [item for item in excess if item in known]
    if unexpected:
        faults.append(f"{len(unexpected):,} are unexpected, such as {brief(repr(unexpected[0]))}")
    if repeated:
        faults.append(f"{len(repeated):,} are repeated, such as {brief(repr(repeated[0]))}")
    if not (lacking or excess):
        first = next(number for number, (a, b) in enumerate(zip(got, want, strict=True)) if a != b)
        faults.append(
            f"the order differs from item {first + 1:,} on: expected {brief(repr(want[first]))}, "
            f"got {brief(repr(got[first]))}"
        )
    raise ContractViolation("; ".join(faults), clause=clause)


def _expect_result(context: CheckContext, found: object, wanted: object, what: str, *, clause: str) -> None:
    """Compare one result of a call on many rows with the expected one."""
    context.assertions += 1
    if found != wanted:
        raise ContractViolation(f"{what}: expected {wanted}, got {found}", clause=clause)


async def _expect_deleted_whole(context: CheckContext, run_id: UUID, what: str) -> None:
    """Delete a completed run, and expect that nothing of it is left when its id starts again."""
    store = context.store
    unknown = await observe(context, new_id(context))
    await store.complete_run(run_id, RunStatus.CANCELLED)
    await store.cleanup(now(context) + DAY)
    gone = await observe(context, run_id)
    assert_same(context, gone, unknown, f"no read shows anything of {what} after its cleanup", clause="RET-1")
    await start(context, run_id=run_id)
    again = await observe(context, run_id)
    del again["get_run_detail"], again["get_run_status"], unknown["get_run_detail"], unknown["get_run_status"]
    assert_same(context, again, unknown, f"the deleted id of {what} starts empty", clause="RET-1")
    _expect_result(
        context,
        len((await get_run(context, run_id)).steps),
        0,
        f"steps of the deleted {what}",
        clause="RET-1",
    )


# One run


@check("QRY-3", "CLM-3", "CLM-4", "STP-6", "RUN-2", "RET-1", kind=Kind.VOLUME, isolated=False)
async def a_run_holds_thousands_of_steps(context: CheckContext) -> None:
    """Reads list all steps, claims and dispatches of a run; reset and expected cover all of its steps."""
    store, run_id = context.store, await start(context)
    count = context.profile.of(1_100, 10_500, 40_000)
    keys = [f"step {number:06}" for number in range(count)]
    skipped = keys[1::8]
    kept = sorted({*keys}.difference(skipped))
    owners = {key: f"owner of {key}" for key in keys}

    async def fill(number: int) -> tuple[object, ...]:
        key = keys[number]
        claimed = await store.try_claim_step(run_id, key, owner=owners[key])
        dispatched = await store.try_record_dispatch(run_id, key)
        if number % 8 == 1:
            await store.record_skipped_step(run_id, key, "http", f"reason of {key}", owner=owners[key])
            return claimed, dispatched, 1
        attempt = await store.record_step_start(run_id, key, "http", job_id=key, owner=owners[key])
        await store.record_step_complete(run_id, key, StepStatus.PENDING, output_json=f"output of {key}")
        return claimed, dispatched, attempt

    results = await _in_groups(fill, count)
    of = f"of a run with {count:,} steps"
    expect_items(
        context, results, [(True, True, 1)] * count, f"claims, dispatches, starts {of}", clause="CON-1"
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
    restarted = await _in_groups(
        lambda number: store.record_step_start(run_id, skipped[number], "http"), len(skipped)
    )
    expect_items(context, restarted, [2] * len(skipped), f"the next attempts {of}", clause="STP-6")

    expected = dict(await store.get_step_statuses(run_id))
    for what, differing in (
        ("the last status differs", {**expected, keys[-1]: StepStatus.FAILED}),
        ("the last key is missing", {key: status for key, status in expected.items() if key != keys[-1]}),
        ("it names one more key", {**expected, "another": StepStatus.PENDING}),
    ):
        won = await store.complete_run(run_id, RunStatus.FAILED, expected=differing)
        _expect_result(
            context,
            won,
            False,
            f"complete_run with {len(differing):,} expected steps: {what}",
            clause="RUN-2",
        )
    won = await store.complete_run(run_id, RunStatus.FAILED, expected=expected)
    _expect_result(
        context, won, True, f"complete_run with the right {count:,} expected steps", clause="RUN-2"
    )
    await _expect_deleted_whole(context, run_id, f"a run with {count:,} steps")


async def _expect_steps(context: CheckContext, run_id: UUID, keys: Sequence[str], of: str) -> None:
    """Compare the statuses, steps and attempts of a_run_holds_thousands_of_steps."""
    pending, skipped = StepStatus.PENDING, StepStatus.SKIPPED
    wanted = [(key, skipped if number % 8 == 1 else pending) for number, key in enumerate(keys)]
    statuses = await context.store.get_step_statuses(run_id)
    expect_items(context, statuses.items(), wanted, f"get_step_statuses {of}", clause="QRY-3")
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
            (key, None, None, f"reason of {key}") if number % 8 == 1 else (key, key, f"output of {key}", None)
            for number, key in enumerate(keys)
        ]
        expect_items(context, found, details, f"the {name} in get_run_detail {of}", clause="QRY-3")


@check("STP-1", "QRY-3", "RET-1", kind=Kind.VOLUME, isolated=False)
async def a_step_holds_thousands_of_attempts(context: CheckContext) -> None:
    """Attempts of one step are numbered without gaps, keep their own input, and are all listed."""
    store, run_id = context.store, await start(context)
    count = context.profile.of(120, 2_600, 33_000)
    started = await _in_groups(
        lambda number: store.record_step_start(run_id, "charge", "http", input_json=f"input {number}"), count
    )
    numbers = range(1, count + 1)
    what = f"the numbers that {count:,} calls of record_step_start return for one step"
    expect_items(context, sorted(started), numbers, what, clause="STP-1")
    step = await get_step(context, run_id)
    _expect_result(
        context, step.attempt_count, count, f"attempt_count after {count:,} starts", clause="STP-1"
    )
    found = [(attempt.attempt, attempt.input_json) for attempt in step.attempts]
    inputs = {attempt: f"input {number}" for number, attempt in enumerate(started)}
    wanted = [(attempt, inputs[attempt]) for attempt in numbers]
    expect_items(context, found, wanted, "number and input of its attempts", clause="QRY-3")
    open_attempts = [attempt.attempt for attempt in step.attempts if attempt.status is StepStatus.RUNNING]
    _expect_result(
        context, open_attempts, [count], f"the open attempts after {count:,} starts", clause="STP-1"
    )
    await store.record_step_complete(run_id, "charge", StepStatus.FAILED, attempt=count)
    await _expect_deleted_whole(context, run_id, f"a run with {count:,} attempts")


@check("EVT-1", "RET-1", kind=Kind.VOLUME, isolated=False)
async def a_run_holds_thousands_of_events(context: CheckContext) -> None:
    """Each event has its own sequence, and pages of every size return each event once."""
    store, run_id = context.store, await start(context)
    count = context.profile.of(120, 2_600, 33_000)
    sequences = await _in_groups(
        lambda number: store.append_event(run_id, f"type {number}", message=f"message {number}"), count
    )
    _expect_result(
        context, len(set(sequences)), count, f"distinct sequences of {count:,} events", clause="EVT-1"
    )
    wanted = [
        (sequence, f"type {number}", f"message {number}")
        for sequence, number in sorted(zip(sequences, range(count), strict=True))
    ]
    for take in (_PAGE, _PAGE - 1, 256):
        found: list[tuple[int, str, str | None]] = []
        after = 0
        while page := await store.get_run_events(run_id, after=after, take=take):
            _expect_result(
                context,
                len(page),
                min(take, count - len(found)),
                f"the size of a page of get_run_events(after={after}, take={take}) of {count:,} events",
                clause="EVT-1",
            )
            found += [(event.sequence, event.event_type, event.message) for event in page]
            after = page[-1].sequence
        expect_items(context, found, wanted, f"the events on pages of {take}", clause="EVT-1")
    await _expect_deleted_whole(context, run_id, f"a run with {count:,} events")


@check("EVT-2", "RET-1", kind=Kind.VOLUME, isolated=False)
async def a_run_holds_thousands_of_outputs(context: CheckContext) -> None:
    """get_outputs returns every output, also of more bytes than a message or page of a database holds."""
    store, run_id = context.store, await start(context)
    count = context.profile.of(120, 2_600, 10_500)
    filler = "0123456789abcdef" * 160
    values = {f"key {number:05}": f"{number} {filler}" for number in range(count)}
    keys = list(values)
    await _in_groups(lambda number: store.save_output(run_id, keys[number], values[keys[number]]), count)
    found = await store.get_outputs(run_id)
    what = f"get_outputs of {count:,} outputs of {len(filler):,} characters"
    expect_items(context, found.items(), values.items(), what, clause="EVT-2")
    for number in range(0, count, count // 7):
        value = await store.get_output(run_id, keys[number])
        _expect_result(
            context, value, values[keys[number]], f"output {number:,} of {count:,}", clause="EVT-2"
        )
    await _expect_deleted_whole(context, run_id, f"a run with {count:,} outputs")


@check("SIG-2", "SIG-3", "RET-1", kind=Kind.VOLUME, isolated=False)
async def a_run_holds_thousands_of_waiters(context: CheckContext) -> None:
    """Each delivery finds the oldest open waiter of its name; every delivery id is remembered."""
    store, run_id = context.store, await start(context)
    count = context.profile.of(60, 1_300, 4_200)
    keys = [f"step {number:05}" for number in range(count)]
    names = ["stop" if number % 10 == 1 else "go" for number in range(count)]
    alike = names.count("go")

    async def register(number: int) -> None:
        # The newest waiters have the first keys.
        await store.register_waiter(run_id, keys[count - 1 - number], names[number])

    for number in (0, 1):
        await register(number)
        advance(context, SECOND)
    await _in_groups(lambda number: register(number + 2), count - 2)
    wanted = list(zip(keys, reversed(names), strict=True))
    if Capability.WAITERS in context.capabilities:
        found = [(waiter.step_key, waiter.signal_name) for waiter in await store.get_waiters(run_id)]
        expect_items(context, found, wanted, f"get_waiters of {count:,} waiters", clause="QRY-1")

    async def deliver(number: int) -> Any:
        return await store.deliver_signal(
            run_id, names[number], f"payload {number}", delivery_id=f"delivery {number}"
        )

    first = [await deliver(number) for number in (0, 1)]
    oldest = [keys[-1], keys[-2]]
    what = f"the oldest of {alike:,} waiters of one name"
    expect_items(context, [one.step_key for one in first], oldest, what, clause="SIG-2")
    results = [*first, *await _in_groups(lambda number: deliver(number + 2), count - 2)]
    what = f"the waiters that {count:,} deliveries reached"
    expect_items(context, sorted(one.step_key or "" for one in results), keys, what, clause="SIG-3")
    payloads = {one.step_key: f"payload {number}" for number, one in enumerate(results)}
    waiters = await _in_groups(lambda number: store.get_waiter(run_id, keys[number]), count)
    kept = [(waiter.step_key, waiter.payload_json) for waiter in waiters if waiter is not None]
    what = f"the payloads of {count:,} deliveries"
    expect_items(context, kept, ((key, payloads[key]) for key in keys), what, clause="SIG-2")
    again = await _in_groups(deliver, count)
    what = f"{count:,} repeated deliveries by step key"
    expect_items(
        context, [one.step_key for one in again], [one.step_key for one in results], what, clause="SIG-2"
    )
    late = await store.deliver_signal(run_id, "go", "late")
    _expect_result(
        context,
        (late.status, late.step_key),
        (SignalDeliveryStatus.ALREADY_DELIVERED, keys[-1]),
        f"a delivery after {alike:,} waiters of its name were delivered to",
        clause="SIG-3",
    )
    await _expect_deleted_whole(context, run_id, f"a run with {count:,} waiters")


@check("IDM-2", "IDM-4", "RET-4", kind=Kind.VOLUME)
async def thousands_of_keys_and_orphans_end_with_cleanup(context: CheckContext) -> None:
    """Every key finds its run; a cleanup frees all keys of a run and deletes all orphans."""
    store, run_id = context.store, await start(context)
    count = context.profile.of(60, 1_300, 10_500)
    orphans = [new_id(context) for _ in range(count)]

    async def register(number: int) -> tuple[bool, bool]:
        own = await store.try_register_idempotency_key(FLOW, "own", f"key {number}", run_id)
        orphan = await store.try_register_idempotency_key(FLOW, "orphan", f"key {number}", orphans[number])
        await store.configure_run(orphans[number], FLOW, "orphan")
        return own, orphan

    async def find(number: int) -> tuple[UUID | None, UUID | None]:
        own = await store.find_run_id_by_idempotency_key(FLOW, "own", f"key {number}")
        return own, await store.find_run_id_by_idempotency_key(FLOW, "orphan", f"key {number}")

    won = await _in_groups(register, count)
    expect_items(context, won, [(True, True)] * count, f"registering {count:,} keys twice", clause="IDM-2")
    found = await _in_groups(find, count)
    wanted = [(run_id, orphan) for orphan in orphans]
    expect_items(context, found, wanted, f"the runs of {count:,} keys", clause="IDM-2")
    await store.complete_run(run_id, RunStatus.SUCCEEDED)
    advance(context, 2 * HOUR)
    deleted = await store.cleanup(now(context) + DAY)
    what = f"the runs deleted by a cleanup of one run and {count:,} orphans"
    _expect_result(context, deleted, 1, what, clause="RET-1")
    found = await _in_groups(find, count)
    left = [number for number, (own, _) in enumerate(found) if own is not None]
    expect_items(context, left, [], f"the keys of a deleted run that had {count:,}", clause="IDM-4")
    if context.clock is not None:
        left = [number for number, (_, orphan) in enumerate(found) if orphan is not None]
        expect_items(context, left, [], f"{count:,} old keys without a run after cleanup", clause="RET-4")
        controls = await _in_groups(lambda number: store.get_run_control(orphans[number]), count)
        left = [number for number, control in enumerate(controls) if control is not None]
        expect_items(context, left, [], f"{count:,} old controls without a run after cleanup", clause="RET-4")


# Many runs

_FLOWS = [UUID(int=FLOW.int + number) for number in range(3)]
_SOURCES = [UUID(int=FLOW.int + 100 + number) for number in range(2)]
_STATUSES = (RunStatus.SUCCEEDED, RunStatus.RUNNING, RunStatus.FAILED, RunStatus.RUNNING, RunStatus.CANCELLED)


def _newest_first(runs: Iterable[FlowRunRecord]) -> list[UUID]:
    """The ids of runs in the order of QRY-1."""
    return [run.run_id for run in sorted(runs, key=lambda run: (run.started_at, run.run_id), reverse=True)]


@check("QRY-1", "QRY-2", "QRY-3", "QRY-4", "QRY-5", "QRY-6", "RET-1", "RET-3", kind=Kind.VOLUME)
async def thousands_of_runs_are_listed_and_deleted(context: CheckContext) -> None:
    """Lists, pages, totals and statistics cover every run, and cleanup deletes every completed one."""
    store = context.store
    count = context.profile.of(60, 10_500, 40_000)
    at = now(context)

    async def begin(number: int) -> FlowRunRecord:
        flow = number % 3
        name = "needle" if number % 4 else "orders"
        source = _SOURCES[number % 2]
        return await store.start_run(_FLOWS[flow], name, new_id(context), "manual", source_run_id=source)

    runs: list[FlowRunRecord] = []
    for first in range(0, count, _CONCURRENT):
        runs += await asyncio.gather(*(begin(n) for n in range(first, min(first + _CONCURRENT, count))))
        advance(context, SECOND)
    statuses = {run.run_id: _STATUSES[number % 5] for number, run in enumerate(runs)}
    ends = [run_id for run_id, status in statuses.items() if status is not RunStatus.RUNNING]

    async def end(number: int) -> tuple[bool, bool]:
        run_id = ends[number]
        claimed = await store.try_claim_step(run_id, "charge", owner="me")
        return claimed, await store.complete_run(run_id, statuses[run_id])

    won = await _in_groups(end, len(ends))
    expect_items(context, won, [(True, True)] * len(ends), f"ending {len(ends):,} runs", clause="RUN-2")
    await _expect_lists(context, runs, statuses)
    if Capability.DASHBOARD in context.capabilities:
        await _expect_totals(context, runs, statuses, at)
    deleted = await store.cleanup(now(context) + DAY)
    _expect_result(
        context, deleted, len(ends), f"the result of a cleanup of {len(ends):,} runs", clause="RET-1"
    )
    left = [run for run in runs if statuses[run.run_id] is RunStatus.RUNNING]
    await _expect_lists(context, left, statuses)
    if Capability.DASHBOARD in context.capabilities:
        await _expect_totals(context, left, statuses, at)
    deleted = await store.cleanup(now(context) + DAY)
    _expect_result(context, deleted, 0, "the result of a second cleanup", clause="RET-3")

    async def restart(number: int) -> tuple[object, ...]:
        await start(context, run_id=ends[number * 4])
        return tuple(await store.get_step_claims(ends[number * 4]))

    left_claims = await _in_groups(restart, len(ends) // 4)
    what = f"the claims of ids that start again after a cleanup of {len(ends):,} runs with one claim each"
    expect_items(context, left_claims, [()] * len(left_claims), what, clause="RET-1")


async def _expect_lists(
    context: CheckContext, runs: Sequence[FlowRunRecord], statuses: dict[UUID, RunStatus]
) -> None:
    """Compare get_runs, get_active_runs and get_derived_runs, whole and page by page."""
    store, of = context.store, f"of {len(runs):,} runs"
    every = _newest_first(runs)
    found: list[UUID] = []
    after: RunPosition | None = None
    while page := await store.get_runs(after=after, take=_PAGE):
        found += [run.run_id for run in page]
        after = page[-1].position
        if len(found) > len(every):
            break
    expect_items(
        context, found, every, f"get_runs {of}, each page after the last run before it", clause="QRY-1"
    )
    for skip in range(0, len(every) + _PAGE, _PAGE - 1):
        found = [run.run_id for run in await store.get_runs(skip=skip, take=_PAGE)]
        wanted = every[skip : skip + _PAGE]
        expect_items(context, found, wanted, f"get_runs(skip={skip}, take={_PAGE}) {of}", clause="QRY-1")
    flow = _newest_first(run for run in runs if run.flow_id == _FLOWS[1])
    found = [run.run_id for run in await store.get_runs(_FLOWS[1], skip=max(0, len(flow) - 9), take=_PAGE)]
    expect_items(context, found, flow[-9:], f"the oldest runs of one flow {of}", clause="QRY-1")
    active = _newest_first(run for run in runs if statuses[run.run_id] is RunStatus.RUNNING)
    derived = _newest_first(run for run in runs if run.source_run_id == _SOURCES[0])
    for take in (None, _PAGE):
        found = [run.run_id for run in await store.get_active_runs(take=take)]
        expect_items(context, found, active[:take], f"get_active_runs(take={take}) {of}", clause="QRY-6")
        found = [run.run_id for run in await store.get_derived_runs(_SOURCES[0], take=take)]
        expect_items(context, found, derived[:take], f"get_derived_runs(take={take}) {of}", clause="QRY-6")


async def _expect_totals(
    context: CheckContext, runs: Sequence[FlowRunRecord], statuses: dict[UUID, RunStatus], at: datetime
) -> None:
    """Compare the pages and totals of get_runs_page, the statistics and a time series."""
    store = context.store
    for status in (None, RunStatus.RUNNING, RunStatus.CANCELLED):
        for search in (None, "needle"):
            wanted = _newest_first(
                run
                for run in runs
                if (status is None or statuses[run.run_id] is status)
                and (search is None or run.flow_name == search)
            )
            after: RunPosition | None = None
            found: list[UUID] = []
            what = f"get_runs_page(status={status}, search={search!r}) of {len(runs):,} runs"
            clause = "QRY-2" if search else "QRY-1"
            while True:
                page = await store.get_runs_page(status=status, search=search, after=after, take=_PAGE)
                _expect_result(
                    context, page.total_count, len(wanted), f"total_count of {what}", clause="QRY-3"
                )
                if not page.runs or len(found) > len(wanted):
                    break
                found += [run.run_id for run in page.runs]
                after = page.runs[-1].position
            expect_items(context, found, wanted, f"the pages of {what}", clause=clause)
            skip = max(0, len(wanted) - 7)
            page = await store.get_runs_page(status=status, search=search, skip=skip, take=_PAGE)
            found = [run.run_id for run in page.runs]
            expect_items(context, found, wanted[-7:], f"the last runs of {what}, skip={skip}", clause=clause)
    statistics = await store.get_statistics()
    counted = Counter(statuses[run.run_id] for run in runs)
    _expect_result(
        context,
        (statistics.total_flows, statistics.active_runs),
        (len({run.flow_id for run in runs}), counted[RunStatus.RUNNING]),
        f"total_flows and active_runs of get_statistics with {len(runs):,} runs",
        clause="QRY-4",
    )
    # A day more on both sides, in case of a server's own clock.
    buckets = await store.get_run_timeseries(RunTimeseriesGranularity.HOUR, at - DAY, at + 2 * DAY)
    sums = [
        sum(getattr(bucket, name) for bucket in buckets)
        for name in ("total", "running", "succeeded", "failed", "cancelled")
    ]
    wanted_sums = [len(runs), *(counted[status] for status in RunStatus)]
    _expect_result(
        context, sums, wanted_sums, "the sums over all buckets of get_run_timeseries", clause="QRY-5"
    )


@check(
    "CTL-3",
    "STP-8",
    needs=[Capability.RECOVERY, Capability.LEASES, Capability.VIRTUAL_CLOCK],
    kind=Kind.VOLUME,
)
async def thousands_of_runs_need_attention(context: CheckContext) -> None:
    """take limits the ordered list: the first 1,000 of thousands come first, whatever was written first."""
    store, clock = context.store, require_clock(context)
    count = context.profile.of(60, 1_300, 10_500)
    at = clock.now
    runs = [new_id(context) for _ in range(count)]
    # Neither the order of writing nor that of the ids is the order of the lists.
    ranks = list(range(count))
    context.random.shuffle(ranks)
    due = {run_id: at + rank * SECOND for run_id, rank in zip(runs, ranks, strict=True)}
    kinds = {run_id: rank % 3 for run_id, rank in zip(runs, ranks, strict=True)}

    async def begin(number: int) -> None:
        run_id = runs[number]
        await start(context, run_id=run_id)
        await store.configure_run(run_id, FLOW, "manual", timeout_at=due[run_id])
        match kinds[run_id]:
            case 0:
                await store.try_record_dispatch(run_id, "charge", due_at=due[run_id])
            case 1:
                await store.try_claim_step(run_id, "charge", owner="me", lease=due[run_id] - at + MINUTE)
            case _:
                await run_step(context, run_id, "charge", StepStatus.PENDING)

    await _in_groups(begin, count)
    stalls = {run_id: (due[run_id], due[run_id] + MINUTE, at)[kinds[run_id]] for run_id in runs}
    for as_of in (at + count * SECOND + HOUR, at + (count // 2) * SECOND, at + 5 * SECOND, at - TICK):
        for take in (_PAGE, 7):
            listed = sorted((deadline, run_id) for run_id, deadline in due.items() if deadline <= as_of)
            found = [run.run_id for run in await store.get_runs_to_stop(as_of=as_of, take=take)]
            what = f"the first {take} of {len(listed):,} runs of get_runs_to_stop as of {as_of}"
            expect_items(context, found, [run_id for _, run_id in listed[:take]], what, clause="CTL-3")
            stalled = sorted((since, run_id) for run_id, since in stalls.items() if since <= as_of)
            found_stalls = [
                (step.since, step.run_id) for step in await store.get_stalled_steps(as_of=as_of, take=take)
            ]
            what = f"the first {take} of {len(stalled):,} steps of get_stalled_steps as of {as_of}"
            expect_items(context, found_stalls, stalled[:take], what, clause="STP-8")
