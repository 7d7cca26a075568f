"""Outputs of runs on PostgreSQL."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any
from uuid import UUID

from flowstore_core import RunNotFoundError
from flowstore_core.outputs import end_of_prefix
from flowstore_postgres.batch_statement import BatchStatement, Row, decode_flags, with_note, with_single_note
from flowstore_postgres.database import Database
from flowstore_postgres.runs import LOCK_RUN
from flowstore_postgres.transactions import Transaction, affected_rows

# The runs are locked against cleanup, in key order. A row whose run does not exist is not saved.
SAVE = """
WITH guard AS MATERIALIZED (SELECT clock_timestamp() < $1 AS before_deadline, $2::timestamptz AS now),
requested AS MATERIALIZED (
    SELECT a.*, (SELECT true FROM {schema}.runs r WHERE r.run_id = a.run_id FOR SHARE) AS found
    FROM guard, unnest($3::uuid[], $4::text[], $5::text[])
                WITH ORDINALITY AS a (run_id, key, value_json, n) WHERE before_deadline
), saved AS (
    INSERT INTO {schema}.outputs (run_id, key, value_json)
    SELECT run_id, {outputs}
    ON CONFLICT (run_id, key) DO UPDATE SET value_json = excluded.value_json
)
SELECT before_deadline, every, CASE WHEN NOT every THEN ARRAY(SELECT n FROM requested WHERE found) END AS
saved FROM guard, (SELECT count(*) = cardinality($3::uuid[]) AS every FROM requested WHERE found) found
"""
SAVE_OUTPUT = SAVE.replace("{outputs}", "key, value_json FROM requested WHERE found ORDER BY n")
# One JSON object holds the outputs of a call. All calls have the same key, so that no two of one run meet in
# a statement: they may save the same output.
SAVE_OUTPUTS = SAVE.replace(
    "{outputs}",
    """one.key, one.value FROM requested, json_each_text(value_json::json) one
    WHERE found ORDER BY n, one.key COLLATE "C" """,
)
SAVE_OUTPUT_SINGLE = """
INSERT INTO {schema}.outputs (run_id, key, value_json)
SELECT $3, $4, $5 FROM (SELECT FROM {schema}.runs WHERE run_id = $3 FOR SHARE) run
WHERE clock_timestamp() < $1 AND ($2::timestamptz IS NULL OR true)
ON CONFLICT (run_id, key) DO UPDATE SET value_json = excluded.value_json
RETURNING true AS saved
"""
SAVED = "(SELECT run_id, key AS step_key FROM requested WHERE found) saved_row"
GET_OUTPUT = "SELECT value_json FROM {schema}.outputs WHERE run_id = $1 AND key = $2"
GET_OUTPUTS = """
SELECT run_id, key, value_json FROM {schema}.outputs WHERE run_id = ANY($1::uuid[]) ORDER BY run_id, key
"""
# The keys with a prefix are a range of the primary key: see end_of_prefix. No key is empty.
GET_SOME_OUTPUTS = """
SELECT key, value_json FROM {schema}.outputs WHERE run_id = $1 AND key >= $2 AND key < $3 AND key > $4
ORDER BY key LIMIT $5
"""
# Its snapshot must follow the lock of the run. Otherwise it could delete the second of two outputs that a
# caller saves in turn, and leave the first.
DELETE_OUTPUTS = "DELETE FROM {schema}.outputs WHERE run_id = $1 AND key >= $2 AND key < $3"


def _size(row: Row) -> int:
    return len(row[2])


SAVE_ONE = BatchStatement(
    operation="save_output",
    batch_sql=with_note(SAVE_OUTPUT, SAVED),
    single_sql=with_single_note(SAVE_OUTPUT_SINGLE),
    decode_batch=decode_flags("saved"),
    decode_probe=lambda row: True,
    size_of=_size,
)


SAVE_SEVERAL = BatchStatement(
    operation="save_outputs",
    batch_sql=with_note(SAVE_OUTPUTS, SAVED),
    decode_batch=decode_flags("saved"),
    decode_probe=lambda row: True,
    size_of=_size,
)


class Outputs:
    """The contract of these operations is in flowstore_core/outputs.py."""

    _database: Database

    async def save_output(self, *, run_id: UUID, key: str, value_json: str) -> None:
        if not await self._database.write(SAVE_ONE, (run_id, key, value_json)):
            raise RunNotFoundError(run_id)

    async def save_outputs(self, *, run_id: UUID, outputs: Mapping[str, str]) -> None:
        row = (run_id, "", json.dumps(outputs, ensure_ascii=False))
        if not await self._database.write(SAVE_SEVERAL, row):
            raise RunNotFoundError(run_id)

    async def get_output(self, *, run_id: UUID, key: str) -> str | None:
        row = await self._database.read_row(GET_OUTPUT, run_id, key)
        return None if row is None else row[0]

    async def get_outputs(
        self, *, run_id: UUID, prefix: str, after: str | None, take: int | None
    ) -> Mapping[str, str]:
        if not prefix and after is None and take is None:
            rows: Sequence[Any] = await self._database.shared_reads.rows(GET_OUTPUTS, run_id)
            return MappingProxyType({row[1]: row[2] for row in rows})
        # LIMIT NULL means no limit.
        rows = await self._database.read(
            GET_SOME_OUTPUTS, run_id, prefix, end_of_prefix(prefix), after or "", take
        )
        return MappingProxyType({row[0]: row[1] for row in rows})

    async def delete_outputs(self, *, run_id: UUID, prefix: str) -> int:
        async def work(transaction: Transaction) -> int:
            if await transaction.row(LOCK_RUN, run_id) is None:
                return 0
            return affected_rows(
                await transaction.execute(DELETE_OUTPUTS, run_id, prefix, end_of_prefix(prefix))
            )

        return await self._database.transaction("delete_outputs", work)
