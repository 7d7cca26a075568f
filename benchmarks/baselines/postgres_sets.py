"""PostgreSQL, set-based statements without callers: the limit of batching.

Three held connections; each takes 256 steps at a time and sends their lifecycles as five statements over
arrays in sequence, each in its own transaction. No caller waits for a single row, so there are no futures, no
queue and no checks of input. Two layouts: the tables of the other baselines, and one row per step with its
claim and its dispatch.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from time import perf_counter
from typing import Any

import asyncpg

from benchmarks.baselines.postgres_tables import Tables
from benchmarks.results import Sample
from benchmarks.workload import INPUT, OUTPUT, Step, WrongAnswerError, make_steps

CONNECTIONS = 3
BATCH = 256

KEYS = "unnest($1::uuid[], $2::text[]) AS k (run_id, step_key)"

SEPARATE_TABLES = (
    f"""
    INSERT INTO {{schema}}.step_dispatches (run_id, step_key)
    SELECT k.run_id, k.step_key FROM {KEYS} ON CONFLICT DO NOTHING RETURNING 1
    """,
    f"""
    UPDATE {{schema}}.step_dispatches d SET job_id = 'job-4711'
    FROM {KEYS} WHERE d.run_id = k.run_id AND d.step_key = k.step_key RETURNING 1
    """,
    f"""
    INSERT INTO {{schema}}.step_claims (run_id, step_key)
    SELECT k.run_id, k.step_key FROM {KEYS} ON CONFLICT DO NOTHING RETURNING 1
    """,
    f"""
    WITH open AS MATERIALIZED (
        SELECT k.run_id, k.step_key, coalesce(s.attempt_count, 0) + 1 AS attempt
        FROM {KEYS} JOIN {{schema}}.runs r ON r.run_id = k.run_id AND r.status = 'Running'
        LEFT JOIN {{schema}}.steps s ON s.run_id = k.run_id AND s.step_key = k.step_key
    ), attempt AS (
        INSERT INTO {{schema}}.step_attempts (run_id, step_key, attempt_no, status, input_json, started_at)
        SELECT run_id, step_key, attempt, 'Running', '{INPUT}', now() FROM open
    )
    INSERT INTO {{schema}}.steps (run_id, step_key, step_type, status, attempt_count, input_json, started_at)
    SELECT run_id, step_key, 'task', 'Running', attempt, '{INPUT}', now() FROM open
    ON CONFLICT (run_id, step_key) DO UPDATE SET status = excluded.status,
        attempt_count = excluded.attempt_count, input_json = excluded.input_json
    RETURNING attempt_count
    """,
    f"""
    WITH step AS (
        UPDATE {{schema}}.steps s SET status = 'Succeeded', output_json = '{OUTPUT}', completed_at = now()
        FROM {KEYS} WHERE s.run_id = k.run_id AND s.step_key = k.step_key AND s.status = 'Running'
        RETURNING s.run_id, s.step_key, s.attempt_count
    )
    UPDATE {{schema}}.step_attempts a
    SET status = 'Succeeded', output_json = '{OUTPUT}', completed_at = now()
    FROM step WHERE a.run_id = step.run_id AND a.step_key = step.step_key
                AND a.attempt_no = step.attempt_count
    RETURNING 1
    """,
)

ONE_ROW_TABLES = """
CREATE SCHEMA {schema};
CREATE TABLE {schema}.runs (
    run_id     uuid        NOT NULL PRIMARY KEY,
    status     text        NOT NULL DEFAULT 'Running',
    started_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE {schema}.steps (
    run_id        uuid    NOT NULL,
    step_key      text    COLLATE "C" NOT NULL,
    step_type     text,
    status        text,
    attempt_count integer NOT NULL DEFAULT 0,
    input_json    text,
    output_json   text,
    started_at    timestamptz,
    completed_at  timestamptz,
    claimed_at    timestamptz,
    dispatched_at timestamptz,
    job_id        text,
    PRIMARY KEY (run_id, step_key)
) WITH (fillfactor = 50);
"""
ONE_ROW = (
    f"""
    INSERT INTO {{schema}}.steps (run_id, step_key, dispatched_at)
    SELECT k.run_id, k.step_key, now()
    FROM {KEYS} JOIN {{schema}}.runs r ON r.run_id = k.run_id AND r.status = 'Running'
    ON CONFLICT DO NOTHING RETURNING 1
    """,
    f"""
    UPDATE {{schema}}.steps s SET job_id = 'job-4711'
    FROM {KEYS} WHERE s.run_id = k.run_id AND s.step_key = k.step_key RETURNING 1
    """,
    f"""
    UPDATE {{schema}}.steps s SET claimed_at = now()
    FROM {KEYS} WHERE s.run_id = k.run_id AND s.step_key = k.step_key AND s.claimed_at IS NULL RETURNING 1
    """,
    f"""
    UPDATE {{schema}}.steps s SET status = 'Running', step_type = 'task', input_json = '{INPUT}',
        attempt_count = attempt_count + 1, started_at = now()
    FROM {KEYS} JOIN {{schema}}.runs r ON r.run_id = k.run_id AND r.status = 'Running'
    WHERE s.run_id = k.run_id AND s.step_key = k.step_key AND s.status IS NULL RETURNING s.attempt_count
    """,
    f"""
    UPDATE {{schema}}.steps s SET status = 'Succeeded', output_json = '{OUTPUT}', completed_at = now()
    FROM {KEYS} WHERE s.run_id = k.run_id AND s.step_key = k.step_key AND s.status = 'Running' RETURNING 1
    """,
)
COUNT_ONE_ROW = """
SELECT count(*) FROM {schema}.steps
WHERE run_id = ANY($1::uuid[]) AND status = 'Succeeded' AND claimed_at IS NOT NULL AND job_id IS NOT NULL
"""


class SetBased(Tables):
    """Three connections that execute lifecycles in batches."""

    def __init__(self, connections: Sequence[Any], schema: str, *, one_row: bool) -> None:
        super().__init__(connections[0], schema)
        self._connections = connections
        self._statements = [self.sql(one) for one in (ONE_ROW if one_row else SEPARATE_TABLES)]
        self._one_row = one_row

    async def create(self) -> None:
        if self._one_row:
            await self._connections[0].execute(self.sql(ONE_ROW_TABLES))
        else:
            await super().create()

    async def lifecycles(self, amount: int) -> Sample:
        """Execute at least ``amount`` lifecycles, in whole batches."""
        amount = -(-amount // BATCH) * BATCH
        run_ids, steps = make_steps(amount)
        await self.add_runs(run_ids)
        groups = iter([steps[start : start + BATCH] for start in range(0, amount, BATCH)])
        began = perf_counter()
        await asyncio.gather(*(self._work(connection, groups) for connection in self._connections))
        seconds = perf_counter() - began
        counted = self.sql(COUNT_ONE_ROW) if self._one_row else None
        found = (
            await self.count_completed(run_ids)
            if counted is None
            else int(await self._connections[0].fetchval(counted, run_ids))
        )
        if found != amount:
            raise WrongAnswerError(f"completed steps: expected {amount}, found {found}")
        return Sample(amount, rate=amount / seconds)

    async def _work(self, connection: Any, groups: Iterator[list[Step]]) -> None:
        for group in groups:
            run_ids = [step[0] for step in group]
            step_keys = [step[1] for step in group]
            for statement in self._statements:
                rows = await connection.fetch(statement, run_ids, step_keys)
                if len(rows) != len(group):
                    raise WrongAnswerError(f"{len(rows)} rows of {len(group)} were changed")


@asynccontextmanager
async def set_based(url: str, *, one_row: bool) -> AsyncIterator[SetBased]:
    schema = "one_row" if one_row else "separate_tables"
    async with AsyncExitStack() as stack:
        connections = []
        for _ in range(CONNECTIONS):
            connections.append(await asyncpg.connect(url))
            stack.push_async_callback(connections[-1].close)
        baseline = SetBased(connections, schema, one_row=one_row)
        await baseline.create()
        yield baseline
