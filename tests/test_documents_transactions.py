"""Transactions of the document toolkit: groups, lost answers, staged changes, and what the dead leave."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from datetime import timedelta
from uuid import UUID

import pytest

from flowstore_core import (
    OutcomeUnknownError,
    RunStatus,
    StepRequest,
    StepStatus,
    StoreUnavailableError,
    new_run_id,
)
from flowstore_core.instrumentation import NO_OBSERVERS
from flowstore_documents import (
    AppliedOrRefused,
    Change,
    DocumentStore,
    NotApplied,
    Range,
    SpaceLimits,
    Version,
    View,
    clear_keys,
    delete_all_keys,
    keys,
    queues,
)
from flowstore_documents.committer import Committer
from flowstore_documents.memory_space import Fault, MemoryData, MemorySpace
from flowstore_documents.transactions import AHEAD
from tests.documents_backend.stores import CountingSpace, PausingSpace, open_on, until
from tests.virtual_clock import VirtualClock

FLOW = UUID(int=3)
LEASE = timedelta(hours=1)
LOST = [Fault.LOST_REQUEST, Fault.LOST_REPLY, Fault.DELAYED]


@pytest.fixture
def data() -> MemoryData:
    return MemoryData()


@pytest.fixture
def space(data: MemoryData) -> CountingSpace:
    return CountingSpace(data)


@pytest.fixture
async def store(space: CountingSpace) -> AsyncIterator[DocumentStore]:
    async with open_on(space) as store:
        yield store


class ImmediateSpace(MemorySpace):
    """Replies without suspending the caller, as an embedded database may."""

    async def commit(self, changes: Sequence[Change]) -> Sequence[Version | None]:
        return self.data.commit(changes)


async def test_no_change_waits_for_a_sender_that_has_ended(data: MemoryData) -> None:
    committer = Committer(ImmediateSpace(data), 5.0, NO_OBSERVERS, "documents")

    async def put(key: bytes) -> int:
        return sum([await committer.commit("put", Change(puts={key: b""})) for _ in range(50)])

    async with asyncio.timeout(60):
        assert await asyncio.gather(*(put(bytes([n % 3])) for n in range(8))) == [50] * 8
    await committer.aclose()


async def start(store: DocumentStore) -> UUID:
    run_id = new_run_id()
    await store.start_run(FLOW, "orders", run_id, "manual")
    return run_id


def names(*, count: int) -> list[str]:
    return [f"step {number:04}" for number in range(count)]


# Groups


async def test_changes_of_different_runs_share_a_commit(store: DocumentStore, space: CountingSpace) -> None:
    runs = await asyncio.gather(*(start(store) for _ in range(20)))
    space.reset()
    assert all(await asyncio.gather(*(store.try_claim_step(run_id, "a") for run_id in runs)))
    assert sum(map(len, space.commits)) == 20
    assert len(space.commits) < 10


async def test_changes_of_one_run_share_a_commit_and_its_tick(
    store: DocumentStore, space: CountingSpace
) -> None:
    """A separate change puts the tick; MemorySpace refuses a commit that names a key twice."""
    run_id = await start(store)
    space.reset()
    assert all(await asyncio.gather(*(store.try_claim_step(run_id, key) for key in names(count=20))))
    assert len(space.commits) < 10
    tick = keys.steps_tick(run_id)
    assert all([tick in change.puts for change in changes].count(True) == 1 for changes in space.commits)


async def test_changes_that_share_a_tick_are_seen_by_those_that_compare_it(data: MemoryData) -> None:
    """Steps start in groups while another store ends their run, expecting the steps that it has seen."""
    async with open_on(MemorySpace(data)) as store, open_on(MemorySpace(data)) as other:
        for _ in range(30):
            run_id = await start(store)
            starting = asyncio.gather(
                *(store.record_step_start(run_id, key, "http") for key in names(count=30)),
                return_exceptions=True,
            )
            seen = await other.get_step_statuses(run_id)
            while not await other.complete_run(run_id, RunStatus.SUCCEEDED, expected=seen):
                seen = await other.get_step_statuses(run_id)
            started = [outcome for outcome in await starting if outcome == 1]
            assert await other.get_step_statuses(run_id) == seen
            assert len(started) == len(seen)


@pytest.mark.parametrize("snapshots", [True, False])
@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.parametrize("is_compared", [True, False])
async def test_a_run_that_ends_beside_a_renewal_leaves_the_queues(
    data: MemoryData, *, is_compared: bool, count: int, snapshots: bool
) -> None:
    """A renewal moves the entry of its step in a queue, which the end of the run deletes (QUE-5)."""
    space = PausingSpace(data, snapshots=snapshots)
    async with open_on(space) as store, open_on(MemorySpace(data, snapshots=snapshots)) as other:
        run_id = await start(store)
        for key in names(count=count):
            assert await store.try_claim_step(run_id, key, owner="me", lease=LEASE)
            assert await store.try_record_dispatch(run_id, key)
            await store.record_step_start(run_id, key, "http", owner="me")
        statuses = dict(await store.get_step_statuses(run_id)) if is_compared else None
        waits, goes_on = space.pause(keys.gate(run_id))
        ending = asyncio.create_task(store.complete_run(run_id, RunStatus.FAILED, expected=statuses))
        await waits.wait()
        assert await other.renew_step_claim(run_id, names(count=1)[0], "me", 2 * LEASE)
        goes_on.set()
        assert await ending
        assert [key for key in data.all_keys() if key.startswith(keys.QUEUES)] == []


async def test_calls_that_change_one_hot_key_take_turns(store: DocumentStore, space: CountingSpace) -> None:
    run_id = await start(store)
    space.reset()
    sequences = await asyncio.gather(*(store.append_event(run_id, "event") for _ in range(100)))
    await asyncio.gather(*(store.deliver_signal(run_id, "go", "{}", buffer=True) for _ in range(100)))
    assert sorted(sequences) == list(range(1, 101))
    assert sum(map(len, space.commits)) == 200


async def test_starts_of_one_step_take_turns(store: DocumentStore, space: CountingSpace) -> None:
    run_id = await start(store)
    space.reset()
    started = await asyncio.gather(*(store.record_step_start(run_id, "a", "http") for _ in range(50)))
    assert sorted(started) == list(range(1, 51))
    assert len(space.commits) == 50


async def test_calls_that_wait_for_their_turn_end_with_the_retries(space: CountingSpace) -> None:
    """While the space cannot be reached, a hundred calls of one hot key take not longer than one."""
    async with open_on(space, retry_timeout=1.0) as store:
        run_id = await start(store)
        space.arm(Fault.NOT_APPLIED, isolates=True)
        async with asyncio.timeout(60):
            calls = [store.append_event(run_id, "event") for _ in range(100)]
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {StoreUnavailableError}
        space.disarm()
        assert await store.append_event(run_id, "event") == 1


class ResendingSpace(MemorySpace):
    """Sends each commit twice, and returns the result of the second time."""

    async def commit(self, changes: Sequence[Change]) -> Sequence[Version | None]:
        await super().commit(changes)
        return await super().commit(changes)


async def test_a_space_that_sends_requests_twice_is_reported(data: MemoryData) -> None:
    async with open_on(MemorySpace(data)) as good:
        run_id = await start(good)
    async with open_on(ResendingSpace(data)) as store:
        with pytest.raises(RuntimeError, match="send requests again"):
            await store.append_event(run_id, "event")


class RefusingSpace(MemorySpace):
    """Never applies a change of a step."""

    async def commit(self, changes: Sequence[Change]) -> Sequence[Version | None]:
        if any(key[:1] == b"r" and key[17:18] == b"S" for change in changes for key in change.puts):
            return [None] * len(changes)
        return await super().commit(changes)


async def test_a_claim_that_always_loses_ends(data: MemoryData, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_on(MemorySpace(data)) as good:
        run_id = await start(good)
        assert await good.try_record_dispatch(run_id, "a", queue="q", step_type="http")
    monkeypatch.setattr(queues, "CONFLICT_SECONDS", 0.1)
    async with open_on(RefusingSpace(data)) as store:
        with pytest.raises(StoreUnavailableError, match="concurrent claims"):
            await store.claim_next_steps(["q"], lease=timedelta(minutes=1))


# Lost answers


@pytest.mark.parametrize("fault", LOST)
async def test_a_lost_answer_is_resolved(store: DocumentStore, space: CountingSpace, fault: Fault) -> None:
    run_id = await start(store)
    space.arm(fault)
    assert await store.append_event(run_id, "one") == 1
    assert space.disarm()
    space.release()
    assert await store.append_event(run_id, "two") == 2
    assert [event.event_type for event in await store.get_run_events(run_id)] == ["one", "two"]


async def test_the_answer_of_a_fence_may_be_lost_too(store: DocumentStore, space: CountingSpace) -> None:
    run_id = await start(store)
    for first in LOST:
        for second in LOST:
            before = await store.get_run_events(run_id)
            space.arm(first)
            appending = asyncio.create_task(store.append_event(run_id, "event"))
            await until(lambda: space.has_struck)
            space.arm(second)
            sequence = await appending
            space.disarm()
            space.release()
            assert len(await store.get_run_events(run_id)) == sequence == len(before) + 1


async def test_a_store_works_on_after_its_server_has_lost_everything(
    store: DocumentStore, data: MemoryData
) -> None:
    """The first changes after the loss expect slots that are gone."""
    await asyncio.gather(*(start(store) for _ in range(5)))
    data.commit([Change(deletes=data.all_keys())])
    runs = await asyncio.gather(*(start(store) for _ in range(5)))
    assert {run.run_id for run in await store.get_runs()} == set(runs)


async def test_one_lost_slot_makes_a_store_forget_all(
    store: DocumentStore, space: CountingSpace, data: MemoryData
) -> None:
    """However many changes it had in progress at once, the first one after a loss ends soon."""
    await asyncio.gather(*(start(store) for _ in range(300)))
    data.commit([Change(deletes=data.all_keys())])
    space.reset()
    await start(store)
    assert len(space.commits) < 10


async def test_an_open_store_does_not_notice_that_its_keys_were_cleared(
    store: DocumentStore, space: CountingSpace, data: MemoryData
) -> None:
    await asyncio.gather(*(start(store) for _ in range(5)))
    await clear_keys(MemorySpace(data))
    assert await store.get_runs() == ()
    space.reset()
    await start(store)
    assert len(space.commits) == 1
    await delete_all_keys(MemorySpace(data))
    assert not data.all_keys()


async def test_a_lost_answer_is_resolved_without_its_slot(
    store: DocumentStore, space: CountingSpace, data: MemoryData
) -> None:
    await start(store)
    space.arm(Fault.LOST_REPLY, isolates=True)
    starting = asyncio.create_task(start(store))
    await until(lambda: space.has_struck)
    data.commit([Change(deletes=data.all_keys())])
    space.disarm()
    async with asyncio.timeout(60):
        run_id = await starting
    assert [run.run_id for run in await store.get_runs()] == [run_id]


async def test_no_verdict_on_late_groups_is_wrong(data: MemoryData) -> None:
    """Groups of changes are lost in every way and arrive at any later moment; each verdict is compared with
    the final state."""
    rng = random.Random(11)
    space = MemorySpace(data)
    committer = Committer(space, 30.0, NO_OBSERVERS, "documents")
    verdicts: dict[bytes, bool] = {}

    async def commit(key: bytes) -> None:
        verdicts[key] = await committer.commit("test", Change({key: None}, {key: b""}))

    for group in range(800):
        space.arm(rng.choice(LOST), skip=rng.randrange(3))
        await asyncio.gather(*(commit(b"%d/%d" % (group, number)) for number in range(3)))
        if rng.random() < 0.3:
            space.release()
    space.release()
    assert {key for key, happened in verdicts.items() if happened} == {
        key for key in data.all_keys() if not key.startswith(keys.SLOTS)
    }
    assert 0 < sum(verdicts.values()) < len(verdicts)


class FullSpace(CountingSpace):
    """Refuses all writes after its fault."""

    async def commit(self, changes: Sequence[Change]) -> Sequence[Version | None]:
        if self.has_struck:
            raise NotApplied("full", retry=False)
        return await super().commit(changes)


async def test_a_lost_answer_is_resolved_although_the_space_is_full(data: MemoryData) -> None:
    space = FullSpace(data)
    async with open_on(space) as store, open_on(MemorySpace(data)) as other:
        run_id = await start(store)
        space.arm(Fault.LOST_REPLY)
        assert await store.append_event(run_id, "one") == 1
        with pytest.raises(StoreUnavailableError, match="full"):
            await store.append_event(run_id, "two")
        space.has_struck = False
        assert await store.append_event(run_id, "three") == 2
        assert [event.event_type for event in await other.get_run_events(run_id)] == ["one", "three"]


class UnclearSpace(CountingSpace):
    """Is full, after the number of changes in ``left``: its answer to the last one is that of a refusal."""

    left: int | None = None

    async def commit(self, changes: Sequence[Change]) -> Sequence[Version | None]:
        if self.left is None:
            return await super().commit(changes)
        if self.left:
            self.left -= 1
            await super().commit(changes)
        raise AppliedOrRefused("full")


@pytest.mark.parametrize("left", [0, 1])
async def test_a_refusal_that_may_have_been_applied_is_told_apart(data: MemoryData, left: int) -> None:
    space = UnclearSpace(data)
    async with open_on(space, retry_timeout=600) as store:
        run_id = await start(store)
        space.left = left
        async with asyncio.timeout(60):
            results = await asyncio.gather(
                *(store.append_event(run_id, f"{number}") for number in range(3)), return_exceptions=True
            )
        space.left = None
        happened = [result for result in results if not isinstance(result, StoreUnavailableError)]
        assert happened == [1] * left
        assert all(not isinstance(result, OutcomeUnknownError) for result in results)
        assert len(await store.get_run_events(run_id)) == left
        assert await store.append_event(run_id, "after") == left + 1


async def test_an_outcome_stays_unknown_only_until_the_space_can_be_reached(space: CountingSpace) -> None:
    """A request that arrives after its call has ended does nothing once the store has answered again."""
    async with open_on(space, retry_timeout=0.2) as store:
        run_id = await start(store)
        space.arm(Fault.DELAYED, isolates=True)
        with pytest.raises(OutcomeUnknownError):
            await store.append_event(run_id, "late")
        with pytest.raises(StoreUnavailableError) as refused:
            await store.append_event(run_id, "refused")
        assert not isinstance(refused.value, OutcomeUnknownError)
        space.disarm()
        assert await store.get_run_events(run_id) == ()
        space.release()
        assert await store.get_run_events(run_id) == ()
        assert await store.append_event(run_id, "one") == 1


class TimePausingSpace(MemorySpace):
    """Waits before a commit that only tells a time, once ``goes_on`` is there."""

    goes_on: asyncio.Event | None = None
    waits: bool = False

    async def commit(self, changes: Sequence[Change]) -> Sequence[Version | None]:
        if self.goes_on is not None and not any(change.puts or change.deletes for change in changes):
            self.waits = True
            await self.goes_on.wait()
        return await super().commit(changes)


@pytest.mark.parametrize("snapshots", [True, False])
async def test_a_call_in_progress_does_not_answer_while_an_outcome_is_unknown(
    data: MemoryData, snapshots: bool
) -> None:
    """Its answer would come before a change that arrives late (CON-3)."""
    space = TimePausingSpace(data, snapshots=snapshots)
    async with open_on(space, retry_timeout=0.2) as store, open_on(MemorySpace(data)) as other:
        run_id = await start(store)
        assert await store.try_claim_step(run_id, "b", owner="first")
        space.goes_on = asyncio.Event()
        losing = asyncio.create_task(store.try_claim_step(run_id, "b", owner="second"))
        await until(lambda: space.waits)
        space.arm(Fault.DELAYED, isolates=True)
        with pytest.raises(OutcomeUnknownError):
            await store.try_claim_step(run_id, "a", owner="late")
        space.disarm()
        space.goes_on.set()
        assert not await losing
        space.release()
        assert [claim.step_key for claim in await other.get_step_claims(run_id)] == ["b"]


async def test_a_cancelled_claim_whose_outcome_was_unknown_is_released(
    store: DocumentStore, space: CountingSpace, data: MemoryData
) -> None:
    async with open_on(MemorySpace(data)) as other, open_on(space, retry_timeout=0.2) as lonely:
        run_id = await start(other)
        space.arm(Fault.LOST_REPLY, isolates=True)
        claiming = asyncio.create_task(lonely.try_claim_step(run_id, "a"))
        async with asyncio.timeout(60):
            await until(lambda: space.has_struck)
            claiming.cancel()
            with pytest.raises(asyncio.CancelledError):
                await claiming
            assert len(await other.get_step_claims(run_id)) == 1
            space.disarm()
            await lonely.aclose()
            assert await other.get_step_claims(run_id) == ()


async def test_a_snapshot_that_is_gone_is_read_again(store: DocumentStore, space: CountingSpace) -> None:
    run_id, steps = await start(store), names(count=AHEAD + 1)
    await asyncio.gather(*(store.record_step_start(run_id, key, "http") for key in steps))
    space.arm(Fault.SNAPSHOT_GONE)
    statuses = await store.get_step_statuses(run_id)
    assert space.disarm()
    assert [*statuses] == steps


async def test_an_error_that_permits_no_retry_is_reported_at_once(
    store: DocumentStore, space: CountingSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = await start(store)

    async def refuse(changes: object) -> None:
        raise NotApplied("no space left", retry=False)

    monkeypatch.setattr(space, "commit", refuse)
    async with asyncio.timeout(20):
        with pytest.raises(StoreUnavailableError, match="no space left"):
            await store.append_event(run_id, "one")
    monkeypatch.undo()
    assert await store.append_event(run_id, "one") == 1


async def test_all_keys_of_a_space_are_deleted(data: MemoryData) -> None:
    data.commit([Change(puts={b"%d" % number: b"" for number in range(2_500)})])
    await delete_all_keys(MemorySpace(data))
    assert not data.all_keys()
    data.commit([Change(puts={b"%02000d" % number: b"" for number in range(1_000)})])
    await delete_all_keys(MemorySpace(data, limits=SpaceLimits(changes=1)))
    assert not data.all_keys()
    data.commit([Change(puts={b"%02000d" % number: b"" for number in range(1_000)})])
    await delete_all_keys(MemorySpace(data))
    assert not data.all_keys()
    space = MemorySpace(data)
    data.commit([Change(puts={b"key": b""})])
    space.arm(Fault.NOT_APPLIED)
    with pytest.raises(StoreUnavailableError, match="not deleted"):
        await delete_all_keys(space)
    assert len(data.all_keys()) == 1


async def test_closing_leaves_no_slot(data: MemoryData) -> None:
    async with open_on(MemorySpace(data)) as store:
        await asyncio.gather(*(start(store) for _ in range(100)))
    assert not [key for key in data.all_keys() if key.startswith(keys.SLOTS)]


# Changes that are larger than a commit


@pytest.mark.parametrize("snapshots", [True, False])
async def test_a_large_change_is_seen_whole_or_not_at_all(data: MemoryData, snapshots: bool) -> None:
    """Readers on another space look while 300 steps are dispatched, then reset."""
    async with (
        open_on(MemorySpace(data, snapshots=snapshots)) as store,
        open_on(MemorySpace(data, snapshots=snapshots)) as other,
    ):
        run_id = await start(store)
        await store.record_step_start(run_id, "first", "http")
        requests = [StepRequest(step_key=key, step_type="http", queue="q") for key in names(count=300)]
        seen = []

        async def read() -> None:
            while True:
                seen.append((len(await other.get_dispatches(run_id)), len(await other.get_queues())))

        reading = asyncio.create_task(read())
        advance = await store.advance_run(
            run_id=run_id,
            step_key="first",
            status=StepStatus.SUCCEEDED,
            attempt=1,
            dispatch=requests,
            complete_as=None,
        )
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        assert len(advance.dispatched) == 300
        assert {count for count, _ in seen} <= {0, 300}
        (queue,) = await other.get_queues()
        assert queue.ready == 300
        assert await other.complete_run(run_id, RunStatus.CANCELLED)
        assert await store.get_queues() == ()
        await store.retry_step(run_id, "first")
        (queue,) = await other.get_queues()
        assert queue.ready == 300


@pytest.mark.parametrize("commits", range(1, 12))
async def test_what_a_dead_process_has_begun_is_finished_by_others(data: MemoryData, commits: int) -> None:
    """A process dies after each of its first commits of a large change, or of a deletion."""
    async with open_on(MemorySpace(data)) as other:
        run_id = await start(other)
        await other.record_step_start(run_id, "first", "http")
        requests = [StepRequest(step_key=key, step_type="http", queue="q") for key in names(count=100)]
        space = CountingSpace(data)
        async with open_on(space, retry_timeout=0.1) as dying:
            calling = asyncio.create_task(
                dying.advance_run(
                    run_id=run_id,
                    step_key="first",
                    status=StepStatus.SUCCEEDED,
                    attempt=1,
                    dispatch=requests,
                )
            )
            await until(lambda: len(space.commits) >= commits or calling.done())
            space.arm(Fault.NOT_APPLIED, isolates=True)
            (outcome,) = await asyncio.gather(calling, return_exceptions=True)
            dispatched = len(await other.get_dispatches(run_id))
            assert dispatched in ((0,) if isinstance(outcome, StoreUnavailableError) else (100,))
            assert sum(queue.ready for queue in await other.get_queues()) == dispatched

            space.disarm()
            await other.complete_run(run_id, RunStatus.FAILED)
            space.reset()
            deleting = asyncio.create_task(dying.delete_run(run_id))
            await until(lambda: len(space.commits) >= commits or deleting.done())
            space.arm(Fault.NOT_APPLIED, isolates=True)
            await asyncio.gather(deleting, return_exceptions=True)
            if await other.get_run(run_id) is None:
                assert await other.get_runs() == ()
                await other.start_run(FLOW, "again", run_id, "manual")
                detail = await other.get_run_detail(run_id)
                assert detail is not None
                assert (detail.flow_name, detail.steps) == ("again", ())
                assert await other.complete_run(run_id, RunStatus.FAILED)
            await other.delete_run(run_id)
            space.disarm()
        assert not [key for key in data.all_keys() if key.startswith((b"r", b"i", b"p")) and key[1:2] != b"x"]


async def test_a_deletion_that_two_processes_finish_deletes_no_key_of_another_run(data: MemoryData) -> None:
    """One process is slow: it deletes the idempotency key after another run has registered it."""
    slow, fast = PausingSpace(data), PausingSpace(data)
    async with open_on(slow) as helper, open_on(fast) as deleting, open_on(MemorySpace(data)) as other:
        run_id = new_run_id()
        await other.trigger_run(FLOW, "orders", run_id, "manual", idempotency_key="k")
        await other.complete_run(run_id, RunStatus.FAILED)
        key = keys.idempotency_key(keys.key_scope(FLOW, "manual", "k"))
        fast_waits, fast_goes_on = fast.pause(key)
        slow_waits, slow_goes_on = slow.pause(key)
        async with asyncio.timeout(60):
            deletion = asyncio.create_task(deleting.delete_run(run_id))
            await fast_waits.wait()
            ends, end = fast.pause(keys.gate(run_id))
            reading = asyncio.create_task(helper.get_run(run_id))
            await slow_waits.wait()
            fast_goes_on.set()
            await ends.wait()
            again = await other.trigger_run(FLOW, "orders", new_run_id(), "manual", idempotency_key="k")
            assert again.created
            slow_goes_on.set()
            assert await reading is None
            end.set()
            assert await deletion
        found = await other.find_run_id_by_idempotency_key(FLOW, "manual", "k")
        assert found == again.run.run_id


async def test_a_run_leaves_no_key_behind(space: CountingSpace, data: MemoryData) -> None:
    """Long texts that were replaced, large changes, keys, signals, events: nothing outlives the run."""
    clock = VirtualClock()
    async with open_on(space, clock=clock) as store:
        run_id = new_run_id()
        long = "x" * 3_000_000
        await store.trigger_run(
            FLOW,
            "orders",
            run_id,
            "manual",
            trigger_data=long,
            tags={f"{number}{long[:250]}": long[:250] for number in range(32)},
            idempotency_key="k",
            timeout_at=clock.advance(hours=1),
            dispatch=[
                StepRequest(step_key=key, step_type="http", queue="q", input_json=long[:40_000] + key)
                for key in names(count=30)
            ],
        )
        assert await store.try_register_idempotency_key(FLOW, "manual", "k2", run_id)
        for claimed in await store.claim_next_steps(["q"], lease=timedelta(hours=1), limit=30):
            assert claimed.input_json == long[:40_000] + claimed.step_key
            await store.register_waiter(run_id, claimed.step_key, "go")
            await store.deliver_signal(run_id, "go", long[:99_000], delivery_id=claimed.step_key)
            await store.record_step_complete(run_id, claimed.step_key, StepStatus.SKIPPED, output_json=long)
        for number in range(4):
            await store.deliver_signal(run_id, "early", long[:99_000], delivery_id=f"{number}", buffer=True)
        await store.register_waiter(run_id, "early", "early")
        for _ in range(3):
            await store.save_output(run_id, "o", long[:200_000])
        await store.append_event(run_id, "e", message=long)
        await store.retry_step(run_id, "step 0000", reset=names(count=30))
        await store.request_cancel(run_id, long[:70_000])
        assert await store.complete_run(run_id, RunStatus.FAILED)
        assert await store.delete_run(run_id)
        assert [key for key in data.all_keys() if not key.startswith(keys.SLOTS)] == []


async def test_cleanup_deletes_what_dead_processes_left(
    space: CountingSpace, data: MemoryData, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_on(space, retry_timeout=0.1) as dying:
        run_id = await start(dying)
        # The pieces arrive, their commit does not.
        saving = asyncio.create_task(dying.save_output(run_id, "o", "x" * 3_000_000))
        await until(lambda: len(space.commits) >= 3)
        space.arm(Fault.NOT_APPLIED, isolates=True)
        with pytest.raises(StoreUnavailableError):
            await saving
        pieces = [key for key in data.all_keys() if key.startswith(keys.run_prefix(run_id) + b"B")]
        assert pieces
        space.disarm()
        async with open_on(MemorySpace(data)) as other:
            now = await space.clock()
            await other.cleanup(now)
            assert set(pieces) <= set(data.all_keys())
            later = now + timedelta(days=2)
            monkeypatch.setattr(data, "clock", lambda: later)
            async with open_on(MemorySpace(data)) as last:
                await last.cleanup(now)
            left = set(data.all_keys())
            assert not left.intersection(pieces)
            assert not [key for key in left if key.startswith(keys.STAGED)]
            assert len([key for key in left if key.startswith(keys.SLOTS)]) <= 1
            # A store whose slots were deleted while it slept goes on with new ones.
            assert await dying.append_event(run_id, "one") == 1


async def test_the_last_advances_and_completions_of_a_busy_run_end(data: MemoryData) -> None:
    """While other clients change steps all the time, complete_run ends by its intent."""
    async with open_on(MemorySpace(data)) as store, open_on(MemorySpace(data)) as other:
        run_id = await start(store)
        done = False

        async def disturb(step_key: str) -> None:
            while not done:
                await other.try_claim_step(run_id, step_key)
                await other.release_step_claim(run_id, step_key)

        disturbing = [asyncio.create_task(disturb(key)) for key in names(count=8)]
        async with asyncio.timeout(60):
            assert await store.complete_run(run_id, RunStatus.SUCCEEDED)
        done = True
        await asyncio.gather(*disturbing)
        assert await other.get_run_status(run_id) is RunStatus.SUCCEEDED
        assert not [key for key in data.all_keys() if key.startswith((b"p", b"ii"))]


# Cost


async def cost_of_a_step(space: CountingSpace, store: DocumentStore, run_id: UUID) -> dict[str, int]:
    """What the life of one more step costs."""
    space.reset()
    await store.try_record_dispatch(run_id, "one more", queue="q", step_type="http")
    (claimed,) = await store.claim_next_steps(["q"], lease=timedelta(hours=1))
    await store.renew_step_claim(run_id, "one more", claimed.owner, timedelta(hours=2))
    await store.advance_run(
        run_id=run_id,
        step_key="one more",
        status=StepStatus.SUCCEEDED,
        attempt=1,
        complete_as=RunStatus.SUCCEEDED,
    )
    changes = [change for commit in space.commits for change in commit]
    return {
        "reads": space.reads,
        "items": space.items,
        "commits": len(space.commits),
        "expected": sum(len(change.expected) for change in changes),
        "writes": sum(len(change.puts) + len(change.deletes) for change in changes),
    }


async def test_a_step_costs_the_same_in_a_run_of_any_size(store: DocumentStore, space: CountingSpace) -> None:
    costs = []
    for count in (10, 1_000):
        run_id = await start(store)
        await asyncio.gather(
            *(store.record_step_start(run_id, key, "http", input_json="{}") for key in names(count=count))
        )
        costs.append(await cost_of_a_step(space, store, run_id))
    small, large = costs
    for name, cost in small.items():
        assert large[name] <= cost * 1.2, (name, costs)


class LatchingSpace(MemorySpace):
    """Calls ``latch`` once, after the next read of a range that starts with a prefix."""

    latch: Callable[[], Awaitable[object]] | None = None
    prefix = b""

    async def read(
        self, wanted: Collection[bytes], ranges: Sequence[Range] = (), *, at: object | None = None
    ) -> View:
        view = await super().read(wanted, ranges, at=at)
        if self.latch is not None and any(one.start.startswith(self.prefix) for one in ranges):
            latch, self.latch = self.latch, None
            await latch()
        return view


@pytest.mark.parametrize("prefix", [keys.DEADLINES, keys.LATCHED])
@pytest.mark.parametrize("has_time", [False, True])
async def test_a_run_latched_during_the_read_of_runs_to_stop_is_listed_once(
    data: MemoryData, prefix: bytes, has_time: bool
) -> None:
    """CTL-3 without snapshots: the latch moves the run from one index to another."""
    space, run_id, clock = LatchingSpace(data, snapshots=False), new_run_id(), VirtualClock()
    as_of = clock.now if has_time else None
    async with (
        open_on(space, clock=clock) as store,
        open_on(MemorySpace(data, snapshots=False), clock=clock) as other,
    ):
        await store.start_run(FLOW, "orders", run_id, "manual")
        await store.configure_run(run_id, FLOW, "manual", timeout_at=clock.now)
        space.prefix, space.latch = prefix, lambda: other.request_cancel(run_id)
        found = await store.get_runs_to_stop(as_of=as_of)
        assert space.latch is None
        assert [run.run_id for run in found] == [run_id]
