"""Runs on PostgreSQL: start, complete, list, detail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID, uuid4

from flowstore_core import (
    FlowRunDetail,
    FlowRunRecord,
    FlowStepAttemptRecord,
    FlowStepRecord,
    RunAlreadyExistsError,
    RunNotFoundError,
    RunStatus,
    StepStatus,
)
from flowstore_core.tags import NO_TAGS, decode_tags, encode_tags
from flowstore_postgres.database import Database
from flowstore_postgres.run_completion import LOCK_AND_COMPLETE_RUNS, Completion, complete_runs
from flowstore_postgres.transactions import Transaction

RUN_COLUMNS = """r.run_id, r.flow_id, r.flow_name, r.status, r.trigger_key, r.trigger_data, r.job_id,
    r.started_at, r.completed_at, r.source_run_id, r.tags"""

START_RUN = """
WITH guard AS MATERIALIZED (
    SELECT clock_timestamp() < $1 AS before_deadline, coalesce($2, clock_timestamp()) AS now
), started AS (
    INSERT INTO {schema}.runs (run_id, flow_id, flow_name, status, trigger_key, trigger_data, job_id,
                               source_run_id, start_token, tags, started_at)
    SELECT $3, $4, $5, 'Running', $6, $7, $8, $9, $10, $11::jsonb, now FROM guard WHERE before_deadline
    ON CONFLICT (run_id) DO NOTHING
    RETURNING started_at
)
SELECT guard.before_deadline, started.started_at FROM guard LEFT JOIN started ON true
"""
FIND_START = "SELECT started_at FROM {schema}.runs WHERE run_id = $1 AND start_token = $2"

# Every operation on a step takes this lock, exclusive or shared, so later statements of the transaction see
# the current state of the run: each takes a new snapshot.
LOCK_RUN = "SELECT status FROM {schema}.runs WHERE run_id = $1 FOR UPDATE"

LIST_RUNS = f"""
SELECT {RUN_COLUMNS} FROM {{schema}}.runs r
WHERE {{filter}} ORDER BY r.started_at DESC, r.run_id DESC LIMIT $1
"""

STEP_COLUMNS = """s.step_key, s.step_type, s.status, s.last_attempt, s.reopened, s.first_started_at,
    s.started_at, s.completed_at, s.input_json, s.output_json, s.error_message, s.job_id"""
ATTEMPT_COLUMNS = """a.step_key, a.attempt, a.step_type, a.status, a.input_json, a.output_json,
    a.error_message, a.job_id, a.started_at, a.completed_at"""

GET_RUN = f"SELECT {RUN_COLUMNS} FROM {{schema}}.runs r WHERE r.run_id = ANY($1::uuid[])"
GET_RUN_DETAIL = f"""
SELECT {RUN_COLUMNS},
       ARRAY(SELECT ROW({STEP_COLUMNS}) FROM {{schema}}.steps s
             WHERE s.run_id = r.run_id AND s.status IS NOT NULL
             ORDER BY s.first_started_at, s.step_key) AS steps,
       ARRAY(SELECT ROW({ATTEMPT_COLUMNS}) FROM {{schema}}.attempts a
             WHERE a.run_id = r.run_id ORDER BY a.step_key, a.attempt) AS attempts
FROM {{schema}}.runs r WHERE r.run_id = $1
"""
GET_RUN_STATUS = "SELECT status FROM {schema}.runs WHERE run_id = $1"


def plain_uuid(value: Any) -> UUID:
    """Convert asyncpg's subclass of UUID to a plain UUID."""
    return UUID(int=value.int)


def run_fields(row: Any) -> dict[str, Any]:
    """Convert a row of RUN_COLUMNS to the fields of a FlowRunRecord."""
    return {
        "run_id": plain_uuid(row[0]),
        "flow_id": plain_uuid(row[1]),
        "flow_name": row[2],
        "status": RunStatus(row[3]),
        "trigger_key": row[4],
        "trigger_data": row[5],
        "job_id": row[6],
        "started_at": row[7],
        "completed_at": row[8],
        "source_run_id": None if row[9] is None else plain_uuid(row[9]),
        "tags": decode_tags(row[10]),
    }


def run_record(row: Any) -> FlowRunRecord:
    return FlowRunRecord(**run_fields(row))


def started_run(row: Any, *, run_id: UUID, **fields: Any) -> FlowRunRecord:
    """The record of a run that was started now, from the row of the statement that starts it.

    Raises RunAlreadyExistsError.
    """
    if row["started_at"] is None:
        raise RunAlreadyExistsError(run_id)
    return FlowRunRecord(
        run_id=run_id, status=RunStatus.RUNNING, started_at=row["started_at"], completed_at=None, **fields
    )


def attempt_record(run_id: UUID, row: Any) -> FlowStepAttemptRecord:
    return FlowStepAttemptRecord(
        run_id=run_id,
        step_key=row[0],
        attempt=row[1],
        step_type=row[2],
        status=StepStatus(row[3]),
        input_json=row[4],
        output_json=row[5],
        error_message=row[6],
        job_id=row[7],
        started_at=row[8],
        completed_at=row[9],
    )


def step_record(run_id: UUID, row: Any, earlier: list[FlowStepAttemptRecord]) -> FlowStepRecord:
    """Build a record from a row of STEP_COLUMNS, which holds the newest attempt, and the earlier attempts."""
    status = StepStatus(row[2])
    last_attempt, reopened = row[3], row[4]
    attempts = tuple(earlier)
    if not reopened:
        newest = (row[0], last_attempt, row[1], status, row[8], row[9], row[10], row[11], row[6], row[7])
        attempts += (attempt_record(run_id, newest),)
    return FlowStepRecord(
        run_id=run_id,
        step_key=row[0],
        step_type=row[1],
        status=status,
        input_json=row[8],
        output_json=row[9],
        error_message=row[10],
        job_id=row[11],
        started_at=row[5],
        completed_at=row[7] if status.is_terminal else None,
        attempt_count=last_attempt + reopened,
        attempts=attempts,
    )


async def lock_run(transaction: Transaction, run_id: UUID) -> RunStatus:
    """Lock a run against every other operation on it and return its status.

    Raises RunNotFoundError.
    """
    row = await transaction.row(LOCK_RUN, run_id)
    if row is None:
        raise RunNotFoundError(run_id)
    return RunStatus(row[0])


class Runs:
    """The contract of these operations is in flowstore_core/runs.py."""

    _database: Database

    async def start_run(
        self,
        *,
        flow_id: UUID,
        flow_name: str,
        run_id: UUID,
        trigger_key: str,
        trigger_data: str | None,
        job_id: str | None,
        source_run_id: UUID | None,
        tags: Mapping[str, str] = NO_TAGS,
    ) -> FlowRunRecord:
        token = uuid4()
        ordered = tuple(tags.items()) if tags else ()
        row = await self._database.statement(
            "start_run",
            START_RUN,
            run_id,
            flow_id,
            flow_name,
            trigger_key,
            trigger_data,
            job_id,
            source_run_id,
            token,
            encode_tags(ordered),
            probe=(FIND_START, run_id, token),
        )
        return started_run(
            row,
            run_id=run_id,
            flow_id=flow_id,
            flow_name=flow_name,
            trigger_key=trigger_key,
            trigger_data=trigger_data,
            job_id=job_id,
            source_run_id=source_run_id,
            tags=ordered,
        )

    async def complete_run(
        self, *, run_id: UUID, status: RunStatus, expected: Mapping[str, StepStatus] | None
    ) -> bool:
        completion = Completion(run_id, status, expected)

        async def work(transaction: Transaction) -> bool:
            if (await lock_run(transaction, run_id)).is_terminal:
                return False
            return bool(await complete_runs(transaction, LOCK_AND_COMPLETE_RUNS, [completion]))

        if await self._database.run_completer.try_complete(completion):
            return True
        return await self._database.transaction("complete_run", work)

    async def _list_runs(
        self, filtered: str, take: int | None, *arguments: object
    ) -> tuple[FlowRunRecord, ...]:
        # LIMIT NULL means no limit.
        rows = await self._database.read(LIST_RUNS.replace("{filter}", filtered), take, *arguments)
        return tuple(run_record(row) for row in rows)

    async def get_active_runs(self, *, take: int | None) -> Sequence[FlowRunRecord]:
        return await self._list_runs("r.status = 'Running'", take)

    async def get_derived_runs(self, *, source_run_id: UUID, take: int | None) -> Sequence[FlowRunRecord]:
        return await self._list_runs("r.source_run_id = $2", take, source_run_id)

    async def get_run(self, *, run_id: UUID) -> FlowRunRecord | None:
        rows = await self._database.shared_reads.rows(GET_RUN, run_id)
        return run_record(rows[0]) if rows else None

    async def get_run_detail(self, *, run_id: UUID) -> FlowRunDetail | None:
        row = await self._database.read_row(GET_RUN_DETAIL, run_id)
        if row is None:
            return None
        earlier: dict[str, list[FlowStepAttemptRecord]] = {}
        for attempt in row["attempts"]:
            earlier.setdefault(attempt[0], []).append(attempt_record(run_id, attempt))
        steps = tuple(step_record(run_id, step, earlier.get(step[0], [])) for step in row["steps"])
        return FlowRunDetail(**run_fields(row), steps=steps)

    async def get_run_status(self, *, run_id: UUID) -> RunStatus | None:
        row = await self._database.read_row(GET_RUN_STATUS, run_id)
        return None if row is None else RunStatus(row[0])
