"""Outputs in SQLite."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from uuid import UUID

from flowstore_core import RunNotFoundError
from flowstore_core.outputs import end_of_prefix
from flowstore_sqlite.database import Database
from flowstore_sqlite.runs import read_run_status, to_limit

SAVE_OUTPUT = """
INSERT INTO outputs (run_id, output_key, value_json) VALUES (?, ?, ?)
ON CONFLICT (run_id, output_key) DO UPDATE SET value_json = excluded.value_json
"""
GET_OUTPUT = "SELECT value_json FROM outputs WHERE run_id = ? AND output_key = ?"
# The keys with a prefix are a range of the primary key: see end_of_prefix. No key is empty.
GET_OUTPUTS = """
SELECT output_key, value_json FROM outputs
WHERE run_id = ? AND output_key >= ? AND output_key < ? AND output_key > ? ORDER BY output_key LIMIT ?
"""
DELETE_OUTPUTS = "DELETE FROM outputs WHERE run_id = ? AND output_key >= ? AND output_key < ?"


class Outputs:
    """See flowstore_core.outputs for the contract."""

    _database: Database

    async def save_output(self, run_id: UUID, key: str, value_json: str) -> None:
        await self._database.write(partial(_save, run_id, {key: value_json}))

    async def save_outputs(self, run_id: UUID, outputs: Mapping[str, str]) -> None:
        await self._database.write(partial(_save, run_id, outputs))

    async def get_output(self, run_id: UUID, key: str) -> str | None:
        row = await self._database.read(lambda db: db.execute(GET_OUTPUT, (run_id.bytes, key)).fetchone())
        return None if row is None else row[0]

    async def get_outputs(
        self, run_id: UUID, *, prefix: str, after: str | None, take: int | None
    ) -> Mapping[str, str]:
        values = (run_id.bytes, prefix, end_of_prefix(prefix), after or "", to_limit(take))
        rows = await self._database.read(lambda db: db.execute(GET_OUTPUTS, values).fetchall())
        return MappingProxyType(dict(rows))

    async def delete_outputs(self, run_id: UUID, *, prefix: str) -> int:
        values = (run_id.bytes, prefix, end_of_prefix(prefix))
        return await self._database.write(lambda db, now: db.execute(DELETE_OUTPUTS, values).rowcount)


def _save(run_id: UUID, outputs: Mapping[str, str], db: sqlite3.Connection, now: int) -> None:
    if read_run_status(db, run_id) is None:
        raise RunNotFoundError(run_id)
    for key, value in outputs.items():
        db.execute(SAVE_OUTPUT, (run_id.bytes, key, value))
