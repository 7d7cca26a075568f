"""Recovery in SQLite: rescheduling a step (STP-7)."""

from __future__ import annotations

import sqlite3
from datetime import datetime
from functools import partial
from uuid import UUID

from flowstore_core import StepAlreadyCompletedError, StepStatus
from flowstore_sqlite.codecs import to_optional_us
from flowstore_sqlite.database import Database
from flowstore_sqlite.retries import REMOVE_UNDELIVERED_WAITER
from flowstore_sqlite.steps import (
    ARCHIVE_ATTEMPT,
    HAS_OUTCOME,
    RECORD_STEP_COMPLETE,
    check_attempt,
    load_step,
)

RESCHEDULE_STEP = """
UPDATE steps SET rescheduled = 1,
    claimed_at = NULL, claim_owner = NULL, expires_at = NULL, claim_token = NULL,
    dispatched_at = ?, due_at = ?, dispatch_job_id = NULL, dispatch_token = NULL
WHERE run_id = ? AND step_key = ?
"""
# Reopens the step too, like retry_step.
RESCHEDULE_FAILED_STEP = """
UPDATE steps SET status = 'Pending', reopened = 1, rescheduled = 1,
    claimed_at = NULL, claim_owner = NULL, expires_at = NULL, claim_token = NULL, started_owner = NULL,
    dispatched_at = ?, due_at = ?, dispatch_job_id = NULL, dispatch_token = NULL,
    error_message = NULL, output_json = NULL
WHERE run_id = ? AND step_key = ?
"""
HAS_FAILED_ATTEMPT = """
SELECT 1 FROM attempts WHERE run_id = ? AND step_key = ? AND attempt = ? AND status = 'Failed'
"""


class Recovery:
    """See flowstore_core.steps.Recovery for the contract."""

    _database: Database

    async def reschedule_step(
        self,
        run_id: UUID,
        step_key: str,
        *,
        attempt: int,
        output_json: str | None,
        error_message: str | None = None,
        due_at: datetime | None,
        owner: str | None,
    ) -> None:
        due = to_optional_us(due_at)
        if error_message is None:
            write = partial(_reschedule_step, run_id, step_key, attempt, owner, output_json, due)
        else:
            outcome = (StepStatus.FAILED.value, output_json, error_message)
            write = partial(_reschedule_failed_step, run_id, step_key, attempt, owner, outcome, due)
        await self._database.write(write)


def _reschedule_step(
    run_id: UUID,
    step_key: str,
    attempt: int,
    owner: str | None,
    output_json: str | None,
    due: int | None,
    db: sqlite3.Connection,
    now: int,
) -> None:
    step = load_step(db, run_id, step_key)
    check_attempt(step, run_id, step_key, attempt, owner)
    if step.is_open:
        outcome = (StepStatus.PENDING.value, output_json, None)
        db.execute(RECORD_STEP_COMPLETE, (*outcome, now, run_id.bytes, step_key, attempt, owner))
    elif step.status != StepStatus.PENDING:
        raise StepAlreadyCompletedError(run_id, step_key, attempt)
    elif step.rescheduled:
        return
    dispatch = (None, None) if step.run_is_terminal else (now, due)
    db.execute(RESCHEDULE_STEP, (*dispatch, run_id.bytes, step_key))


def _reschedule_failed_step(
    run_id: UUID,
    step_key: str,
    attempt: int,
    owner: str | None,
    outcome: tuple[str, str | None, str],
    due: int | None,
    db: sqlite3.Connection,
    now: int,
) -> None:
    step = load_step(db, run_id, step_key)
    key = (run_id.bytes, step_key)
    is_rescheduled = step.reopened and step.rescheduled and step.last_attempt == attempt
    if is_rescheduled and db.execute(HAS_FAILED_ATTEMPT, (*key, attempt)).fetchone() is not None:
        # A repeated call.
        return
    check_attempt(step, run_id, step_key, attempt, owner)
    if step.is_open:
        db.execute(RECORD_STEP_COMPLETE, (*outcome, now, *key, attempt, owner))
    elif step.rescheduled and step.status == StepStatus.FAILED:
        # A repeated call on a terminal run.
        return
    elif not db.execute(HAS_OUTCOME, (*outcome, *key)).fetchone()[0]:
        raise StepAlreadyCompletedError(run_id, step_key, attempt)
    if step.run_is_terminal:
        db.execute(RESCHEDULE_STEP, (None, None, *key))
        return
    # Not archive_attempt: it would close the attempt as superseded, from the state before this call.
    db.execute(ARCHIVE_ATTEMPT, key)
    db.execute(RESCHEDULE_FAILED_STEP, (now, due, *key))
    db.execute(REMOVE_UNDELIVERED_WAITER, key)
