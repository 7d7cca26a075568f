"""INP: arguments are checked alike on every backend, and what is legal comes back to the letter."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowstore_core import FlowStore, InvalidArgumentError, RunStatus, StepStatus
from tests.contract.operations import OPERATIONS, hostile_arguments, legal_arguments
from tests.contract.scenes import FLOW, MINUTE, new_run, picture, run_step, the_step
from tests.virtual_clock import VirtualClock

MAX_TEXT = 16 * 1024 * 1024

# What has been seen to come back changed, or not at all, from one database or another.
TEXTS = [
    "",
    " ",
    "  leading and trailing  ",
    "\t\r\n\v\f",
    "a\r\nb\rc\n",
    '{"b": 1.0,  "a": [1e400, -0.0], "a": "\\u0000"}',
    "null",
    "'; DROP TABLE runs; --",
    "\\ \\x00 \\u0000 %s %% $1 ? :name {0}",
    "\x01\x02\x1b\x7f\x80\x85\xa0",
    "Ärger ß ẞ \u0130 \u0131 \u212a",
    "e\u0301 \u00e9 \u1112\u1161\u11ab \ud55c",
    "\u200b\u200e\u202e\ufeff\u2028\u2029",
    "\ufffd\ufffe\uffff\U0001f600\U0010ffff",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "2026-03-14T09:26:53Z",
    "1",
    "1.0",
    "True",
]
KEYS = [text for text in TEXTS if text]

legal_characters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
legal_text = st.text(alphabet=legal_characters, max_size=200)
legal_key = st.text(alphabet=legal_characters, min_size=1, max_size=256)
# Each example is a run of its own in the one namespace of the test.
in_one_store = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def test_inp_the_table_of_operations_is_complete() -> None:
    found = {
        name: list(inspect.signature(member).parameters)[1:]
        for name, member in inspect.getmembers(FlowStore, inspect.isfunction)
        if not name.startswith("_") and name not in ("ping", "aclose")
    }
    assert found == {name: list(kinds) for name, kinds in OPERATIONS.items()}


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_inp_a_hostile_argument_is_named_and_nothing_changes(store: FlowStore, operation: str) -> None:
    run_id = legal_arguments("get_run_detail")["run_id"]
    await new_run(store, run_id=run_id)
    await store.try_claim_step(run_id, "charge", owner="me")
    await store.record_step_start(run_id, "charge", "http")
    await store.configure_run(run_id, FLOW, "manual")
    await store.register_waiter(run_id, "charge", "go")
    before = await picture(store, run_id)
    calls = hostile_arguments(operation)
    for name, arguments in calls:
        with pytest.raises(InvalidArgumentError) as caught:
            await getattr(store, operation)(**arguments)
        assert (caught.value.argument, isinstance(caught.value, ValueError)) == (name, True)
        assert caught.value.limit in str(caught.value)
        assert name in str(caught.value)
    assert await picture(store, run_id) == before


async def test_inp_a_message_never_shows_the_value(store: FlowStore) -> None:
    secret = "hunter2"
    for arguments in ({"job_id": secret * 200}, {"trigger_data": secret + "\0"}, {"flow_name": secret * 40}):
        with pytest.raises(InvalidArgumentError) as caught:
            await store.start_run(**{**legal_arguments("start_run"), **arguments})
        assert secret not in f"{caught.value} {caught.value!r} {caught.value.__dict__}"


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_inp_legal_arguments_are_not_refused(store: FlowStore, operation: str) -> None:
    run_id = legal_arguments("get_run_detail")["run_id"]
    if "start" not in operation and "trigger" not in operation:
        await new_run(store, run_id=run_id)
    if operation in ("record_step_complete", "retry_step", "reschedule_step"):
        await store.record_step_start(run_id, "charge", "http")
    if operation == "record_step_start":
        await new_run(store, run_id=run_id)
        await store.try_claim_step(run_id, "charge", owner="charge")
    await getattr(store, operation)(**legal_arguments(operation))


async def test_inp_1_keys_of_1_and_of_256_characters_are_kept(store: FlowStore) -> None:
    # 256 characters of four bytes: the limit counts characters.
    for key in ("x", " ", "\U0001f600", "k" * 256, "\U0001f600" * 256, " " * 256):
        await _keys_come_back(store, key, key * 4 if len(key) == 256 else key)


async def _keys_come_back(store: FlowStore, key: str, job_id: str) -> None:
    """Store one text wherever a key, a name or a job id goes, and find it everywhere again."""
    run_id = uuid4()
    await store.trigger_run(run_id, key, run_id, key, job_id=job_id, idempotency_key=key)
    assert await store.find_run_id_by_idempotency_key(run_id, key, key) == run_id
    await store.try_record_dispatch(run_id, key)
    await store.annotate_dispatch(run_id, key, job_id)
    assert await store.try_claim_step(run_id, key, owner=key)
    assert await store.try_claim_step(run_id, key, owner=key)
    assert await store.record_step_start(run_id, key, key, job_id=job_id, owner=key) == 1
    await store.register_waiter(run_id, key, key)
    first = await store.deliver_signal(run_id, key, "{}", delivery_id=key)
    assert await store.deliver_signal(run_id, key, "{}", delivery_id=key) == first
    await store.save_output(run_id, key, "1")
    await store.append_event(run_id, key, step_key=key)

    detail = await store.get_run_detail(run_id)
    assert detail is not None
    assert (detail.flow_name, detail.trigger_key, detail.job_id) == (key, key, job_id)
    (step,) = detail.steps
    assert (step.step_key, step.step_type, step.job_id) == (key, key, job_id)
    assert (step.attempts[0].step_key, step.attempts[0].step_type) == (key, key)
    assert await store.get_step_statuses(run_id) == {key: StepStatus.RUNNING}
    assert await store.get_claimed_step_keys(run_id) == await store.get_dispatched_step_keys(run_id) == {key}
    (claim,) = await store.get_step_claims(run_id)
    assert (claim.step_key, claim.owner) == (key, key)
    (dispatch,) = await store.get_dispatches(run_id)
    assert (dispatch.step_key, dispatch.job_id) == (key, job_id)
    control = await store.get_run_control(run_id)
    assert control is not None
    assert (control.trigger_key, control.idempotency_key) == (key, key)
    waiter = await store.get_waiter(run_id, key)
    assert waiter is not None
    assert (waiter.step_key, waiter.signal_name, first.step_key) == (key, key, key)
    assert await store.get_output(run_id, key) == "1"
    assert list(await store.get_outputs(run_id)) == [key]
    (event,) = await store.get_run_events(run_id)
    assert (event.event_type, event.step_key) == (key, key)


@pytest.mark.parametrize("key", KEYS)
async def test_inp_1_a_key_comes_back_to_the_letter(store: FlowStore, key: str) -> None:
    await _keys_come_back(store, key, key)


@in_one_store
@given(key=legal_key)
async def test_inp_1_any_legal_key_comes_back_to_the_letter(store: FlowStore, key: str) -> None:
    await _keys_come_back(store, key, key)


async def test_inp_1_keys_that_look_alike_are_not(store: FlowStore) -> None:
    keys = [
        "key",
        "Key",
        "key ",
        " key",
        "k\u0435y",
        "e\u0301",
        "\u00e9",
        "\u212b",
        "\u00c5",
        "1",
        "01",
        "1.0",
    ]
    run_id = await new_run(store)
    for number, key in enumerate(keys):
        assert await store.try_claim_step(run_id, key, owner=str(number))
        assert await store.try_record_dispatch(run_id, key)
        assert await run_step(store, run_id, key, output_json=str(number)) == 1
        await store.save_output(run_id, key, str(number))
        await store.register_waiter(run_id, key, key)
    assert len(await store.get_step_statuses(run_id)) == len(keys)
    assert await store.get_outputs(run_id) == {key: str(number) for number, key in enumerate(keys)}
    for key in keys:
        assert (await store.deliver_signal(run_id, key, "{}")).step_key == key


async def test_inp_1_a_str_subclass_and_a_uuid_subclass_are_what_they_hold(store: FlowStore) -> None:
    class Key(str):
        __slots__ = ()

    class Id(UUID):
        pass

    run_id = Id(int=uuid4().int)
    await store.start_run(FLOW, Key("orders"), run_id, Key("manual"), trigger_data=Key("data"))
    await store.save_output(run_id, Key("a"), Key("1"))
    (run,) = await store.get_runs()
    assert (run.run_id, run.flow_name, run.trigger_data) == (UUID(int=run_id.int), "orders", "data")
    for value in (run.flow_name, run.trigger_key, run.trigger_data, await store.get_output(run_id, "a")):
        assert type(value) is str


async def _texts_come_back(store: FlowStore, text: str) -> None:
    run_id = await new_run(store, trigger_data=text)
    await store.record_step_start(run_id, "failed", "http", input_json=text)
    await store.record_step_complete(
        run_id, "failed", StepStatus.FAILED, output_json=text, error_message=text
    )
    # The same outcome again is known as the same.
    await store.record_step_complete(
        run_id, "failed", StepStatus.FAILED, output_json=text, error_message=text
    )
    await store.record_skipped_step(run_id, "skipped", "http", text, owner="me")
    await store.record_skipped_step(run_id, "skipped", "http", text, owner="me")
    await store.record_step_start(run_id, "poll", "http")
    await store.reschedule_step(run_id, "poll", attempt=1, output_json=text)
    await store.request_cancel(run_id, text)
    await store.register_waiter(run_id, "poll", "go")
    await store.deliver_signal(run_id, "go", text)
    await store.save_output(run_id, "out", text)
    await store.append_event(run_id, "event", message=text)
    other = await new_run(store)
    await store.configure_run(other, FLOW, "manual")
    await store.mark_timed_out(other, text)

    detail = await store.get_run_detail(run_id)
    assert detail is not None
    failed, poll, skipped = sorted(detail.steps, key=lambda step: step.step_key)
    waiter = await store.get_waiter(run_id, "poll")
    (event,) = await store.get_run_events(run_id)
    control, late = await store.get_run_control(run_id), await store.get_run_control(other)
    assert waiter is not None
    assert control is not None
    assert late is not None
    for back in (
        detail.trigger_data,
        failed.input_json,
        failed.output_json,
        failed.error_message,
        failed.attempts[0].output_json,
        failed.attempts[0].error_message,
        skipped.error_message,
        poll.output_json,
        waiter.payload_json,
        await store.get_output(run_id, "out"),
        (await store.get_outputs(run_id))["out"],
        event.message,
        control.cancel_reason,
        late.cancel_reason,
    ):
        assert back == text


@pytest.mark.parametrize("text", TEXTS)
async def test_inp_2_text_comes_back_to_the_letter(store: FlowStore, text: str) -> None:
    await _texts_come_back(store, text)


@in_one_store
@given(text=legal_text)
async def test_inp_2_any_legal_text_comes_back_to_the_letter(store: FlowStore, text: str) -> None:
    await _texts_come_back(store, text)


@pytest.mark.parametrize("unit", ["x", "é", "\U0001f600"])
async def test_inp_2_sixteen_mib_of_utf_8_are_kept(store: FlowStore, unit: str) -> None:
    text = unit * (MAX_TEXT // len(unit.encode()))
    run_id = await new_run(store)
    await store.save_output(run_id, "out", text)
    assert await store.get_output(run_id, "out") == text
    with pytest.raises(InvalidArgumentError):
        await store.save_output(run_id, "out", text + "x")
    assert await store.get_output(run_id, "out") == text


async def test_inp_2_long_texts_are_compared_whole(store: FlowStore) -> None:
    run_id = await new_run(store)
    text = "x" * 100_000
    await store.record_step_start(run_id, "charge", "http")
    await store.record_step_complete(run_id, "charge", StepStatus.SUCCEEDED, output_json=text + "a")
    await store.record_step_complete(run_id, "charge", StepStatus.SUCCEEDED, output_json=text + "a")
    with pytest.raises(Exception, match="already completed"):
        await store.record_step_complete(run_id, "charge", StepStatus.SUCCEEDED, output_json=text + "b")


_ZONES = [
    UTC,
    timezone(timedelta(hours=14)),
    timezone(timedelta(hours=-12)),
    timezone(timedelta(hours=5, minutes=53, seconds=28, microseconds=7)),
    ZoneInfo("Europe/Berlin"),
    ZoneInfo("America/St_Johns"),
]


async def _times_come_back(store: FlowStore, clock: VirtualClock, moment: datetime) -> None:
    wanted = moment.astimezone(UTC)
    clock.now = moment
    run_id = await new_run(store)
    await store.configure_run(run_id, FLOW, "manual", timeout_at=moment)
    await store.try_record_dispatch(run_id, "charge", due_at=moment)
    await store.try_claim_step(run_id, "charge", owner="me")
    await store.register_waiter(run_id, "charge", "go", expires_at=moment)
    await store.append_event(run_id, "event")
    await run_step(store, run_id, "charge")
    detail = await store.get_run_detail(run_id)
    control = await store.get_run_control(run_id)
    waiter = await store.get_waiter(run_id, "charge")
    (dispatch,) = await store.get_dispatches(run_id)
    (claim,) = await store.get_step_claims(run_id)
    (event,) = await store.get_run_events(run_id)
    assert detail is not None
    assert control is not None
    assert waiter is not None
    for back in (
        detail.started_at,
        detail.steps[0].started_at,
        detail.steps[0].completed_at,
        detail.steps[0].attempts[0].completed_at,
        control.timeout_at,
        control.created_at,
        waiter.expires_at,
        waiter.created_at,
        dispatch.due_at,
        dispatch.dispatched_at,
        claim.claimed_at,
        event.timestamp,
    ):
        assert back == wanted
        assert back.tzinfo is UTC
        assert type(back) is datetime


@pytest.mark.parametrize("zone", _ZONES, ids=str)
async def test_inp_3_any_zone_is_normalised_to_utc(
    store: FlowStore, clock: VirtualClock, zone: timezone | ZoneInfo
) -> None:
    await _times_come_back(store, clock, datetime(2026, 7, 14, 1, 2, 3, 4, zone))


@pytest.mark.parametrize(
    "moment",
    [
        datetime(1, 1, 2, tzinfo=UTC),
        datetime(9999, 12, 30, tzinfo=UTC),
        datetime(9999, 12, 29, 23, 59, 59, 999_999, UTC),
        datetime(1969, 12, 31, 23, 59, 59, 999_999, UTC),
        datetime(2026, 3, 29, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin")),
        datetime(2026, 10, 25, 2, 30, fold=0, tzinfo=ZoneInfo("Europe/Berlin")),
        datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin")),
    ],
)
async def test_inp_3_times_at_the_limits_come_back(
    store: FlowStore, clock: VirtualClock, moment: datetime
) -> None:
    await _times_come_back(store, clock, moment)


@in_one_store
@given(
    moment=st.datetimes(
        min_value=datetime(1, 1, 3),  # noqa: DTZ001 - Hypothesis wants naive bounds
        max_value=datetime(9999, 12, 29),  # noqa: DTZ001
        timezones=st.sampled_from(_ZONES),
    )
)
async def test_inp_3_any_time_comes_back_to_the_microsecond(
    store: FlowStore, clock: VirtualClock, moment: datetime
) -> None:
    await _times_come_back(store, clock, moment)


async def test_inp_3_a_zone_may_lie_beyond_the_limits_of_its_own_calendar(store: FlowStore) -> None:
    run_id = await new_run(store)
    wanted = datetime(9999, 12, 30, tzinfo=UTC)
    await store.configure_run(
        run_id, FLOW, "manual", timeout_at=wanted.astimezone(timezone(timedelta(hours=14)))
    )
    control = await store.get_run_control(run_id)
    assert control is not None
    assert control.timeout_at == wanted


@pytest.mark.parametrize(
    "reading",
    [None, "2026-03-14", 0, datetime(2026, 3, 14), datetime.max.replace(tzinfo=UTC)],  # noqa: DTZ001
)
async def test_inp_3_the_clock_is_checked_too(store: FlowStore, clock: VirtualClock, reading: Any) -> None:
    run_id = await new_run(store)
    before = await picture(store, run_id)
    good, clock.now = clock.now, reading
    with pytest.raises(InvalidArgumentError) as caught:
        await new_run(store)
    assert caught.value.argument == "clock"
    with pytest.raises(InvalidArgumentError):
        await store.record_step_start(run_id, "charge", "http")
    clock.now = good
    assert await picture(store, run_id) == before


async def test_inp_4_numbers_at_their_limits_are_legal(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    assert len(await store.get_runs(skip=0, take=1000)) == 1
    assert await store.get_runs(skip=2**63 - 1, take=0) == ()
    assert (await store.get_runs_page(skip=2**63 - 1, take=1000, search="x" * 256)).total_count == 0
    assert await store.get_run_events(run_id, after=2**63 - 1, take=1000) == ()
    assert await store.try_claim_step(run_id, "charge", owner="me", lease=timedelta(days=366))
    assert await store.renew_step_claim(run_id, "charge", "me", timedelta(microseconds=1))


async def test_inp_4_a_lease_needs_an_owner(store: FlowStore) -> None:
    run_id = await new_run(store)
    with pytest.raises(InvalidArgumentError) as caught:
        await store.try_claim_step(run_id, "charge", lease=MINUTE)
    assert caught.value.argument == "lease"
    assert await store.get_step_claims(run_id) == ()


async def test_inp_4_since_lies_at_or_before_until(store: FlowStore, clock: VirtualClock) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        await store.get_run_timeseries("hour", clock() + timedelta(microseconds=1), clock())  # type: ignore[arg-type]
    assert caught.value.argument == "since"


async def test_inp_4_a_window_has_at_most_ten_thousand_buckets(store: FlowStore) -> None:
    since = datetime(2000, 1, 1, tzinfo=UTC)
    for granularity, width in (("hour", timedelta(hours=1)), ("day", timedelta(days=1))):
        end = since + 10_000 * width
        with pytest.raises(InvalidArgumentError) as caught:
            await store.get_run_timeseries(granularity, since, end + timedelta(microseconds=1))  # type: ignore[arg-type]
        assert caught.value.argument == "until"


@pytest.mark.parametrize("status", ["Succeeded", "Failed", "Cancelled"])
async def test_inp_4_run_statuses_may_be_plain_str(store: FlowStore, status: Any) -> None:
    run_id = await new_run(store)
    assert await store.complete_run(run_id, status, expected={})
    assert (await store.get_runs_page(status=status)).total_count == 1
    assert await store.get_run_status(run_id) is RunStatus(status)


@pytest.mark.parametrize("status", ["Succeeded", "Failed", "Skipped", "Pending"])
async def test_inp_4_step_statuses_may_be_plain_str(store: FlowStore, status: Any) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id, "charge", status)
    assert (await the_step(store, run_id)).status is StepStatus(status)
    expected: Mapping[str, Any] = {"charge": status}
    assert await store.complete_run(run_id, RunStatus.SUCCEEDED, expected=expected)
