"""Group commit in SQLite: errors within a group, cancellation, closing, locks."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from flowstore_core import (
    FlowStore,
    FlowStoreError,
    RunAlreadyExistsError,
    RunNotFoundError,
    StoreClosedError,
    StoreUnavailableError,
    open_store,
)
from flowstore_sqlite.database import Database

FLOW = uuid4()
MANY = 300


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "flows.db"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[FlowStore]:
    async with open_store(f"sqlite:///{path}") as opened:
        yield opened


@pytest.fixture
async def run_id(store: FlowStore) -> UUID:
    return (await store.start_run(FLOW, "flow", uuid4(), "manual")).run_id


def database(store: FlowStore) -> Database:
    """Return the database of the store, whose ``write`` accepts any function."""
    inner: Any = store
    (backend_store,) = inner._store.values()
    assert isinstance(backend_store._database, Database)
    return backend_store._database


async def claimed(store: FlowStore, run_id: UUID) -> set[str]:
    return {claim.step_key for claim in await store.get_step_claims(run_id)}


async def test_a_call_that_fails_after_a_change_is_rolled_back(store: FlowStore, run_id: UUID) -> None:
    def trigger(number: int) -> Any:
        # The key is registered before the duplicate run id raises.
        return store.trigger_run(FLOW, "flow", run_id, "manual", idempotency_key=f"key-{number}")

    calls = [
        trigger(number) if number % 3 == 0 else store.try_claim_step(run_id, str(number))
        for number in range(MANY)
    ]
    results = await asyncio.gather(*calls, return_exceptions=True)
    for number, result in enumerate(results):
        if number % 3 == 0:
            assert isinstance(result, RunAlreadyExistsError)
            assert await store.find_run_id_by_idempotency_key(FLOW, "manual", f"key-{number}") is None
        else:
            assert result is True
    assert len(await claimed(store, run_id)) == MANY - MANY // 3


async def test_an_error_before_a_change_fails_only_its_call(store: FlowStore, run_id: UUID) -> None:
    calls = [store.try_claim_step(run_id if number % 2 else uuid4(), str(number)) for number in range(MANY)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [result for result in results if result is True] == [True] * (MANY // 2)
    assert sum(isinstance(result, RunNotFoundError) for result in results) == MANY // 2


@pytest.mark.parametrize("ends_transaction", [False, True])
async def test_an_error_of_the_driver_fails_only_its_call(
    store: FlowStore, run_id: UUID, ends_transaction: bool
) -> None:
    def broken(db: sqlite3.Connection, now: int) -> None:
        if ends_transaction:
            db.execute("ROLLBACK")
        db.execute("INSERT INTO steps (run_id, step_key) VALUES (x'00', NULL)")

    calls: list[Any] = [store.try_claim_step(run_id, str(number)) for number in range(100)]
    calls.insert(50, database(store).write(broken))
    results = await asyncio.gather(*calls, return_exceptions=True)
    failure = results.pop(50)
    assert type(failure) is FlowStoreError
    assert "IntegrityError" not in str(failure)
    assert results == [True] * 100
    assert len(await claimed(store, run_id)) == 100


async def test_slow_writes_are_split_into_several_groups(store: FlowStore, run_id: UUID) -> None:
    statements: list[str] = []

    def slow(db: sqlite3.Connection, now: int) -> int:
        db.set_trace_callback(statements.append)
        time.sleep(0.005)
        return now

    results = await asyncio.gather(*(database(store).write(slow) for _ in range(20)))
    assert results == sorted(results)
    assert len(set(results)) == 20
    # After 20 ms a group starts no further write.
    assert statements.count("COMMIT") >= 4


async def test_cancelled_calls_are_compensated(store: FlowStore, run_id: UUID) -> None:
    for wait in (0.0, 0.001, 0.003, 0.01):
        tasks = [
            asyncio.create_task(
                store.try_claim_step(run_id, f"{wait}-{number}")
                if number % 2
                else store.try_record_dispatch(run_id, f"{wait}-{number}")
            )
            for number in range(MANY)
        ]
        await asyncio.sleep(wait)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        succeeded = {f"{wait}-{number}" for number, result in enumerate(results) if result is True}
        # Compensations may still be running.
        for _ in range(1000):
            claimed_keys = {*await claimed(store, run_id), *await store.get_dispatched_step_keys(run_id)}
            claimed_keys = {key for key in claimed_keys if key.startswith(f"{wait}-")}
            if claimed_keys == succeeded:
                break
            await asyncio.sleep(0.02)
        assert claimed_keys == succeeded


async def test_closing_waits_for_compensations(path: Path) -> None:
    async with open_store(f"sqlite:///{path}") as store:
        run_id = (await store.start_run(FLOW, "flow", uuid4(), "manual")).run_id
        tasks = [asyncio.create_task(store.try_claim_step(run_id, str(number))) for number in range(MANY)]
        # The first call is being written, and the others are queued.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert True not in results
    async with open_store(f"sqlite:///{path}") as store:
        assert await claimed(store, run_id) == set()


async def test_closing_writes_queued_calls(path: Path) -> None:
    async with open_store(f"sqlite:///{path}") as store:
        run_id = (await store.start_run(FLOW, "flow", uuid4(), "manual")).run_id
        tasks = [asyncio.create_task(store.try_claim_step(run_id, str(number))) for number in range(3000)]
        await asyncio.sleep(0)
    assert await asyncio.gather(*tasks) == [True] * len(tasks)
    async with open_store(f"sqlite:///{path}") as store:
        assert len(await claimed(store, run_id)) == len(tasks)


async def test_writes_wait_for_a_locked_file(path: Path) -> None:
    other = sqlite3.connect(path, isolation_level=None)
    async with open_store(f"sqlite:///{path}?busy_timeout=0.3") as store:
        run_id = (await store.start_run(FLOW, "flow", uuid4(), "manual")).run_id
        other.execute("BEGIN IMMEDIATE")
        calls = (store.try_claim_step(run_id, str(number)) for number in range(20))
        for result in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(result, StoreUnavailableError)
            assert "was locked by others for 0.3 s" in str(result)
        # Readers do not wait.
        assert await store.get_step_claims(run_id) == ()
    async with open_store(f"sqlite:///{path}?busy_timeout=60") as store:
        asyncio.get_running_loop().call_later(0.05, other.execute, "COMMIT")
        assert await store.try_claim_step(run_id, "later")
    other.close()


async def test_closing_stops_waiting_for_a_locked_file(path: Path) -> None:
    async with open_store(f"sqlite:///{path}?busy_timeout=600") as store:
        run_id = (await store.start_run(FLOW, "flow", uuid4(), "manual")).run_id
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        tasks = [asyncio.create_task(store.try_claim_step(run_id, str(number))) for number in range(20)]
        await asyncio.sleep(0.01)
        began = time.monotonic()
    assert time.monotonic() - began < 200
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(result, StoreClosedError)
    other.close()


CLOSED_LOOP = """
import asyncio, sys
from uuid import uuid4
from flowstore_core import open_store

async def begin():
    contexts.append(open_store(sys.argv[1]))
    store = await contexts[0].__aenter__()
    run = await store.start_run(uuid4(), "flow", uuid4(), "manual")
    return run.run_id, [asyncio.ensure_future(store.try_claim_step(run.run_id, str(n))) for n in range(500)]

async def reopen():
    async with open_store(sys.argv[1]) as store:
        assert await store.try_claim_step(run_id, "new")
        print("reopened")

contexts = []
loop = asyncio.new_event_loop()
run_id, tasks = loop.run_until_complete(begin())
loop.run_until_complete(asyncio.sleep(0))
loop.close()
asyncio.run(reopen())
"""


def test_a_store_opens_after_its_loop_was_closed_during_writes(path: Path) -> None:
    command = [sys.executable, "-c", CLOSED_LOOP, f"sqlite:///{path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "reopened\n"), done.stderr


async def test_claims_of_one_step_in_one_group_have_one_winner(store: FlowStore, run_id: UUID) -> None:
    owners = [f"owner-{number % 10}" for number in range(100)]
    results = await asyncio.gather(*(store.try_claim_step(run_id, "one", owner=owner) for owner in owners))
    winners = {owner for owner, succeeded in zip(owners, results, strict=True) if succeeded}
    assert len(winners) == 1
    # The winner called ten times, and every call of the holder returns True.
    assert sum(results) == 10
    dispatched = await asyncio.gather(*(store.try_record_dispatch(run_id, "one") for _ in range(50)))
    assert sum(dispatched) == 1


async def test_attempt_numbers_continue_after_skip_and_reset(store: FlowStore, run_id: UUID) -> None:
    """The fast path of record_step_start applies only to first attempts."""
    await store.record_step_start(run_id, "first", "task")
    await store.record_skipped_step(run_id, "second", "task")
    await store.retry_step(run_id, "first", reset=["second"])
    assert await store.try_claim_step(run_id, "second", owner="me")
    assert await store.record_step_start(run_id, "second", "task", owner="me") == 2
    assert await store.record_step_start(run_id, "second", "task", owner="me") == 2
    assert await store.record_step_start(run_id, "first", "task") == 2
