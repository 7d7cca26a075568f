"""INP: an illegal argument raises InvalidArgumentError and changes nothing."""

from __future__ import annotations

from collections.abc import Awaitable, Collection
from datetime import datetime, timedelta
from typing import Any

from flowstore_conformance.checks.fixtures import (
    FLOW,
    HOUR,
    MINUTE,
    abbreviate,
    assert_same,
    expect_fields,
    get_step,
    new_id,
    now,
    observe_all,
    require_clock,
    run_step,
    start,
)
from flowstore_conformance.checks.operations import ARGUMENT_KINDS, RUN, hostile_arguments
from flowstore_conformance.context import CheckContext
from flowstore_conformance.registry import Kind, check
from flowstore_core import Capability, InvalidArgumentError, RunStatus, StepStatus
from flowstore_core.timeseries import LATEST


async def expect_refused(context: CheckContext, kinds: Collection[str], rule: str) -> None:
    """Call every operation with every illegal value of some kinds, and expect a refusal each time."""
    store = context.store
    run_id = await start(context, run_id=RUN)
    await store.try_claim_step(run_id, "charge", owner="me")
    await store.record_step_start(run_id, "charge", "http")
    await store.configure_run(run_id, FLOW, "manual")
    await store.register_waiter(run_id, "charge", "go")
    before = await observe_all(context, run_id)
    for operation in ARGUMENT_KINDS:
        for name, arguments in hostile_arguments(operation, kinds):
            sentence = f"{operation}({name}={abbreviate(arguments[name])}): {rule}"
            call = getattr(store, operation)(**arguments)
            error = await context.expect_error(call, InvalidArgumentError, sentence)
            # An argument of a request is named as dispatch.step_key.
            named = str(getattr(error, "argument", None)).partition(".")[0]
            context.expect(named, name, f"{sentence}: the error names the argument")
            context.expect_that(getattr(error, "limit", None), f"{sentence}: the error names the limit")
    assert_same(context, await observe_all(context, run_id), before, "a refused call changes nothing")


@check("INP-1", kind=Kind.HOSTILE, rotation="refused arguments")
async def ids_and_keys_out_of_limits_are_refused(context: CheckContext) -> None:
    """Every operation refuses an id that is no UUID, and a key or name of illegal length."""
    await expect_refused(
        context, ("id", "key", "job", "prefix"), "ids, keys and names outside their limits are refused"
    )


@check("INP-2", kind=Kind.HOSTILE, rotation="refused arguments")
async def illegal_texts_are_refused(context: CheckContext) -> None:
    """Every text argument refuses U+0000, lone surrogates, more than 16 MiB and values that are no str."""
    await expect_refused(context, ("text", "search"), "illegal texts are refused")
    oversize = "\u00e9" * (8 * 1024 * 1024 + 1)
    call = context.store.request_cancel(RUN, oversize)
    await context.expect_error(
        call, InvalidArgumentError, "a text of more than 16 MiB of UTF-8 with fewer characters"
    )


@check("INP-3", kind=Kind.HOSTILE, rotation="refused arguments")
async def naive_and_out_of_range_datetimes_are_refused(context: CheckContext) -> None:
    """Every operation refuses a naive datetime, and one outside 0001-01-02 to 9999-12-30 UTC."""
    await expect_refused(context, ("datetime",), "naive and out-of-range datetimes are refused")


@check("INP-4", kind=Kind.HOSTILE)
async def wrong_types_and_ranges_are_refused(context: CheckContext) -> None:
    """Numbers, leases, statuses and collections outside their limits are refused; so is a bool as an int."""
    kinds = {"attempt", "position", "skip", "take", "after", "lease", "completion", "run status", "outcome"}
    kinds |= {"ids", "claims", "outputs"}
    kinds |= {
        "expected",
        "keys",
        "granularity",
        "priority",
        "queues",
        "limit",
        "final outcome",
        "ended steps",
    }
    kinds |= {"requests", "first requests", "tags", "tag changes"}
    await expect_refused(context, kinds, "wrong types and ranges are refused")
    store, moment = context.store, now(context)
    many = [f"step-{number}" for number in range(100_001)]
    rule = "a call names at most 100,000 step keys"
    states = dict.fromkeys(many, StepStatus.FAILED)
    call: Awaitable[object] = store.complete_run(RUN, RunStatus.FAILED, expected=states)
    error = await context.expect_error(call, InvalidArgumentError, rule)
    expect_fields(context, error, f"{rule}: the error names the argument", argument="expected")
    call = store.retry_step(RUN, "charge", reset=many)
    error = await context.expect_error(call, InvalidArgumentError, rule)
    expect_fields(context, error, f"{rule}: the error names the argument", argument="reset")
    error = await context.expect_error(
        store.try_claim_step(RUN, "ship", lease=MINUTE), InvalidArgumentError, "a lease needs an owner"
    )
    expect_fields(context, error, "a lease without owner names the argument", argument="lease")
    windows: list[tuple[str, Any, datetime, datetime]] = [
        ("since", "hour", moment + timedelta(microseconds=1), moment),
        ("until", "hour", moment, moment + 10_001 * HOUR),
        ("until", "day", moment, moment + 10_001 * 24 * HOUR),
    ]
    for name, granularity, since, until in windows:
        error = await context.expect_error(
            store.get_run_timeseries(granularity, since, until),
            InvalidArgumentError,
            "since <= until, at most 10,000 buckets",
        )
        expect_fields(context, error, f"a refused window of {granularity}s: the error names", argument=name)


@check("INP-4", rotation="arguments at the limits")
async def values_at_their_limits_and_plain_strings_are_accepted(context: CheckContext) -> None:
    """Numbers at their limits are accepted, and so are enum values as plain str."""
    store = context.store
    run_id = await start(context)
    most = context.page_size
    for take in (0, most):
        context.expect(await store.get_runs(skip=2**63 - 1, take=take), (), "skip may be 2^63 - 1")
    context.expect(len(await store.get_runs(skip=0, take=most)), 1, f"take may be {most:,}")
    if Capability.DASHBOARD in context.capabilities:
        page = await store.get_runs_page(skip=2**63 - 1, take=context.page_size, search="x" * 256)
        context.expect(page.total_count, 0, "a search may have 256 characters")
    if Capability.EVENTS in context.capabilities:
        events = await store.get_run_events(run_id, after=2**63 - 1, take=context.page_size)
        context.expect(events, (), "after may be 2^63 - 1")
    if Capability.LEASES in context.capabilities:
        longest = timedelta(days=366)
        claimed = await store.try_claim_step(run_id, "leased", owner="me", lease=longest)
        context.expect(claimed, True, "a lease may be 366 days")
        await store.renew_step_claim(run_id, "leased", "me", timedelta(microseconds=1))
        await store.release_step_claim(run_id, "leased")
    plain: Any = ("Pending", "Failed", "Skipped", "Succeeded")
    for status in plain:
        await run_step(context, run_id, status, status)
        context.expect(
            (await get_step(context, run_id, status)).status, status, "a status may be a plain str"
        )
    expected: Any = {status: status for status in plain}
    done: Any = "Cancelled"
    answer = await store.complete_run(run_id, done, expected=expected)
    context.expect(answer, True, "complete_run takes plain str for statuses")
    context.expect(await store.get_run_status(run_id), RunStatus.CANCELLED, "a status may be a plain str")


@check(
    "INP-3", needs=[Capability.VIRTUAL_CLOCK], kind=Kind.HOSTILE, isolated=False, rotation="refused arguments"
)
async def illegal_clock_readings_are_refused(context: CheckContext) -> None:
    """An illegal reading of the clock raises InvalidArgumentError and changes nothing."""
    store, clock = context.store, require_clock(context)
    run_id = await start(context)
    before, good = await observe_all(context, run_id), clock.now
    readings: tuple[Any, ...] = (None, "2026-03-14", 0, good.replace(tzinfo=None), LATEST + HOUR)
    for reading in readings:
        clock.now = reading
        for call in (
            store.start_run(FLOW, "orders", new_id(context), "manual"),
            store.record_step_start(run_id, "charge", "http"),
        ):
            error = await context.expect_error(call, InvalidArgumentError, f"a clock reading of {reading!r}")
            expect_fields(
                context, error, "an illegal clock reading: the error names the clock", argument="clock"
            )
    clock.now = good
    assert_same(
        context, await observe_all(context, run_id), before, "an illegal clock reading changes nothing"
    )
