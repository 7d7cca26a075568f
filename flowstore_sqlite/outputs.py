"""Outputs in SQLite."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from types import MappingProxyType
from uuid import UUID

from flowstore_core import RunNotFoundError
from flowstore_sqlite.database import Database
from flowstore_sqlite.runs import read_run_status

SAVE_OUTPUT = """
INSERT INTO outputs (run_id, output_key, value_json) VALUES (?, ?, ?)
ON CONFLICT (run_id, output_key) DO UPDATE SET value_json = excluded.value_json
"""
GET_OUTPUT = "SELECT value_json FROM outputs WHERE run_id = ? AND output_key = ?"
GET_OUTPUTS = "SELECT output_key, value_json FROM outputs WHERE run_id = ? ORDER BY output_key"


class Outputs:
    """See flowstore_core.outputs for the contract."""

    _database: Database

    async def save_output(self, run_id: UUID, key: str, value_json: str) -> None:
        def save(db: sqlite3.Connection, now: int) -> None:
            if read_run_status(db, run_id) is None:
                raise RunNotFoundError(run_id)
            db.execute(SAVE_OUTPUT, (run_id.bytes, key, value_json))

        await self._database.write(save)

    async def get_output(self, run_id: UUID, key: str) -> str | None:
        row = await self._database.read(lambda db: db.execute(GET_OUTPUT, (run_id.bytes, key)).fetchone())
        return None if row is None else row[0]

    async def get_outputs(self, run_id: UUID) -> Mapping[str, str]:
        rows = await self._database.read(lambda db: db.execute(GET_OUTPUTS, (run_id.bytes,)).fetchall())
        return MappingProxyType(dict(rows))
