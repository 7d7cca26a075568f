"""Outputs of runs on PostgreSQL."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from uuid import UUID

from flowstore_core import RunNotFoundError
from flowstore_postgres.database import Database

SAVE_OUTPUT = """
WITH guard AS MATERIALIZED (SELECT clock_timestamp() < $1 AS in_time, $2::timestamptz AS now),
run AS MATERIALIZED (SELECT true AS found FROM {schema}.runs WHERE run_id = $3 FOR SHARE),
saved AS (
    INSERT INTO {schema}.outputs (run_id, key, value_json) SELECT $3, $4, $5 FROM guard, run WHERE in_time
    ON CONFLICT (run_id, key) DO UPDATE SET value_json = excluded.value_json
)
SELECT guard.in_time, run.found FROM guard LEFT JOIN run ON true
"""
FIND_OUTPUT = """
SELECT true AS found FROM {schema}.outputs WHERE run_id = $1 AND key = $2 AND value_json = $3
"""
GET_OUTPUT = "SELECT value_json FROM {schema}.outputs WHERE run_id = $1 AND key = $2"
GET_OUTPUTS = "SELECT key, value_json FROM {schema}.outputs WHERE run_id = $1 ORDER BY key"


class Outputs:
    _database: Database

    async def save_output(self, *, run_id: UUID, key: str, value_json: str) -> None:
        row = await self._database.statement(
            "save_output",
            SAVE_OUTPUT,
            run_id,
            key,
            value_json,
            look=(FIND_OUTPUT, run_id, key, value_json),
        )
        if row["found"] is None:
            raise RunNotFoundError(run_id)

    async def get_output(self, *, run_id: UUID, key: str) -> str | None:
        row = await self._database.read_row(GET_OUTPUT, run_id, key)
        return None if row is None else row[0]

    async def get_outputs(self, *, run_id: UUID) -> Mapping[str, str]:
        return MappingProxyType(dict(await self._database.read(GET_OUTPUTS, run_id)))
