"""CLM for the dispatch ledger: at most one dispatch of a step until it is released."""

from __future__ import annotations

from datetime import timedelta
from uuid import uuid4

import pytest

from flowstore_core import FlowStore, RunStatus, StepDispatch, StepStatus
from tests.conftest import OpenAnother
from tests.contract.scenes import MINUTE, new_run, picture, run_step, together
from tests.virtual_clock import VirtualClock


async def test_clm_1_exactly_one_of_many_dispatchers_wins(
    store: FlowStore, open_another: OpenAnother
) -> None:
    stores = [store, await open_another(), await open_another()]
    run_id = await new_run(store)
    keys = [f"step {number}" for number in range(20)]
    calls = [(key, one) for key in keys for one in stores for _ in range(2)]
    won = await together(one.try_record_dispatch(run_id, key) for key, one in calls)
    assert sorted(key for (key, _), answer in zip(calls, won, strict=True) if answer) == sorted(keys)
    assert await store.get_dispatched_step_keys(run_id) == set(keys)


async def test_clm_1_a_losing_dispatch_changes_nothing(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    assert await store.try_record_dispatch(run_id, "charge", due_at=clock() + MINUTE)
    await store.annotate_dispatch(run_id, "charge", "job 1")
    before = await store.get_dispatches(run_id)
    clock.advance(hours=1)
    assert not await store.try_record_dispatch(run_id, "charge")
    assert await store.get_dispatches(run_id) == before


async def test_clm_1_a_dispatch_is_recorded_with_its_time(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    first = clock()
    await store.try_record_dispatch(run_id, "b", due_at=first + MINUTE)
    second = clock.advance(seconds=1)
    await store.try_record_dispatch(run_id, "a")
    assert await store.get_dispatches(run_id) == (
        StepDispatch(run_id=run_id, step_key="a", dispatched_at=second, due_at=None, job_id=None),
        StepDispatch(run_id=run_id, step_key="b", dispatched_at=first, due_at=first + MINUTE, job_id=None),
    )


async def test_clm_2_a_dispatch_is_seen_by_every_store(store: FlowStore, open_another: OpenAnother) -> None:
    other = await open_another()
    run_id = await new_run(store)
    for number in range(10):
        assert await store.try_record_dispatch(run_id, f"step {number}")
        assert len(await other.get_dispatched_step_keys(run_id)) == number + 1
        assert not await other.try_record_dispatch(run_id, f"step {number}")


async def test_clm_3_releasing_frees_that_key_alone_and_is_idempotent(store: FlowStore) -> None:
    run_id, other_run = await new_run(store), await new_run(store)
    for run, key in ((run_id, "a"), (run_id, "b"), (other_run, "a")):
        assert await store.try_record_dispatch(run, key)
    await store.annotate_dispatch(run_id, "a", "job 1")
    await store.release_dispatch(run_id, "a")
    await store.release_dispatch(run_id, "a")
    assert await store.get_dispatched_step_keys(run_id) == {"b"}
    assert await store.get_dispatched_step_keys(other_run) == {"a"}
    assert await store.try_record_dispatch(run_id, "a")
    # The next dispatch is a new one, without the old one's job.
    assert [dispatch.job_id for dispatch in await store.get_dispatches(run_id)] == [None, None]


async def test_clm_3_releasing_a_dispatch_keeps_the_claim(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.try_record_dispatch(run_id, "charge")
    await store.try_claim_step(run_id, "charge", owner="me")
    await store.release_dispatch(run_id, "charge")
    assert await store.get_claimed_step_keys(run_id) == {"charge"}


async def test_clm_the_ledger_keeps_dispatches_of_started_and_finished_steps(store: FlowStore) -> None:
    run_id = await new_run(store)
    for key in ("done", "failed", "running", "waiting"):
        assert await store.try_record_dispatch(run_id, key)
    await run_step(store, run_id, "done")
    await run_step(store, run_id, "failed", StepStatus.FAILED)
    await store.record_step_start(run_id, "running", "http")
    assert await store.get_dispatched_step_keys(run_id) == {"done", "failed", "running", "waiting"}
    assert [d.step_key for d in await store.get_dispatches(run_id)] == [
        "done",
        "failed",
        "running",
        "waiting",
    ]


@pytest.mark.parametrize("status", [StepStatus.SUCCEEDED, StepStatus.FAILED, StepStatus.SKIPPED])
async def test_run_4_a_terminal_step_is_not_dispatched(store: FlowStore, status: StepStatus) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id, "charge", status)
    before = await picture(store, run_id)
    assert not await store.try_record_dispatch(run_id, "charge")
    assert await picture(store, run_id) == before


async def test_run_4_a_pending_or_running_step_is_dispatched_again(store: FlowStore) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id, "pending", StepStatus.PENDING)
    await store.record_step_start(run_id, "running", "http")
    assert await store.try_record_dispatch(run_id, "pending")
    assert await store.try_record_dispatch(run_id, "running")


@pytest.mark.parametrize("status", [RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.CANCELLED])
async def test_run_4_nothing_of_a_terminal_run_is_dispatched(store: FlowStore, status: RunStatus) -> None:
    run_id = await new_run(store)
    await store.complete_run(run_id, status)
    before = await picture(store, run_id)
    assert not await store.try_record_dispatch(run_id, "charge")
    assert await picture(store, run_id) == before


async def test_clm_7_annotating_stores_the_job_id(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    await store.try_record_dispatch(run_id, "charge", due_at=clock() + timedelta(days=1))
    (before,) = await store.get_dispatches(run_id)
    clock.advance(minutes=1)
    await store.annotate_dispatch(run_id, "charge", "job 1")
    await store.annotate_dispatch(run_id, "charge", "job 2")
    (after,) = await store.get_dispatches(run_id)
    assert after.job_id == "job 2"
    assert (after.dispatched_at, after.due_at) == (before.dispatched_at, before.due_at)


async def test_clm_7_annotating_never_creates_a_record(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "claimed")
    await store.record_step_start(run_id, "started", "http", job_id="own")
    before = await picture(store, run_id)
    for key in ("claimed", "started", "unknown"):
        await store.annotate_dispatch(run_id, key, "job 1")
    await store.annotate_dispatch(uuid4(), "charge", "job 1")
    assert await picture(store, run_id) == before
    # Nor does it lie in wait for the dispatch to come.
    for key in ("claimed", "started", "unknown"):
        assert await store.try_record_dispatch(run_id, key)
    assert [dispatch.job_id for dispatch in await store.get_dispatches(run_id)] == [None] * 3


async def test_clm_7_the_job_of_a_dispatch_is_not_the_job_of_an_attempt(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.try_record_dispatch(run_id, "charge")
    await store.record_step_start(run_id, "charge", "http", job_id="of the attempt")
    await store.annotate_dispatch(run_id, "charge", "of the dispatch")
    detail = await store.get_run_detail(run_id)
    assert detail is not None
    assert detail.job_id is None
    assert detail.steps[0].job_id == "of the attempt"
    (dispatch,) = await store.get_dispatches(run_id)
    assert dispatch.job_id == "of the dispatch"


async def test_clm_dispatches_of_unknown_runs_are_empty(store: FlowStore) -> None:
    assert await store.get_dispatches(uuid4()) == ()
    assert await store.get_dispatched_step_keys(uuid4()) == frozenset()
