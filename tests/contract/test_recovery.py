"""STP-7 and STP-8: rescheduling a step in one act, and finding what nothing will move."""

from __future__ import annotations

from datetime import datetime, timedelta
from uuid import UUID

import pytest

from flowstore_core import (
    Capability,
    FlowStore,
    RunStatus,
    StaleAttemptError,
    StalledStep,
    StallReason,
    StepAlreadyCompletedError,
    StepDispatch,
    StepNotFoundError,
    StepStatus,
)
from tests.conftest import OpenAnother
from tests.contract.scenes import MINUTE, new_run, outcomes, picture, run_step, the_step, together
from tests.virtual_clock import VirtualClock

pytestmark = pytest.mark.needs(Capability.RECOVERY)

TICK = timedelta(microseconds=1)


# STP-7


async def test_stp_7_rescheduling_closes_releases_and_dispatches_in_one_act(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    await store.try_record_dispatch(run_id, "poll", due_at=clock())
    await store.annotate_dispatch(run_id, "poll", "job")
    await store.try_claim_step(run_id, "poll", owner="me")
    await store.record_step_start(run_id, "poll", "http", owner="me")
    now = clock.advance(seconds=1)
    await store.reschedule_step(run_id, "poll", attempt=1, output_json="not yet", due_at=now + MINUTE)

    step = await the_step(store, run_id, "poll")
    (attempt,) = step.attempts
    assert (attempt.status, attempt.completed_at) == (StepStatus.PENDING, now)
    assert (attempt.output_json, attempt.error_message) == ("not yet", None)
    assert (step.status, step.completed_at, step.output_json) == (StepStatus.PENDING, None, "not yet")
    assert await store.get_step_claims(run_id) == ()
    assert await store.get_dispatches(run_id) == (
        StepDispatch(run_id=run_id, step_key="poll", dispatched_at=now, due_at=now + MINUTE, job_id=None),
    )
    assert await store.try_claim_step(run_id, "poll", owner="next")
    assert await store.record_step_start(run_id, "poll", "http", owner="next") == 2


async def test_stp_7_a_step_without_dispatch_gets_one(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    await store.record_step_start(run_id, "poll", "http")
    await store.reschedule_step(run_id, "poll", attempt=1)
    (dispatch,) = await store.get_dispatches(run_id)
    assert (dispatch.dispatched_at, dispatch.due_at) == (clock(), None)


async def test_stp_7_again_for_the_attempt_it_closed_is_a_no_op(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    await store.record_step_start(run_id, "poll", "http")
    await store.reschedule_step(run_id, "poll", attempt=1, output_json="out", due_at=clock())
    await store.try_claim_step(run_id, "poll", owner="next")
    await store.annotate_dispatch(run_id, "poll", "job")
    before = await picture(store, run_id)
    clock.advance(seconds=1)
    await store.reschedule_step(run_id, "poll", attempt=1, output_json="out", due_at=clock())
    await store.reschedule_step(run_id, "poll", attempt=1, output_json="other", due_at=clock() + MINUTE)
    clock.advance(seconds=-1)
    assert await picture(store, run_id) == before


async def test_stp_7_even_after_its_dispatch_was_released(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.record_step_start(run_id, "poll", "http")
    await store.reschedule_step(run_id, "poll", attempt=1)
    await store.release_dispatch(run_id, "poll")
    await store.reschedule_step(run_id, "poll", attempt=1)
    assert await store.get_dispatches(run_id) == ()


async def test_stp_7_after_record_step_complete_as_pending_it_reschedules_all_the_same(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    await store.try_record_dispatch(run_id, "poll")
    await store.try_claim_step(run_id, "poll", owner="me")
    await store.record_step_start(run_id, "poll", "http", owner="me")
    ended = clock.advance(seconds=1)
    await store.record_step_complete(run_id, "poll", StepStatus.PENDING, output_json="first")
    now = clock.advance(seconds=1)
    await store.reschedule_step(run_id, "poll", attempt=1, output_json="second", due_at=now + MINUTE)
    step = await the_step(store, run_id, "poll")
    # The attempt was closed already: what it recorded stays.
    assert (step.output_json, step.attempts[0].completed_at) == ("first", ended)
    assert await store.get_step_claims(run_id) == ()
    (dispatch,) = await store.get_dispatches(run_id)
    assert (dispatch.dispatched_at, dispatch.due_at) == (now, now + MINUTE)
    before = await picture(store, run_id)
    await store.reschedule_step(run_id, "poll", attempt=1)
    assert await picture(store, run_id) == before


@pytest.mark.parametrize("status", [StepStatus.SUCCEEDED, StepStatus.FAILED, StepStatus.SKIPPED])
async def test_stp_7_an_attempt_with_another_outcome_is_not_rescheduled(
    store: FlowStore, status: StepStatus
) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id, "poll", status)
    before = await picture(store, run_id)
    with pytest.raises(StepAlreadyCompletedError) as caught:
        await store.reschedule_step(run_id, "poll", attempt=1)
    assert (caught.value.run_id, caught.value.step_key) == (run_id, "poll")
    assert await picture(store, run_id) == before


@pytest.mark.parametrize("attempt", [1, 3])
async def test_stp_7_an_attempt_that_is_not_the_last_is_stale(store: FlowStore, attempt: int) -> None:
    run_id = await new_run(store)
    await store.record_step_start(run_id, "poll", "http")
    await store.reschedule_step(run_id, "poll", attempt=1)
    await store.record_step_start(run_id, "poll", "http")
    before = await picture(store, run_id)
    with pytest.raises(StaleAttemptError) as caught:
        await store.reschedule_step(run_id, "poll", attempt=attempt)
    assert (caught.value.attempt, caught.value.last_attempt) == (attempt, 2)
    assert await picture(store, run_id) == before


async def test_stp_7_a_reopened_step_is_stale(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.record_step_start(run_id, "poll", "http")
    await store.retry_step(run_id, "poll")
    for attempt in (1, 2):
        with pytest.raises(StaleAttemptError):
            await store.reschedule_step(run_id, "poll", attempt=attempt)
    assert await store.get_dispatches(run_id) == ()


async def test_stp_7_a_step_that_never_started_is_not_found(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.try_record_dispatch(run_id, "poll")
    with pytest.raises(StepNotFoundError):
        await store.reschedule_step(run_id, "poll", attempt=1)


async def test_stp_7_on_a_terminal_run_the_attempt_closes_and_nothing_is_dispatched(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    await store.try_record_dispatch(run_id, "poll")
    await store.try_claim_step(run_id, "poll", owner="me")
    await store.record_step_start(run_id, "poll", "http", owner="me")
    await store.complete_run(run_id, RunStatus.CANCELLED)
    await store.reschedule_step(run_id, "poll", attempt=1, due_at=clock() + MINUTE)
    assert await store.get_step_statuses(run_id) == {"poll": StepStatus.PENDING}
    assert await store.get_step_claims(run_id) == ()
    assert await store.get_dispatches(run_id) == ()
    assert await store.get_run_status(run_id) is RunStatus.CANCELLED


async def test_stp_7_many_reschedules_at_once_dispatch_once(
    store: FlowStore, open_another: OpenAnother, clock: VirtualClock
) -> None:
    stores = [store, await open_another(), await open_another()]
    run_id = await new_run(store)
    await store.record_step_start(run_id, "poll", "http")
    due = [clock() + n * MINUTE for n in range(9)]
    await together(
        stores[n % 3].reschedule_step(run_id, "poll", attempt=1, output_json=str(n), due_at=due[n])
        for n in range(9)
    )
    (dispatch,) = await store.get_dispatches(run_id)
    step = await the_step(store, run_id, "poll")
    # One of them did all of it.
    assert dispatch.due_at == due[int(step.output_json or "")]


async def test_stp_7_completing_and_rescheduling_race(store: FlowStore, open_another: OpenAnother) -> None:
    other = await open_another()
    for _ in range(10):
        run_id = await new_run(store)
        await store.record_step_start(run_id, "poll", "http")
        completed, rescheduled = await outcomes(
            [
                store.record_step_complete(run_id, "poll", StepStatus.SUCCEEDED, attempt=1),
                other.reschedule_step(run_id, "poll", attempt=1),
            ]
        )
        errors = [error for error in (completed, rescheduled) if error is not None]
        assert [type(error) for error in errors] == [StepAlreadyCompletedError]
        dispatched = len(await store.get_dispatches(run_id))
        assert dispatched == (1 if rescheduled is None else 0)


# STP-8


def _stalled(run_id: UUID, key: str, status: StepStatus, reason: StallReason, since: datetime) -> StalledStep:
    return StalledStep(run_id=run_id, step_key=key, status=status, reason=reason, since=since)


async def test_stp_8_a_claim_counts_from_the_end_of_its_lease(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "claimed", owner="me", lease=MINUTE)
    await store.try_claim_step(run_id, "running", owner="me", lease=2 * MINUTE)
    await store.record_step_start(run_id, "running", "http", owner="me")
    expires = clock() + MINUTE
    assert await store.get_stalled_steps(as_of=expires - TICK) == ()
    claimed = _stalled(run_id, "claimed", StepStatus.PENDING, StallReason.LEASE_EXPIRED, expires)
    assert await store.get_stalled_steps(as_of=expires) == (claimed,)
    running = _stalled(run_id, "running", StepStatus.RUNNING, StallReason.LEASE_EXPIRED, expires + MINUTE)
    assert await store.get_stalled_steps(as_of=expires + MINUTE) == (claimed, running)


async def test_stp_8_a_claim_without_lease_never_stalls(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    await store.try_record_dispatch(run_id, "claimed")
    await store.try_claim_step(run_id, "claimed", owner="me")
    await store.try_claim_step(run_id, "running")
    await store.record_step_start(run_id, "running", "http")
    assert await store.get_stalled_steps(as_of=clock() + timedelta(days=3650)) == ()


async def test_stp_8_an_expired_claim_comes_before_the_dispatch(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    await store.try_record_dispatch(run_id, "a")
    await store.try_claim_step(run_id, "a", owner="me", lease=MINUTE)
    expires = clock() + MINUTE
    assert await store.get_stalled_steps(as_of=expires) == (
        _stalled(run_id, "a", StepStatus.PENDING, StallReason.LEASE_EXPIRED, expires),
    )


async def test_stp_8_a_dispatch_counts_from_due_at_else_from_dispatched_at(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    now = clock()
    await store.try_record_dispatch(run_id, "now")
    await store.try_record_dispatch(run_id, "later", due_at=now + MINUTE)
    await store.try_record_dispatch(run_id, "long due", due_at=now - MINUTE)
    long_due = _stalled(run_id, "long due", StepStatus.PENDING, StallReason.DISPATCH_DUE, now - MINUTE)
    at_once = _stalled(run_id, "now", StepStatus.PENDING, StallReason.DISPATCH_DUE, now)
    later = _stalled(run_id, "later", StepStatus.PENDING, StallReason.DISPATCH_DUE, now + MINUTE)
    assert await store.get_stalled_steps(as_of=now - TICK) == (long_due,)
    assert await store.get_stalled_steps(as_of=now) == (long_due, at_once)
    assert await store.get_stalled_steps(as_of=now + MINUTE - TICK) == (long_due, at_once)
    assert await store.get_stalled_steps(as_of=now + MINUTE) == (long_due, at_once, later)


async def test_stp_8_a_dispatched_step_that_runs_without_claim_counts_its_dispatch(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    await store.try_record_dispatch(run_id, "a", due_at=clock() + MINUTE)
    await store.record_step_start(run_id, "a", "http")
    assert await store.get_stalled_steps() == ()
    due = clock.advance(minutes=1)
    assert await store.get_stalled_steps() == (
        _stalled(run_id, "a", StepStatus.RUNNING, StallReason.DISPATCH_DUE, due),
    )


async def test_stp_8_a_missing_dispatch_counts_from_the_last_attempt(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    started = clock()
    await store.record_step_start(run_id, "open", "http")
    await store.record_step_start(run_id, "pending", "http")
    await store.record_step_start(run_id, "reopened", "http")
    ended = clock.advance(seconds=10)
    await store.record_step_complete(run_id, "pending", StepStatus.PENDING)
    await store.record_step_complete(run_id, "reopened", StepStatus.FAILED)
    clock.advance(seconds=10)
    await store.retry_step(run_id, "reopened")
    not_dispatched = StallReason.NOT_DISPATCHED
    still_open = _stalled(run_id, "open", StepStatus.RUNNING, not_dispatched, started)
    pending = _stalled(run_id, "pending", StepStatus.PENDING, not_dispatched, ended)
    reopened = _stalled(run_id, "reopened", StepStatus.PENDING, not_dispatched, ended)
    assert await store.get_stalled_steps(as_of=started - TICK) == ()
    assert await store.get_stalled_steps(as_of=started) == (still_open,)
    assert await store.get_stalled_steps(as_of=ended - TICK) == (still_open,)
    assert await store.get_stalled_steps(as_of=ended) == (still_open, pending, reopened)


async def test_stp_8_an_engine_that_dies_between_complete_and_dispatch_is_noticed(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    await store.try_record_dispatch(run_id, "poll")
    await store.try_claim_step(run_id, "poll", owner="me")
    await store.record_step_start(run_id, "poll", "http", owner="me")
    await store.record_step_complete(run_id, "poll", StepStatus.PENDING)
    await store.release_step_claim(run_id, "poll", owner="me")
    await store.release_dispatch(run_id, "poll")
    (stalled,) = await store.get_stalled_steps()
    assert (stalled.step_key, stalled.reason) == ("poll", StallReason.NOT_DISPATCHED)


async def test_stp_8_without_as_of_it_is_the_stores_now(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    await store.try_record_dispatch(run_id, "a", due_at=clock() + MINUTE)
    assert await store.get_stalled_steps() == ()
    clock.advance(minutes=1)
    assert [stalled.step_key for stalled in await store.get_stalled_steps()] == ["a"]


async def test_stp_8_as_of_may_lie_in_the_past(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    await store.record_step_start(run_id, "a", "http")
    clock.advance(minutes=10)
    grace = 5 * MINUTE
    assert [s.step_key for s in await store.get_stalled_steps(as_of=clock() - grace)] == ["a"]
    assert await store.get_stalled_steps(as_of=clock() - 3 * grace) == ()


async def test_stp_8_terminal_steps_and_runs_do_not_stall(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    for key, status in (
        ("succeeded", StepStatus.SUCCEEDED),
        ("failed", StepStatus.FAILED),
        ("skipped", StepStatus.SKIPPED),
    ):
        await store.try_record_dispatch(run_id, key)
        await store.try_claim_step(run_id, key, owner="me", lease=MINUTE)
        await run_step(store, run_id, key, status)
    finished = await new_run(store)
    await store.try_record_dispatch(finished, "dispatched")
    await store.record_step_start(finished, "open", "http")
    await store.complete_run(finished, RunStatus.CANCELLED)
    assert await store.get_stalled_steps(as_of=clock() + timedelta(days=1)) == ()


async def test_stp_8_a_key_that_was_released_is_nothing(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    await store.try_record_dispatch(run_id, "a")
    await store.try_claim_step(run_id, "a", owner="me", lease=MINUTE)
    await store.release_step_claim(run_id, "a")
    await store.release_dispatch(run_id, "a")
    await run_step(store, run_id, "charge", StepStatus.FAILED)
    await store.record_skipped_step(run_id, "reset", "http")
    await store.retry_step(run_id, "charge", reset=["reset"])
    await store.try_claim_step(run_id, "charge")
    assert await store.get_stalled_steps(as_of=clock() + timedelta(days=1)) == ()


async def test_stp_8_a_reset_key_that_is_dispatched_again_stalls_as_pending(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id, "charge", StepStatus.FAILED)
    await store.record_skipped_step(run_id, "ship", "http")
    await store.retry_step(run_id, "charge", reset=["ship"])
    await store.try_claim_step(run_id, "charge")
    await store.try_record_dispatch(run_id, "ship")
    assert await store.get_stalled_steps() == (
        _stalled(run_id, "ship", StepStatus.PENDING, StallReason.DISPATCH_DUE, clock()),
    )


async def test_stp_8_a_waiting_step_is_not_stalled(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    now = clock()
    await store.record_step_start(run_id, "for ever", "wait")
    await store.register_waiter(run_id, "for ever", "go")
    await store.record_step_start(run_id, "a minute", "wait")
    await store.register_waiter(run_id, "a minute", "go", expires_at=now + MINUTE)
    await store.try_record_dispatch(run_id, "dispatched")
    await store.register_waiter(run_id, "dispatched", "go")
    assert await store.get_stalled_steps(as_of=now + MINUTE - TICK) == ()
    # as_of governs the waiter's expiry too.
    stalled = await store.get_stalled_steps(as_of=now + MINUTE)
    assert [s.step_key for s in stalled] == ["a minute"]


async def test_stp_8_a_delivered_or_expired_waiter_no_longer_holds_the_step(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    for key in ("delivered", "expired", "removed"):
        await store.record_step_start(run_id, key, "wait")
    await store.register_waiter(run_id, "delivered", "go")
    await store.register_waiter(run_id, "expired", "stop", expires_at=clock())
    await store.register_waiter(run_id, "removed", "stop")
    await store.deliver_signal(run_id, "go", "{}")
    await store.expire_waiter(run_id, "expired")
    await store.remove_waiter(run_id, "removed")
    assert [s.step_key for s in await store.get_stalled_steps()] == ["delivered", "expired", "removed"]


async def test_stp_8_an_expired_waiter_is_expired_whatever_as_of(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    started = clock()
    await store.record_step_start(run_id, "wait", "wait")
    await store.register_waiter(run_id, "wait", "go", expires_at=started + MINUTE)
    clock.advance(minutes=1)
    assert await store.get_stalled_steps(as_of=started) == ()
    await store.expire_waiter(run_id, "wait")
    assert [s.step_key for s in await store.get_stalled_steps(as_of=started)] == ["wait"]


async def test_stp_8_a_waiter_of_another_run_does_not_hold_the_step(store: FlowStore) -> None:
    run_id, other = await new_run(store), await new_run(store)
    await store.record_step_start(run_id, "a", "wait")
    await store.register_waiter(other, "a", "go")
    await store.register_waiter(run_id, "b", "go")
    assert [(s.run_id, s.step_key) for s in await store.get_stalled_steps()] == [(run_id, "a")]


async def test_stp_8_ordered_by_since_run_and_key(store: FlowStore, clock: VirtualClock) -> None:
    first, second = UUID(int=2), UUID(int=1)
    await new_run(store, run_id=first)
    await new_run(store, run_id=second)
    now = clock()
    for run_id in (first, second):
        for key in ("b", "a", "Z", "é"):
            await store.try_record_dispatch(run_id, key, due_at=now)
    await store.try_record_dispatch(first, "oldest", due_at=now - MINUTE)
    await store.record_step_start(second, "middle", "http")
    await store.try_claim_step(second, "lease", owner="me", lease=TICK)
    found = [(s.run_id.int, s.step_key) for s in await store.get_stalled_steps(as_of=now + TICK)]
    assert found == [
        (2, "oldest"),
        *[(1, key) for key in ("Z", "a", "b", "middle", "é")],
        *[(2, key) for key in ("Z", "a", "b", "é")],
        (1, "lease"),
    ]
    for take in (0, 1, 3, 11):
        assert [
            (s.run_id.int, s.step_key) for s in await store.get_stalled_steps(as_of=now + TICK, take=take)
        ] == found[:take]
