"""Setup shared by the proofs of PostgreSQL mutants."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import asyncpg

from flowstore_core import FlowStore, FlowStoreError, RunStatus, StepStatus
from flowstore_core.urls import parse_url
from flowstore_postgres.migrate import CREATE_VERSION_TABLE, RECORD_VERSION, read_migrations

# The sessions that have waited for a lock for a while (a batch's first try gives up after 0.1 s): those with
# a statement on this schema, and those that wait for this session.
COUNT_BLOCKED = """
SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'
   AND (position($1 IN query) > 0 OR pg_backend_pid() = ANY(pg_blocking_pids(pid)))
   AND clock_timestamp() - query_start > interval '0.3 s'
"""


def schema_of(url: str) -> str:
    return parse_url(url).options["schema"]


@asynccontextmanager
async def connection(url: str) -> AsyncIterator[Any]:
    """A connection of another client of the server, with the store's schema in its search_path."""
    options = parse_url(url).options
    other = await asyncpg.connect(host=options["host"], user="postgres", database="postgres")
    try:
        await other.execute(f'SET search_path = "{options["schema"]}"')
        yield other
    finally:
        await other.close(timeout=10)


async def wait_until_blocked(url: str, other: Any, *tasks: asyncio.Future[Any], number: int = 1) -> None:
    """Wait until ``number`` statements of the store wait for a lock, or one of the tasks has ended."""
    blocked = 0
    while blocked < number and not any(task.done() for task in tasks):
        await asyncio.sleep(0.02)
        # Otherwise a transaction reads one cached snapshot of pg_stat_activity.
        await other.execute("SELECT pg_stat_clear_snapshot()")
        blocked = await other.fetchval(COUNT_BLOCKED, schema_of(url))


async def send(call: asyncio.Future[Any]) -> None:
    """Let a call send its statement on an open connection, without waiting for the reply."""
    for _ in range(20):
        await asyncio.sleep(0)
    assert not call.done()


async def outcome(call: Awaitable[Any]) -> Any:
    """Return the result of a call, or the class of its error."""
    try:
        return await call
    except FlowStoreError as error:
        return type(error)


async def outcomes(calls: Sequence[Awaitable[Any]]) -> list[Any]:
    """Make calls concurrently, so that they share batches, and return their outcomes."""
    return list(await asyncio.gather(*map(outcome, calls)))


async def finish(
    store: FlowStore, run_id: UUID, step_key: str, status: str = StepStatus.SUCCEEDED, **result: Any
) -> None:
    """Start a step and complete its attempt."""
    await store.record_step_start(run_id, step_key, "task")
    await store.record_step_complete(run_id, step_key, status, **result)


async def end(store: FlowStore, run_id: UUID, status: RunStatus = RunStatus.SUCCEEDED) -> None:
    assert await store.complete_run(run_id, status), "the run was not completed"


async def create_old_schema(url: str, other: Any, version: int) -> None:
    """Bring an empty schema to an earlier version, as an earlier release would have."""
    schema = f'"{schema_of(url)}"'
    await other.execute(CREATE_VERSION_TABLE.replace("{schema}", schema))
    for one in read_migrations():
        if one.number <= version:
            await other.execute(one.sql.replace("{schema}", schema))
            record = RECORD_VERSION.replace("{schema}", schema)
            await other.execute(record, one.number, one.name, one.works_from)
