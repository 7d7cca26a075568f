"""Runs in SQLite: starting, completing and reading them."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from datetime import datetime
from functools import partial
from typing import Any
from uuid import UUID

from flowstore_core import (
    FlowRunDetail,
    FlowRunRecord,
    RunAlreadyExistsError,
    RunNotFoundError,
    RunStatus,
    StepStatus,
)
from flowstore_core.tags import NO_TAGS, decode_tags
from flowstore_sqlite.codecs import (
    from_optional_id,
    from_optional_us,
    from_us,
    join_sql,
    to_optional_id,
)
from flowstore_sqlite.database import Database
from flowstore_sqlite.steps import read_steps
from flowstore_sqlite.tags import save_tags

START_RUN = """
INSERT INTO runs (
    run_id, flow_id, flow_name, status, trigger_key, trigger_data, job_id, started_at, source_run_id
)
VALUES (?, ?, ?, 'Running', ?, ?, ?, ?, ?)
ON CONFLICT (run_id) DO NOTHING
"""

COMPLETE_RUN = """
UPDATE runs SET status = ?, completed_at = ? WHERE run_id = ? AND status = 'Running'
"""

# The statuses that complete_run compares with ``expected``, and whether a step is claimed or dispatched.
READ_PROGRESS = """
SELECT step_key, status, claimed_at IS NOT NULL AND (expires_at IS NULL OR expires_at > ?)
    OR dispatched_at IS NOT NULL
FROM steps WHERE run_id = ?
"""

GET_RUN_STATUS = "SELECT status FROM runs WHERE run_id = ?"

SELECT_RUNS = """
SELECT run_id, flow_id, flow_name, status, trigger_key, trigger_data, job_id, started_at, completed_at,
    source_run_id, tags
FROM runs
"""
NEWEST_FIRST = "ORDER BY started_at DESC, run_id DESC"

GET_RUN = join_sql(SELECT_RUNS, "WHERE run_id = ?")
GET_ACTIVE_RUNS = join_sql(SELECT_RUNS, "WHERE status = 'Running'", NEWEST_FIRST, "LIMIT ?")
GET_DERIVED_RUNS = join_sql(SELECT_RUNS, "WHERE source_run_id = ?", NEWEST_FIRST, "LIMIT ?")


class Runs:
    """See flowstore_core.runs for the contract."""

    _database: Database

    async def start_run(
        self,
        flow_id: UUID,
        flow_name: str,
        run_id: UUID,
        trigger_key: str,
        *,
        trigger_data: str | None,
        job_id: str | None,
        source_run_id: UUID | None,
        tags: Mapping[str, str] = NO_TAGS,
    ) -> FlowRunRecord:
        def start(db: sqlite3.Connection, now: int) -> FlowRunRecord:
            run = new_run(
                flow_id,
                flow_name,
                run_id,
                trigger_key,
                trigger_data,
                job_id,
                source_run_id,
                tags,
                from_us(now),
            )
            if not insert_run(db, run, now):
                raise RunAlreadyExistsError(run_id)
            return run

        return await self._database.write(start)

    async def complete_run(
        self, run_id: UUID, status: RunStatus, *, expected: Mapping[str, StepStatus] | None
    ) -> bool:
        return await self._database.write(partial(_complete_run, run_id, status, expected))

    async def get_run(self, run_id: UUID) -> FlowRunRecord | None:
        return await self._database.read(lambda db: read_run(db, run_id))

    async def get_run_detail(self, run_id: UUID) -> FlowRunDetail | None:
        def detail(db: sqlite3.Connection) -> FlowRunDetail | None:
            if (row := db.execute(GET_RUN, (run_id.bytes,)).fetchone()) is None:
                return None
            return FlowRunDetail(**_run_fields(row), steps=read_steps(db, run_id))

        return await self._database.read(detail)

    async def get_run_status(self, run_id: UUID) -> RunStatus | None:
        return await self._database.read(lambda db: read_run_status(db, run_id))

    async def get_active_runs(self, *, take: int | None) -> tuple[FlowRunRecord, ...]:
        return await self._database.read(lambda db: to_runs(db.execute(GET_ACTIVE_RUNS, (to_limit(take),))))

    async def get_derived_runs(self, source_run_id: UUID, *, take: int | None) -> tuple[FlowRunRecord, ...]:
        row = (source_run_id.bytes, to_limit(take))
        return await self._database.read(lambda db: to_runs(db.execute(GET_DERIVED_RUNS, row)))


def new_run(
    flow_id: UUID,
    flow_name: str,
    run_id: UUID,
    trigger_key: str,
    trigger_data: str | None,
    job_id: str | None,
    source_run_id: UUID | None,
    tags: Mapping[str, str],
    started_at: datetime,
) -> FlowRunRecord:
    """The record of a new run."""
    return FlowRunRecord(
        run_id=run_id,
        flow_id=flow_id,
        flow_name=flow_name,
        status=RunStatus.RUNNING,
        trigger_key=trigger_key,
        trigger_data=trigger_data,
        job_id=job_id,
        started_at=started_at,
        completed_at=None,
        source_run_id=source_run_id,
        tags=tuple(tags.items()) if tags else (),
    )


def insert_run(db: sqlite3.Connection, run: FlowRunRecord, now: int) -> bool:
    """Store a new run; False if its id exists."""
    row = (
        run.run_id.bytes,
        run.flow_id.bytes,
        run.flow_name,
        run.trigger_key,
        run.trigger_data,
        run.job_id,
        now,
        to_optional_id(run.source_run_id),
    )
    if db.execute(START_RUN, row).rowcount == 0:
        return False
    if run.tags:
        save_tags(db, run.run_id, (), run.tags)
    return True


def read_run(db: sqlite3.Connection, run_id: UUID) -> FlowRunRecord | None:
    row = db.execute(GET_RUN, (run_id.bytes,)).fetchone()
    return None if row is None else to_run(row)


def read_run_status(db: sqlite3.Connection, run_id: UUID) -> RunStatus | None:
    row = db.execute(GET_RUN_STATUS, (run_id.bytes,)).fetchone()
    return None if row is None else RunStatus(row[0])


def _complete_run(
    run_id: UUID,
    status: RunStatus,
    expected: Mapping[str, StepStatus] | None,
    db: sqlite3.Connection,
    now: int,
) -> bool:
    status_now = read_run_status(db, run_id)
    if status_now is None:
        raise RunNotFoundError(run_id)
    if status_now.is_terminal:
        return False
    if expected is not None and not _is_as_expected(db, run_id, expected, now):
        return False
    return db.execute(COMPLETE_RUN, (status.value, now, run_id.bytes)).rowcount == 1


def _is_as_expected(
    db: sqlite3.Connection, run_id: UUID, expected: Mapping[str, StepStatus], now: int
) -> bool:
    statuses = {}
    for step_key, status, is_busy in db.execute(READ_PROGRESS, (now, run_id.bytes)):
        if status is not None:
            statuses[step_key] = status
        elif is_busy:
            # ``expected`` contains only started steps (RUN-2).
            return False
    return statuses == expected


def to_limit(take: int | None) -> int:
    """The LIMIT of a statement."""
    return -1 if take is None else take


def to_run(row: tuple[Any, ...]) -> FlowRunRecord:
    """The record of a row of SELECT_RUNS."""
    return FlowRunRecord(**_run_fields(row))


def _run_fields(row: tuple[Any, ...]) -> dict[str, Any]:
    return {
        "run_id": UUID(bytes=row[0]),
        "flow_id": UUID(bytes=row[1]),
        "flow_name": row[2],
        "status": RunStatus(row[3]),
        "trigger_key": row[4],
        "trigger_data": row[5],
        "job_id": row[6],
        "started_at": from_us(row[7]),
        "completed_at": from_optional_us(row[8]),
        "source_run_id": from_optional_id(row[9]),
        "tags": decode_tags(row[10]),
    }


def to_runs(rows: sqlite3.Cursor) -> tuple[FlowRunRecord, ...]:
    return tuple(to_run(row) for row in rows)
