"""SQLite, a transaction per call through aiosqlite: the common practice of engines.

One aiosqlite connection, with one trip to its thread per statement; a lock serializes the transactions of
concurrent calls. Every call is BEGIN IMMEDIATE, its statements, COMMIT.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID

import aiosqlite

from benchmarks.baselines import sqlite_tables as tables
from benchmarks.workload import WrongAnswerError
from flowstore_core import StepStatus


class TransactionPerCall(tables.Records):
    def __init__(self, db: aiosqlite.Connection, path: Path) -> None:
        super().__init__(path)
        self._db = db
        self._lock = asyncio.Lock()

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[aiosqlite.Connection]:
        async with self._lock:
            await self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                await self._db.execute("ROLLBACK")
                raise
            await self._db.execute("COMMIT")

    async def try_record_dispatch(self, run_id: UUID, step_key: str, /) -> bool:
        async with self._transaction() as db:
            cursor = await db.execute(tables.DISPATCH, (run_id.bytes, step_key, time.time_ns()))
            return cursor.rowcount == 1

    async def annotate_dispatch(self, run_id: UUID, step_key: str, job_id: str, /) -> None:
        async with self._transaction() as db:
            await db.execute(tables.ANNOTATE, (job_id, run_id.bytes, step_key))

    async def try_claim_step(self, run_id: UUID, step_key: str, /) -> bool:
        async with self._transaction() as db:
            cursor = await db.execute(tables.CLAIM, (run_id.bytes, step_key, time.time_ns()))
            return cursor.rowcount == 1

    async def record_step_start(
        self, run_id: UUID, step_key: str, step_type: str, /, *, input_json: str | None = None
    ) -> int:
        key = run_id.bytes
        async with self._transaction() as db:
            status = await (await db.execute(tables.RUN_STATUS, (key,))).fetchone()
            if status is None or status[0] != "Running":
                raise WrongAnswerError("the run is not Running")
            row = await (await db.execute(tables.NEXT_ATTEMPT, (key, step_key))).fetchone()
            assert row is not None
            attempt, now = int(row[0]), time.time_ns()
            await db.execute(tables.ADD_ATTEMPT, (key, step_key, attempt, input_json, now))
            await db.execute(tables.PUT_STEP, (key, step_key, step_type, attempt, input_json, now))
            return attempt

    async def record_step_complete(
        self,
        run_id: UUID,
        step_key: str,
        status: StepStatus,
        /,
        *,
        output_json: str | None = None,
        attempt: int | None = None,
    ) -> None:
        row = (status.value, output_json, time.time_ns(), run_id.bytes, step_key, attempt)
        async with self._transaction() as db:
            if (await db.execute(tables.CLOSE_STEP, row)).rowcount != 1:
                raise WrongAnswerError("no open attempt of that number")
            await db.execute(tables.CLOSE_ATTEMPT, row)


@asynccontextmanager
async def transaction_per_call(path: Path) -> AsyncIterator[TransactionPerCall]:
    tables.create(path)
    async with aiosqlite.connect(path, isolation_level=None, timeout=tables.BUSY_SECONDS) as db:
        await db.execute("PRAGMA journal_mode = WAL")
        await db.execute("PRAGMA synchronous = FULL")
        yield TransactionPerCall(db, path)
