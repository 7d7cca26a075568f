"""Queues on PostgreSQL: locks, the index of queued steps, and stores that older versions use too (QUE)."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from flowstore_chaos.proxy import Fault, MessageMatch, proxy_before
from flowstore_core import (
    ClaimedStep,
    ClaimLostError,
    EndedStep,
    FlowStore,
    FlowStoreError,
    OutcomeUnknownError,
    RunAdvance,
    RunStatus,
    StaleAttemptError,
    StepRequest,
    StepStatus,
    new_run_id,
    open_store,
)
from flowstore_core.open import resolve_store
from flowstore_postgres import advances, controls, queues, stalled
from flowstore_postgres import store as postgres_store
from flowstore_postgres.claim_bounds import LATE_SECONDS, ClaimBounds
from flowstore_postgres.prepared_connections import CLAIM_SETTINGS
from flowstore_postgres.sql_placeholders import fill_in
from flowstore_postgres.transactions import BEGIN_BY_KEY, BEGIN_READ_BY_INDEX
from tests.virtual_clock import VirtualClock

FLOW = UUID(int=1)
LEASE = timedelta(minutes=5)
TIMEOUT_SECONDS = 60.0


def _request(step_key: str, *after: str, queue: str = "q") -> StepRequest:
    return StepRequest(step_key=step_key, step_type="http", input_json="{}", queue=queue, after=after)


async def _trigger(store: FlowStore, *requests: StepRequest) -> UUID:
    run_id = new_run_id()
    await store.trigger_run(FLOW, "orders", run_id, "manual", dispatch=requests)
    return run_id


async def _claim(store: FlowStore, limit: int = 1) -> Sequence[ClaimedStep]:
    async with asyncio.timeout(TIMEOUT_SECONDS):
        return await store.claim_next_steps(["q"], lease=LEASE, limit=limit)


async def _until(condition: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while not await condition():  # noqa: ASYNC110 - a condition of the server
            await asyncio.sleep(0.02)


async def _is_blocking(admin: asyncpg.Connection) -> object:
    """Whether a statement waits for a lock of this session."""
    # Otherwise a transaction reads one cached snapshot of pg_stat_activity.
    await admin.execute("SELECT pg_stat_clear_snapshot()")
    return await admin.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE pg_backend_pid() = ANY(pg_blocking_pids(pid))"
    )


async def _pending(admin: asyncpg.Connection) -> list[str]:
    rows = await admin.fetch("SELECT step_key FROM pending ORDER BY ready_at, step_key")
    return [row[0] for row in rows]


# Concurrency

MIDDLE = [f"part {n}" for n in range(6)]
FAN_IN: dict[str, list[StepRequest]] = {
    "split": [_request(key, "split") for key in MIDDLE],
    **{key: [_request("join", *MIDDLE)] for key in MIDDLE},
    "join": [],
}


async def test_que_4_every_step_of_concurrent_fan_ins_runs_once_and_every_run_completes(fresh: str) -> None:
    runs = 12
    async with open_store(fresh) as first, open_store(fresh, pool_size=2) as second:
        for _ in range(runs):
            await _trigger(first, _request("split"))
        claims: Counter[tuple[UUID, str]] = Counter()
        completed: Counter[UUID] = Counter()

        async def advance(store: FlowStore, step: ClaimedStep) -> None:
            result = await store.advance_run(
                step.run_id,
                step.step_key,
                StepStatus.SUCCEEDED,
                attempt=step.attempt,
                owner=step.owner,
                dispatch=FAN_IN[step.step_key],
                complete_as=RunStatus.SUCCEEDED,
            )
            completed[step.run_id] += result.run_completed

        async def work(store: FlowStore) -> None:
            while completed.total() < runs:
                claimed = await store.claim_next_steps(["q"], lease=LEASE, limit=3)
                claims.update((step.run_id, step.step_key) for step in claimed)
                await asyncio.gather(*(advance(store, step) for step in claimed))

        async with asyncio.timeout(TIMEOUT_SECONDS):
            await asyncio.gather(*(work(store) for store in (first, second) for _ in range(4)))
        assert set(claims.values()) == {1}
        assert len(claims) == runs * len(FAN_IN)
        assert set(completed.values()) == {1}
        assert len(completed) == runs
        assert await first.get_queues() == ()


ENDED = [StepStatus.SUCCEEDED, StepStatus.FAILED, StepStatus.SKIPPED]


def _arguments(end: EndedStep) -> dict[str, Any]:
    return {each.name: getattr(end, each.name) for each in fields(end)}


async def _end_at_random(store: FlowStore, seed: int, how: str) -> tuple[list[Any], str]:
    """End the six started steps of a run with random requests; the results and the final state."""
    rng = random.Random(seed)
    started, later = MIDDLE, [f"later {n}" for n in range(4)]
    run_id = await _trigger(store, *(_request(key) for key in started))
    claimed = {one.step_key: one for one in await _claim(store, 100) if one.run_id == run_id}
    assert sorted(claimed) == started
    ends = []
    for key in rng.sample(started, len(started)):
        requests = [
            StepRequest(
                step_key=one,
                step_type="http",
                queue="later",
                after=tuple(rng.sample([other for other in (*started, *later) if other != one], 2)),
                accept=frozenset(rng.sample(ENDED, 2)),
            )
            for one in rng.sample(later, 3)
        ]
        ends.append(
            EndedStep(
                run_id=run_id,
                step_key=key,
                status=rng.choice(ENDED),
                attempt=1,
                owner=claimed[key].owner,
                dispatch=requests,
                complete_as=rng.choice([RunStatus.SUCCEEDED, None]),
            )
        )
    if how == "in one call":
        results = list(await store.advance_runs(ends))
    else:
        calls = [store.advance_run(**_arguments(end)) for end in ends]
        if how == "concurrently":
            results = list(await asyncio.gather(*calls))
        else:
            results = [await call for call in calls]
    state = repr((await store.get_run_detail(run_id), await store.get_dispatches(run_id)))
    return results, state.replace(str(run_id), "<run>")


@pytest.mark.parametrize("how", ["concurrently", "in one call"])
@pytest.mark.parametrize("seed", range(15))
async def test_que_4_advances_that_share_a_transaction_are_serial(seed: int, how: str, fresh: str) -> None:
    clock = VirtualClock()
    async with open_store(fresh, clock=clock) as store:
        expected = await _end_at_random(store, seed, "one by one")
        # The first call is sent alone, the other five share the next transaction, in their order.
        assert await _end_at_random(store, seed, how) == expected


async def test_que_4_advance_runs_waits_for_a_locked_run_and_ends_the_others_meanwhile(
    fresh: str, admin: asyncpg.Connection
) -> None:
    async with open_store(fresh) as store:
        locked, free = [await _trigger(store, _request("a"), _request("b")) for _ in range(2)]
        claimed = await _claim(store, 100)
        ends = [
            EndedStep(
                run_id=one.run_id,
                step_key=one.step_key,
                status=StepStatus.SUCCEEDED,
                attempt=1,
                owner=one.owner,
                dispatch=[_request("c", "a", "b")],
                complete_as=RunStatus.SUCCEEDED,
            )
            for one in claimed
        ]
        async with admin.transaction():
            await admin.execute("SELECT FROM runs WHERE run_id = $1 FOR UPDATE", locked)
            call = asyncio.create_task(store.advance_runs([*ends, ends[0]]))

            async def is_ended() -> bool:
                return set((await store.get_step_statuses(free)).values()) == {StepStatus.SUCCEEDED}

            await _until(is_ended)
            assert not call.done()
            assert set((await store.get_step_statuses(locked)).values()) == {StepStatus.RUNNING}
        results = await call
        assert [result for result in results if isinstance(result, FlowStoreError)] == []
        dispatched = Counter(
            end.run_id
            for end, result in zip(ends, results, strict=False)
            if isinstance(result, RunAdvance) and result.dispatched == ("c",)
        )
        assert dispatched == {locked: 1, free: 1}
        assert results[-1] == RunAdvance(dispatched=(), run_completed=False)


async def test_que_4_calls_that_share_a_statement_each_get_their_own_result(
    fresh: str, admin: asyncpg.Connection
) -> None:
    async with open_store(fresh, clock=VirtualClock()) as store:
        runs = [await _trigger(store, _request("a")) for _ in range(8)]
        steps = {step.run_id: step for step in await _claim(store, 100)}
        plain, last, dispatched, released, waits, stale, lost, ended = runs
        await store.try_record_dispatch(dispatched, "b", queue="q", step_type="http")
        await store.try_claim_step(released, "b", owner="me")
        await store.release_step_claim(released, "b")
        await store.register_waiter(waits, "b", "paid")
        await store.complete_run(ended, RunStatus.CANCELLED)

        async def advance(run_id: UUID, *dispatch: StepRequest) -> object:
            try:
                return await store.advance_run(
                    run_id,
                    "a",
                    StepStatus.SUCCEEDED,
                    attempt=2 if run_id == stale else 1,
                    owner="me" if run_id == lost else steps[run_id].owner,
                    output_json=f'"\x1f\x1e{run_id}"',
                    dispatch=dispatch,
                    complete_as=RunStatus.SUCCEEDED,
                )
            except FlowStoreError as error:
                return type(error)

        requests = _request("b", "a"), _request("c")
        results = await asyncio.gather(
            *(advance(run_id, *(() if run_id == last else requests)) for run_id in runs)
        )
        assert results == [
            RunAdvance(dispatched=("b", "c"), run_completed=False),
            RunAdvance(dispatched=(), run_completed=True),
            RunAdvance(dispatched=("c",), run_completed=False),
            RunAdvance(dispatched=("b", "c"), run_completed=False),
            RunAdvance(dispatched=("b", "c"), run_completed=False),
            StaleAttemptError,
            ClaimLostError,
            RunAdvance(dispatched=(), run_completed=False),
        ]
        ready = {(step.run_id, step.step_key) for step in await _claim(store, 100)}
        expected = {(run_id, key) for run_id in (plain, dispatched, released, waits) for key in ("b", "c")}
        assert ready == expected - {(waits, "b")}
        for run_id in runs:
            detail = await store.get_run_detail(run_id)
            assert detail is not None
            output = {step.step_key: step.output_json for step in detail.steps}["a"]
            assert output == (None if run_id in (stale, lost) else f'"\x1f\x1e{run_id}"')
        # The rows of the steps that were not ended, and of those that wait or are claimed now.
        assert await admin.fetchval("SELECT count(*) FROM pending") == len(expected) + 2


@pytest.mark.parametrize("locked", ["runs", "steps", "pending"])
async def test_que_2_a_claim_passes_over_a_step_that_another_call_is_changing(
    locked: str, fresh: str, admin: asyncpg.Connection
) -> None:
    async with open_store(fresh) as store:
        busy = await _trigger(store, _request("busy"))
        await _trigger(store, _request("free"))
        async with admin.transaction():
            await admin.execute(f"SELECT FROM {locked} WHERE run_id = $1 FOR UPDATE", busy)
            # It does not wait.
            assert [step.step_key for step in await _claim(store, 2)] == ["free"]
        assert [step.step_key for step in await _claim(store, 2)] == ["busy"]


async def test_que_2_a_claim_finds_a_free_step_behind_many_that_are_locked(
    fresh: str, admin: asyncpg.Connection
) -> None:
    async with open_store(fresh) as store:
        await _trigger(store, *(_request(f"step {n:03}") for n in range(2 * queues.LOOKAHEAD)))
        await _trigger(store, _request("free"))
        async with admin.transaction():
            await admin.execute("SELECT FROM pending WHERE step_key <> 'free' FOR UPDATE")
            assert [step.step_key for step in await _claim(store)] == ["free"]


async def test_que_2_a_claim_sees_a_change_that_it_did_not_wait_for(
    fresh: str, admin: asyncpg.Connection
) -> None:
    """A step that was claimed after the snapshot of a claim is not claimed again."""
    async with open_store(fresh) as store, open_store(fresh) as other:
        for _ in range(20):
            await _trigger(store, *(_request(f"step {n}") for n in range(10)))
        found = await asyncio.gather(*(_claim(one, 7) for _ in range(20) for one in (store, other)))
        steps = [(step.run_id, step.step_key) for claimed in found for step in claimed]
        assert len(steps) == len(set(steps)) == 200
        assert len({step.owner for claimed in found for step in claimed}) == 200


async def test_que_2_a_step_that_is_changed_after_the_snapshot_hides_no_other(
    fresh: str, admin: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both steps are free when the claim locks them: the change of the first one has been committed."""
    waiting = queues.CLAIM_NEXT_STEPS.replace(
        "FROM found ORDER BY", "FROM found, (SELECT pg_advisory_xact_lock_shared(1)) waited ORDER BY"
    )
    assert waiting != queues.CLAIM_NEXT_STEPS
    monkeypatch.setattr(queues, "CLAIM_NEXT_STEPS", waiting)
    async with open_store(fresh) as store:
        run_id = await _trigger(store, _request("a"), _request("b"))
        await admin.execute("SELECT pg_advisory_lock(1)")
        claiming = asyncio.ensure_future(_claim(store))
        await _until(lambda: _is_blocking(admin))
        await store.annotate_dispatch(run_id, "a", "job 1")
        await admin.execute("SELECT pg_advisory_unlock(1)")
        assert len(await claiming) == 1


DISPATCHES: dict[str, Callable[[FlowStore, UUID], Awaitable[object]]] = {
    "try_record_dispatch": lambda s, r: s.try_record_dispatch(r, "waits", queue="q", step_type="http"),
    "advance_run": lambda s, r: s.advance_run(
        r, "open", StepStatus.SUCCEEDED, attempt=1, dispatch=[_request("waits")]
    ),
    "retry_step": lambda s, r: s.retry_step(r, "open", dispatch=[_request("waits")]),
    "redispatch_step": lambda s, r: s.redispatch_step(r, "moved", queue="q"),
    "reschedule_step": lambda s, r: s.reschedule_step(r, "open", attempt=1),
}


@pytest.mark.parametrize("method", DISPATCHES)
async def test_que_5_a_dispatch_sees_a_waiter_that_was_registered_while_it_waited(
    method: str, fresh: str, admin: asyncpg.Connection
) -> None:
    async with open_store(fresh) as store:
        run_id = await _trigger(store, _request("open"), _request("moved", queue="other"))
        assert len(await _claim(store)) == 1
        await store.try_record_dispatch(run_id, "warm", due_at=datetime.now(UTC) + LEASE)
        async with admin.transaction():
            await admin.execute("SELECT FROM runs WHERE run_id = $1 FOR UPDATE", run_id)
            task = asyncio.ensure_future(DISPATCHES[method](store, run_id))
            await _until(lambda: _is_blocking(admin))
            await admin.execute(
                "INSERT INTO waiters (run_id, step_key, signal_name, created_at) "
                "SELECT $1, key, 'go', now() FROM unnest($2::text[]) key",
                run_id,
                ["waits", "moved", "open"],
            )
        await task
        assert await _claim(store, 10) == ()


# The index of queued steps


async def test_que_5_rows_of_ended_runs_leave_the_index_and_return_when_the_run_is_reopened(
    fresh: str, admin: asyncpg.Connection
) -> None:
    async with open_store(fresh) as store:
        ended = await _trigger(store, *(_request(f"step {n:03}") for n in range(2 * queues.LOOKAHEAD)))
        [first] = await _claim(store)
        await store.advance_run(ended, first.step_key, StepStatus.FAILED, attempt=1)
        await store.complete_run(ended, RunStatus.CANCELLED)
        await _trigger(store, _request("other"))
        assert [step.step_key for step in await _claim(store)] == ["other"]
        # Each claim deletes the rows that it finds.
        assert await _claim(store) == ()
        assert await _pending(admin) == ["other"]
        await store.retry_step(ended, first.step_key)
        assert len(await _claim(store, 1000)) == 2 * queues.LOOKAHEAD - 1


async def test_ret_1_cleanup_empties_the_index(fresh: str, admin: asyncpg.Connection) -> None:
    async with open_store(fresh) as store:
        run_id = await _trigger(store, _request("one"), _request("two"))
        await store.complete_run(run_id, RunStatus.FAILED)
        assert await _pending(admin) == ["one", "two"]
        assert await store.cleanup(datetime.now(UTC) + timedelta(hours=1)) == 1
        assert await _pending(admin) == []


async def test_the_cost_of_a_claim_does_not_depend_on_the_steps_that_sleep(
    fresh: str, admin: asyncpg.Connection
) -> None:
    async def buffers() -> int:
        schema = await admin.fetchval("SELECT quote_ident(current_schema())")
        statement = "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + fill_in(queues.CLAIM_NEXT_STEPS, schema)
        later = datetime.now(UTC) + timedelta(hours=1)
        arguments = (
            later,
            None,
            ["q", "r"],
            10 + queues.LOOKAHEAD,
            10,
            1,
            "o",
            None,
            "",
            1,
            1,
            [],
            None,
            False,
        )
        [plan] = json.loads(await admin.fetchval(statement, *arguments))
        return int(plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"])

    async with open_store(fresh) as store:
        run_id = await _trigger(store)
        await buffers()
        empty = await buffers()
        await admin.execute(
            "WITH sleeping AS (INSERT INTO steps (run_id, step_key, dispatched_at, due_at, dispatch_queue,"
            "    dispatch_priority, dispatch_step_type, pending_writes)"
            "  SELECT $1, n::text, now(), now() + interval '1 day', 'q', n % 10, 't', 1"
            "  FROM generate_series(1, 20000) n RETURNING *)"
            "INSERT INTO pending SELECT run_id, step_key, 'q', dispatch_priority, due_at FROM sleeping",
            run_id,
        )
        # Each of the 20 ranges of the index is one level deeper. The minimum, because a connection reads the
        # catalogs again after other tests have changed them.
        assert min([await buffers() for _ in range(5)]) <= empty + 3 * 20


# Bounds


@pytest.fixture
def bounds(monkeypatch: pytest.MonkeyPatch) -> list[ClaimBounds]:
    """The bounds of the stores that the test opens."""
    made: list[ClaimBounds] = []

    def make() -> ClaimBounds:
        made.append(ClaimBounds())
        return made[-1]

    monkeypatch.setattr(postgres_store, "ClaimBounds", make)
    return made


def _bound(bounds: list[ClaimBounds]) -> datetime:
    [bound, *_], *_ = bounds[0].parameters(["q"])
    return bound or datetime.min.replace(tzinfo=UTC)


async def _work(store: FlowStore, steps: int = 1) -> None:
    """Trigger runs, and claim and complete their steps, all others that are ready included."""
    for _ in range(steps):
        await _trigger(store, _request("passing"))
    for step in await _claim(store, 1000):
        await store.advance_run(
            step.run_id, step.step_key, StepStatus.SUCCEEDED, attempt=1, complete_as=RunStatus.SUCCEEDED
        )


async def _raise_bound(store: FlowStore, bounds: list[ClaimBounds], over: datetime) -> None:
    """Claim until claims begin to read after a moment."""

    async def is_raised() -> bool:
        await _work(store)
        return _bound(bounds) > over

    await _until(is_raised)


Prepare = Callable[[FlowStore, asyncpg.Connection], Awaitable[UUID]]
Change = Callable[[FlowStore, asyncpg.Connection, UUID], Awaitable[object]]

ADD_STEP = """
WITH run AS (
    INSERT INTO runs (run_id, flow_id, flow_name, status, trigger_key, started_at, start_token)
    SELECT $1, $1, 'orders', 'Running', 'manual', now(), $1
)
INSERT INTO steps (run_id, step_key, dispatched_at, dispatch_queue, dispatch_priority, dispatch_step_type,
                   pending_writes, stall_noted)
SELECT $1, 'before', clock_timestamp(), 'q', 0, 'http', $2, false
"""
ADD_PENDING_OF_VERSION_11 = """
INSERT INTO pending (run_id, step_key, queue, priority, ready_at)
SELECT run_id, step_key, dispatch_queue, dispatch_priority, dispatched_at FROM steps WHERE run_id = $1
"""


async def _claimed(store: FlowStore, admin: asyncpg.Connection) -> UUID:
    run_id = await _trigger(store, _request("before"))
    assert len(await _claim(store)) == 1
    return run_id


async def _waiting(store: FlowStore, admin: asyncpg.Connection) -> UUID:
    run_id = await _trigger(store)
    await store.register_waiter(run_id, "before", "go")
    await store.try_record_dispatch(run_id, "before", queue="q", step_type="http")
    return run_id


async def _ended(store: FlowStore, admin: asyncpg.Connection) -> UUID:
    run_id = await _trigger(store, _request("before"), _request("failed", queue="other"))
    await store.record_step_start(run_id, "failed", "http")
    await store.record_step_complete(run_id, "failed", StepStatus.FAILED)
    await store.complete_run(run_id, RunStatus.FAILED)
    return run_id


async def _uncommitted(store: FlowStore, admin: asyncpg.Connection) -> UUID:
    run_id = new_run_id()
    await admin.execute("BEGIN")
    await admin.execute(ADD_STEP, run_id, 0)
    return run_id


async def _unindexed(store: FlowStore, admin: asyncpg.Connection) -> UUID:
    run_id = new_run_id()
    await admin.execute(ADD_STEP, run_id, 1)
    return run_id


BEFORE_THE_BOUND: dict[str, tuple[Prepare, Change]] = {
    "a claim that is released": (_claimed, lambda s, a, r: s.release_step_claim(r, "before")),
    "a signal that is delivered": (_waiting, lambda s, a, r: s.deliver_signal(r, "go", "{}")),
    "a run that is reopened": (_ended, lambda s, a, r: s.retry_step(r, "failed")),
    "a dispatch that was due": (
        lambda s, a: _trigger(s),
        lambda s, a, r: s.try_record_dispatch(
            r, "before", queue="q", step_type="http", due_at=datetime.now(UTC) - LEASE
        ),
    ),
    "a request that was due": (
        lambda s, a: _trigger(s, StepRequest(step_key="first", step_type="http", queue="other")),
        lambda s, a, r: _advance_to(s, r),
    ),
    "a statement of an older version": (
        _unindexed,
        lambda s, a, r: a.execute(ADD_PENDING_OF_VERSION_11, r),
    ),
}


async def _advance_to(store: FlowStore, run_id: UUID) -> None:
    [step] = await store.claim_next_steps(["other"], lease=LEASE)
    request = StepRequest(
        step_key="before", step_type="http", queue="q", due_at=datetime.now(UTC) - LEASE, after=("first",)
    )
    await store.advance_run(run_id, step.step_key, StepStatus.SUCCEEDED, attempt=1, dispatch=[request])


@pytest.mark.parametrize("case", BEFORE_THE_BOUND)
async def test_que_2_a_step_that_becomes_ready_before_the_bound_is_claimed_first(
    case: str, fresh: str, admin: asyncpg.Connection, bounds: list[ClaimBounds]
) -> None:
    prepare, change = BEFORE_THE_BOUND[case]
    async with open_store(fresh) as store:
        run_id = await prepare(store, admin)
        await _raise_bound(store, bounds, datetime.now(UTC))
        await change(store, admin, run_id)
        await _trigger(store, _request("later"))
        assert [step.step_key for step in await _claim(store, 2)] == ["before", "later"]


async def test_que_2_a_step_that_is_committed_late_is_claimed_first(
    fresh: str, admin: asyncpg.Connection, bounds: list[ClaimBounds]
) -> None:
    async with open_store(fresh) as store:
        await _uncommitted(store, admin)
        written = datetime.now(UTC)
        # Longer than the bound stays behind without the transaction.
        while datetime.now(UTC) < written + timedelta(seconds=2 * LATE_SECONDS + 1):
            await _work(store)
        await _trigger(store, _request("later"))
        await admin.execute("COMMIT")
        assert [step.step_key for step in await _claim(store, 2)] == ["before", "later"]
        await _raise_bound(store, bounds, written)


async def test_a_claim_does_not_read_past_the_steps_that_ended_since_an_old_snapshot(
    fresh: str, admin: asyncpg.Connection, bounds: list[ClaimBounds]
) -> None:
    options = resolve_store(fresh)[2].parts.options
    explainer = await asyncpg.connect(host=options["host"], user="postgres", database="postgres")

    async def entries(*parameters: object) -> int:
        """The number of entries of the index that a claim reads."""
        schema = await admin.fetchval("SELECT quote_ident(current_schema())")
        statement = "EXPLAIN (ANALYZE, FORMAT JSON) " + fill_in(queues.CLAIM_NEXT_STEPS, schema)
        later = datetime.now(UTC) + timedelta(hours=1)
        arguments = (later, None, ["q"], 10 + queues.LOOKAHEAD, 10, 1, "o", None, "", 1, 1, *parameters)
        async with explainer.transaction():
            await explainer.execute(CLAIM_SETTINGS)
            await explainer.fetchval(statement, *arguments)
            index = f"{schema}.pending_by_time"
            return int(
                await explainer.fetchval("SELECT pg_stat_get_xact_tuples_returned($1::regclass)", index)
            )

    async with open_store(fresh) as store, admin.transaction(isolation="repeatable_read"):
        assert await admin.fetchval("SELECT count(*) FROM pending") == 0
        try:
            await _work(store, 500)
            ended = datetime.now(UTC)

            async def is_raised() -> bool:
                assert await _claim(store) == ()
                return _bound(bounds) > ended

            await _until(is_raised)
            assert await entries([], None, False) >= 500
            assert await entries(*bounds[0].parameters(["q"])) == 0
        finally:
            await explainer.close()


def _result(began: datetime, server: int = 1, oldest_id: int = 9) -> dict[str, Any]:
    """The result of a claim that found nothing."""
    started = datetime.fromtimestamp(server, UTC)
    return {
        "server": started, "began": began, "now": began, "oldest_id": oldest_id, "id": 5, "levels": None,
        "first": None,
    }  # fmt: skip


def test_bounds_are_about_one_server_and_one_course_of_its_clock() -> None:
    bounds, began = ClaimBounds(), datetime.now(UTC)

    def has_bounds() -> bool:
        return any(bounds.parameters(["q"])[0])

    assert bounds.update(["q"], _result(began, oldest_id=5))
    # The transaction of the first claim had not ended.
    assert not has_bounds()
    assert bounds.update(["q"], _result(began))
    assert has_bounds()
    assert _bound([bounds]) < began - timedelta(seconds=LATE_SECONDS)
    assert bounds.update(["q"], _result(began, server=2, oldest_id=5))
    assert not has_bounds()
    assert bounds.update(["q"], _result(began, server=2))
    assert has_bounds()
    assert not bounds.update(["q"], _result(began - timedelta(seconds=1), server=2))
    assert not has_bounds()


# Plans

EXECUTE = {
    "claim_next_steps": (
        queues.CLAIM_NEXT_STEPS,
        "'2100-01-01', NULL, '{q,r}', 42, 10, 1, 'o', NULL, '', 1, 1, '{}', NULL, false",
        CLAIM_SETTINGS,
    ),
    "the locks of advance_runs": (
        advances.LOCK_UNLOCKED_RUNS,
        f"1, 1, '{{{UUID(int=1)},{UUID(int=2)}}}', NULL",
        BEGIN_BY_KEY,
    ),
    "advance_runs": (
        advances.ADVANCE_STEPS,
        # The first of two runs gets another step, the second one is completed.
        f"NULL, '2100-01-01', '{{{UUID(int=1)},{UUID(int=2)}}}', '{{a,a}}', '{{1,1}}', NULL,"
        "'{Succeeded,Succeeded}', NULL, NULL, '{Succeeded,Succeeded}', '{Failed,Failed}',"
        "'{1}', '{b}', NULL, '{q}', '{0}', '{t}', NULL",
        BEGIN_BY_KEY,
    ),
    "get_stalled_steps": (stalled.GET_STALLED_STEPS, "NULL, NULL, 10, 20, 20", BEGIN_READ_BY_INDEX),
    "get_runs_to_stop": (controls.GET_RUNS_TO_STOP, "NULL, NULL, 10, 20", BEGIN_READ_BY_INDEX),
}
MANY = 2_000
ADD_READY_RUNS = """
WITH run AS MATERIALIZED (SELECT gen_random_uuid() AS id, n FROM generate_series(1, $1) n), added AS (
    INSERT INTO runs (run_id, flow_id, flow_name, status, trigger_key, started_at, start_token, stall_bound)
    SELECT id, id, 'flow', 'Running', 'manual', now(), id, now() FROM run
), controlled AS (
    INSERT INTO controls (run_id, flow_id, trigger_key, created_at, timeout_at)
    SELECT id, id, 'manual', now(), now() FROM run
), waited AS (
    INSERT INTO waiters (run_id, step_key, signal_name, created_at, delivered_at)
    SELECT id, 'without queue', 'signal', now(), now() FROM run
), dispatched AS (
    INSERT INTO steps (run_id, step_key, status, last_attempt, step_type, started_at, dispatched_at,
                       dispatch_queue, dispatch_priority, dispatch_step_type, pending_writes, stall_noted)
    SELECT id, 'a', 'Pending', 1, 't', now(), now(), 'q', n % 10, 't', 1, false FROM run
    UNION ALL
    SELECT id, 'without queue', NULL, 0, NULL, NULL, now(), NULL, NULL, NULL, NULL, false FROM run
)
INSERT INTO pending (run_id, step_key, queue, priority, ready_at, late)
SELECT id, 'a', 'q', n % 10, now() - n * interval '1 second', n % 2 = 0 FROM run
"""
ADD_RUNNING_RUNS = f"""
WITH run AS MATERIALIZED (
    SELECT id::uuid FROM unnest(ARRAY['{UUID(int=1)}', '{UUID(int=2)}']) id
), added AS (
    INSERT INTO runs (run_id, flow_id, flow_name, status, trigger_key, started_at, start_token)
    SELECT id, id, 'flow', 'Running', 'manual', now(), id FROM run
), started AS (
    INSERT INTO steps (run_id, step_key, status, last_attempt, step_type, started_at, dispatched_at,
                       dispatch_queue, dispatch_priority, dispatch_step_type, pending_writes, stall_noted)
    SELECT id, 'a', 'Running', 1, 't', now(), now(), 'q', 0, 't', 1, false FROM run
)
INSERT INTO pending (run_id, step_key, queue, priority, ready_at, late)
SELECT id, 'a', 'q', 0, now() + interval '1 hour', false FROM run
"""
ADD_WAITERS = f"""
INSERT INTO waiters (run_id, step_key, signal_name, created_at, delivered_at)
SELECT '{UUID(int=1)}', 'waiter ' || n, 'signal', now(), CASE WHEN n % 2 = 0 THEN now() END
FROM generate_series(1, $1) n
"""
STATISTICS = {
    "none": [],
    "of empty tables": ["VACUUM ANALYZE"],
    "of many rows, now deleted": [ADD_READY_RUNS, "ANALYZE", "DELETE FROM pending", "VACUUM"],
    # A table of some pages without rows counts as empty, whatever is added.
    "of deleted rows": [
        ADD_READY_RUNS,
        "DELETE FROM runs; DELETE FROM controls; DELETE FROM waiters; DELETE FROM steps; DELETE FROM pending",
        "ANALYZE",
    ],
}


def _rows_read(plan: dict[str, Any]) -> int:
    """The rows that a plan reads from tables, those that a filter removes included."""
    rows = 0
    if "Relation Name" in plan or "Index Name" in plan:
        removed = (value for key, value in plan.items() if key.startswith("Rows Removed"))
        rows = int((plan["Actual Rows"] + sum(removed)) * plan["Actual Loops"])
    return rows + sum(map(_rows_read, plan.get("Plans", ())))


async def _prepare(operation: str, admin: asyncpg.Connection) -> Callable[[], Awaitable[dict[str, Any]]]:
    """Prepare an operation of EXECUTE. Returns a function that executes it on ADD_RUNNING_RUNS."""
    sql, arguments, settings = EXECUTE[operation]
    schema = await admin.fetchval("SELECT quote_ident(current_schema())")
    for setting in settings.replace("SET LOCAL", "SET").split(";"):
        if "SET" in setting:
            await admin.execute(setting)
    await admin.execute(f"PREPARE operation AS {fill_in(sql, schema)}")

    async def explain() -> dict[str, Any]:
        transaction = admin.transaction()
        await transaction.start()
        try:
            await admin.execute(ADD_RUNNING_RUNS)
            explained = f"EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE operation ({arguments})"
            [plan] = json.loads(await admin.fetchval(explained))
        finally:
            await transaction.rollback()
        found: dict[str, Any] = plan["Plan"]
        return found

    return explain


@pytest.mark.parametrize("later", [[], ["ANALYZE"]], ids=["kept", "made anew"])
@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("operation", EXECUTE)
async def test_a_plan_reads_by_index_whatever_the_statistics_say(
    operation: str, statistics: str, later: list[str], fresh: str, admin: asyncpg.Connection
) -> None:
    """A plan is kept while the tables grow, and may be made from old statistics."""
    async with open_store(fresh):
        pass
    for statement in STATISTICS[statistics]:
        await admin.execute(statement, *([MANY] if statement is ADD_READY_RUNS else []))
    explain = await _prepare(operation, admin)
    await explain()
    await admin.execute(ADD_READY_RUNS, MANY)
    for statement in later:
        await admin.execute(statement)
    plan = await explain()
    assert 0 < _rows_read(plan) < MANY, json.dumps(plan, indent=1)


async def test_the_cost_of_an_advance_does_not_depend_on_the_waiters_of_its_run(
    fresh: str, admin: asyncpg.Connection
) -> None:
    async with open_store(fresh):
        pass
    explain = await _prepare("advance_runs", admin)
    before = _rows_read(await explain())
    await admin.execute(ADD_WAITERS, MANY)
    await admin.execute("ANALYZE waiters")
    plan = await explain()
    assert before <= _rows_read(plan) <= before + 2, json.dumps(plan, indent=1)


# Older versions

RELEASE_BY_VERSION_7 = """
UPDATE steps SET dispatched_at = NULL, due_at = NULL, dispatch_job_id = NULL
WHERE run_id = $1 AND step_key = $2
"""
DISPATCH_BY_VERSION_7 = """
UPDATE steps SET dispatched_at = now(), due_at = NULL, dispatch_token = 1
WHERE run_id = $1 AND step_key = $2 AND dispatched_at IS NULL
"""
RESCHEDULE_BY_VERSION_7 = """
UPDATE steps
SET completed_at = now(), status = 'Pending', rescheduled = true, claim_token = NULL, claim_owned = NULL,
    claimed_at = NULL, claim_expires_at = NULL, dispatch_token = NULL, dispatch_job_id = NULL,
    dispatched_at = now(), due_at = now()
WHERE run_id = $1 AND step_key = $2
"""


async def test_que_7_an_older_version_that_releases_a_dispatch_forgets_its_queue(
    fresh: str, admin: asyncpg.Connection
) -> None:
    async with open_store(fresh) as store:
        run_id = await _trigger(store, _request("one"), _request("two"))
        await admin.execute(RELEASE_BY_VERSION_7, run_id, "one")
        assert await _pending(admin) == ["two"]
        await admin.execute(DISPATCH_BY_VERSION_7, run_id, "one")
        dispatches = {one.step_key: one.queue for one in await store.get_dispatches(run_id)}
        assert dispatches == {"one": None, "two": "q"}
        assert [step.step_key for step in await _claim(store, 2)] == ["two"]


async def test_stp_7_an_older_version_that_reschedules_a_step_keeps_its_queue(
    fresh: str, admin: asyncpg.Connection
) -> None:
    async with open_store(fresh) as store:
        run_id = await _trigger(store, _request("one"))
        [first] = await _claim(store)
        await admin.execute(RESCHEDULE_BY_VERSION_7, run_id, "one")
        [second] = await _claim(store)
        assert (first.attempt, second.attempt) == (1, 2)
        await admin.execute("UPDATE runs SET status = 'Cancelled', completed_at = now()")
        assert await _claim(store) == ()
        await admin.execute("DELETE FROM steps")
        assert await _pending(admin) == []


async def test_a_store_of_version_7_is_migrated_in_place(fresh: str, admin: asyncpg.Connection) -> None:
    _, backend, config = resolve_store(fresh)
    for number, _, script in backend.migrations(config):  # type: ignore[attr-defined]
        if number < 8:
            await admin.execute(script)
    run_id = new_run_id()
    await admin.execute(
        "INSERT INTO runs (run_id, flow_id, flow_name, status, trigger_key, started_at, start_token) "
        "VALUES ($1, $1, 'orders', 'Running', 'manual', now(), $1)",
        run_id,
    )
    await admin.execute(
        "INSERT INTO steps (run_id, step_key, dispatched_at, dispatch_token) VALUES ($1, 'old', now(), 1)",
        run_id,
    )
    async with open_store(fresh) as store:
        assert [(one.step_key, one.queue) for one in await store.get_dispatches(run_id)] == [("old", None)]
        assert await _claim(store) == ()
        await store.release_dispatch(run_id, "old")
        assert await store.try_record_dispatch(run_id, "old", queue="q", step_type="http")
        [claimed] = await _claim(store)
        assert (claimed.run_id, claimed.step_key, claimed.attempt) == (run_id, "old", 1)


# Lost replies and cancelled calls


@asynccontextmanager
async def _queued(fresh: str) -> AsyncIterator[tuple[FlowStore, UUID]]:
    """A store on a run with three queued steps."""
    async with open_store(fresh) as direct:
        yield direct, await _trigger(direct, *(_request(f"step {n}") for n in range(3)))


@pytest.mark.parametrize("pgbouncer", ["false", "true"])
async def test_que_3_a_cancelled_claim_is_given_back(pgbouncer: str, fresh: str) -> None:
    async with (
        _queued(fresh) as (direct, run_id),
        proxy_before(fresh) as (proxy, through),
        open_store(through, pgbouncer=pgbouncer, statement_timeout=2) as store,
    ):
        assert await store.claim_next_steps(["other"], lease=LEASE) == ()
        proxy.arm(1, Fault.REPLY_LOST, match=MessageMatch.COMMIT)
        task = asyncio.create_task(_claim(store, 3))
        while not proxy.has_injected:  # noqa: ASYNC110 - before the store retries
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        async def is_given_back() -> bool:
            return not await direct.get_step_claims(run_id)

        await _until(is_given_back)
        detail = await direct.get_run_detail(run_id)
        assert detail is not None
        assert {step.status for step in detail.steps} <= {StepStatus.PENDING}
        assert [step.step_key for step in await _claim(direct, 3)] == ["step 0", "step 1", "step 2"]


async def test_que_3_a_repeated_claim_returns_the_steps_that_it_still_holds(fresh: str) -> None:
    async with (
        _queued(fresh) as (direct, run_id),
        proxy_before(fresh) as (proxy, through),
        open_store(through) as store,
    ):
        assert await store.claim_next_steps(["other"], lease=LEASE) == ()
        proxy.arm(1, Fault.REPLY_LOST, match=MessageMatch.COMMIT)
        task = asyncio.create_task(_claim(store, 2))
        while not proxy.has_injected:  # noqa: ASYNC110 - before the store retries
            await asyncio.sleep(0)
        proxy.arm(1, Fault.RESET, match=MessageMatch.CONNECT, times=1_000)

        async def is_claimed() -> bool:
            return len(await direct.get_step_claims(run_id)) == 2

        await _until(is_claimed)
        await direct.release_step_claim(run_id, "step 0")
        proxy.heal()
        assert [step.step_key for step in await task] == ["step 1"]
        assert [step.step_key for step in await _claim(direct, 3)] == ["step 0", "step 2"]


async def test_que_3_an_unknown_claim_ends_with_its_lease(fresh: str) -> None:
    async with (
        _queued(fresh) as (direct, _),
        proxy_before(fresh) as (proxy, through),
        open_store(through, retry_timeout=0) as store,
    ):
        assert await store.claim_next_steps(["other"], lease=LEASE) == ()
        proxy.arm(1, Fault.REPLY_LOST, match=MessageMatch.COMMIT)
        with pytest.raises(OutcomeUnknownError):
            await store.claim_next_steps(["q"], lease=timedelta(milliseconds=500), limit=3)

        async def is_claimed_again() -> bool:
            return bool(await _claim(direct, 3))

        await _until(is_claimed_again)
