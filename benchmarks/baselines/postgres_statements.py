"""PostgreSQL, one statement per call: the maximum without batching.

The same tables and results as a transaction per call, but the start and the completion are single statements
too (common table expressions). The pool does not reset released connections, which these statements do not
need and which costs a round trip per call.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import asyncpg

from benchmarks.baselines.postgres_transactions import TransactionPerCall
from flowstore_core import StepStatus

START = """
WITH attempt AS (
    INSERT INTO {schema}.step_attempts (run_id, step_key, attempt_no, status, input_json, started_at)
    SELECT run_id, $2, coalesce((SELECT max(attempt_no) FROM {schema}.step_attempts
                                 WHERE run_id = $1 AND step_key = $2), 0) + 1, 'Running', $4, now()
    FROM {schema}.runs WHERE run_id = $1 AND status = 'Running'
    RETURNING attempt_no
), step AS (
    INSERT INTO {schema}.steps (run_id, step_key, step_type, status, attempt_count, input_json, started_at)
    SELECT $1, $2, $3, 'Running', attempt_no, $4, now() FROM attempt
    ON CONFLICT (run_id, step_key) DO UPDATE SET
        step_type = excluded.step_type, status = excluded.status, attempt_count = excluded.attempt_count,
        input_json = excluded.input_json, output_json = NULL, completed_at = NULL
)
SELECT attempt_no FROM attempt
"""
COMPLETE = """
WITH step AS (
    UPDATE {schema}.steps SET status = $3, output_json = $4, completed_at = now()
    WHERE run_id = $1 AND step_key = $2 AND attempt_count = coalesce($5, attempt_count)
      AND status = 'Running'
    RETURNING attempt_count
)
UPDATE {schema}.step_attempts SET status = $3, output_json = $4, completed_at = now()
FROM step WHERE run_id = $1 AND step_key = $2 AND attempt_no = step.attempt_count
"""


class StatementPerCall(TransactionPerCall):
    async def _start(self, run_id: UUID, step_key: str, step_type: str, input_json: str | None) -> int:
        async with self._pool.acquire() as connection:
            attempt = await connection.fetchval(self.sql(START), run_id, step_key, step_type, input_json)
        if attempt is None:
            raise ValueError("the run is not Running")
        return int(attempt)

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
        async with self._pool.acquire() as connection:
            tag = await connection.execute(
                self.sql(COMPLETE), run_id, step_key, status.value, output_json, attempt
            )
        if tag != "UPDATE 1":
            raise ValueError("no open attempt of that number")


async def _leave_as_it_is(connection: Any) -> None:
    """A no-op reset, because the connection has no session state."""


@asynccontextmanager
async def statement_per_call(url: str, connections: int) -> AsyncIterator[StatementPerCall]:
    async with asyncpg.create_pool(
        url, min_size=connections, max_size=connections, reset=_leave_as_it_is
    ) as pool:
        baseline = StatementPerCall(pool, "statements")
        await baseline.create()
        yield baseline
