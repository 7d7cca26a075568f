"""Opening and closing a store, and CON-6: opening many times at once migrates once."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest

from flowstore_core import (
    Capability,
    FlowStore,
    InvalidArgumentError,
    RunStatus,
    StoreClosedError,
    open_store,
)
from tests.conftest import OpenAnother
from tests.contract.operations import OPERATIONS, hostile_arguments, legal_arguments
from tests.contract.scenes import FLOW, new_run, outcomes, run_step, together
from tests.virtual_clock import VirtualClock


async def test_open_a_store_says_what_it_is(store: FlowStore, backend: str) -> None:
    assert store.backend == backend
    facts = {Capability.DURABLE, Capability.MULTI_PROCESS}
    assert store.capabilities == frozenset(Capability) - (facts if backend == "memory" else set())
    assert type(store.capabilities) is frozenset


async def test_open_ping_answers(store: FlowStore) -> None:
    await store.ping()
    await together(store.ping() for _ in range(5))


async def test_open_the_context_closes_the_store(namespace: str) -> None:
    async with open_store(namespace) as store:
        await store.ping()
    with pytest.raises(StoreClosedError):
        await store.ping()


async def test_open_the_context_closes_the_store_on_an_error_too(namespace: str) -> None:
    with pytest.raises(ZeroDivisionError):
        async with open_store(namespace) as store:
            raise ZeroDivisionError
    with pytest.raises(StoreClosedError):
        await store.ping()


async def test_open_aclose_is_idempotent_and_concurrent(namespace: str) -> None:
    async with open_store(namespace) as store:
        await together(store.aclose() for _ in range(5))
        await store.aclose()
    await store.aclose()


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_open_a_closed_store_says_so_after_argument_errors(store: FlowStore, operation: str) -> None:
    await store.aclose()
    with pytest.raises(StoreClosedError):
        await getattr(store, operation)(**legal_arguments(operation))
    for name, arguments in hostile_arguments(operation)[:3]:
        with pytest.raises(InvalidArgumentError) as caught:
            await getattr(store, operation)(**arguments)
        assert caught.value.argument == name


async def test_open_closing_one_leaves_the_others_open(store: FlowStore, open_another: OpenAnother) -> None:
    other = await open_another()
    run_id = await new_run(store)
    await store.aclose()
    assert await other.get_run_status(run_id) is RunStatus.RUNNING
    await run_step(other, run_id)


async def test_open_closing_lets_calls_in_flight_end(store: FlowStore, open_another: OpenAnother) -> None:
    other = await open_another()
    run_id = await new_run(store)
    calls = [asyncio.ensure_future(store.try_claim_step(run_id, f"step {n}", owner="me")) for n in range(20)]
    await asyncio.sleep(0)
    await store.aclose()
    answers = await asyncio.gather(*calls, return_exceptions=True)
    claimed = await other.get_claimed_step_keys(run_id)
    for number, answer in enumerate(answers):
        # Whoever was told of a claim holds it, and nobody is told anything else.
        assert answer is True or isinstance(answer, StoreClosedError)
        assert answer is not True or f"step {number}" in claimed


async def test_open_a_store_sees_what_was_stored_before_it_was_opened(
    store: FlowStore, open_another: OpenAnother
) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id)
    before = await store.get_run_detail(run_id)
    other = await open_another()
    assert await other.get_run_detail(run_id) == before


@pytest.mark.needs(Capability.DURABLE)
async def test_con_5_what_was_stored_outlives_every_store(namespace: str, clock: VirtualClock) -> None:
    async with open_store(namespace, clock=clock) as store:
        run_id = await new_run(store)
        await run_step(store, run_id)
        before = await store.get_run_detail(run_id)
    async with open_store(namespace, clock=clock) as store:
        assert await store.get_run_detail(run_id) == before


async def test_open_each_store_has_a_clock_of_its_own(store: FlowStore, open_another: OpenAnother) -> None:
    ahead = VirtualClock(datetime(2050, 1, 1, tzinfo=UTC))
    other = await open_another(clock=ahead)
    run_id = await new_run(store)
    await other.try_claim_step(run_id, "charge", owner="me", lease=timedelta(seconds=1))
    (claim,) = await store.get_step_claims(run_id)
    assert claim.claimed_at == ahead.now
    # What one writes the other compares with its own now.
    assert await store.get_claimed_step_keys(run_id) == {"charge"}
    ahead.advance(seconds=1)
    assert await other.get_claimed_step_keys(run_id) == frozenset()


async def test_open_without_clock_it_is_the_backends_own(open_another: OpenAnother) -> None:
    store = await open_another(clock=None)
    day = timedelta(days=1)
    before = datetime.now(UTC)
    run_id = await new_run(store)
    await run_step(store, run_id)
    detail = await store.get_run_detail(run_id)
    assert detail is not None
    step = detail.steps[0]
    assert step.completed_at is not None
    # No limit that a slow machine or a server's clock could pass.
    assert before - day < detail.started_at <= step.started_at <= step.completed_at < before + day
    assert detail.started_at.tzinfo is UTC
    assert (await store.get_statistics()).active_runs == 1


@pytest.mark.needs(Capability.LEASES)
async def test_open_without_clock_leases_are_held_and_renewed(open_another: OpenAnother) -> None:
    store = await open_another(clock=None)
    run_id = await new_run(store)
    assert await store.try_claim_step(run_id, "charge", owner="me", lease=timedelta(days=1))
    assert not await store.try_claim_step(run_id, "charge", owner="other", lease=timedelta(days=1))
    assert await store.renew_step_claim(run_id, "charge", "me", timedelta(days=2))
    (claim,) = await store.get_step_claims(run_id)
    assert claim.expires_at is not None
    assert claim.expires_at - claim.claimed_at >= timedelta(days=2)
    assert await store.record_step_start(run_id, "charge", "http", owner="me") == 1
    assert await store.get_stalled_steps() == ()


async def test_con_6_a_dozen_opening_a_new_store_at_once(open_another: OpenAnother) -> None:
    stores = await together(open_another() for _ in range(12))
    run_id = await new_run(stores[0])
    won = await together(one.try_claim_step(run_id, "charge", owner=f"{n}") for n, one in enumerate(stores))
    assert sum(won) == 1


async def test_con_6_opening_again_changes_nothing(store: FlowStore, open_another: OpenAnother) -> None:
    run_id = await new_run(store)
    before = await store.get_run_detail(run_id)
    for migrate in (True, False):
        other = await open_another(migrate=migrate)
        assert await other.get_run_detail(run_id) == before


async def test_open_positional_and_keyword_arguments_are_alike(store: FlowStore) -> None:
    run_id = uuid4()
    await store.start_run(flow_id=FLOW, flow_name="orders", run_id=run_id, trigger_key="manual")
    await store.record_step_start(run_id=run_id, step_key="charge", step_type="http")
    assert await store.get_runs(flow_id=FLOW) == await store.get_runs(FLOW)
    assert await store.request_cancel(run_id=run_id, reason="user")


async def test_open_a_failed_open_leaves_nothing_behind(namespace: str) -> None:
    tasks = asyncio.all_tasks()
    answers = await outcomes(_open_and_close(namespace, n) for n in range(6))
    assert answers == [None] * 6
    assert asyncio.all_tasks() == tasks


async def _open_and_close(url: str, number: int) -> None:
    async with open_store(url) as store:
        if number % 2:
            await store.ping()
