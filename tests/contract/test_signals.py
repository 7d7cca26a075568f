"""SIG: waiters and deliveries."""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID, uuid4

import pytest

from flowstore_core import (
    Capability,
    ConflictError,
    FlowSignalWaiter,
    FlowStore,
    SignalDeliveryResult,
    SignalDeliveryStatus,
)
from tests.conftest import OpenAnother
from tests.contract.scenes import MINUTE, new_run, outcomes, picture, together
from tests.virtual_clock import VirtualClock

waiters = pytest.mark.needs(Capability.WAITERS)

DELIVERED = SignalDeliveryStatus.DELIVERED
ALREADY = SignalDeliveryStatus.ALREADY_DELIVERED
NOT_FOUND = SignalDeliveryResult(status=SignalDeliveryStatus.NOT_FOUND, step_key=None, delivered_at=None)


async def _waiter(store: FlowStore, run_id: UUID, step_key: str = "wait") -> FlowSignalWaiter:
    waiter = await store.get_waiter(run_id, step_key)
    assert waiter is not None
    return waiter


async def test_sig_1_register_waiter_creates_it(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    await store.register_waiter(run_id, "wait", "go", expires_at=clock() + MINUTE)
    assert await _waiter(store, run_id) == FlowSignalWaiter(
        run_id=run_id,
        step_key="wait",
        signal_name="go",
        created_at=clock(),
        expires_at=clock() + MINUTE,
        delivered_at=None,
        payload_json=None,
        expired_at=None,
    )


async def test_sig_1_a_step_that_never_started_may_wait(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.register_waiter(run_id, "wait", "go")
    assert await store.get_step_statuses(run_id) == {}


async def test_sig_1_again_it_updates_name_and_expiry_and_keeps_created_at(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    created = clock()
    await store.register_waiter(run_id, "wait", "go", expires_at=created + MINUTE)
    clock.advance(seconds=1)
    await store.register_waiter(run_id, "wait", "stop")
    waiter = await _waiter(store, run_id)
    assert (waiter.signal_name, waiter.expires_at, waiter.created_at) == ("stop", None, created)
    assert await store.deliver_signal(run_id, "go", "{}") == NOT_FOUND
    assert (await store.deliver_signal(run_id, "stop", "{}")).status is DELIVERED


async def test_sig_1_again_on_a_delivered_waiter_it_keeps_the_payload(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    created = clock()
    await store.register_waiter(run_id, "wait", "go")
    delivered = clock.advance(seconds=1)
    await store.deliver_signal(run_id, "go", "payload")
    clock.advance(seconds=1)
    await store.register_waiter(run_id, "wait", "go", expires_at=clock() + MINUTE)
    assert await _waiter(store, run_id) == FlowSignalWaiter(
        run_id=run_id,
        step_key="wait",
        signal_name="go",
        created_at=created,
        expires_at=clock() + MINUTE,
        delivered_at=delivered,
        payload_json="payload",
        expired_at=None,
    )


async def test_sig_1_another_name_on_a_delivered_waiter_is_refused(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.register_waiter(run_id, "wait", "go")
    await store.deliver_signal(run_id, "go", "payload")
    before = await picture(store, run_id)
    with pytest.raises(ConflictError) as caught:
        await store.register_waiter(run_id, "wait", "stop")
    assert (caught.value.run_id, caught.value.step_key) == (run_id, "wait")
    assert await picture(store, run_id) == before


@waiters
@pytest.mark.parametrize("name", ["go", "stop"])
async def test_sig_1_an_expired_waiter_is_not_registered_again(
    store: FlowStore, clock: VirtualClock, name: str
) -> None:
    run_id = await new_run(store)
    await store.register_waiter(run_id, "wait", "go", expires_at=clock())
    await store.expire_waiter(run_id, "wait")
    before = await picture(store, run_id)
    with pytest.raises(ConflictError):
        await store.register_waiter(run_id, "wait", name)
    assert await picture(store, run_id) == before


async def test_sig_1_after_remove_waiter_a_new_one_may_be_registered(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    await store.register_waiter(run_id, "wait", "go")
    await store.deliver_signal(run_id, "go", "payload")
    await store.remove_waiter(run_id, "wait")
    now = clock.advance(seconds=1)
    await store.register_waiter(run_id, "wait", "stop")
    waiter = await _waiter(store, run_id)
    assert (waiter.signal_name, waiter.created_at, waiter.delivered_at) == ("stop", now, None)
    assert waiter.payload_json is None


async def test_sig_1_a_waiter_of_a_step_is_one_however_many_register_at_once(
    store: FlowStore, open_another: OpenAnother
) -> None:
    stores = [store, await open_another()]
    run_id = await new_run(store)
    await together(stores[n % 2].register_waiter(run_id, "wait", f"signal {n % 3}") for n in range(12))
    delivered = [await store.deliver_signal(run_id, f"signal {n}", "{}") for n in range(3)]
    assert sorted(result.status is DELIVERED for result in delivered) == [False, False, True]


async def test_sig_2_a_delivery_gives_the_payload_to_the_waiter(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    await store.register_waiter(run_id, "wait", "go")
    now = clock.advance(seconds=1)
    result = await store.deliver_signal(run_id, "go", ' {"a": 1} ')
    assert result == SignalDeliveryResult(status=DELIVERED, step_key="wait", delivered_at=now)
    waiter = await _waiter(store, run_id)
    assert (waiter.delivered_at, waiter.payload_json) == (now, ' {"a": 1} ')


async def test_sig_2_the_oldest_waiter_gets_it(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    for key in ("c", "b", "a"):
        await store.register_waiter(run_id, key, "go")
        clock.advance(microseconds=1)
    # Registering again does not make a waiter younger.
    await store.register_waiter(run_id, "c", "go")
    assert [(await store.deliver_signal(run_id, "go", "{}")).step_key for _ in range(3)] == ["c", "b", "a"]


async def test_sig_2_of_one_age_the_lower_key_gets_it(store: FlowStore) -> None:
    run_id = await new_run(store)
    keys = ["b", "a", "é", "Z", "\U0001f600", "\uffff"]
    for key in keys:
        await store.register_waiter(run_id, key, "go")
    got = [(await store.deliver_signal(run_id, "go", str(n))).step_key for n in range(len(keys))]
    assert got == sorted(keys)


async def test_sig_2_only_the_run_and_the_name_match(store: FlowStore) -> None:
    run_id, other = await new_run(store), await new_run(store)
    await store.register_waiter(run_id, "wait", "go")
    await store.register_waiter(other, "wait", "go")
    for name in ("Go", "go ", "g", "gó"):
        assert await store.deliver_signal(run_id, name, "{}") == NOT_FOUND
    assert (await store.deliver_signal(run_id, "go", "{}")).status is DELIVERED
    assert (await _waiter(store, other)).delivered_at is None


async def test_sig_2_the_same_delivery_id_returns_the_first_result(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    await store.register_waiter(run_id, "a", "go")
    await store.register_waiter(run_id, "b", "go")
    first = await store.deliver_signal(run_id, "go", "one", delivery_id="id")
    assert first.step_key == "a"
    before = await picture(store, run_id)
    clock.advance(seconds=1)
    assert await store.deliver_signal(run_id, "go", "two", delivery_id="id") == first
    assert await store.deliver_signal(run_id, "another name", "two", delivery_id="id") == first
    clock.advance(seconds=-1)
    assert await picture(store, run_id) == before
    second = await store.deliver_signal(run_id, "go", "two", delivery_id="ID")
    assert second.step_key == "b"


async def test_sig_2_a_delivery_id_outlives_its_waiter(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.register_waiter(run_id, "wait", "go")
    first = await store.deliver_signal(run_id, "go", "one", delivery_id="id")
    await store.remove_waiter(run_id, "wait")
    await store.register_waiter(run_id, "wait", "go")
    assert await store.deliver_signal(run_id, "go", "one", delivery_id="id") == first
    assert (await _waiter(store, run_id)).delivered_at is None


async def test_sig_2_only_delivered_is_remembered(store: FlowStore) -> None:
    run_id = await new_run(store)
    assert await store.deliver_signal(run_id, "go", "{}", delivery_id="id") == NOT_FOUND
    await store.register_waiter(run_id, "a", "go")
    assert (await store.deliver_signal(run_id, "go", "{}")).status is DELIVERED
    assert (await store.deliver_signal(run_id, "go", "{}", delivery_id="id")).status is ALREADY
    await store.register_waiter(run_id, "b", "go")
    result = await store.deliver_signal(run_id, "go", "{}", delivery_id="id")
    assert (result.status, result.step_key) == (DELIVERED, "b")


async def test_sig_2_delivery_ids_are_per_run(store: FlowStore) -> None:
    run_id, other = await new_run(store), await new_run(store)
    for one in (run_id, other):
        await store.register_waiter(one, "wait", "go")
        assert (await store.deliver_signal(one, "go", "{}", delivery_id="id")).status is DELIVERED
    assert (await _waiter(store, other)).payload_json == "{}"


async def test_sig_2_one_delivery_id_many_times_at_once_delivers_once(
    store: FlowStore, open_another: OpenAnother
) -> None:
    stores = [store, await open_another(), await open_another()]
    for _ in range(5):
        run_id = await new_run(store)
        for number in range(4):
            await store.register_waiter(run_id, f"wait {number}", "go")
        results = await together(
            stores[n % 3].deliver_signal(run_id, "go", str(n), delivery_id="id") for n in range(12)
        )
        assert {result.status for result in results} == {DELIVERED}
        assert {result.step_key for result in results} == {"wait 0"}
        delivered = [w for w in await store.get_waiters(run_id) if w.delivered_at is not None]
        assert len(delivered) == 1


async def test_sig_3_with_none_undelivered_it_names_the_oldest_delivered(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    await store.register_waiter(run_id, "b", "go")
    clock.advance(seconds=1)
    await store.register_waiter(run_id, "a", "go")
    first = await store.deliver_signal(run_id, "go", "one")
    clock.advance(seconds=1)
    await store.deliver_signal(run_id, "go", "two")
    clock.advance(seconds=1)
    again = await store.deliver_signal(run_id, "go", "three")
    assert again == SignalDeliveryResult(status=ALREADY, step_key="b", delivered_at=first.delivered_at)
    assert [w.payload_json for w in await store.get_waiters(run_id)] == ["two", "one"]


async def test_sig_3_without_waiter_it_is_not_found(store: FlowStore) -> None:
    run_id = await new_run(store)
    assert await store.deliver_signal(run_id, "go", "{}") == NOT_FOUND
    await store.register_waiter(run_id, "wait", "go")
    await store.deliver_signal(run_id, "go", "{}")
    await store.remove_waiter(run_id, "wait")
    assert await store.deliver_signal(run_id, "go", "{}") == NOT_FOUND


@waiters
async def test_sig_3_an_expired_waiter_matches_nothing(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    await store.register_waiter(run_id, "expired", "go", expires_at=clock())
    await store.expire_waiter(run_id, "expired")
    assert await store.deliver_signal(run_id, "go", "{}") == NOT_FOUND
    clock.advance(seconds=1)
    await store.register_waiter(run_id, "fresh", "go")
    result = await store.deliver_signal(run_id, "go", "{}")
    assert (result.status, result.step_key) == (DELIVERED, "fresh")
    assert (await store.deliver_signal(run_id, "go", "{}")).step_key == "fresh"


@pytest.mark.parametrize(("waiting", "deliveries"), [(1, 12), (5, 12), (12, 5), (8, 8)])
async def test_sig_3_n_waiters_and_m_deliveries_make_exactly_min(
    store: FlowStore, open_another: OpenAnother, waiting: int, deliveries: int
) -> None:
    stores = [store, await open_another(), await open_another()]
    for _ in range(3):
        run_id = await new_run(store)
        for number in range(waiting):
            await store.register_waiter(run_id, f"wait {number:02}", "go")
        results = await together(
            stores[n % 3].deliver_signal(run_id, "go", str(n), delivery_id=f"id {n}" if n % 2 else None)
            for n in range(deliveries)
        )
        won = {result.step_key: str(n) for n, result in enumerate(results) if result.status is DELIVERED}
        assert len([r for r in results if r.status is DELIVERED]) == len(won) == min(waiting, deliveries)
        # No waiter that was there throughout is ever not found.
        assert {result.status for result in results} <= {DELIVERED, ALREADY}
        kept = {w.step_key: w.payload_json for w in await store.get_waiters(run_id) if w.delivered_at}
        assert kept == won


async def test_sig_3_a_waiter_that_is_registered_again_all_the_while_is_never_not_found(
    store: FlowStore, open_another: OpenAnother
) -> None:
    other = await open_another()
    for _ in range(5):
        run_id = await new_run(store)
        await store.register_waiter(run_id, "wait", "go")
        calls = [
            call
            for n in range(8)
            for call in (
                store.deliver_signal(run_id, "go", str(n)),
                other.register_waiter(run_id, "wait", "go"),
            )
        ]
        answers = await outcomes(calls)
        results = [answer for answer in answers if isinstance(answer, SignalDeliveryResult)]
        assert sorted(r.status for r in results) == sorted([DELIVERED] + [ALREADY] * 7)
        assert all(answer is None for answer in answers if not isinstance(answer, SignalDeliveryResult))


async def test_sig_4_the_store_does_not_act_on_expires_at(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    await store.register_waiter(run_id, "wait", "go", expires_at=clock())
    clock.advance(days=1)
    assert (await _waiter(store, run_id)).expired_at is None
    assert (await store.deliver_signal(run_id, "go", "{}")).status is DELIVERED


@waiters
async def test_sig_4_expire_waiter_closes_a_due_one_and_returns_it(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    await store.register_waiter(run_id, "wait", "go", expires_at=clock() + MINUTE)
    clock.now += MINUTE - timedelta(microseconds=1)
    before = await _waiter(store, run_id)
    assert await store.expire_waiter(run_id, "wait") == before
    assert await _waiter(store, run_id) == before
    now = clock.advance(microseconds=1)
    expired = await store.expire_waiter(run_id, "wait")
    assert expired is not None
    assert (expired.expired_at, expired.delivered_at, expired.payload_json) == (now, None, None)
    clock.advance(seconds=1)
    assert await store.expire_waiter(run_id, "wait") == expired
    assert await _waiter(store, run_id) == expired


@waiters
async def test_sig_4_a_waiter_without_expiry_does_not_expire(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    await store.register_waiter(run_id, "wait", "go")
    clock.advance(days=3650)
    waiter = await store.expire_waiter(run_id, "wait")
    assert waiter is not None
    assert waiter.expired_at is None


@waiters
async def test_sig_4_a_delivered_waiter_does_not_expire(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    await store.register_waiter(run_id, "wait", "go", expires_at=clock())
    await store.deliver_signal(run_id, "go", "payload")
    clock.advance(days=1)
    waiter = await store.expire_waiter(run_id, "wait")
    assert waiter is not None
    assert (waiter.expired_at, waiter.payload_json) == (None, "payload")


@waiters
async def test_sig_4_delivered_or_expired_one_of_the_two_for_ever(
    store: FlowStore, open_another: OpenAnother, clock: VirtualClock
) -> None:
    other = await open_another()
    for _ in range(15):
        run_id = await new_run(store)
        await store.register_waiter(run_id, "wait", "go", expires_at=clock())
        delivery, expired = await outcomes(
            [store.deliver_signal(run_id, "go", "payload"), other.expire_waiter(run_id, "wait")]
        )
        assert isinstance(delivery, SignalDeliveryResult)
        assert isinstance(expired, FlowSignalWaiter)
        if delivery.status is DELIVERED:
            assert (expired.expired_at, expired.delivered_at) == (None, delivery.delivered_at)
        else:
            assert delivery == NOT_FOUND
            assert expired.expired_at is not None
        assert await _waiter(store, run_id) == expired


async def test_sig_4_remove_waiter_returns_what_it_removed(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    await store.register_waiter(run_id, "open", "go")
    await store.register_waiter(run_id, "delivered", "stop", expires_at=clock())
    await store.deliver_signal(run_id, "stop", "payload")
    for key in ("open", "delivered"):
        before = await _waiter(store, run_id, key)
        assert await store.remove_waiter(run_id, key) == before
        assert await store.get_waiter(run_id, key) is None
        assert await store.remove_waiter(run_id, key) is None
    assert before.payload_json == "payload"


async def test_sig_4_removing_and_delivering_race(store: FlowStore, open_another: OpenAnother) -> None:
    other = await open_another()
    for _ in range(15):
        run_id = await new_run(store)
        await store.register_waiter(run_id, "wait", "go")
        delivery, removed = await outcomes(
            [store.deliver_signal(run_id, "go", "payload"), other.remove_waiter(run_id, "wait")]
        )
        assert isinstance(delivery, SignalDeliveryResult)
        assert isinstance(removed, FlowSignalWaiter)
        # A payload that was delivered is in the hands of whoever removed the waiter.
        assert removed.payload_json == ("payload" if delivery.status is DELIVERED else None)


async def test_sig_4_exactly_one_of_many_removes(store: FlowStore, open_another: OpenAnother) -> None:
    stores = [store, await open_another()]
    run_id = await new_run(store)
    await store.register_waiter(run_id, "wait", "go")
    removed = await together(stores[n % 2].remove_waiter(run_id, "wait") for n in range(8))
    assert len([waiter for waiter in removed if waiter is not None]) == 1


@waiters
async def test_qry_1_waiters_are_listed_by_key(store: FlowStore, clock: VirtualClock) -> None:
    run_id, other = await new_run(store), await new_run(store)
    keys = ["b", "a", "é", "Z", "\U0001f600", "\uffff"]
    for key in keys:
        await store.register_waiter(run_id, key, "go")
        clock.advance(seconds=1)
    await store.register_waiter(other, "c", "go")
    listed = await store.get_waiters(run_id)
    assert [waiter.step_key for waiter in listed] == sorted(keys)
    assert listed[0] == await store.get_waiter(run_id, sorted(keys)[0])
    assert await store.get_waiters(uuid4()) == ()
