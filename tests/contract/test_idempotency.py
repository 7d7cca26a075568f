"""IDM: idempotency keys and the atomic trigger."""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID, uuid4

import pytest

from flowstore_core import Capability, FlowStore, RunAlreadyExistsError, RunStatus, TriggerResult
from tests.conftest import OpenAnother
from tests.contract.scenes import FLOW, MINUTE, new_run, outcomes, picture, run_step, together
from tests.virtual_clock import VirtualClock

trigger = pytest.mark.needs(Capability.TRIGGER)


async def test_idm_1_the_scope_is_flow_trigger_and_key(store: FlowStore) -> None:
    scopes = [
        (FLOW, "manual", "key"),
        (uuid4(), "manual", "key"),
        (FLOW, "timer", "key"),
        (FLOW, "manual", "other"),
        # Nothing is glued together.
        (FLOW, "manualk", "ey"),
        (FLOW, "manual:key", "key"),
    ]
    runs = [uuid4() for _ in scopes]
    for scope, run_id in zip(scopes, runs, strict=True):
        assert await store.try_register_idempotency_key(*scope, run_id) is True
    for scope, run_id in zip(scopes, runs, strict=True):
        assert await store.find_run_id_by_idempotency_key(*scope) == run_id


async def test_idm_1_keys_are_compared_exactly(store: FlowStore) -> None:
    keys = [
        "key",
        "Key",
        "KEY",
        "key ",
        " key",
        "key\n",
        "kéy",
        "ke\u0301y",
        "k%y",
        "k_y",
        "straße",
        "strasse",
    ]
    runs = {key: uuid4() for key in keys}
    for key, run_id in runs.items():
        assert await store.try_register_idempotency_key(FLOW, "manual", key, run_id) is True
    for key, run_id in runs.items():
        assert await store.find_run_id_by_idempotency_key(FLOW, "manual", key) == run_id
    assert await store.find_run_id_by_idempotency_key(FLOW, "Manual", "key") is None


async def test_idm_2_the_first_run_wins_and_wins_again(store: FlowStore) -> None:
    first, second = uuid4(), uuid4()
    assert await store.find_run_id_by_idempotency_key(FLOW, "manual", "key") is None
    assert await store.try_register_idempotency_key(FLOW, "manual", "key", first) is True
    assert await store.try_register_idempotency_key(FLOW, "manual", "key", second) is False
    assert await store.try_register_idempotency_key(FLOW, "manual", "key", first) is True
    found = await store.find_run_id_by_idempotency_key(FLOW, "manual", "key")
    assert found == first
    assert type(found) is UUID


async def test_idm_2_exactly_one_of_many_wins_and_everyone_finds_it(
    store: FlowStore, open_another: OpenAnother
) -> None:
    stores = [store, await open_another(), await open_another()]
    for round_ in range(8):
        key = f"key {round_}"
        runs = [uuid4() for _ in range(12)]
        won = await together(
            stores[n % 3].try_register_idempotency_key(FLOW, "manual", key, run_id)
            for n, run_id in enumerate(runs)
        )
        assert sum(won) == 1
        for one in stores:
            assert await one.find_run_id_by_idempotency_key(FLOW, "manual", key) == runs[won.index(True)]


async def test_idm_2_one_run_may_hold_many_keys(store: FlowStore) -> None:
    run_id = await new_run(store)
    for number in range(5):
        assert await store.try_register_idempotency_key(FLOW, "manual", f"key {number}", run_id)
    for number in range(5):
        assert await store.find_run_id_by_idempotency_key(FLOW, "manual", f"key {number}") == run_id


async def test_idm_2_registering_starts_nothing(store: FlowStore) -> None:
    run_id = uuid4()
    await store.try_register_idempotency_key(FLOW, "manual", "key", run_id)
    assert await store.get_run_status(run_id) is None
    assert await store.get_run_control(run_id) is None


@trigger
async def test_idm_3_a_new_key_registers_key_control_and_run(store: FlowStore, clock: VirtualClock) -> None:
    run_id, source = uuid4(), uuid4()
    result = await store.trigger_run(
        FLOW,
        "orders",
        run_id,
        "manual",
        trigger_data="data",
        job_id="job",
        source_run_id=source,
        idempotency_key="key",
        timeout_at=clock() + MINUTE,
    )
    (run,) = await store.get_runs()
    assert result == TriggerResult(run=run, created=True)
    assert (run.run_id, run.flow_id, run.flow_name, run.trigger_key) == (run_id, FLOW, "orders", "manual")
    assert (run.trigger_data, run.job_id, run.source_run_id) == ("data", "job", source)
    assert (run.status, run.started_at, run.completed_at) == (RunStatus.RUNNING, clock(), None)
    assert await store.find_run_id_by_idempotency_key(FLOW, "manual", "key") == run_id
    control = await store.get_run_control(run_id)
    assert control is not None
    assert (control.flow_id, control.trigger_key, control.idempotency_key) == (FLOW, "manual", "key")
    assert (control.timeout_at, control.created_at) == (clock() + MINUTE, clock())
    assert not control.cancel_requested


@trigger
async def test_idm_3_without_a_key_it_starts_run_and_control(store: FlowStore) -> None:
    run_id = uuid4()
    result = await store.trigger_run(FLOW, "orders", run_id, "manual")
    assert (result.created, result.run.run_id) == (True, run_id)
    control = await store.get_run_control(run_id)
    assert control is not None
    assert (control.idempotency_key, control.timeout_at) == (None, None)


@trigger
async def test_idm_3_a_taken_key_returns_the_existing_run_as_it_is(
    store: FlowStore, clock: VirtualClock
) -> None:
    first, second = uuid4(), uuid4()
    await store.trigger_run(FLOW, "orders", first, "manual", trigger_data="one", idempotency_key="key")
    await run_step(store, first)
    await store.complete_run(first, RunStatus.SUCCEEDED)
    clock.advance(seconds=1)
    before = await picture(store, first, second)
    result = await store.trigger_run(
        FLOW, "other", second, "manual", trigger_data="two", idempotency_key="key", timeout_at=clock()
    )
    assert result.created is False
    assert (result.run.run_id, result.run.trigger_data) == (first, "one")
    assert result.run.status is RunStatus.SUCCEEDED
    assert await picture(store, first, second) == before


@trigger
async def test_idm_3_the_same_run_again_under_its_key_is_the_existing_run(store: FlowStore) -> None:
    run_id = uuid4()
    first = await store.trigger_run(FLOW, "orders", run_id, "manual", idempotency_key="key")
    again = await store.trigger_run(FLOW, "orders", run_id, "manual", idempotency_key="key")
    assert (first.created, again.created) == (True, False)
    assert again.run == first.run


@trigger
async def test_idm_3_a_key_whose_run_never_started_starts_it(store: FlowStore, clock: VirtualClock) -> None:
    registered, asked = uuid4(), uuid4()
    await store.try_register_idempotency_key(FLOW, "manual", "key", registered)
    result = await store.trigger_run(
        FLOW,
        "orders",
        asked,
        "manual",
        trigger_data="data",
        job_id="job",
        idempotency_key="key",
        timeout_at=clock() + MINUTE,
    )
    assert result.created is True
    assert result.run.run_id == registered
    assert (result.run.flow_name, result.run.trigger_data, result.run.job_id) == ("orders", "data", "job")
    assert await store.get_run_status(asked) is None
    assert await store.get_run_control(asked) is None
    control = await store.get_run_control(registered)
    assert control is not None
    assert (control.idempotency_key, control.timeout_at) == ("key", clock() + MINUTE)
    # Whatever the run_id asked for is, even one that exists: the key decides.
    again = await store.trigger_run(FLOW, "orders", asked, "manual", idempotency_key="key")
    assert (again.created, again.run.run_id) == (False, registered)


@trigger
async def test_idm_3_a_registered_key_decides_over_a_run_id_that_exists(store: FlowStore) -> None:
    existing, registered = await new_run(store), uuid4()
    await store.try_register_idempotency_key(FLOW, "manual", "key", registered)
    result = await store.trigger_run(FLOW, "orders", existing, "manual", idempotency_key="key")
    assert (result.created, result.run.run_id) == (True, registered)


@trigger
async def test_idm_3_a_control_record_from_before_is_configured_anew_and_keeps_its_latches(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = uuid4()
    created = clock()
    await store.configure_run(run_id, uuid4(), "timer", idempotency_key="old", timeout_at=created)
    await store.request_cancel(run_id, "user")
    clock.advance(seconds=1)
    await store.trigger_run(FLOW, "orders", run_id, "manual", idempotency_key="key")
    control = await store.get_run_control(run_id)
    assert control is not None
    assert (control.flow_id, control.trigger_key) == (FLOW, "manual")
    assert (control.idempotency_key, control.timeout_at) == ("key", None)
    assert (control.created_at, control.cancel_reason) == (created, "user")


@trigger
@pytest.mark.parametrize("key", ["new key", None])
async def test_idm_3_a_run_id_that_exists_registers_nothing(store: FlowStore, key: str | None) -> None:
    run_id = await new_run(store)
    before = await picture(store, run_id)
    with pytest.raises(RunAlreadyExistsError) as caught:
        await store.trigger_run(FLOW, "orders", run_id, "manual", idempotency_key=key)
    assert caught.value.run_id == run_id
    assert await picture(store, run_id) == before
    assert await store.find_run_id_by_idempotency_key(FLOW, "manual", "new key") is None


@trigger
async def test_idm_3_of_many_triggers_under_one_key_one_creates_and_all_get_its_run(
    store: FlowStore, open_another: OpenAnother
) -> None:
    stores = [store, await open_another(), await open_another()]
    for round_ in range(6):
        results = await together(
            stores[n % 3].trigger_run(
                FLOW, "orders", uuid4(), "manual", trigger_data=str(n), idempotency_key=f"key {round_}"
            )
            for n in range(12)
        )
        (winner,) = [n for n, result in enumerate(results) if result.created]
        assert {result.run.run_id for result in results} == {results[winner].run.run_id}
        assert {result.run.trigger_data for result in results} == {str(winner)}
    assert len(await store.get_runs()) == 6


@trigger
async def test_idm_3_of_many_triggers_of_one_run_id_one_creates(
    store: FlowStore, open_another: OpenAnother
) -> None:
    stores = [store, await open_another(), await open_another()]
    for _ in range(4):
        run_id = uuid4()
        answers = await outcomes(
            stores[n % 3].trigger_run(FLOW, "orders", run_id, "manual", idempotency_key=f"{run_id} {n}")
            for n in range(9)
        )
        (winner,) = [n for n, answer in enumerate(answers) if not isinstance(answer, BaseException)]
        assert [type(a) for n, a in enumerate(answers) if n != winner] == [RunAlreadyExistsError] * 8
        registered = [
            n
            for n in range(9)
            if await store.find_run_id_by_idempotency_key(FLOW, "manual", f"{run_id} {n}") is not None
        ]
        assert registered == [winner]


@trigger
async def test_idm_3_registering_and_triggering_race_for_one_key(
    store: FlowStore, open_another: OpenAnother
) -> None:
    other = await open_another()
    for round_ in range(8):
        key, registering, triggering = f"key {round_}", uuid4(), uuid4()
        registered, result = await outcomes(
            [
                other.try_register_idempotency_key(FLOW, "manual", key, registering),
                store.trigger_run(FLOW, "orders", triggering, "manual", idempotency_key=key),
            ]
        )
        assert isinstance(result, TriggerResult)
        # Whoever came first, the key has a run and this call started it.
        assert result.created is True
        assert result.run.run_id == (registering if registered else triggering)
        assert await store.find_run_id_by_idempotency_key(FLOW, "manual", key) == result.run.run_id


@trigger
async def test_idm_4_cleaning_up_a_run_ends_its_deduplication(store: FlowStore, clock: VirtualClock) -> None:
    first, second = uuid4(), uuid4()
    await store.trigger_run(FLOW, "orders", first, "manual", idempotency_key="key")
    await store.complete_run(first, RunStatus.SUCCEEDED)
    clock.advance(hours=2)
    # Only cleanup ends it, not time.
    again = await store.trigger_run(FLOW, "orders", second, "manual", idempotency_key="key")
    assert again.created is False
    assert await store.cleanup(clock() - timedelta(hours=1)) == 1
    assert await store.find_run_id_by_idempotency_key(FLOW, "manual", "key") is None
    result = await store.trigger_run(FLOW, "orders", second, "manual", idempotency_key="key")
    assert (result.created, result.run.run_id) == (True, second)
