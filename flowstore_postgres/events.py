"""The event log on PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID, uuid4

from flowstore_core import FlowEventRecord, RunNotFoundError
from flowstore_postgres.database import Database

# Incrementing the run's counter locks its row until the commit, so the next event waits, and sequence numbers
# become visible in order (EVT-1). MAX(sequence) + 1 would not wait.
APPEND_EVENT = """
WITH guard AS MATERIALIZED (
    SELECT clock_timestamp() < $1 AS before_deadline
), counted AS (
    UPDATE {schema}.runs SET last_event = last_event + 1 FROM guard WHERE before_deadline AND run_id = $3
    RETURNING last_event
), appended AS (
    INSERT INTO {schema}.events (run_id, sequence, timestamp, event_type, step_key, message, token)
    SELECT $3, last_event, coalesce($2, clock_timestamp()), $4, $5, $6, $7 FROM counted
)
SELECT guard.before_deadline, counted.last_event AS sequence FROM guard LEFT JOIN counted ON true
"""
FIND_EVENT = "SELECT sequence FROM {schema}.events WHERE run_id = $1 AND token = $2"
GET_RUN_EVENTS = """
SELECT sequence, timestamp, event_type, step_key, message FROM {schema}.events
WHERE run_id = $1 AND sequence > $2 ORDER BY sequence LIMIT $3
"""


class Events:
    """The contract of these operations is in flowstore_core/events.py."""

    _database: Database

    async def append_event(
        self, *, run_id: UUID, event_type: str, step_key: str | None, message: str | None
    ) -> int:
        token = uuid4()
        row = await self._database.statement(
            "append_event",
            APPEND_EVENT,
            run_id,
            event_type,
            step_key,
            message,
            token,
            probe=(FIND_EVENT, run_id, token),
        )
        if row["sequence"] is None:
            raise RunNotFoundError(run_id)
        return int(row["sequence"])

    async def get_run_events(self, *, run_id: UUID, after: int, take: int) -> Sequence[FlowEventRecord]:
        rows = await self._database.read(GET_RUN_EVENTS, run_id, after, take)
        return tuple(event_record(run_id, row) for row in rows)


def event_record(run_id: UUID, row: Any) -> FlowEventRecord:
    return FlowEventRecord(
        sequence=row[0],
        run_id=run_id,
        timestamp=row[1],
        event_type=row[2],
        step_key=row[3],
        message=row[4],
    )
