"""Completions and reads of runs that share a transaction or a statement on PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from uuid import UUID, uuid4

import asyncpg
import pytest

from flowstore_core import (
    FlowStore,
    RunNotFoundError,
    RunStatus,
    StepStatus,
    StoreUnavailableError,
    new_run_id,
    open_store,
)
from flowstore_core.plugins import find_backend
from tests.calls import together

RUNS = 40


@pytest.fixture
async def url(postgresql_url: str) -> AsyncIterator[str]:
    async with find_backend("postgresql")[1].scratch(postgresql_url) as fresh:
        yield fresh


@pytest.fixture
async def store(url: str) -> AsyncIterator[FlowStore]:
    async with open_store(url, retry_timeout=2) as opened:
        yield opened


@pytest.fixture
async def server(postgresql_url: str, url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(postgresql_url)
    schema = url.rpartition("schema=")[2].partition("&")[0]
    await connection.execute(f'SET search_path = "{schema}"')
    yield connection
    await connection.close()


async def start(store: FlowStore, runs: int) -> list[UUID]:
    run_ids = [new_run_id() for _ in range(runs)]
    await together([store.start_run(uuid4(), "flow", run_id, "manual") for run_id in run_ids])
    return run_ids


async def test_concurrent_completions_get_their_own_results(store: FlowStore) -> None:
    run_ids = await start(store, RUNS)
    await together([store.record_skipped_step(run_id, "a", "http") for run_id in run_ids[::2]])
    await store.try_record_dispatch(run_ids[1], "b")
    expected = {"a": StepStatus.SKIPPED}
    calls = [store.complete_run(run_id, RunStatus.FAILED, expected=expected) for run_id in run_ids]
    assert await together(calls) == [number % 2 == 0 for number in range(RUNS)]
    calls = [store.complete_run(run_id, RunStatus.SUCCEEDED, expected={}) for run_id in run_ids]
    assert await together(calls) == [number % 2 == 1 and number != 1 for number in range(RUNS)]
    calls = [store.complete_run(run_id, RunStatus.CANCELLED) for run_id in (run_ids[1], *run_ids)]
    assert sum(await together(calls)) == 1
    statuses = await together([store.get_run_status(run_id) for run_id in run_ids])
    assert statuses[:4] == [RunStatus.FAILED, RunStatus.CANCELLED, RunStatus.FAILED, RunStatus.SUCCEEDED]


async def test_a_locked_run_delays_no_other_completion(store: FlowStore, server: asyncpg.Connection) -> None:
    run_ids = await start(store, RUNS)
    transaction = server.transaction()
    await transaction.start()
    await server.execute("SELECT FROM runs WHERE run_id = $1 FOR UPDATE", run_ids[0])
    completions = [asyncio.create_task(store.complete_run(run_id, RunStatus.SUCCEEDED)) for run_id in run_ids]
    assert all(await asyncio.wait_for(asyncio.gather(*completions[1:]), 60))
    assert not completions[0].done()
    await transaction.rollback()
    assert await completions[0]


async def test_a_call_waits_for_a_locked_step(store: FlowStore, server: asyncpg.Connection) -> None:
    run_ids = await start(store, 3)
    for run_id in run_ids:
        await store.record_step_start(run_id, "a", "http")
    transaction = server.transaction()
    await transaction.start()
    await server.execute("UPDATE steps SET status = 'Succeeded' WHERE run_id = $1", run_ids[0])
    done = {"a": StepStatus.SUCCEEDED}
    completion = asyncio.create_task(store.complete_run(run_ids[0], RunStatus.SUCCEEDED, expected=done))
    assert not await store.complete_run(run_ids[1], RunStatus.SUCCEEDED, expected=done)
    assert not completion.done()
    await transaction.commit()
    assert await completion


async def test_a_failed_completion_does_not_affect_the_others(
    store: FlowStore, server: asyncpg.Connection
) -> None:
    run_ids = await start(store, RUNS)
    await server.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN IF NEW.run_id = '{run_ids[7]}' THEN RAISE 'no'; END IF; RETURN NEW; END $$;"
        " CREATE TRIGGER refuse BEFORE UPDATE ON runs FOR EACH ROW EXECUTE FUNCTION refuse()"
    )
    completions = [store.complete_run(run_id, RunStatus.SUCCEEDED) for run_id in run_ids]
    results = await asyncio.gather(
        *completions, store.complete_run(uuid4(), RunStatus.FAILED), return_exceptions=True
    )
    assert isinstance(results.pop(7), StoreUnavailableError)
    assert isinstance(results.pop(), RunNotFoundError)
    assert results == [True] * (RUNS - 1)


async def test_concurrent_reads_return_their_own_run(store: FlowStore) -> None:
    run_ids = await start(store, RUNS)
    await together([store.save_output(run_id, "key", f'"{run_id}"') for run_id in run_ids[1:]])
    await together([store.record_skipped_step(run_id, str(run_id), "http") for run_id in run_ids[1:]])
    for _ in range(2):
        requested = [*run_ids, uuid4(), *run_ids]
        outputs = await together([store.get_outputs(run_id) for run_id in requested])
        statuses = await together([store.get_step_statuses(run_id) for run_id in requested])
        for run_id, output, steps in zip(requested, outputs, statuses, strict=True):
            is_known = run_id in run_ids[1:]
            assert output == ({"key": f'"{run_id}"'} if is_known else {})
            assert steps == ({str(run_id): StepStatus.SKIPPED} if is_known else {})


async def test_concurrent_outputs_under_one_key_are_serialized(store: FlowStore) -> None:
    (run_id,) = await start(store, 1)
    await together([store.save_output(run_id, f"key {number % 2}", str(number)) for number in range(RUNS)])
    outputs = await store.get_outputs(run_id)
    assert {int(outputs[f"key {parity}"]) % 2 for parity in range(2)} == {0, 1}
    results = await asyncio.gather(
        store.save_output(uuid4(), "key 0", "1"),
        store.save_output(run_id, "key 0", "0"),
        return_exceptions=True,
    )
    assert isinstance(results[0], RunNotFoundError)
    assert results[1] is None
    assert await store.get_output(run_id, "key 0") == "0"
