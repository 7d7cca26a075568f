"""PostgreSQL, a transaction per call: the common technique of engines today.

An asyncpg pool with default settings (including the reset of released connections); one statement for a
claim, a dispatch and an annotation; a transaction of several statements for the start and the completion of
an attempt. The number of a new attempt is the maximum plus one; concurrent starts conflict on the primary key
of step_attempts, and the later one retries.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

import asyncpg

from benchmarks.baselines.postgres_tables import Tables
from flowstore_core import StepStatus

CLAIM = "INSERT INTO {schema}.step_claims (run_id, step_key) VALUES ($1, $2) ON CONFLICT DO NOTHING"
DISPATCH = "INSERT INTO {schema}.step_dispatches (run_id, step_key) VALUES ($1, $2) ON CONFLICT DO NOTHING"
ANNOTATE = "UPDATE {schema}.step_dispatches SET job_id = $3 WHERE run_id = $1 AND step_key = $2"
RUN_STATUS = "SELECT status FROM {schema}.runs WHERE run_id = $1"
NEXT_ATTEMPT = """
SELECT coalesce(max(attempt_no), 0) + 1 FROM {schema}.step_attempts WHERE run_id = $1 AND step_key = $2
"""
ADD_ATTEMPT = """
INSERT INTO {schema}.step_attempts (run_id, step_key, attempt_no, status, input_json, started_at)
VALUES ($1, $2, $3, 'Running', $4, now())
"""
PUT_STEP = """
INSERT INTO {schema}.steps (run_id, step_key, step_type, status, attempt_count, input_json, started_at)
VALUES ($1, $2, $3, 'Running', $4, $5, now())
ON CONFLICT (run_id, step_key) DO UPDATE SET
    step_type = excluded.step_type, status = excluded.status, attempt_count = excluded.attempt_count,
    input_json = excluded.input_json, output_json = NULL, completed_at = NULL
"""
CLOSE_STEP = """
UPDATE {schema}.steps SET status = $3, output_json = $4, completed_at = now()
WHERE run_id = $1 AND step_key = $2 AND attempt_count = coalesce($5, attempt_count) AND status = 'Running'
RETURNING attempt_count
"""
CLOSE_ATTEMPT = """
UPDATE {schema}.step_attempts SET status = $4, output_json = $5, completed_at = now()
WHERE run_id = $1 AND step_key = $2 AND attempt_no = $3
"""
INSERTED = "INSERT 0 1"


class TransactionPerCall(Tables):
    async def try_record_dispatch(self, run_id: UUID, step_key: str, /) -> bool:
        async with self._pool.acquire() as connection:
            tag = await connection.execute(self.sql(DISPATCH), run_id, step_key)
        return bool(tag == INSERTED)

    async def annotate_dispatch(self, run_id: UUID, step_key: str, job_id: str, /) -> None:
        async with self._pool.acquire() as connection:
            await connection.execute(self.sql(ANNOTATE), run_id, step_key, job_id)

    async def try_claim_step(self, run_id: UUID, step_key: str, /) -> bool:
        async with self._pool.acquire() as connection:
            tag = await connection.execute(self.sql(CLAIM), run_id, step_key)
        return bool(tag == INSERTED)

    async def record_step_start(
        self, run_id: UUID, step_key: str, step_type: str, /, *, input_json: str | None = None
    ) -> int:
        while True:
            try:
                return await self._start(run_id, step_key, step_type, input_json)
            except asyncpg.UniqueViolationError:
                continue

    async def _start(self, run_id: UUID, step_key: str, step_type: str, input_json: str | None) -> int:
        async with self._pool.acquire() as connection, connection.transaction():
            status = await connection.fetchval(self.sql(RUN_STATUS), run_id)
            if status != "Running":
                raise ValueError(f"the run is {status}")
            attempt = int(await connection.fetchval(self.sql(NEXT_ATTEMPT), run_id, step_key))
            await connection.execute(self.sql(ADD_ATTEMPT), run_id, step_key, attempt, input_json)
            await connection.execute(self.sql(PUT_STEP), run_id, step_key, step_type, attempt, input_json)
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
        async with self._pool.acquire() as connection, connection.transaction():
            closed = await connection.fetchval(
                self.sql(CLOSE_STEP), run_id, step_key, status.value, output_json, attempt
            )
            if closed is None:
                raise ValueError("no open attempt of that number")
            await connection.execute(
                self.sql(CLOSE_ATTEMPT), run_id, step_key, closed, status.value, output_json
            )


@asynccontextmanager
async def transaction_per_call(
    url: str, connections: int, schema: str = "transactions"
) -> AsyncIterator[TransactionPerCall]:
    async with asyncpg.create_pool(url, min_size=connections, max_size=connections) as pool:
        baseline = TransactionPerCall(pool, schema)
        await baseline.create()
        yield baseline
