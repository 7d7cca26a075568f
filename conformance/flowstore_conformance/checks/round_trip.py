"""INP-1 to INP-3: legal values round-trip unchanged, datetimes to the microsecond."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

from flowstore_conformance.checks.example_checks import example
from flowstore_conformance.checks.fixtures import (
    FLOW,
    abbreviate,
    expect_fields,
    get_control,
    get_run,
    get_step,
    get_waiter,
    new_id,
    require_clock,
    run_step,
    single,
    start,
)
from flowstore_conformance.context import CheckContext
from flowstore_core import Capability, RunStatus, StepStatus

# Texts that some databases are known to change or to reject.
TEXTS = (
    # A byte order mark is only removed at the beginning, where it is in all texts joined.
    "\ufeff1",
    " ",
    "  leading and trailing  ",
    "\t\r\n\v\f",
    "a\r\nb\rc\n",
    '{"b": 1.0,  "a": [1e400, -0.0], "a": "\\u0000"}',
    "null",
    "'; DROP TABLE runs; --",
    "\\ \\x00 \\u0000 %s %% $1 ? :name {0}",
    "\x01\x02\x1b\x7f\x80\x85\xa0",
    "\u00c4rger \u00df \u1e9e \u0130 \u0131 \u212a",
    "e\u0301 \u00e9 \u1112\u1161\u11ab \ud55c",
    "\u200b\u200e\u202e\ufeff\u2028\u2029",
    "\ufffd\ufffe\uffff\U0001f600\U0010ffff",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "2026-03-14T09:26:53Z",
    "1",
    "1.0",
    "True",
)
_PLANES = ((0x01, 0x7F), (0x80, 0x24F), (0x250, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF))


def random_text(context: CheckContext, shortest: int, longest: int) -> str:
    """Random legal text with characters from every plane."""
    planes = context.random.choices(_PLANES, k=context.random.randint(shortest, longest))
    return "".join(chr(context.random.randint(*plane)) for plane in planes)


# INP-1


async def expect_key_round_trip(context: CheckContext, key: str, job_id: str) -> None:
    """Store one text in every key, name and job id, and read it everywhere."""
    store, flow_id = context.store, new_id(context)
    sentence = f"the key {abbreviate(key)} round-trips unchanged"
    run_id = await start(context, flow_id=flow_id, flow_name=key, trigger_key=key, job_id=job_id)
    await store.configure_run(run_id, flow_id, key, idempotency_key=key)
    await store.try_register_idempotency_key(flow_id, key, key, run_id)
    found = await store.find_run_id_by_idempotency_key(flow_id, key, key)
    context.expect(found, run_id, f"the run of the idempotency key {abbreviate(key)}")
    await store.try_record_dispatch(run_id, key)
    await store.annotate_dispatch(run_id, key, job_id)
    await store.try_claim_step(run_id, key, owner=key)
    again = await store.try_claim_step(run_id, key, owner=key)
    context.expect(again, True, f"a repeated claim by the owner {abbreviate(key)}")
    await store.record_step_start(run_id, key, key, job_id=job_id, owner=key)
    await store.register_waiter(run_id, key, key)
    first = await store.deliver_signal(run_id, key, "{}", delivery_id=key)
    context.expect(first.step_key, key, sentence)
    repeated = await store.deliver_signal(run_id, key, "{}", delivery_id=key)
    context.expect(repeated, first, f"a repeated delivery with the delivery_id {abbreviate(key)}")

    detail = await get_run(context, run_id)
    expect_fields(context, detail, sentence, flow_name=key, trigger_key=key, job_id=job_id)
    step = single(detail.steps, sentence)
    expect_fields(context, step, sentence, step_key=key, step_type=key, job_id=job_id)
    attempt = single(step.attempts, sentence)
    expect_fields(context, attempt, sentence, step_key=key, step_type=key, job_id=job_id)
    context.expect(list(await store.get_step_statuses(run_id)), [key], sentence)
    context.expect(await store.get_claimed_step_keys(run_id), {key}, sentence)
    context.expect(await store.get_dispatched_step_keys(run_id), {key}, sentence)
    expect_fields(
        context, single(await store.get_step_claims(run_id), sentence), sentence, step_key=key, owner=key
    )
    dispatch = single(await store.get_dispatches(run_id), sentence)
    expect_fields(context, dispatch, sentence, step_key=key, job_id=job_id)
    expect_fields(context, await get_control(context, run_id), sentence, trigger_key=key, idempotency_key=key)
    expect_fields(context, await get_waiter(context, run_id, key), sentence, step_key=key, signal_name=key)
    if Capability.OUTPUTS in context.capabilities:
        await store.save_output(run_id, key, "1")
        context.expect(await store.get_output(run_id, key), "1", sentence)
        context.expect(list(await store.get_outputs(run_id)), [key], sentence)
    if Capability.EVENTS in context.capabilities:
        await store.append_event(run_id, key, step_key=key)
        event = single(await store.get_run_events(run_id), sentence)
        expect_fields(context, event, sentence, event_type=key, step_key=key)


@example("INP-1")
async def keys_round_trip_unchanged(context: CheckContext) -> None:
    """Every legal key, name and job id of every allowed length round-trips unchanged."""
    width = context.limits.key_bytes // 4
    longest = "\U0001f600" * width
    await expect_key_round_trip(context, longest, "\U0001f600" * 1024)
    mixed = "".join(TEXTS)
    parts = [mixed[at : at + width] for at in range(0, len(mixed), width)]
    chosen = context.random.sample(TEXTS, k=context.profile.of(1, 2, len(TEXTS)))
    drawn = [random_text(context, 1, width) for _ in range(context.profile.of(1, 1, 40))]
    for key in (" ", *parts, *chosen, *drawn):
        await expect_key_round_trip(context, key, key)


# INP-2


async def expect_text_round_trip(context: CheckContext, text: str) -> None:
    """Store one text in every text argument, and read it everywhere."""
    store = context.store
    sentence = f"the text {abbreviate(text)} round-trips unchanged"
    run_id = await start(context, trigger_data=text)
    await store.record_step_start(run_id, "failed", "http", input_json=text)
    for _ in range(2):
        # A repeated outcome compares equal.
        await store.record_step_complete(
            run_id, "failed", StepStatus.FAILED, output_json=text, error_message=text
        )
    for _ in range(2):
        await store.record_skipped_step(run_id, "skipped", "http", text, owner="me")
    await store.request_cancel(run_id, text)
    await store.register_waiter(run_id, "wait", "go")
    await store.deliver_signal(run_id, "go", text)
    other = await start(context)
    await store.configure_run(other, FLOW, "manual")
    await store.mark_timed_out(other, text)

    detail = await get_run(context, run_id)
    context.expect(detail.trigger_data, text, sentence)
    step = await get_step(context, run_id, "failed")
    for record in (step, step.attempts[0]):
        expect_fields(context, record, sentence, input_json=text, output_json=text, error_message=text)
    context.expect((await get_step(context, run_id, "skipped")).error_message, text, sentence)
    context.expect((await get_waiter(context, run_id)).payload_json, text, sentence)
    context.expect((await get_control(context, run_id)).cancel_reason, text, sentence)
    context.expect((await get_control(context, other)).cancel_reason, text, sentence)
    if Capability.OUTPUTS in context.capabilities:
        await store.save_output(run_id, "out", text)
        context.expect(await store.get_output(run_id, "out"), text, sentence)
        context.expect(await store.get_outputs(run_id), {"out": text}, sentence)
    if Capability.EVENTS in context.capabilities:
        await store.append_event(run_id, "event", message=text)
        context.expect(single(await store.get_run_events(run_id), sentence).message, text, sentence)
    if Capability.RECOVERY in context.capabilities:
        await store.record_step_start(run_id, "poll", "http")
        await store.reschedule_step(run_id, "poll", attempt=1, output_json=text)
        context.expect((await get_step(context, run_id, "poll")).output_json, text, sentence)


@example("INP-2")
async def texts_round_trip_unchanged(context: CheckContext) -> None:
    """Every legal text round-trips unchanged: JSON is not reformatted, blanks stay, "" is not None."""
    chosen = context.random.sample(TEXTS, k=context.profile.of(1, 2, len(TEXTS)))
    drawn = [random_text(context, 0, 400) for _ in range(context.profile.of(1, 1, 40))]
    # JSON that a JSON column would reformat, blanks that trimming would remove, and all texts together.
    for text in ("", '{"b": 1.0,  "a": 1e2, "a": "\\u00e9"}', "  a  ", "".join(TEXTS), *chosen, *drawn):
        await expect_text_round_trip(context, text)


@example("INP-2")
async def long_texts_are_kept_and_compared_whole(context: CheckContext) -> None:
    """Texts of up to the store's limit are stored whole; two that differ only at the end are different."""
    store = context.store
    run_id = await start(context)
    limit = context.limits.text_bytes
    for unit in ("x", "\U0001f600")[: context.profile.of(1, 1, 2)]:
        size = context.profile.of(min(limit, 2**20), limit, limit)
        text = unit * (size // len(unit.encode()))
        await store.register_waiter(run_id, unit, unit)
        await store.deliver_signal(run_id, unit, text)
        kept = (await get_waiter(context, run_id, unit)).payload_json
        sentence = f"a text of {size:,} bytes of UTF-8 is returned whole"
        context.expect_that(
            kept == text, f"{sentence}: expected {len(text):,} characters, got {len(kept or '')}"
        )
    text = "x" * (context.text_size(100_000) - 1)
    await store.record_step_start(run_id, "charge", "http")
    await store.record_step_complete(
        run_id, "charge", StepStatus.PENDING, output_json=text + "a", error_message=text + "b"
    )
    step = await get_step(context, run_id)
    context.expect_that(step.output_json == text + "a", "a long output is returned whole")
    context.expect_that(step.error_message == text + "b", "a long error message is returned whole")


# INP-3

_ZONES = (
    UTC,
    timezone(timedelta(hours=14)),
    timezone(timedelta(hours=-12)),
    timezone(timedelta(hours=5, minutes=53, seconds=28, microseconds=7)),
)
_MOMENTS = (
    datetime(1, 1, 2, tzinfo=UTC),
    datetime(1582, 10, 10, 1, 2, 3, 4, tzinfo=UTC),
    datetime(1969, 12, 31, 23, 59, 59, 999_999, UTC),
    datetime(2026, 7, 14, 1, 2, 3, 999_999, timezone(timedelta(hours=14))),
    datetime(2038, 1, 19, 3, 14, 8, 1, timezone(timedelta(hours=-12))),
    datetime(9999, 12, 29, 23, 59, 59, 999_999, UTC),
    datetime(9999, 12, 30, tzinfo=UTC),
)


def _random_datetime(context: CheckContext) -> datetime:
    micros = context.random.randrange(int((_MOMENTS[-1] - _MOMENTS[0]) / timedelta(microseconds=1)))
    moment = _MOMENTS[0] + timedelta(microseconds=micros)
    # The local datetime must be within datetime's range.
    return moment.astimezone(context.random.choice(_ZONES)) if 1 < moment.year < 9999 else moment


def _expect_utc(context: CheckContext, value: object, wanted: datetime) -> None:
    sentence = "a datetime is returned aware, in UTC, to the microsecond"
    context.expect_that(
        isinstance(value, datetime) and value.utcoffset() == timedelta(0) and value == wanted,
        f"{sentence}: expected {wanted.astimezone(UTC)!r}, got {value!r}",
    )


@example("INP-3")
async def datetimes_round_trip_in_utc_to_the_microsecond(context: CheckContext) -> None:
    """Every legal datetime of any zone is returned in UTC, exact to the microsecond."""
    store = context.store
    run_id = await start(context)
    drawn = [_random_datetime(context) for _ in range(context.profile.of(1, 4, 100))]
    for number, moment in enumerate((*_MOMENTS, *drawn)):
        key = f"step {number:03}"
        await store.configure_run(run_id, FLOW, "manual", timeout_at=moment)
        _expect_utc(context, (await get_control(context, run_id)).timeout_at, moment)
        await store.try_record_dispatch(run_id, key, due_at=moment)
        dispatch = [one for one in await store.get_dispatches(run_id) if one.step_key == key]
        _expect_utc(context, single(dispatch, "the dispatch").due_at, moment)
        await store.register_waiter(run_id, "wait", "go", expires_at=moment)
        _expect_utc(context, (await get_waiter(context, run_id)).expires_at, moment)


@example("INP-3", needs=[Capability.VIRTUAL_CLOCK])
async def every_timestamp_comes_from_the_given_clock(context: CheckContext) -> None:
    """Every timestamp that the store sets is the clock's reading, in UTC, exact to the microsecond."""
    store, clock = context.store, require_clock(context)
    for moment in (*_MOMENTS[:: context.profile.of(3, 2, 1)], _random_datetime(context)):
        clock.now = moment
        run_id = await start(context)
        await store.configure_run(run_id, FLOW, "manual")
        await store.request_cancel(run_id)
        await store.mark_timed_out(run_id)
        await store.try_record_dispatch(run_id, "charge")
        await store.try_claim_step(run_id, "charge", owner="me")
        await store.register_waiter(run_id, "charge", "go")
        delivered = await store.deliver_signal(run_id, "go", "{}")
        await run_step(context, run_id)
        await store.complete_run(run_id, RunStatus.SUCCEEDED)
        detail, control = await get_run(context, run_id), await get_control(context, run_id)
        step, waiter = await get_step(context, run_id), await get_waiter(context, run_id, "charge")
        stamps: list[object] = [detail.started_at, detail.completed_at, step.started_at, step.completed_at]
        stamps += [step.attempts[0].started_at, step.attempts[0].completed_at]
        stamps += [control.created_at, control.cancel_requested_at, control.timed_out_at]
        stamps += [waiter.created_at, waiter.delivered_at, delivered.delivered_at]
        listed = [run for run in await store.get_runs() if run.run_id == run_id]
        record = single(listed, "the run in get_runs")
        stamps += [record.started_at, record.completed_at]
        stamps += [single(await store.get_step_claims(run_id), "the claim").claimed_at]
        stamps += [single(await store.get_dispatches(run_id), "the dispatch").dispatched_at]
        if Capability.EVENTS in context.capabilities:
            await store.append_event(run_id, "event")
            stamps += [single(await store.get_run_events(run_id), "the event").timestamp]
        for stamp in stamps:
            _expect_utc(context, stamp, moment)
