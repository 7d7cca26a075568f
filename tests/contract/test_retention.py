"""RET: cleanup deletes what is over, whole, and nothing else."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from uuid import UUID, uuid4

import pytest

from flowstore_core import (
    FlowStore,
    RunNotFoundError,
    RunStatus,
    SignalDeliveryStatus,
    StepNotFoundError,
    StepStatus,
)
from tests.conftest import OpenAnother
from tests.contract.scenes import FLOW, MINUTE, new_run, outcomes, picture, run_step, the_step, together
from tests.virtual_clock import VirtualClock


async def _furnished_run(store: FlowStore, run_id: UUID | None = None) -> UUID:
    """A completed run with something of every kind that belongs to a run."""
    run_id = run_id or uuid4()
    await store.trigger_run(FLOW, "orders", run_id, "manual", idempotency_key=f"key of {run_id}")
    await store.try_register_idempotency_key(FLOW, "manual", f"more of {run_id}", run_id)
    await store.try_record_dispatch(run_id, "charge")
    await store.try_claim_step(run_id, "charge", owner="me")
    await run_step(store, run_id, "charge", StepStatus.PENDING, output_json="out")
    await run_step(store, run_id, "charge", StepStatus.FAILED, output_json="out")
    await store.record_skipped_step(run_id, "skipped", "http")
    await store.retry_step(run_id, "charge", reset=["skipped"])
    await store.try_record_dispatch(run_id, "only dispatched")
    await store.try_claim_step(run_id, "only claimed")
    await store.register_waiter(run_id, "wait", "go")
    await store.register_waiter(run_id, "wait more", "go")
    await store.deliver_signal(run_id, "go", "payload", delivery_id="id")
    await store.save_output(run_id, "out", "1")
    await store.append_event(run_id, "done")
    await store.request_cancel(run_id, "enough")
    await store.complete_run(run_id, RunStatus.CANCELLED)
    return run_id


async def test_ret_1_runs_completed_strictly_before_the_cutoff_go(
    store: FlowStore, clock: VirtualClock
) -> None:
    ids = [await new_run(store) for _ in range(4)]
    for run_id, status in zip(
        ids, (RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.CANCELLED, RunStatus.SUCCEEDED), strict=True
    ):
        cutoff = clock.advance(seconds=1)
        await store.complete_run(run_id, status)
    assert await store.cleanup(cutoff) == 3
    assert [run.run_id for run in await store.get_runs()] == ids[3:]
    assert await store.cleanup(cutoff) == 0
    assert await store.cleanup(cutoff + timedelta(microseconds=1)) == 1
    assert await store.get_runs() == ()


async def test_ret_1_when_it_started_does_not_matter(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    cutoff = clock.advance(days=30)
    await store.complete_run(run_id, RunStatus.SUCCEEDED)
    assert await store.cleanup(cutoff) == 0


async def test_ret_1_everything_that_belongs_to_a_run_goes_with_it(
    store: FlowStore, clock: VirtualClock
) -> None:
    empty = await picture(store, unknown := uuid4())
    run_id = await _furnished_run(store)
    assert await store.cleanup(clock.advance(seconds=1)) == 1
    gone = await picture(store, run_id)
    assert gone[str(run_id)] == empty[str(unknown)]
    assert {key: value for key, value in gone.items() if key != str(run_id)} == {
        key: value for key, value in empty.items() if key != str(unknown)
    }
    for key in (f"key of {run_id}", f"more of {run_id}"):
        assert await store.find_run_id_by_idempotency_key(FLOW, "manual", key) is None
    page = await store.get_runs_page(search="orders")
    assert (page.runs, page.total_count) == ((), 0)
    delivery = await store.deliver_signal(run_id, "go", "{}", delivery_id="id")
    assert delivery.status is SignalDeliveryStatus.NOT_FOUND
    with pytest.raises(RunNotFoundError):
        await store.append_event(run_id, "more")


async def test_ret_1_a_run_started_anew_under_the_id_begins_empty(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await _furnished_run(store)
    await store.cleanup(clock.advance(seconds=1))
    fresh = await new_run(store)
    await new_run(store, run_id=run_id)
    one, other = await picture(store, run_id), await picture(store, fresh)
    of_one, of_other = one[str(run_id)], other[str(fresh)]
    assert of_one.pop("detail").steps == of_other.pop("detail").steps == ()
    assert of_one == of_other
    # Numbering begins anew, and nothing that was remembered is.
    assert await store.record_step_start(run_id, "charge", "http") == 1
    assert await store.append_event(run_id, "again") == 1
    with pytest.raises(StepNotFoundError):
        await store.record_step_complete(run_id, "skipped", StepStatus.SKIPPED)
    assert await store.record_step_start(run_id, "skipped", "http") == 1
    await store.register_waiter(run_id, "new", "go")
    delivery = await store.deliver_signal(run_id, "go", "new", delivery_id="id")
    assert (delivery.status, delivery.step_key) == (SignalDeliveryStatus.DELIVERED, "new")


async def test_ret_1_other_runs_stay_to_the_letter(store: FlowStore, clock: VirtualClock) -> None:
    gone = await _furnished_run(store)
    cutoff = clock.advance(seconds=1)
    kept = await _furnished_run(store)
    derived = await new_run(store, source_run_id=gone)
    before = await picture(store, kept, derived)
    assert await store.cleanup(cutoff) == 1
    after = await picture(store, kept, derived)
    assert (after[str(kept)], after[str(derived)]) == (before[str(kept)], before[str(derived)])
    assert await store.find_run_id_by_idempotency_key(FLOW, "manual", f"key of {kept}") == kept
    # A source need not be stored.
    assert [run.run_id for run in await store.get_derived_runs(gone)] == [derived]


async def test_ret_3_more_runs_than_any_batch(
    store: FlowStore, open_another: OpenAnother, clock: VirtualClock
) -> None:
    other = await open_another()
    ids = [UUID(int=n) for n in range(1, 1201)]
    await together(new_run(store, run_id=run_id) for run_id in ids)
    await together(store.complete_run(run_id, RunStatus.SUCCEEDED) for run_id in ids[:1150])
    cutoff = clock.advance(seconds=1)
    cleaning = asyncio.gather(store.cleanup(cutoff), other.cleanup(cutoff))
    turns = 0
    while not cleaning.done():
        await asyncio.sleep(0)
        turns += 1
    # Others get their turn between the batches, even where nothing has to be waited for.
    assert turns > 3
    assert sum(await cleaning) == 1150
    assert {run.run_id for run in await store.get_runs(take=1000)} == set(ids[1150:])


async def test_ret_2_running_runs_are_never_touched(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id)
    await store.configure_run(run_id, FLOW, "manual", idempotency_key="key", timeout_at=clock())
    await store.try_register_idempotency_key(FLOW, "manual", "key", run_id)
    before = await picture(store, run_id)
    clock.advance(days=3650)
    assert await store.cleanup(clock()) == 0
    clock.advance(days=-3650)
    assert await picture(store, run_id) == before
    assert await store.find_run_id_by_idempotency_key(FLOW, "manual", "key") == run_id


async def test_ret_2_a_reopened_run_is_running_again(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id, "charge", StepStatus.FAILED)
    await store.complete_run(run_id, RunStatus.FAILED)
    clock.advance(days=1)
    await store.retry_step(run_id, "charge")
    assert await store.cleanup(clock()) == 0
    assert (await the_step(store, run_id)).status is StepStatus.PENDING


async def test_ret_2_a_run_that_retry_reopens_meanwhile_is_kept_whole_or_deleted_whole(
    store: FlowStore, open_another: OpenAnother, clock: VirtualClock
) -> None:
    other = await open_another()
    ids = [uuid4() for _ in range(12)]
    for run_id in ids:
        await new_run(store, run_id=run_id)
        await run_step(store, run_id, "charge", StepStatus.FAILED, output_json="out")
        await store.save_output(run_id, "out", "1")
        await store.try_register_idempotency_key(FLOW, "manual", str(run_id), run_id)
        await store.complete_run(run_id, RunStatus.FAILED)
    cutoff = clock.advance(days=1)
    deleted, *retried = await outcomes(
        [store.cleanup(cutoff), *(other.retry_step(run_id, "charge") for run_id in ids)]
    )
    kept = [run_id for run_id, answer in zip(ids, retried, strict=True) if answer is None]
    assert all(answer is None or isinstance(answer, RunNotFoundError) for answer in retried)
    assert deleted == len(ids) - len(kept)
    for run_id in ids:
        whole = run_id in kept
        assert (await store.get_run_detail(run_id) is not None) is whole
        assert (await store.get_output(run_id, "out") == "1") is whole
        found = await store.find_run_id_by_idempotency_key(FLOW, "manual", str(run_id))
        assert (found == run_id) is whole
        if whole:
            assert (await the_step(store, run_id)).attempts[0].output_json == "out"


async def test_ret_3_stopped_halfway_it_has_deleted_whole_runs_only(
    store: FlowStore, open_another: OpenAnother, clock: VirtualClock
) -> None:
    ids = [uuid4() for _ in range(400)]

    async def furnish(run_id: UUID) -> None:
        await store.trigger_run(FLOW, "orders", run_id, "manual", idempotency_key=str(run_id))
        await run_step(store, run_id)
        await store.save_output(run_id, "out", "1")
        await store.complete_run(run_id, RunStatus.SUCCEEDED)

    await together(furnish(run_id) for run_id in ids)
    cutoff = clock.advance(days=1)
    cleaning = asyncio.ensure_future(store.cleanup(cutoff))
    other = await open_another()
    while len(await other.get_runs(take=1000)) == len(ids):  # noqa: ASYNC110 - the store is what changes
        await asyncio.sleep(0)
    cleaning.cancel()
    await asyncio.gather(cleaning, return_exceptions=True)
    await store.aclose()
    left = {run.run_id for run in await other.get_runs(take=1000)}
    for run_id in ids:
        whole = run_id in left
        assert (await other.get_step_statuses(run_id) == {"charge": StepStatus.SUCCEEDED}) is whole
        assert (await other.get_output(run_id, "out") == "1") is whole
        assert (await other.get_run_control(run_id) is not None) is whole
        found = await other.find_run_id_by_idempotency_key(FLOW, "manual", str(run_id))
        assert (found == run_id) is whole
    assert await other.cleanup(cutoff) == len(left)
    assert await other.get_runs() == ()


async def test_ret_3_two_cleanups_at_once_count_each_run_once(
    store: FlowStore, open_another: OpenAnother, clock: VirtualClock
) -> None:
    stores = [store, await open_another(), await open_another()]
    ids = [await new_run(store) for _ in range(40)]
    await together(store.complete_run(run_id, RunStatus.SUCCEEDED) for run_id in ids)
    cutoff = clock.advance(seconds=1)
    assert sum(await together(one.cleanup(cutoff) for one in stores)) == 40
    assert await store.get_runs() == ()


async def test_ret_3_writers_go_on_beside_a_cleanup(
    store: FlowStore, open_another: OpenAnother, clock: VirtualClock
) -> None:
    other = await open_another()
    ids = [uuid4() for _ in range(300)]
    await together(new_run(store, run_id=run_id) for run_id in ids)
    await together(store.complete_run(run_id, RunStatus.SUCCEEDED) for run_id in ids)
    cutoff = clock.advance(seconds=1)
    running = await new_run(store)

    async def write() -> list[int]:
        return [await run_step(other, running, "poll", StepStatus.PENDING) for _ in range(20)]

    deleted, numbers = await asyncio.gather(store.cleanup(cutoff), write())
    assert deleted == 300
    assert numbers == list(range(1, 21))


async def test_ret_4_old_keys_and_controls_whose_run_never_started_go(
    store: FlowStore, clock: VirtualClock
) -> None:
    never = uuid4()
    await store.try_register_idempotency_key(FLOW, "manual", "key", never)
    await store.configure_run(never, FLOW, "manual", idempotency_key="key")
    created = clock()
    clock.now = created + timedelta(hours=1)
    # Not strictly older than the cutoff yet.
    assert await store.cleanup(created) == 0
    assert await store.find_run_id_by_idempotency_key(FLOW, "manual", "key") == never
    assert await store.get_run_control(never) is not None
    assert await store.cleanup(created + timedelta(microseconds=1)) == 0
    assert await store.find_run_id_by_idempotency_key(FLOW, "manual", "key") is None
    assert await store.get_run_control(never) is None


async def test_ret_4_they_stay_for_an_hour_at_least(store: FlowStore, clock: VirtualClock) -> None:
    never = uuid4()
    await store.try_register_idempotency_key(FLOW, "manual", "key", never)
    await store.configure_run(never, FLOW, "manual")
    clock.now += timedelta(hours=1) - timedelta(microseconds=1)
    assert await store.cleanup(clock() + timedelta(days=1)) == 0
    assert await store.find_run_id_by_idempotency_key(FLOW, "manual", "key") == never
    assert await store.get_run_control(never) is not None


async def test_ret_4_each_key_of_a_run_that_never_started_has_its_own_age(
    store: FlowStore, clock: VirtualClock
) -> None:
    never = uuid4()
    await store.try_register_idempotency_key(FLOW, "manual", "old", never)
    clock.advance(hours=2)
    await store.try_register_idempotency_key(FLOW, "manual", "young", never)
    for hours, left in ((0, never), (2, None), (2, None)):
        clock.advance(hours=hours)
        await store.cleanup(clock())
        assert await store.find_run_id_by_idempotency_key(FLOW, "manual", "old") is None
        assert await store.find_run_id_by_idempotency_key(FLOW, "manual", "young") == left
    # A swept key is free again.
    other = uuid4()
    assert await store.try_register_idempotency_key(FLOW, "manual", "young", other)


async def test_ret_4_old_keys_and_controls_of_stored_runs_stay(store: FlowStore, clock: VirtualClock) -> None:
    run_id = uuid4()
    await store.try_register_idempotency_key(FLOW, "manual", "key", run_id)
    await store.configure_run(run_id, FLOW, "manual", timeout_at=clock() + MINUTE)
    clock.advance(days=1)
    await new_run(store, run_id=run_id)
    await store.complete_run(run_id, RunStatus.SUCCEEDED)
    # Completed at the cutoff, so it stays, and what belongs to it stays too.
    assert await store.cleanup(clock()) == 0
    assert await store.find_run_id_by_idempotency_key(FLOW, "manual", "key") == run_id
    assert await store.get_run_control(run_id) is not None


async def test_ret_nothing_to_clean_up(store: FlowStore, clock: VirtualClock) -> None:
    assert await store.cleanup(clock()) == 0
