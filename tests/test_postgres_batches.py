"""Batches on PostgreSQL: deadlocks, unacknowledged statements, invalid rows, cancelled calls, closing."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from flowstore_chaos.proxy import HANGS, Fault, proxy_before
from flowstore_core import (
    ClaimLostError,
    FlowStore,
    FlowStoreError,
    OutcomeUnknownError,
    RunNotFoundError,
    StaleAttemptError,
    StepStatus,
    StoreClosedError,
    StoreUnavailableError,
    new_run_id,
    open_store,
)
from flowstore_postgres import batch_writer, database
from flowstore_postgres.connection import Connection
from flowstore_postgres.prepared_connections import INDEX_ONLY_SETTINGS, PreparedConnections
from tests.worker import Call, WorkerPool

FLOW = UUID(int=1)
LEASE = timedelta(minutes=5)


async def new_run(store: FlowStore) -> UUID:
    run = new_run_id()
    await store.start_run(FLOW, "orders", run, "manual")
    return run


async def gather_results(*calls: Awaitable[Any]) -> list[Any]:
    return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60)


@asynccontextmanager
async def locked(admin: asyncpg.Connection, run: UUID) -> AsyncIterator[None]:
    """Lock the run, so that every call on it waits."""
    async with admin.transaction():
        await admin.execute("SELECT FROM runs WHERE run_id = $1 FOR UPDATE", run)
        yield


async def _wait_for_blocked_sessions(admin: asyncpg.Connection, count: int) -> None:
    """Wait until ``count`` sessions wait for a lock of the administrator's transaction."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE pg_backend_pid() = ANY(pg_blocking_pids(pid))"
    while await admin.fetchval(waiting) < count:
        # Within a transaction the statistics are cached.
        await admin.execute("SELECT pg_stat_clear_snapshot()")


@pytest.fixture
def long_lock_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches wait for locked runs while a loaded machine queues calls behind them."""
    settings = INDEX_ONLY_SETTINGS.replace("lock_timeout = 100", "lock_timeout = 60000")
    assert settings != INDEX_ONLY_SETTINGS
    monkeypatch.setattr(batch_writer, "PreparedConnections", partial(PreparedConnections, settings=settings))


async def queue_together(
    store: FlowStore, admin: asyncpg.Connection, calls: list[Awaitable[Any]]
) -> list[Any]:
    """Start calls that share a batch: every worker waits for a lock until all are queued.

    Needs the fixture ``long_lock_timeout``.
    """
    runs = [await new_run(store) for _ in range(2)]
    async with admin.transaction():
        await admin.execute("SELECT FROM runs WHERE run_id = ANY($1) FOR UPDATE", runs)
        waiting = []
        for run in runs:
            waiting.append(asyncio.ensure_future(store.try_claim_step(run, "blocked")))
            await _wait_for_blocked_sessions(admin, len(waiting))
        tasks = [asyncio.ensure_future(call) for call in calls]
        await asyncio.sleep(0.02)
    assert await gather_results(*waiting) == [True, True]
    return tasks


async def deadlocks(admin: asyncpg.Connection) -> int:
    await admin.execute("SELECT pg_stat_clear_snapshot()")
    return int(
        await admin.fetchval("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
    )


# Processes


def random_calls(runs: list[UUID], process: int, number: int) -> list[Call]:
    rng = random.Random(f"{process} {number}")
    calls: list[Call] = []
    for caller in range(128):
        step: dict[str, Any] = {"run_id": rng.choice(runs), "step_key": f"step {rng.randrange(4)}"}
        owner = f"owner {rng.randrange(3)}"
        calls.append(
            rng.choice(
                [
                    ("try_claim_step", {**step, "owner": owner, "lease": timedelta(seconds=1)}),
                    ("try_claim_step", step),
                    (
                        "try_start_step",
                        {**step, "step_type": "http", "owner": owner, "lease": timedelta(seconds=1)},
                    ),
                    ("release_step_claim", step),
                    ("renew_step_claim", {**step, "owner": owner, "lease": timedelta(seconds=2)}),
                    ("try_record_dispatch", step),
                    ("annotate_dispatch", {**step, "job_id": f"job {caller}"}),
                    ("release_dispatch", step),
                    ("record_step_start", {**step, "step_type": "http"}),
                    ("record_step_start", {**step, "step_type": "http", "owner": owner}),
                    ("record_step_complete", {**step, "status": StepStatus.PENDING}),
                    ("record_step_complete", {**step, "status": StepStatus.FAILED, "attempt": 1}),
                    ("complete_run", {"run_id": step["run_id"], "status": "Failed", "expected": {}}),
                    ("retry_step", step),
                ]
            )
        )
    return calls


async def test_concurrent_calls_of_two_processes_on_the_same_steps_cause_no_deadlock(
    fresh: str, admin: asyncpg.Connection, worker_pool: WorkerPool
) -> None:
    workers = worker_pool.get(2)
    assert await gather_results(*(worker.request("open", fresh, None) for worker in workers)) == [None, None]
    async with open_store(fresh) as store:
        runs = [await new_run(store) for _ in range(20)]
        before = await deadlocks(admin)
        unexpected: set[type] = set()
        expected = {"ConflictError", "StepNotFoundError"}
        for number in range(8):
            await gather_results(
                *(w.request("prepare", random_calls(runs, n, number)) for n, w in enumerate(workers))
            )
            for results in await gather_results(*(worker.request("go") for worker in workers)):
                unexpected |= {
                    type(one)
                    for one in results
                    if isinstance(one, FlowStoreError)
                    and not expected & {kind.__name__ for kind in type(one).__mro__}
                }
        assert unexpected == set()
        # Exactly one of the two processes claims each new key.
        keys = [(run, f"fresh {n}") for run in runs for n in range(6)]
        for name, more in (("try_claim_step", {}), ("try_record_dispatch", {})):
            calls = [(name, {"run_id": run, "step_key": key, **more}) for run, key in keys]
            await gather_results(*(w.request("prepare", calls[:: 1 - 2 * n]) for n, w in enumerate(workers)))
            first, second = await gather_results(*(worker.request("go") for worker in workers))
            open_runs = {run for run in runs if await store.get_run_status(run) == "Running"}
            for (run, _), one, other in zip(keys, first, reversed(second), strict=True):
                assert [one, other].count(True) == (run in open_runs)
        await gather_results(*(worker.request("close") for worker in workers))
        assert await deadlocks(admin) == before


# Unacknowledged batches


@pytest.mark.usefixtures("long_lock_timeout")
@pytest.mark.parametrize("fault", Fault)
async def test_con_3_an_unacknowledged_batch_has_correct_results(
    fault: Fault, fresh: str, admin: asyncpg.Connection
) -> None:
    async with (
        open_store(fresh) as direct,
        proxy_before(fresh) as (proxy, through),
        # Only faults that hang wait for the timeout.
        open_store(through, statement_timeout=0.5 if fault in HANGS else 30) as store,
    ):
        run = await new_run(direct)
        keys = [f"step {n:02}" for n in range(20)]
        for key in keys[::2]:
            assert await direct.try_claim_step(run, key)
        free = [n % 2 == 1 for n in range(20)]

        async def round_trip(*calls: Awaitable[Any]) -> list[Any]:
            tasks = await queue_together(store, admin, list(calls))
            return await gather_results(*tasks)

        # Open the connections and prepare the statements, so that the next message is the statement itself.
        warm = [f"warm {n}" for n in range(20)]
        assert await round_trip(*(store.try_claim_step(run, key) for key in warm)) == [True] * 20
        assert await round_trip(*(store.record_step_start(run, key, "t") for key in warm)) == [1] * 20
        await round_trip(*(store.record_step_complete(run, key, "Failed") for key in warm))
        await round_trip(*(store.try_record_dispatch(run, key) for key in warm))

        async def with_fault(*calls: Awaitable[Any]) -> list[Any]:
            tasks = await start_and_arm(list(calls))
            results = await gather_results(*tasks)
            assert proxy.has_injected
            proxy.disarm()
            await proxy.settle()
            return results

        async def start_and_arm(calls: list[Awaitable[Any]]) -> list[Any]:
            tasks = [asyncio.ensure_future(call) for call in calls]
            proxy.arm(1, fault)
            return tasks

        # Of two claims of one key in one batch exactly one wins, for every fault.
        claims = await with_fault(*(store.try_claim_step(run, key) for key in keys for _ in range(2)))
        assert [sum(claims[2 * n : 2 * n + 2]) for n in range(20)] == free
        assert await with_fault(*(store.record_step_start(run, key, "t") for key in keys)) == [1] * 20
        assert (
            await with_fault(*(store.record_step_complete(run, key, "Failed") for key in keys)) == [None] * 20
        )
        # A second start is a second attempt, numbered once.
        assert await with_fault(*(store.record_step_start(run, key, "t") for key in keys)) == [2] * 20
        dispatches = await with_fault(
            *(store.try_record_dispatch(run, key) for key in keys for _ in range(2))
        )
        assert [sum(dispatches[2 * n : 2 * n + 2]) for n in range(20)] == [True] * 20
        detail = await direct.get_run_detail(run)
        assert detail is not None
        assert [len(step.attempts) for step in detail.steps if step.step_key in keys] == [2] * 20
        assert len(await direct.get_step_claims(run)) == 40


# Errors of single rows


@pytest.mark.usefixtures("long_lock_timeout")
async def test_a_rejected_row_fails_only_its_call(fresh: str, admin: asyncpg.Connection) -> None:
    async with open_store(fresh) as store:
        run = await new_run(store)
        # Validation leaves nothing for PostgreSQL to reject, so the table gets a constraint.
        await admin.execute("ALTER TABLE steps ADD CHECK (step_key NOT LIKE 'bad%')")
        keys = [f"{'bad' if n in (3, 17, 18) else 'good'} {n}" for n in range(40)]
        results = await gather_results(
            *await queue_together(store, admin, [store.try_claim_step(run, key) for key in keys])
        )
        for key, one in zip(keys, results, strict=True):
            if key.startswith("bad"):
                assert type(one) is StoreUnavailableError
                assert "23514" in str(one)
                assert key not in str(one)
            else:
                assert one is True
        assert {one.step_key for one in await store.get_step_claims(run)} == {
            key for key in keys if key.startswith("good")
        }


async def test_an_error_of_the_whole_statement_does_not_split_the_batch(
    fresh: str, admin: asyncpg.Connection
) -> None:
    async with (
        open_store(fresh) as direct,
        proxy_before(fresh) as (proxy, through),
        open_store(through, statement_timeout=0.3) as store,
    ):
        run = await new_run(direct)
        async with locked(admin, run):
            proxy.arm(0, Fault.REPLY_LOST)
            results = await gather_results(*(store.try_claim_step(run, f"step {n}") for n in range(40)))
            # Halving 40 rows would send a statement for each half.
            assert proxy.messages < 40
        assert {type(one) for one in results} == {StoreUnavailableError}
        assert len({id(one) for one in results}) == 40
        assert await direct.try_claim_step(run, "step 0")


async def test_unknown_runs_and_stale_attempts_do_not_affect_other_rows(fresh: str) -> None:
    async with open_store(fresh) as store:
        run = await new_run(store)
        unknown = new_run_id()
        for n in range(30):
            await store.record_step_start(run, f"step {n}", "t")
        results = await gather_results(
            *(
                store.record_step_complete(
                    unknown if n % 3 == 0 else run, f"step {n}", "Failed", attempt=2 if n % 3 == 1 else 1
                )
                for n in range(30)
            )
        )
        assert [type(one) for one in results] == [RunNotFoundError, StaleAttemptError, type(None)] * 10


@pytest.mark.usefixtures("long_lock_timeout")
async def test_large_texts_do_not_share_a_message(fresh: str, admin: asyncpg.Connection) -> None:
    # 256 texts of the maximum size exceed the server's limit for a message.
    async with open_store(fresh) as store:
        run = await new_run(store)
        text = '"' + "x" * (3 * 1024 * 1024) + '"'
        keys = [f"step {n}" for n in range(6)]
        for calls in (
            [store.try_claim_step(run, key) for key in keys],
            [store.record_step_start(run, key, "t", input_json=text) for key in keys],
            [store.record_step_complete(run, key, "Failed", error_message=text) for key in keys],
        ):
            await gather_results(*await queue_together(store, admin, calls))
            written = await admin.fetchval(
                "SELECT count(DISTINCT xmin::text) FROM steps WHERE run_id = $1", run
            )
            assert written == (1 if calls[0].__name__ == "try_claim_step" else 6)


# Times of claims


async def test_a_claim_begins_when_the_run_is_unlocked(fresh: str, admin: asyncpg.Connection) -> None:
    async with open_store(fresh) as store:
        run = await new_run(store)
        assert await store.try_claim_step(run, "mine", owner="me", lease=timedelta(seconds=0.3))
        async with locked(admin, run):
            calls = [
                asyncio.ensure_future(store.try_claim_step(run, "other", owner="me", lease=LEASE)),
                asyncio.ensure_future(store.record_step_start(run, "mine", "t", owner="me")),
            ]
            await asyncio.sleep(0.5)
            freed = datetime.now(UTC)
        claimed, started = await gather_results(*calls)
        assert claimed is True
        (claim,) = [one for one in await store.get_step_claims(run) if one.step_key == "other"]
        assert claim.claimed_at >= freed
        # The lease expired while the start waited, so the start must fail (STP-3).
        assert isinstance(started, ClaimLostError)


# Cancellation


async def test_con_4_many_cancelled_claims_leave_no_key_claimed(fresh: str) -> None:
    rng = random.Random(4)
    async with open_store(fresh) as store:
        run = await new_run(store)
        keys = [f"step {n}" for n in range(500)]

        async def claim(key: str) -> None:
            task = asyncio.ensure_future(
                rng.choice([store.try_claim_step, store.try_record_dispatch])(run, key)
            )
            await asyncio.sleep(rng.random() * 0.05)
            task.cancel()
            with suppress(asyncio.CancelledError):
                if await task:
                    # The claim completed before the cancellation.
                    await store.release_step_claim(run, key)
                    await store.release_dispatch(run, key)

        for _ in range(3):
            await asyncio.wait_for(asyncio.gather(*(claim(key) for key in keys)), 200)
        # Closing waits 5 seconds for the releases, which may take longer on a loaded machine.
        async with asyncio.timeout(60):
            while await store.get_claimed_step_keys(run) or await store.get_dispatched_step_keys(run):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    async with open_store(fresh) as store:
        assert (
            await gather_results(*(store.try_claim_step(run, key, owner="new") for key in keys))
            == [True] * 500
        )
        assert await gather_results(*(store.try_record_dispatch(run, key) for key in keys)) == [True] * 500


# Closing and options


async def test_a_store_closed_with_queued_calls_returns_correct_results(
    fresh: str, admin: asyncpg.Connection
) -> None:
    opened = open_store(fresh)
    store = await opened.__aenter__()
    run = await new_run(store)
    tasks = [asyncio.ensure_future(store.try_claim_step(run, f"step {n}", owner="me")) for n in range(600)]
    await asyncio.sleep(0.001)
    await opened.__aexit__(None, None, None)
    results = await gather_results(*tasks)
    assert {type(one) for one in results} <= {bool, StoreClosedError, OutcomeUnknownError}
    rows = await admin.fetch("SELECT step_key FROM steps WHERE claimed_at IS NOT NULL")
    claimed = {row["step_key"] for row in rows}
    for n, one in enumerate(results):
        if not isinstance(one, OutcomeUnknownError):
            assert (f"step {n}" in claimed) == (one is True)
    assert results.count(True) > 0


async def test_a_closing_store_fails_the_calls_on_a_locked_run(
    fresh: str, admin: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "CLOSE_SECONDS", 1.0)
    async with open_store(fresh, retry_timeout=600) as store:
        run = await new_run(store)
        async with locked(admin, run):
            # While the store closes, the calls reach the lock timeout and move to another batch.
            waiting = [asyncio.create_task(store.try_claim_step(run, f"s{n}")) for n in range(4)]
            await asyncio.sleep(0)
            await store.aclose()
            results = await gather_results(*waiting)
    assert {type(result) for result in results} <= {OutcomeUnknownError, StoreClosedError}


@pytest.mark.parametrize(
    "options", [{"pool_size": 1}, {"pgbouncer": True}, {"pgbouncer": True, "pool_size": 1}]
)
async def test_batches_work_with_one_connection_and_with_a_transaction_pooler(
    options: dict[str, Any], fresh: str
) -> None:
    async with open_store(fresh, **options) as store:
        run = await new_run(store)
        keys = [f"step {n}" for n in range(150)]
        assert await gather_results(*(store.try_claim_step(run, key) for key in keys)) == [True] * 150
        assert await gather_results(*(store.record_step_start(run, key, "t") for key in keys)) == [1] * 150
        results = await gather_results(
            *(store.record_step_complete(run, key, "Succeeded") for key in keys), store.get_step_statuses(run)
        )
        assert results[:-1] == [None] * 150
        assert set((await store.get_step_statuses(run)).values()) == {StepStatus.SUCCEEDED}


async def test_statements_prepared_on_small_tables_use_indexes_on_large_tables(
    fresh: str, admin: asyncpg.Connection
) -> None:
    async with open_store(fresh, pool_size=2) as store:
        run = await new_run(store)
        for number in range(8):
            # PostgreSQL may cache a generic plan after five executions.
            await gather_results(*(store.try_claim_step(run, f"{number} {n}") for n in range(20)))
            await gather_results(*(store.record_step_start(run, f"{number} {n}", "t") for n in range(20)))
            await gather_results(
                *(store.record_step_complete(run, f"{number} {n}", "Failed") for n in range(20))
            )
        await admin.execute(
            "INSERT INTO steps (run_id, step_key)"
            " SELECT gen_random_uuid(), 'x' FROM generate_series(1, 50000)"
        )

        async def use() -> None:
            for call in (store.try_claim_step, store.release_step_claim, store.try_record_dispatch):
                await gather_results(*(call(run, f"late {n}") for n in range(20)))
            await gather_results(*(store.record_step_start(run, f"late {n}", "t") for n in range(20)))
            await gather_results(
                *(store.record_step_complete(run, f"late {n}", "Pending") for n in range(20))
            )

        async def scans() -> int:
            await use()
            # A server process reports its statistics with its next statement, at least a second later.
            await asyncio.sleep(1.1)
            await use()
            await admin.execute("SELECT pg_stat_clear_snapshot()")
            count = await admin.fetchval(
                "SELECT seq_scan FROM pg_stat_user_tables WHERE relid = 'steps'::regclass"
            )
            return int(count)

        # A connection that was idle may report the scans of the small table late.
        before = await scans()
        for _ in range(10):
            after = await scans()
            if after == before:
                return
            before = after
        raise AssertionError("every round of calls scans the table")


async def test_a_locked_run_delays_no_other_run(fresh: str, admin: asyncpg.Connection) -> None:
    async with open_store(fresh) as store:
        locked_run, free = await new_run(store), await new_run(store)
        for step in "abc":
            assert await store.try_claim_step(locked_run, step, owner="me", lease=LEASE)
            await store.record_step_start(locked_run, step, "t", owner="me")
        transaction = admin.transaction()
        await transaction.start()
        await admin.execute("SELECT FROM runs WHERE run_id = $1 FOR UPDATE", locked_run)
        await admin.execute("SELECT FROM steps WHERE run_id = $1 AND step_key = 'b' FOR UPDATE", locked_run)
        # More calls than connections; most wait for the run, one waits for the step.
        waiting = [asyncio.create_task(store.try_claim_step(locked_run, f"s{n}")) for n in range(8)]
        for step in "ab":
            completing = store.record_step_complete(locked_run, step, StepStatus.SUCCEEDED)
            waiting.append(asyncio.create_task(completing))
        cancelled = asyncio.create_task(store.try_claim_step(locked_run, "cancelled"))
        try:
            # Calls on another run are not delayed.
            for n in range(3):
                key = f"s{n}"
                assert await store.try_record_dispatch(free, key)
                assert await store.try_claim_step(free, key)
                await store.record_step_start(free, key, "t")
                await store.record_step_complete(free, key, StepStatus.SUCCEEDED)
            assert not any(task.done() for task in waiting)
            cancelled.cancel()
        finally:
            await transaction.rollback()
        assert await asyncio.gather(*waiting) == [True] * 8 + [None, None]
        with suppress(asyncio.CancelledError):
            await cancelled
        statuses = await store.get_step_statuses(locked_run)
        assert statuses == {"a": StepStatus.SUCCEEDED, "b": StepStatus.SUCCEEDED, "c": StepStatus.RUNNING}
    async with open_store(fresh) as store:
        # A claim of the cancelled call was released.
        assert await store.try_claim_step(locked_run, "cancelled")


@pytest.mark.parametrize("options", [{}, {"pgbouncer": True}])
async def test_a_connection_terminated_before_execution_is_a_lost_connection(
    options: dict[str, Any], fresh: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection is terminated after a statement was prepared and before it is executed."""
    prepare: Any = Connection._get_statement
    terminated = False

    async def terminate(connection: Connection, *arguments: Any, **named: Any) -> Any:
        nonlocal terminated
        statement = await prepare(connection, *arguments, **named)
        if not terminated and "step" in arguments[0]:
            terminated = True
            connection.terminate()
        return statement

    async with open_store(fresh, **options) as store:
        run = await new_run(store)
        monkeypatch.setattr(Connection, "_get_statement", terminate)
        keys = [f"step {n}" for n in range(20)]
        results = await gather_results(*(store.try_claim_step(run, key, owner="me") for key in keys))
        assert terminated
        assert results == [True] * 20
