"""Retries in SQLite: reopening a step and resetting the steps that were skipped because of it."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Sequence
from functools import partial
from uuid import UUID

from flowstore_core import StaleAttemptError, StepNotFoundError, StepRequest, StepStatus
from flowstore_sqlite.database import Database
from flowstore_sqlite.requests import settle_requests
from flowstore_sqlite.steps import archive_attempt, load_step

# Keeps the end of the last attempt: get_stalled_steps measures from it. Keeps rescheduled: a repeated
# reschedule_step must find it.
REOPEN_STEP = """
UPDATE steps SET status = 'Pending', reopened = 1,
    claimed_at = NULL, claim_owner = NULL, expires_at = NULL, claim_token = NULL, started_owner = NULL,
    dispatched_at = NULL, due_at = NULL, dispatch_job_id = NULL, dispatch_token = NULL,
    error_message = NULL, output_json = NULL
WHERE run_id = ? AND step_key = ?
"""
RESET_STEP = """
UPDATE steps SET status = NULL, rescheduled = 0, attempt_started_at = NULL, attempt_completed_at = NULL,
    claimed_at = NULL, claim_owner = NULL, expires_at = NULL, claim_token = NULL, started_owner = NULL,
    dispatched_at = NULL, due_at = NULL, dispatch_job_id = NULL, dispatch_token = NULL,
    step_type = NULL, job_id = NULL, error_message = NULL, output_json = NULL, input_json = NULL
WHERE run_id = ? AND step_key = ?
"""
REMOVE_UNDELIVERED_WAITER = """
DELETE FROM waiters WHERE run_id = ? AND step_key = ? AND delivered_at IS NULL
"""
REOPEN_RUN = "UPDATE runs SET status = 'Running', completed_at = NULL WHERE run_id = ?"
CLEAR_LATCHES = """
UPDATE controls SET cancelled_at = NULL, cancel_reason = NULL, timed_out_at = NULL, timed_out_reason = NULL,
    timeout_at = CASE WHEN timeout_at <= ? THEN NULL ELSE timeout_at END
WHERE run_id = ?
"""


class Retries:
    """See flowstore_core.steps for the contract."""

    _database: Database

    async def retry_step(
        self,
        run_id: UUID,
        step_key: str,
        *,
        attempt: int | None,
        reset: Collection[str],
        dispatch: Sequence[StepRequest] = (),
    ) -> None:
        await self._database.write(partial(_retry_step, run_id, step_key, attempt, reset, dispatch))


def _retry_step(
    run_id: UUID,
    step_key: str,
    attempt: int | None,
    reset: Collection[str],
    dispatch: Sequence[StepRequest],
    db: sqlite3.Connection,
    now: int,
) -> None:
    step = load_step(db, run_id, step_key)
    if step.status is None:
        raise StepNotFoundError(run_id, step_key)
    if attempt not in (None, step.last_attempt):
        raise StaleAttemptError(run_id, step_key, attempt, step.last_attempt)
    if not step.reopened:
        archive_attempt(db, run_id, step_key, step, now)
        db.execute(REOPEN_STEP, (run_id.bytes, step_key))
        db.execute(REMOVE_UNDELIVERED_WAITER, (run_id.bytes, step_key))
        for key in reset:
            if key != step_key:
                _reset_step(db, run_id, key, now)
    if step.run_is_terminal:
        db.execute(REOPEN_RUN, (run_id.bytes,))
        db.execute(CLEAR_LATCHES, (now, run_id.bytes))
    settle_requests(db, run_id, dispatch, now)


def _reset_step(db: sqlite3.Connection, run_id: UUID, step_key: str, now: int) -> None:
    step = load_step(db, run_id, step_key)
    if step.status == StepStatus.SKIPPED:
        archive_attempt(db, run_id, step_key, step, now)
        db.execute(RESET_STEP, (run_id.bytes, step_key))
        db.execute(REMOVE_UNDELIVERED_WAITER, (run_id.bytes, step_key))
