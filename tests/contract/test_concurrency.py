"""CON: many tasks, stores and event loops at once, and cancelled calls."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar
from uuid import UUID, uuid4

import pytest

from flowstore_core import (
    Capability,
    FlowStore,
    FlowStoreError,
    OutcomeUnknownError,
    RunStatus,
    StepStatus,
    StoreUnavailableError,
    open_store,
)
from tests.conftest import OpenAnother
from tests.contract.histories import RUNS, first_calls, random_call
from tests.contract.scenes import FLOW, assert_sound, new_run, outcomes, run_step, together
from tests.virtual_clock import VirtualClock

T = TypeVar("T")

# How many turns of the event loop a call gets before it is cancelled.
TURNS = [0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 8, 13, 21, 34, 55, 120, 300]


async def _storm(
    calls: Sequence[Callable[[], Awaitable[T]]], rng: random.Random, spared: float = 0.25
) -> list[T | BaseException]:
    """Run calls at once and cancel most of them at random moments; a result, an error or CancelledError."""

    async def cancel(task: asyncio.Task[T], turns: int) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()

    async def run(call: Callable[[], Awaitable[T]]) -> T:
        return await call()

    tasks = [asyncio.create_task(run(call)) for call in calls]
    cancelling = []
    for task in tasks:
        if rng.random() < spared:
            continue
        if turns := rng.choice(TURNS):
            cancelling.append(asyncio.create_task(cancel(task, turns)))
        else:
            # Before its first step: the only moment at which a call that never waits can be cancelled.
            task.cancel()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.gather(*cancelling)
    return list(answers)


def _calling(store: FlowStore, operation: str, /, **arguments: Any) -> Callable[[], Awaitable[Any]]:
    return lambda: getattr(store, operation)(**arguments)


def _trigger(run_id: UUID) -> dict[str, Any]:
    return {
        "flow_id": FLOW,
        "flow_name": "orders",
        "run_id": run_id,
        "trigger_key": "manual",
        "idempotency_key": str(run_id),
    }


def _was_cancelled(answer: object) -> bool:
    return isinstance(answer, asyncio.CancelledError)


# CON-1 and CON-2


@pytest.mark.parametrize("seed", range(4))
async def test_con_1_random_operations_at_once_leave_runs_sound(
    store: FlowStore, open_another: OpenAnother, clock: VirtualClock, seed: int
) -> None:
    rng = random.Random(seed)
    stores = [store, await open_another(), await open_another()]
    for operation, arguments in first_calls(rng):
        await getattr(store, operation)(**arguments)

    async def work(one: FlowStore) -> int:
        done = 0
        for number in range(60):
            operation, arguments = random_call(rng, clock)
            # Nothing but the store's own errors ever surfaces, and the database is there.
            try:
                await getattr(one, operation)(**arguments)
                done += 1
            except StoreUnavailableError:
                raise
            except FlowStoreError:
                pass
            if number % 15 == 0:
                await assert_sound(one, *RUNS)
        return done

    done = await together(work(stores[n % 3]) for n in range(9))
    assert sum(done) > 100
    for one in stores:
        await assert_sound(one, *RUNS)


async def test_con_1_workers_share_the_steps_of_many_runs(
    store: FlowStore, open_another: OpenAnother
) -> None:
    stores = [store, await open_another(), await open_another()]
    run_ids = [await new_run(store) for _ in range(3)]
    keys = [f"step {n}" for n in range(12)]

    async def work(number: int) -> list[tuple[UUID, str]]:
        one, rng, mine = stores[number % 3], random.Random(number), []
        steps = [(run_id, key) for run_id in run_ids for key in keys]
        rng.shuffle(steps)
        for run_id, key in steps:
            owner = f"{number} {run_id} {key}"
            if await one.try_record_dispatch(run_id, key):
                await one.annotate_dispatch(run_id, key, owner)
            if await one.try_claim_step(run_id, key, owner=owner):
                attempt = await one.record_step_start(run_id, key, "http", owner=owner)
                await one.record_step_complete(
                    run_id, key, StepStatus.SUCCEEDED, output_json=owner, attempt=attempt
                )
                mine.append((run_id, key))
        return mine

    done = await together(work(number) for number in range(9))
    assert sorted(step for mine in done for step in mine) == sorted((r, k) for r in run_ids for k in keys)
    expected = dict.fromkeys(keys, StepStatus.SUCCEEDED)
    for run_id in run_ids:
        detail = await store.get_run_detail(run_id)
        assert detail is not None
        claims = {claim.step_key: claim.owner for claim in await store.get_step_claims(run_id)}
        # Each step was done once, by whoever held its claim.
        assert {step.step_key: step.output_json for step in detail.steps} == claims
        assert {step.attempt_count for step in detail.steps} == {1}
        ended = await together(
            one.complete_run(run_id, RunStatus.SUCCEEDED, expected=expected) for one in stores
        )
        assert sorted(ended) == [False, False, True]


async def test_con_1_several_event_loops_in_several_threads(store: FlowStore, namespace: str) -> None:
    run_id = await new_run(store)
    keys = [f"step {n}" for n in range(30)]
    won: dict[int, list[str]] = {}
    numbers: list[int] = []
    barrier = threading.Barrier(4)

    async def work(thread: int) -> None:
        async with open_store(namespace) as own:
            await asyncio.to_thread(barrier.wait)
            answers = await together(own.try_claim_step(run_id, key, owner=str(thread)) for key in keys)
            won[thread] = [key for key, answer in zip(keys, answers, strict=True) if answer]
            numbers.extend([await own.record_step_start(run_id, "shared", "http") for _ in range(10)])

    await together(asyncio.to_thread(asyncio.run, work(thread)) for thread in range(4))
    assert sorted(key for mine in won.values() for key in mine) == sorted(keys)
    assert {c.step_key: c.owner for c in await store.get_step_claims(run_id)} == {
        key: str(thread) for thread, mine in won.items() for key in mine
    }
    assert sorted(numbers) == list(range(1, 41))


async def test_con_1_a_read_sees_what_its_caller_wrote_before(
    store: FlowStore, open_another: OpenAnother
) -> None:
    other = await open_another()
    run_ids = [await new_run(store) for _ in range(8)]

    async def work(run_id: UUID) -> None:
        for number in range(1, 11):
            assert await store.record_step_start(run_id, "poll", "http", input_json=str(number)) == number
            detail = await other.get_run_detail(run_id)
            assert detail is not None
            assert detail.steps[0].input_json == str(number)
            await other.record_step_complete(run_id, "poll", StepStatus.PENDING, attempt=number)
            assert await store.get_step_statuses(run_id) == {"poll": StepStatus.PENDING}

    await together(work(run_id) for run_id in run_ids)


# CON-4


@pytest.mark.parametrize("seed", range(3))
async def test_con_4_a_cancelled_claim_without_owner_is_given_back(
    store: FlowStore, open_another: OpenAnother, seed: int
) -> None:
    rng = random.Random(seed)
    other = await open_another()
    run_id = await new_run(store)
    keys = [f"step {n:03}" for n in range(120)]
    answers = await _storm(
        [_calling(store, "try_claim_step", run_id=run_id, step_key=key) for key in keys], rng
    )
    assert any(_was_cancelled(answer) for answer in answers)
    assert all(answer is True or _was_cancelled(answer) for answer in answers)
    # Closing waits for what is still to be given back.
    await store.aclose()
    held = {key for key, answer in zip(keys, answers, strict=True) if answer is True}
    assert await other.get_claimed_step_keys(run_id) == held
    for key in set(keys) - held:
        assert await other.try_claim_step(run_id, key)


@pytest.mark.parametrize("seed", range(3))
async def test_con_4_a_cancelled_dispatch_is_given_back(
    store: FlowStore, open_another: OpenAnother, seed: int
) -> None:
    rng = random.Random(seed)
    other = await open_another()
    run_id = await new_run(store)
    keys = [f"step {n:03}" for n in range(120)]
    answers = await _storm(
        [_calling(store, "try_record_dispatch", run_id=run_id, step_key=key) for key in keys], rng
    )
    assert any(_was_cancelled(answer) for answer in answers)
    assert all(answer is True or _was_cancelled(answer) for answer in answers)
    await store.aclose()
    held = {key for key, answer in zip(keys, answers, strict=True) if answer is True}
    assert await other.get_dispatched_step_keys(run_id) == held


@pytest.mark.parametrize("seed", range(3))
async def test_con_4_what_a_cancelled_winner_gives_back_is_never_anothers(
    store: FlowStore, open_another: OpenAnother, seed: int
) -> None:
    rng = random.Random(seed)
    other, third = await open_another(), await open_another()
    run_id = await new_run(store)
    keys = [f"step {n:02}" for n in range(30)] * 4
    rng.shuffle(keys)
    calls = [
        _calling(one, "try_claim_step", run_id=run_id, step_key=key)
        for key, one in zip(keys, [store, other] * 60, strict=True)
    ]
    answers = await _storm(calls, rng)
    await together([store.aclose(), other.aclose()])
    winners = [key for key, answer in zip(keys, answers, strict=True) if answer is True]
    assert len(winners) == len(set(winners))
    assert await third.get_claimed_step_keys(run_id) == set(winners)


@pytest.mark.parametrize("seed", range(2))
async def test_con_4_a_cancelled_claim_with_owner_is_found_out_by_asking_again(
    store: FlowStore, open_another: OpenAnother, seed: int
) -> None:
    rng = random.Random(seed)
    other = await open_another()
    run_id = await new_run(store)
    keys = [f"step {n:02}" for n in range(80)]
    answers = await _storm(
        [_calling(store, "try_claim_step", run_id=run_id, step_key=key, owner=key) for key in keys], rng
    )
    assert all(answer is True or _was_cancelled(answer) for answer in answers)
    again = await together(store.try_claim_step(run_id, key, owner=key) for key in keys)
    assert again == [True] * len(keys)
    assert {c.step_key: c.owner for c in await other.get_step_claims(run_id)} == {key: key for key in keys}


@pytest.mark.needs(Capability.TRIGGER)
@pytest.mark.parametrize("seed", range(2))
async def test_con_4_a_cancelled_trigger_has_happened_whole_or_not(
    store: FlowStore, open_another: OpenAnother, seed: int
) -> None:
    rng = random.Random(seed)
    other = await open_another()
    ids = [uuid4() for _ in range(60)]
    answers = await _storm([_calling(store, "trigger_run", **_trigger(i)) for i in ids], rng)
    await store.aclose()
    for run_id, answer in zip(ids, answers, strict=True):
        there = await other.get_run_status(run_id) is not None
        assert (await other.get_run_control(run_id) is not None) is there
        found = await other.find_run_id_by_idempotency_key(FLOW, "manual", str(run_id))
        assert (found == run_id) is there
        assert there or _was_cancelled(answer)
        again = await other.trigger_run(FLOW, "orders", uuid4(), "manual", idempotency_key=str(run_id))
        assert again.created is not there


@pytest.mark.parametrize("seed", range(2))
async def test_con_4_a_cancelled_start_has_happened_whole_or_not(
    store: FlowStore, open_another: OpenAnother, seed: int
) -> None:
    rng = random.Random(seed)
    other = await open_another()
    run_id = await new_run(store)
    answers = await _storm(
        [
            _calling(
                store,
                "record_step_start",
                run_id=run_id,
                step_key="poll",
                step_type="http",
                input_json=str(n),
            )
            for n in range(60)
        ],
        rng,
    )
    await store.aclose()
    await assert_sound(other, run_id)
    detail = await other.get_run_detail(run_id)
    assert detail is not None
    inputs = {} if not detail.steps else {a.attempt: a.input_json for a in detail.steps[0].attempts}
    told = {answer: str(n) for n, answer in enumerate(answers) if isinstance(answer, int)}
    assert told.items() <= inputs.items()
    # None happened twice.
    assert len(set(inputs.values())) == len(inputs)


@pytest.mark.parametrize("seed", range(2))
async def test_con_4_a_cancelled_retry_has_happened_whole_or_not(
    store: FlowStore, open_another: OpenAnother, seed: int
) -> None:
    rng = random.Random(seed)
    other = await open_another()
    ids = [await new_run(store) for _ in range(25)]
    for run_id in ids:
        await store.try_record_dispatch(run_id, "charge")
        await store.try_claim_step(run_id, "charge", owner="me")
        await run_step(store, run_id, "charge", StepStatus.FAILED)
        await store.record_skipped_step(run_id, "ship", "http")
        await store.register_waiter(run_id, "charge", "go")
        await store.request_cancel(run_id)
        await store.complete_run(run_id, RunStatus.FAILED)
    answers = await _storm(
        [_calling(store, "retry_step", run_id=i, step_key="charge", reset=["ship"]) for i in ids], rng
    )
    await store.aclose()
    for run_id, answer in zip(ids, answers, strict=True):
        statuses = await other.get_step_statuses(run_id)
        control = await other.get_run_control(run_id)
        assert control is not None
        seen = (
            await other.get_run_status(run_id),
            statuses.get("charge"),
            statuses.get("ship"),
            len(await other.get_step_claims(run_id)),
            len(await other.get_dispatches(run_id)),
            await other.get_waiter(run_id, "charge") is not None,
            control.cancel_requested,
        )
        untouched = (RunStatus.FAILED, StepStatus.FAILED, StepStatus.SKIPPED, 1, 1, True, True)
        done = (RunStatus.RUNNING, StepStatus.PENDING, None, 0, 0, False, False)
        assert seen == done or (seen == untouched and _was_cancelled(answer))


@pytest.mark.parametrize("seed", range(3))
async def test_con_4_after_a_storm_the_store_works_and_nothing_is_left_running(
    open_another: OpenAnother, namespace: str, clock: VirtualClock, seed: int
) -> None:
    rng = random.Random(seed)
    keeper = await open_another()
    tasks, threads = asyncio.all_tasks(), threading.active_count()
    async with open_store(namespace, clock=clock) as store:
        for operation, arguments in first_calls(rng):
            await getattr(store, operation)(**arguments)
        cancelled = 0
        for _ in range(4):
            calls = [random_call(rng, clock) for _ in range(60)]
            answers = await _storm([_calling(store, name, **arguments) for name, arguments in calls], rng)
            for answer in answers:
                cancelled += _was_cancelled(answer)
                assert not isinstance(answer, StoreUnavailableError | OutcomeUnknownError)
                if isinstance(answer, BaseException):
                    assert isinstance(answer, FlowStoreError | asyncio.CancelledError)
            run_id = await new_run(store)
            assert await store.try_claim_step(run_id, "charge", owner="me")
            assert await store.record_step_start(run_id, "charge", "http", owner="me") == 1
    assert cancelled > 0
    assert asyncio.all_tasks() == tasks
    assert threading.active_count() <= threads
    await assert_sound(keeper, *RUNS)


async def test_con_4_a_call_that_runs_into_a_timeout_leaves_the_store_usable(store: FlowStore) -> None:
    run_id = await new_run(store)
    for number in range(20):
        with pytest.raises(TimeoutError):
            await _run_into_a_timeout(store, run_id)
        assert await store.record_step_start(run_id, "poll", "http") == number + 1


async def _run_into_a_timeout(store: FlowStore, run_id: UUID) -> None:
    async with asyncio.timeout(0):
        await store.get_run_detail(run_id)
        await asyncio.sleep(0)


async def test_con_4_opening_may_be_cancelled(namespace: str, clock: VirtualClock) -> None:
    tasks = asyncio.all_tasks()

    async def open_and_use() -> None:
        async with open_store(namespace, clock=clock) as store:
            await store.ping()

    await _storm([open_and_use for _ in range(20)], random.Random(1), spared=0)
    async with open_store(namespace, clock=clock) as store:
        run_id = await new_run(store)
        assert await store.get_run_status(run_id) is RunStatus.RUNNING
    assert asyncio.all_tasks() == tasks


async def test_con_2_hot_spots_are_survived(store: FlowStore, open_another: OpenAnother) -> None:
    stores = [store, await open_another(), await open_another()]
    run_id = await new_run(store)
    await run_step(store, run_id, "poll", StepStatus.PENDING)

    async def hammer(number: int) -> None:
        one = stores[number % 3]
        for turn in range(6):
            await one.save_output(run_id, "out", f"{number} {turn}")
            await one.append_event(run_id, f"{number}")
            await one.try_claim_step(run_id, "poll")
            await one.record_step_start(run_id, "poll", "http")
            await one.release_step_claim(run_id, "poll")
            await one.register_waiter(run_id, "poll", "go")
            await one.deliver_signal(run_id, "go", "{}")
            await one.configure_run(run_id, FLOW, f"trigger {number}")
            await one.get_run_detail(run_id)

    answers = await outcomes(hammer(number) for number in range(12))
    assert answers == [None] * 12
    await assert_sound(store, run_id)
    assert len(await store.get_run_events(run_id)) == 72
