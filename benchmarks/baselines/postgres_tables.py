"""The tables of the PostgreSQL baselines: one table per noun, without secondary indexes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

TABLES = """
CREATE SCHEMA {schema};
CREATE TABLE {schema}.runs (
    run_id     uuid        NOT NULL PRIMARY KEY,
    status     text        NOT NULL DEFAULT 'Running',
    started_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE {schema}.step_dispatches (
    run_id        uuid        NOT NULL,
    step_key      text        NOT NULL,
    dispatched_at timestamptz NOT NULL DEFAULT now(),
    job_id        text,
    PRIMARY KEY (run_id, step_key)
);
CREATE TABLE {schema}.step_claims (
    run_id     uuid        NOT NULL,
    step_key   text        NOT NULL,
    claimed_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (run_id, step_key)
);
CREATE TABLE {schema}.steps (
    run_id        uuid        NOT NULL,
    step_key      text        NOT NULL,
    step_type     text        NOT NULL,
    status        text        NOT NULL,
    attempt_count integer     NOT NULL,
    input_json    text,
    output_json   text,
    started_at    timestamptz NOT NULL,
    completed_at  timestamptz,
    PRIMARY KEY (run_id, step_key)
);
CREATE TABLE {schema}.step_attempts (
    run_id       uuid        NOT NULL,
    step_key     text        NOT NULL,
    attempt_no   integer     NOT NULL,
    status       text        NOT NULL,
    input_json   text,
    output_json  text,
    started_at   timestamptz NOT NULL,
    completed_at timestamptz,
    PRIMARY KEY (run_id, step_key, attempt_no)
);
"""
ADD_RUNS = "INSERT INTO {schema}.runs (run_id) SELECT unnest($1::uuid[])"
COUNT_COMPLETED = """
SELECT count(*) FROM {schema}.steps JOIN {schema}.step_attempts USING (run_id, step_key, status)
WHERE run_id = ANY($1::uuid[]) AND status = 'Succeeded'
"""
COUNT_CLAIMED = "SELECT count(*) FROM {schema}.step_claims WHERE run_id = ANY($1::uuid[])"


class Tables:
    """Run creation and counts on these tables, in a separate schema."""

    def __init__(self, pool: Any, schema: str) -> None:
        self._pool = pool
        self._schema = schema

    def sql(self, statement: str) -> str:
        return statement.replace("{schema}", self._schema)

    async def create(self) -> None:
        await self._pool.execute(self.sql(TABLES))

    async def add_runs(self, run_ids: Sequence[UUID]) -> None:
        await self._pool.execute(self.sql(ADD_RUNS), run_ids)

    async def count_completed(self, run_ids: Sequence[UUID]) -> int:
        return int(await self._pool.fetchval(self.sql(COUNT_COMPLETED), run_ids))

    async def count_claimed(self, run_ids: Sequence[UUID]) -> int:
        return int(await self._pool.fetchval(self.sql(COUNT_CLAIMED), run_ids))
