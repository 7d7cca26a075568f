"""Events in SQLite: numbered under the write lock, so in commit order."""

from __future__ import annotations

import sqlite3
from typing import Any
from uuid import UUID

from flowstore_core import FlowEventRecord, RunNotFoundError
from flowstore_sqlite.codecs import from_us
from flowstore_sqlite.database import Database
from flowstore_sqlite.runs import read_run_status

# One seek to the end of the run's range, not a scan.
LAST_SEQUENCE = "SELECT COALESCE(MAX(sequence), 0) FROM events WHERE run_id = ?"
APPEND_EVENT = """
INSERT INTO events (run_id, sequence, created_at, event_type, step_key, message) VALUES (?, ?, ?, ?, ?, ?)
"""
GET_RUN_EVENTS = """
SELECT sequence, created_at, event_type, step_key, message FROM events
WHERE run_id = ? AND sequence > ? ORDER BY sequence LIMIT ?
"""


class Events:
    """See flowstore_core.events for the contract."""

    _database: Database

    async def append_event(
        self, run_id: UUID, event_type: str, *, step_key: str | None, message: str | None
    ) -> int:
        def append(db: sqlite3.Connection, now: int) -> int:
            if read_run_status(db, run_id) is None:
                raise RunNotFoundError(run_id)
            sequence: int = db.execute(LAST_SEQUENCE, (run_id.bytes,)).fetchone()[0] + 1
            db.execute(APPEND_EVENT, (run_id.bytes, sequence, now, event_type, step_key, message))
            return sequence

        return await self._database.write(append)

    async def get_run_events(self, run_id: UUID, *, after: int, take: int) -> tuple[FlowEventRecord, ...]:
        row = (run_id.bytes, after, take)
        rows = await self._database.read(lambda db: db.execute(GET_RUN_EVENTS, row).fetchall())
        return tuple(to_event(run_id, row) for row in rows)


def to_event(run_id: UUID, row: tuple[Any, ...]) -> FlowEventRecord:
    sequence, created_at, event_type, step_key, message = row
    return FlowEventRecord(
        sequence=sequence,
        run_id=run_id,
        timestamp=from_us(created_at),
        event_type=event_type,
        step_key=step_key,
        message=message,
    )
