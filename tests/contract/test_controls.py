"""CTL: the control record, its latches and deadlines."""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID, uuid4

import pytest

from flowstore_core import Capability, FlowRunControlRecord, FlowStore, RunStatus
from tests.conftest import OpenAnother
from tests.contract.scenes import FLOW, MINUTE, new_run, picture, together
from tests.virtual_clock import VirtualClock

deadlines = pytest.mark.needs(Capability.DEADLINES)


async def _control(store: FlowStore, run_id: UUID) -> FlowRunControlRecord:
    control = await store.get_run_control(run_id)
    assert control is not None
    return control


async def test_ctl_1_configure_run_stores_a_record(store: FlowStore, clock: VirtualClock) -> None:
    run_id = uuid4()
    await store.configure_run(run_id, FLOW, "manual", idempotency_key="key", timeout_at=clock() + MINUTE)
    assert await _control(store, run_id) == FlowRunControlRecord(
        run_id=run_id,
        flow_id=FLOW,
        trigger_key="manual",
        idempotency_key="key",
        timeout_at=clock() + MINUTE,
        cancel_requested=False,
        cancel_reason=None,
        cancel_requested_at=None,
        timed_out_at=None,
        created_at=clock(),
    )


async def test_ctl_1_it_overwrites_with_none_too_and_keeps_created_at(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id, other_flow = uuid4(), uuid4()
    created = clock()
    await store.configure_run(run_id, FLOW, "manual", idempotency_key="key", timeout_at=created)
    clock.advance(seconds=1)
    await store.configure_run(run_id, other_flow, "timer")
    control = await _control(store, run_id)
    assert (control.flow_id, control.trigger_key) == (other_flow, "timer")
    assert (control.idempotency_key, control.timeout_at) == (None, None)
    assert control.created_at == created


async def test_ctl_1_it_registers_no_key(store: FlowStore) -> None:
    run_id, other = uuid4(), uuid4()
    await store.configure_run(run_id, FLOW, "manual", idempotency_key="key")
    assert await store.find_run_id_by_idempotency_key(FLOW, "manual", "key") is None
    assert await store.try_register_idempotency_key(FLOW, "manual", "key", other)


async def test_ctl_1_it_may_come_before_start_run(store: FlowStore, clock: VirtualClock) -> None:
    run_id = uuid4()
    await store.configure_run(run_id, FLOW, "manual", timeout_at=clock())
    before = await _control(store, run_id)
    assert await store.get_run_status(run_id) is None
    assert await store.get_runs() == ()
    await new_run(store, run_id=run_id)
    assert await _control(store, run_id) == before


async def test_ctl_1_it_never_clears_a_latch(store: FlowStore, clock: VirtualClock) -> None:
    run_id = uuid4()
    await store.configure_run(run_id, FLOW, "manual", timeout_at=clock())
    await store.request_cancel(run_id, "user")
    await store.mark_timed_out(run_id, "late")
    before = await _control(store, run_id)
    clock.advance(seconds=1)
    await store.configure_run(run_id, FLOW, "manual", timeout_at=before.timeout_at)
    assert await _control(store, run_id) == before


async def test_ctl_1_many_configure_at_once_one_record_remains(
    store: FlowStore, open_another: OpenAnother
) -> None:
    stores = [store, await open_another()]
    run_id = uuid4()
    await together(
        stores[n % 2].configure_run(run_id, FLOW, f"trigger {n}", idempotency_key=f"key {n}")
        for n in range(12)
    )
    control = await _control(store, run_id)
    assert control.trigger_key.removeprefix("trigger") == (control.idempotency_key or "").removeprefix("key")


async def test_ctl_2_request_cancel_is_a_latch(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    await store.configure_run(run_id, FLOW, "manual")
    now = clock.advance(seconds=1)
    assert await store.request_cancel(run_id, "user") is True
    clock.advance(seconds=1)
    assert await store.request_cancel(run_id, "again") is False
    control = await _control(store, run_id)
    assert (control.cancel_requested, control.cancel_reason) == (True, "user")
    assert (control.cancel_requested_at, control.timed_out_at) == (now, None)


async def test_ctl_2_mark_timed_out_is_a_latch(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    await store.configure_run(run_id, FLOW, "manual")
    now = clock.advance(seconds=1)
    assert await store.mark_timed_out(run_id, "late") is True
    clock.advance(seconds=1)
    assert await store.mark_timed_out(run_id, "again") is False
    control = await _control(store, run_id)
    assert (control.cancel_requested, control.cancel_reason) == (True, "late")
    assert (control.cancel_requested_at, control.timed_out_at) == (now, now)


@pytest.mark.parametrize("order", [("cancel", "time out"), ("time out", "cancel")])
async def test_ctl_2_each_latch_is_its_own_and_the_users_reason_comes_first(
    store: FlowStore, clock: VirtualClock, order: tuple[str, str]
) -> None:
    run_id = await new_run(store)
    await store.configure_run(run_id, FLOW, "manual")
    at = {}
    for what in order:
        at[what] = clock.advance(seconds=1)
        if what == "cancel":
            assert await store.request_cancel(run_id, "user") is True
        else:
            assert await store.mark_timed_out(run_id, "late") is True
    control = await _control(store, run_id)
    assert (control.cancel_reason, control.cancel_requested_at) == ("user", at["cancel"])
    assert control.timed_out_at == at["time out"]


async def test_ctl_2_a_reason_may_be_missing(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    assert await store.request_cancel(run_id) is True
    control = await _control(store, run_id)
    assert (control.cancel_requested, control.cancel_reason) == (True, None)
    assert control.cancel_requested_at == clock()


async def test_ctl_2_a_user_without_reason_does_not_get_the_time_outs(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    await store.configure_run(run_id, FLOW, "manual")
    await store.mark_timed_out(run_id, "late")
    now = clock.advance(seconds=1)
    await store.request_cancel(run_id)
    control = await _control(store, run_id)
    assert (control.cancel_reason, control.cancel_requested_at) == (None, now)


async def test_ctl_2_request_cancel_creates_the_record_of_an_existing_run(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store, trigger_key="timer")
    now = clock.advance(seconds=1)
    assert await store.request_cancel(run_id, "user") is True
    assert await _control(store, run_id) == FlowRunControlRecord(
        run_id=run_id,
        flow_id=FLOW,
        trigger_key="timer",
        idempotency_key=None,
        timeout_at=None,
        cancel_requested=True,
        cancel_reason="user",
        cancel_requested_at=now,
        timed_out_at=None,
        created_at=now,
    )


async def test_ctl_2_mark_timed_out_creates_no_record(store: FlowStore) -> None:
    run_id = await new_run(store)
    assert await store.mark_timed_out(run_id, "late") is False
    assert await store.get_run_control(run_id) is None


async def test_ctl_2_latches_work_before_the_run_starts(store: FlowStore) -> None:
    run_id = uuid4()
    await store.configure_run(run_id, FLOW, "manual")
    assert await store.request_cancel(run_id) is True
    assert await store.mark_timed_out(run_id) is True
    await new_run(store, run_id=run_id)
    assert (await _control(store, run_id)).cancel_requested


async def test_ctl_2_latches_work_on_a_terminal_run(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.configure_run(run_id, FLOW, "manual")
    await store.complete_run(run_id, RunStatus.SUCCEEDED)
    assert await store.request_cancel(run_id) is True
    assert await store.mark_timed_out(run_id) is True
    assert await store.get_run_status(run_id) is RunStatus.SUCCEEDED


async def test_ctl_2_with_as_of_only_a_deadline_that_has_come_times_out(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    deadline = clock() + MINUTE
    await store.configure_run(run_id, FLOW, "manual", timeout_at=deadline)
    before = await _control(store, run_id)
    assert await store.mark_timed_out(run_id, as_of=deadline - timedelta(microseconds=1)) is False
    assert await _control(store, run_id) == before
    assert await store.mark_timed_out(run_id, as_of=deadline) is True
    # When it was latched is the store's time, whatever as_of is.
    assert (await _control(store, run_id)).timed_out_at == clock()
    assert await store.mark_timed_out(run_id, as_of=deadline) is False


async def test_ctl_2_with_as_of_a_run_without_deadline_never_times_out(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    await store.configure_run(run_id, FLOW, "manual")
    assert await store.mark_timed_out(run_id, as_of=clock() + timedelta(days=3650)) is False


async def test_ctl_2_without_as_of_the_deadline_does_not_matter(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    await store.configure_run(run_id, FLOW, "manual", timeout_at=clock() + MINUTE)
    assert await store.mark_timed_out(run_id) is True


@pytest.mark.parametrize("configured", [True, False])
async def test_ctl_2_exactly_one_of_many_sets_a_latch(
    store: FlowStore, open_another: OpenAnother, configured: bool
) -> None:
    stores = [store, await open_another(), await open_another()]
    for _ in range(4):
        run_id = await new_run(store)
        if configured:
            await store.configure_run(run_id, FLOW, "manual")
        won = await together(stores[n % 3].request_cancel(run_id, f"reason {n}") for n in range(12))
        assert sum(won) == 1
        assert (await _control(store, run_id)).cancel_reason == f"reason {won.index(True)}"
        timed_out = await together(stores[n % 3].mark_timed_out(run_id) for n in range(12))
        assert sum(timed_out) == 1


@deadlines
async def test_ctl_3_runs_to_stop_are_past_their_deadline_or_cancelled(
    store: FlowStore, clock: VirtualClock
) -> None:
    now = clock()
    names = {}
    for name, timeout_at in (
        ("late", now - MINUTE),
        ("on time", now),
        ("to come", now + timedelta(microseconds=1)),
        ("latched", now - 2 * MINUTE),
        ("timed out early", now + MINUTE),
        ("cancelled", None),
        ("no deadline", None),
    ):
        run_id = await new_run(store, flow_name=name)
        names[run_id] = name
        await store.configure_run(run_id, FLOW, "manual", timeout_at=timeout_at)
        if name in ("latched", "timed out early"):
            await store.mark_timed_out(run_id)
        if name == "cancelled":
            await store.request_cancel(run_id)
    await new_run(store, flow_name="no control record")
    found = await store.get_runs_to_stop()
    assert [names[run.run_id] for run in found] == [
        "latched",
        "late",
        "on time",
        "timed out early",
        "cancelled",
    ]
    everything = {run.run_id: run for run in await store.get_runs()}
    assert list(found) == [everything[run.run_id] for run in found]


@deadlines
async def test_ctl_3_only_running_runs_are_to_stop(store: FlowStore, clock: VirtualClock) -> None:
    run_id, orphan = await new_run(store), uuid4()
    for one in (run_id, orphan):
        await store.configure_run(one, FLOW, "manual", timeout_at=clock())
        await store.request_cancel(one)
    assert [run.run_id for run in await store.get_runs_to_stop()] == [run_id]
    await store.complete_run(run_id, RunStatus.CANCELLED)
    assert await store.get_runs_to_stop() == ()


@deadlines
async def test_ctl_3_as_of_governs_the_deadline(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    deadline = clock() + MINUTE
    await store.configure_run(run_id, FLOW, "manual", timeout_at=deadline)
    assert await store.get_runs_to_stop() == ()
    assert await store.get_runs_to_stop(as_of=deadline - timedelta(microseconds=1)) == ()
    assert [run.run_id for run in await store.get_runs_to_stop(as_of=deadline)] == [run_id]
    clock.advance(minutes=1)
    assert [run.run_id for run in await store.get_runs_to_stop()] == [run_id]


@deadlines
async def test_ctl_3_ordered_by_deadline_then_run_those_without_last(
    store: FlowStore, clock: VirtualClock
) -> None:
    now = clock()
    wanted = []
    for number, timeout_at in ((5, now - MINUTE), (3, now), (4, now), (1, None), (2, None)):
        run_id = UUID(int=number)
        wanted.append(run_id)
        await new_run(store, run_id=run_id)
        await store.configure_run(run_id, FLOW, "manual", timeout_at=timeout_at)
        await store.request_cancel(run_id)
    for take in (5, 100, 4, 2, 0):
        assert [run.run_id for run in await store.get_runs_to_stop(take=take)] == wanted[:take]


@deadlines
async def test_ctl_3_extend_deadline_undoes_the_time_out_and_keeps_a_users_cancel(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    await store.configure_run(run_id, FLOW, "manual", idempotency_key="key", timeout_at=clock())
    await store.mark_timed_out(run_id, "late")
    await store.request_cancel(run_id, "user")
    before = await _control(store, run_id)
    new_deadline = clock.advance(minutes=1) + MINUTE
    assert await store.extend_deadline(run_id, new_deadline) is True
    after = await _control(store, run_id)
    assert (after.timeout_at, after.timed_out_at) == (new_deadline, None)
    assert (after.cancel_requested, after.cancel_reason) == (True, "user")
    assert after.cancel_requested_at == before.cancel_requested_at
    assert (after.created_at, after.idempotency_key) == (before.created_at, "key")


@deadlines
async def test_ctl_3_after_extending_the_run_may_time_out_again(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    await store.configure_run(run_id, FLOW, "manual", timeout_at=clock())
    await store.mark_timed_out(run_id, "late")
    assert await store.extend_deadline(run_id, clock() + MINUTE)
    control = await _control(store, run_id)
    assert (control.cancel_requested, control.cancel_reason, control.cancel_requested_at) == (
        False,
        None,
        None,
    )
    assert await store.get_runs_to_stop() == ()
    clock.advance(minutes=1)
    assert await store.mark_timed_out(run_id, "later", as_of=clock()) is True
    assert (await _control(store, run_id)).cancel_reason == "later"


@deadlines
async def test_ctl_3_extend_deadline_may_shorten_and_gives_one_where_there_was_none(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = uuid4()
    await store.configure_run(run_id, FLOW, "manual")
    for deadline in (clock() + MINUTE, clock() - MINUTE):
        assert await store.extend_deadline(run_id, deadline) is True
        assert (await _control(store, run_id)).timeout_at == deadline


@deadlines
async def test_ctl_3_extend_deadline_without_control_record_is_false(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    before = await picture(store, run_id)
    assert await store.extend_deadline(run_id, clock()) is False
    assert await store.extend_deadline(uuid4(), clock()) is False
    assert await picture(store, run_id) == before
