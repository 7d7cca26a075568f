"""Several processes on one store (MULTI_PROCESS), and what survives the death of one (DURABLE)."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any
from uuid import UUID, uuid4

import pytest

from flowstore_core import (
    Capability,
    FlowStore,
    RunAlreadyExistsError,
    RunNotFoundError,
    RunStatus,
    SignalDeliveryStatus,
    StaleAttemptError,
    StepAlreadyCompletedError,
    StepStatus,
    open_store,
)
from tests.conftest import OpenAnother
from tests.contract.scenes import FLOW, MINUTE, assert_sound, new_run, run_step, the_step
from tests.virtual_clock import VirtualClock
from tests.worker import Call, Fleet, Worker

pytestmark = pytest.mark.needs(Capability.MULTI_PROCESS)

PROCESSES = 4

AtOnce = Callable[[Sequence[Sequence[Call]]], Awaitable[list[list[Any]]]]


@pytest.fixture
async def processes(namespace: str, clock: VirtualClock, fleet: Fleet) -> AsyncIterator[list[Worker]]:
    """Processes with a store each, on the namespace, all at the clock's present moment."""
    workers = fleet.take(PROCESSES)
    assert await asyncio.gather(*(worker.ask("open", namespace, clock()) for worker in workers)) == [
        None
    ] * len(workers)
    yield workers
    await asyncio.gather(*(worker.ask("close") for worker in workers))


@pytest.fixture
def at_once(processes: list[Worker]) -> AtOnce:
    """Makes each process run its calls, all calls of all processes at the same time."""

    async def run(calls: Sequence[Sequence[Call]]) -> list[list[Any]]:
        pairs = list(zip(processes, calls, strict=True))
        await asyncio.gather(*(worker.ask("prepare", theirs) for worker, theirs in pairs))
        return list(await asyncio.gather(*(worker.ask("go") for worker, _ in pairs)))

    return run


async def test_clm_1_one_of_many_processes_claims(store: FlowStore, at_once: AtOnce) -> None:
    run_id = await new_run(store)
    keys = [f"step {n:02}" for n in range(60)]
    answers = await at_once(
        [
            [
                ("try_claim_step", {"run_id": run_id, "step_key": key, "owner": f"{process} {twice} {key}"})
                for key in keys
                for twice in range(2)
            ]
            for process in range(PROCESSES)
        ]
    )
    won = [
        (key, f"{process} {twice} {key}")
        for process, theirs in enumerate(answers)
        for (key, twice), answer in zip([(k, t) for k in keys for t in range(2)], theirs, strict=True)
        if answer
    ]
    assert {type(answer) for theirs in answers for answer in theirs} == {bool}
    assert sorted(key for key, _ in won) == keys
    assert {c.step_key: c.owner for c in await store.get_step_claims(run_id)} == dict(won)


async def test_clm_1_one_of_many_processes_dispatches(store: FlowStore, at_once: AtOnce) -> None:
    run_id = await new_run(store)
    keys = [f"step {n:02}" for n in range(60)]
    answers = await at_once(
        [[("try_record_dispatch", {"run_id": run_id, "step_key": key}) for key in keys]] * PROCESSES
    )
    for key, theirs in zip(keys, zip(*answers, strict=True), strict=True):
        assert sorted(theirs) == [False] * (PROCESSES - 1) + [True], key


async def test_clm_6_one_of_many_processes_takes_over(
    store: FlowStore, namespace: str, clock: VirtualClock, fleet: Fleet
) -> None:
    run_id = await new_run(store)
    keys = [f"step {n:02}" for n in range(40)]
    for key in keys:
        assert await store.try_claim_step(run_id, key, owner="dead", lease=MINUTE)
    workers = fleet.take(PROCESSES)
    now = clock.advance(minutes=1)
    await asyncio.gather(*(worker.ask("open", namespace, now) for worker in workers))
    for number, worker in enumerate(workers):
        calls = [
            (
                "try_claim_step",
                {"run_id": run_id, "step_key": key, "owner": f"{number} {key}", "lease": MINUTE},
            )
            for key in keys
        ]
        await worker.ask("prepare", calls)
    answers = await asyncio.gather(*(worker.ask("go") for worker in workers))
    await asyncio.gather(*(worker.ask("close") for worker in workers))
    owners = {c.step_key: c.owner for c in await store.get_step_claims(run_id)}
    for index, key in enumerate(keys):
        won = [f"{number} {key}" for number, theirs in enumerate(answers) if theirs[index]]
        assert won == [owners[key]]
        assert not await store.renew_step_claim(run_id, key, "dead", MINUTE)


async def test_idm_2_one_of_many_processes_registers_a_key(store: FlowStore, at_once: AtOnce) -> None:
    keys = [f"key {n:02}" for n in range(50)]
    ids = [[uuid4() for _ in keys] for _ in range(PROCESSES)]
    answers = await at_once(
        [
            [
                (
                    "try_register_idempotency_key",
                    {"flow_id": FLOW, "trigger_key": "manual", "idempotency_key": key, "run_id": run_id},
                )
                for key, run_id in zip(keys, mine, strict=True)
            ]
            for mine in ids
        ]
    )
    for index, key in enumerate(keys):
        (winner,) = [process for process in range(PROCESSES) if answers[process][index]]
        found = await store.find_run_id_by_idempotency_key(FLOW, "manual", key)
        assert found == ids[winner][index]


async def test_idm_3_one_of_many_processes_triggers(store: FlowStore, at_once: AtOnce) -> None:
    keys = [f"key {n:02}" for n in range(40)]
    answers = await at_once(
        [
            [
                (
                    "trigger_run",
                    {
                        "flow_id": FLOW,
                        "flow_name": "orders",
                        "run_id": uuid4(),
                        "trigger_key": "manual",
                        "trigger_data": str(process),
                        "idempotency_key": key,
                    },
                )
                for key in keys
            ]
            for process in range(PROCESSES)
        ]
    )
    for theirs in zip(*answers, strict=True):
        (winner,) = [number for number, result in enumerate(theirs) if result.created]
        # The losers are given the winner's run, not merely a refusal.
        assert {result.run.run_id for result in theirs} == {theirs[winner].run.run_id}
        assert {result.run.trigger_data for result in theirs} == {str(winner)}
    assert len(await store.get_runs(take=1000)) == len(keys)


async def test_run_1_one_of_many_processes_starts_a_run(store: FlowStore, at_once: AtOnce) -> None:
    ids = [uuid4() for _ in range(40)]
    answers = await at_once(
        [
            [
                (
                    "start_run",
                    {"flow_id": FLOW, "flow_name": str(process), "run_id": run_id, "trigger_key": "manual"},
                )
                for run_id in ids
            ]
            for process in range(PROCESSES)
        ]
    )
    names = {run.run_id: run.flow_name for run in await store.get_runs(take=1000)}
    for run_id, theirs in zip(ids, zip(*answers, strict=True), strict=True):
        (won,) = [answer for answer in theirs if not isinstance(answer, Exception)]
        assert won.flow_name == names[run_id]
        lost = [answer for answer in theirs if isinstance(answer, RunAlreadyExistsError)]
        assert len(lost) == PROCESSES - 1
        assert {error.run_id for error in lost} == {run_id}


async def test_stp_1_attempts_are_numbered_without_gaps_across_processes(
    store: FlowStore, at_once: AtOnce
) -> None:
    run_id = await new_run(store)
    answers = await at_once(
        [
            [
                (
                    "record_step_start",
                    {"run_id": run_id, "step_key": "poll", "step_type": "http", "input_json": f"{p} {n}"},
                )
                for n in range(30)
            ]
            for p in range(PROCESSES)
        ]
    )
    told = {number: f"{p} {n}" for p, theirs in enumerate(answers) for n, number in enumerate(theirs)}
    assert sorted(told) == list(range(1, 30 * PROCESSES + 1))
    step = await the_step(store, run_id, "poll")
    assert {a.attempt: a.input_json for a in step.attempts} == told
    await assert_sound(store, run_id)


async def test_stp_4_of_outcomes_from_many_processes_one_wins_whole(
    store: FlowStore, at_once: AtOnce
) -> None:
    run_id = await new_run(store)
    keys = [f"step {n:02}" for n in range(30)]
    for key in keys:
        await store.record_step_start(run_id, key, "http")
    statuses = [StepStatus.SUCCEEDED, StepStatus.FAILED, StepStatus.SKIPPED, StepStatus.PENDING]
    answers = await at_once(
        [
            [
                (
                    "record_step_complete",
                    {
                        "run_id": run_id,
                        "step_key": key,
                        "status": statuses[process],
                        "output_json": str(process),
                        "attempt": 1,
                    },
                )
                for key in keys
            ]
            for process in range(PROCESSES)
        ]
    )
    for key, theirs in zip(keys, zip(*answers, strict=True), strict=True):
        (winner,) = [process for process, answer in enumerate(theirs) if answer is None]
        lost = [type(answer) for answer in theirs if answer is not None]
        assert lost == [StepAlreadyCompletedError] * (PROCESSES - 1)
        step = await the_step(store, run_id, key)
        assert (step.status, step.output_json) == (statuses[winner], str(winner))


async def test_stp_6_double_clicks_in_many_processes_reopen_once(store: FlowStore, at_once: AtOnce) -> None:
    ids = [await new_run(store) for _ in range(20)]
    for run_id in ids:
        await run_step(store, run_id, "charge", StepStatus.FAILED)
        await store.complete_run(run_id, RunStatus.FAILED)
    calls: list[Call] = [
        call
        for run_id in ids
        for call in (
            ("retry_step", {"run_id": run_id, "step_key": "charge", "attempt": 1}),
            ("record_step_start", {"run_id": run_id, "step_key": "charge", "step_type": "http"}),
        )
    ]
    answers = await at_once([calls] * PROCESSES)
    for index in range(len(ids)):
        clicks = [theirs[2 * index] for theirs in answers]
        starts = [theirs[2 * index + 1] for theirs in answers]
        numbers = [number for number in starts if isinstance(number, int)]
        # Gapless, whoever came first; the late clicks met an attempt that had started.
        assert sorted(numbers) == list(range(2, 2 + len(numbers)))
        assert {type(click) for click in clicks} <= {type(None), StaleAttemptError}
        assert clicks.count(None) >= 1
    await assert_sound(store, *ids)


async def test_run_2_one_of_many_processes_completes(store: FlowStore, at_once: AtOnce) -> None:
    ids = [await new_run(store) for _ in range(40)]
    endings = [RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.CANCELLED, RunStatus.FAILED]
    answers = await at_once(
        [
            [
                ("complete_run", {"run_id": i, "status": ending, "expected": {} if n % 2 else None})
                for i in ids
            ]
            for n, ending in enumerate(endings)
        ]
    )
    for index, run_id in enumerate(ids):
        (winner,) = [process for process in range(PROCESSES) if answers[process][index]]
        assert await store.get_run_status(run_id) is endings[winner]


async def test_ctl_2_one_of_many_processes_sets_a_latch(store: FlowStore, at_once: AtOnce) -> None:
    ids = [await new_run(store) for _ in range(30)]
    answers = await at_once(
        [
            [("request_cancel", {"run_id": run_id, "reason": str(process)}) for run_id in ids]
            for process in range(PROCESSES)
        ]
    )
    for index, run_id in enumerate(ids):
        (winner,) = [process for process in range(PROCESSES) if answers[process][index]]
        control = await store.get_run_control(run_id)
        assert control is not None
        assert control.cancel_reason == str(winner)


@pytest.mark.parametrize(("waiting", "each"), [(30, 10), (12, 10)])
async def test_sig_3_deliveries_of_many_processes_make_exactly_min(
    store: FlowStore, at_once: AtOnce, waiting: int, each: int
) -> None:
    run_id = await new_run(store)
    for number in range(waiting):
        await store.register_waiter(run_id, f"wait {number:02}", "go")
    answers = await at_once(
        [
            [
                ("deliver_signal", {"run_id": run_id, "signal_name": "go", "payload_json": f"{p} {n}"})
                for n in range(each)
            ]
            for p in range(PROCESSES)
        ]
    )
    results = [(f"{p} {n}", r) for p, theirs in enumerate(answers) for n, r in enumerate(theirs)]
    delivered = [
        (r.step_key, payload) for payload, r in results if r.status is SignalDeliveryStatus.DELIVERED
    ]
    assert len(delivered) == len(dict(delivered)) == min(waiting, PROCESSES * each)
    assert Counter(result.status for _, result in results)[SignalDeliveryStatus.NOT_FOUND] == 0
    kept = {w.step_key: w.payload_json for w in await store.get_waiters(run_id) if w.delivered_at}
    assert kept == dict(delivered)


async def test_evt_1_sequences_of_many_processes_are_in_commit_order(
    store: FlowStore, processes: list[Worker]
) -> None:
    run_id = await new_run(store)
    each = 40
    for number, worker in enumerate(processes):
        await worker.ask("prepare", [("append_event", {"run_id": run_id, "event_type": f"{number}"})] * each)
    working = asyncio.gather(*(worker.ask("go") for worker in processes))
    seen: list[int] = []
    while len(seen) < each * PROCESSES:
        # Following by the last sequence misses nothing, however the processes interleave.
        events = await store.get_run_events(run_id, after=seen[-1] if seen else 0)
        seen += [event.sequence for event in events]
        await asyncio.sleep(0)
    told = [sequence for theirs in await working for sequence in theirs]
    assert seen == sorted(told)
    assert len(set(seen)) == each * PROCESSES


async def test_ret_2_a_cleanup_and_retries_in_other_processes(
    store: FlowStore, processes: list[Worker], namespace: str, clock: VirtualClock, at_once: AtOnce
) -> None:
    ids = [uuid4() for _ in range(40)]
    for run_id in ids:
        await store.trigger_run(FLOW, "orders", run_id, "manual", idempotency_key=str(run_id))
        await run_step(store, run_id, "charge", StepStatus.FAILED)
        await store.complete_run(run_id, RunStatus.FAILED)
    cutoff = clock() + MINUTE
    retries: list[Call] = [("retry_step", {"run_id": run_id, "step_key": "charge"}) for run_id in ids]
    cleanup: list[Call] = [("cleanup", {"cutoff": cutoff})]
    answers = await at_once([cleanup, retries, retries, cleanup])
    deleted = answers[0][0] + answers[3][0]
    kept = {run.run_id for run in await store.get_runs(take=1000)}
    assert len(kept) + deleted == len(ids)
    for index, run_id in enumerate(ids):
        for theirs in answers[1:3]:
            assert theirs[index] is None or isinstance(theirs[index], RunNotFoundError)
        found = await store.find_run_id_by_idempotency_key(FLOW, "manual", str(run_id))
        assert (found == run_id) is (run_id in kept)
    assert {await store.get_run_status(run_id) for run_id in kept} <= {RunStatus.RUNNING}
    await assert_sound(store, *ids)


async def test_qry_3_a_detail_is_of_one_snapshot_while_other_processes_write(
    store: FlowStore, processes: list[Worker]
) -> None:
    run_id = await new_run(store)
    for number, worker in enumerate(processes):
        key = f"step {number}"
        calls: list[Call] = []
        for _ in range(15):
            calls.append(("record_step_start", {"run_id": run_id, "step_key": key, "step_type": "http"}))
            calls.append(
                (
                    "record_step_complete",
                    {"run_id": run_id, "step_key": key, "status": StepStatus.PENDING, "output_json": "out"},
                )
            )
        await worker.send("stream", calls)
    receiving = asyncio.gather(*(_receive_all(worker, 30) for worker in processes))
    looks = 0
    while not receiving.done() and looks < 200:
        await assert_sound(store, run_id)
        looks += 1
    assert looks > 0
    for answers in await receiving:
        assert [a for a in answers if a is not None] == list(range(1, 16))


async def _receive_all(worker: Worker, count: int) -> list[Any]:
    return [await worker.receive() for _ in range(count)]


async def test_con_6_twelve_processes_opening_a_new_store_at_once(
    namespace: str, clock: VirtualClock, fleet: Fleet
) -> None:
    workers = fleet.take(12)
    opened = await asyncio.gather(*(worker.ask("open", namespace, clock()) for worker in workers))
    assert opened == [None] * 12
    async with open_store(namespace, clock=clock) as store:
        run_id = await new_run(store)
        calls: list[Call] = [
            ("try_claim_step", {"run_id": run_id, "step_key": "a"}),
            ("append_event", {"run_id": run_id, "event_type": "opened"}),
        ]
        await asyncio.gather(*(worker.ask("prepare", calls) for worker in workers))
        answers = await asyncio.gather(*(worker.ask("go") for worker in workers))
        await asyncio.gather(*(worker.ask("close") for worker in workers))
        assert sum(claimed for claimed, _ in answers) == 1
        assert sorted(sequence for _, sequence in answers) == list(range(1, 13))


# The death of a process


def _lifecycles(run_id: UUID, count: int) -> list[Call]:
    """One of each kind of write, over and over; six acknowledgements a turn."""
    calls: list[Call] = []
    for number in range(count):
        step = {"run_id": run_id, "step_key": f"step {number:04}"}
        calls += [
            ("try_record_dispatch", step),
            ("try_claim_step", {**step, "owner": "me"}),
            ("record_step_start", {**step, "step_type": "http", "owner": "me"}),
            ("record_step_complete", {**step, "status": StepStatus.SUCCEEDED, "output_json": str(number)}),
            ("save_output", {"run_id": run_id, "key": f"out {number:04}", "value_json": str(number)}),
            ("append_event", {"run_id": run_id, "event_type": f"event {number:04}"}),
        ]
    return calls


@pytest.mark.needs(Capability.DURABLE)
@pytest.mark.parametrize("acknowledged", [61, 122, 183])
async def test_con_5_what_returned_survives_a_sigkill(
    namespace: str, clock: VirtualClock, acknowledged: int
) -> None:
    async with open_store(namespace, clock=clock) as store:
        run_id = await new_run(store)
    worker = Worker()
    try:
        assert await worker.ask("open", namespace, clock()) is None
        await worker.send("stream", _lifecycles(run_id, 400))
        answers = [await worker.receive() for _ in range(acknowledged)]
    finally:
        worker.kill()
    assert answers[:6] == [True, True, 1, None, None, 1]

    async with open_store(namespace, clock=clock) as store:
        await assert_sound(store, run_id)
        turns, rest = divmod(acknowledged, 6)
        # What was begun in the turn that was cut off is acknowledged too.
        begun = turns + (rest > 0)
        steps = await store.get_step_statuses(run_id)
        assert len(await store.get_dispatched_step_keys(run_id)) >= begun
        assert list(steps.values())[:turns] == [StepStatus.SUCCEEDED] * turns
        outputs = await store.get_outputs(run_id)
        assert list(outputs.values())[:turns] == [str(number) for number in range(turns)]
        events = await store.get_run_events(run_id, take=1000)
        assert [event.event_type for event in events][:turns] == [f"event {n:04}" for n in range(turns)]
        claims = {claim.step_key: claim.owner for claim in await store.get_step_claims(run_id)}
        assert set(steps) <= set(claims)
        assert set(claims.values()) == {"me"}
        # And the store goes on.
        assert await store.append_event(run_id, "after") == len(events) + 1
        assert await store.try_claim_step(run_id, "after")


@pytest.mark.needs(Capability.DURABLE)
async def test_con_5_the_store_goes_on_beside_a_process_that_dies(
    store: FlowStore, open_another: OpenAnother, namespace: str, clock: VirtualClock
) -> None:
    other = await open_another()
    run_id, own = await new_run(store), await new_run(store)
    worker = Worker()
    try:
        assert await worker.ask("open", namespace, clock()) is None
        await worker.send("stream", _lifecycles(run_id, 400))
        for number in range(1, 25):
            await worker.receive()
            assert await store.append_event(own, "beside") == number
    finally:
        worker.kill()
    for number in range(25, 35):
        assert await other.append_event(own, "after") == number
    await assert_sound(store, run_id)
    assert len(await store.get_outputs(run_id)) >= 4


@pytest.mark.needs(Capability.LEASES)
async def test_clm_6_the_claim_of_a_process_that_died_is_taken_over_after_its_lease(
    store: FlowStore, namespace: str, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    worker = Worker()
    try:
        await worker.ask("open", namespace, clock())
        claim = {"run_id": run_id, "step_key": "charge", "owner": "dead", "lease": MINUTE}
        start = {"run_id": run_id, "step_key": "charge", "step_type": "http", "owner": "dead"}
        await worker.send("stream", [("try_claim_step", claim), ("record_step_start", start)])
        assert [await worker.receive(), await worker.receive()] == [True, 1]
    finally:
        worker.kill()
    assert not await store.try_claim_step(run_id, "charge", owner="heir", lease=MINUTE)
    assert await store.get_stalled_steps() == ()
    clock.advance(minutes=1)
    (stalled,) = await store.get_stalled_steps()
    assert stalled.step_key == "charge"
    assert await store.try_claim_step(run_id, "charge", owner="heir", lease=MINUTE)
    assert await store.record_step_start(run_id, "charge", "http", owner="heir") == 2
    await store.record_step_complete(run_id, "charge", StepStatus.SUCCEEDED, attempt=2)
    await assert_sound(store, run_id)


@pytest.mark.needs(Capability.DURABLE)
async def test_con_6_a_process_that_dies_while_it_opens_leaves_a_store_that_opens(
    namespace: str, clock: VirtualClock
) -> None:
    # Killed at once, so at any point of starting, connecting, migrating or after it.
    for acknowledged in (False, False, True):
        worker = Worker()
        try:
            await worker.send("open", namespace, clock())
            if acknowledged:
                assert await worker.receive() is None
        finally:
            worker.kill()
    async with open_store(namespace, clock=clock) as store:
        run_id = await new_run(store)
        assert await run_step(store, run_id) == 1
