"""Setup shared by the proofs of SQLite mutants: runs, steps, errors, locks and groups of writes."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Coroutine, Iterator
from contextlib import closing, contextmanager
from typing import Any, TypeVar
from uuid import UUID

from flowstore_core import FlowStore, FlowStoreError, RunStatus, StepStatus
from flowstore_sqlite.url import database_path
from tests.calls import new_run

T = TypeVar("T")


async def new_step(
    store: FlowStore,
    run_id: UUID,
    step_key: str = "charge",
    status: StepStatus = StepStatus.SUCCEEDED,
    **outcome: Any,
) -> int:
    """Start a step, close the attempt and return its number."""
    attempt = await store.record_step_start(run_id, step_key, "http")
    await store.record_step_complete(run_id, step_key, status, attempt=attempt, **outcome)
    return attempt


async def ended_run(store: FlowStore, status: RunStatus = RunStatus.SUCCEEDED, **overrides: Any) -> UUID:
    """Start a run, complete it and return its id."""
    run_id = await new_run(store, **overrides)
    await store.complete_run(run_id, status)
    return run_id


async def error_of(call: Awaitable[object]) -> type[FlowStoreError] | None:
    """Return the class of a call's error, or None if the call succeeds."""
    try:
        await call
    except FlowStoreError as error:
        return type(error)
    return None


@contextmanager
def raw_connection(url: str) -> Iterator[sqlite3.Connection]:
    """Connect to the file as another program, in autocommit mode."""
    with closing(sqlite3.connect(database_path(url), isolation_level=None)) as db:
        yield db


@contextmanager
def write_lock(url: str) -> Iterator[sqlite3.Connection]:
    """Hold the write lock of the file on a separate connection; commit at the end."""
    with raw_connection(url) as db:
        db.execute("BEGIN IMMEDIATE")
        try:
            yield db
        finally:
            db.execute("COMMIT")


async def begin(call: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Start a call and let the event loop run until the call is queued or sent."""
    task = asyncio.create_task(call)
    for _ in range(5):
        await asyncio.sleep(0)
    return task


async def in_one_group(store: FlowStore, run_id: UUID, *calls: Awaitable[Any]) -> list[Any]:
    """Make writes that share one transaction and return their results or errors.

    They queue while the writer thread executes an earlier write.
    """
    first = store.append_event(run_id, "first")
    _, *outcomes = await asyncio.gather(first, *calls, return_exceptions=True)
    return outcomes
