"""Recovery in SQLite: rescheduling a step, and finding stalled steps."""

from __future__ import annotations

import sqlite3
from datetime import datetime
from functools import partial
from uuid import UUID

from flowstore_core import StalledStep, StallReason, StepAlreadyCompletedError, StepStatus
from flowstore_sqlite.codecs import from_us, to_optional_us, to_us
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

# CROSS JOIN fixes the join order: from the running runs, by their index, to their steps. -9223372036854775808
# stands for a time that does not exist, before every other.
GET_STALLED_STEPS = """
SELECT run_id, step_key, status, reason, since FROM (
    SELECT steps.run_id, steps.step_key, COALESCE(steps.status, 'Pending') AS status,
        CASE
            WHEN claimed_at IS NOT NULL THEN 'LeaseExpired'
            WHEN dispatched_at IS NOT NULL THEN 'DispatchDue'
            ELSE 'NotDispatched'
        END AS reason,
        MAX(
            CASE
                -- NULL for a claim without lease, which never stalls
                WHEN claimed_at IS NOT NULL THEN steps.expires_at
                WHEN dispatched_at IS NOT NULL THEN COALESCE(due_at, dispatched_at)
                WHEN steps.status IS NOT NULL THEN COALESCE(attempt_completed_at, attempt_started_at)
            END,
            COALESCE(due_at, dispatched_at, -9223372036854775808),
            COALESCE(
                (
                    SELECT waiters.expires_at FROM waiters
                    WHERE waiters.run_id = steps.run_id AND waiters.step_key = steps.step_key
                        AND delivered_at IS NULL
                ),
                -9223372036854775808
            )
        ) AS since
    FROM runs CROSS JOIN steps ON steps.run_id = runs.run_id
    WHERE runs.status = 'Running' AND (steps.status IS NULL OR steps.status IN ('Pending', 'Running'))
        AND NOT EXISTS (
            SELECT 1 FROM waiters
            WHERE waiters.run_id = steps.run_id AND waiters.step_key = steps.step_key
                AND delivered_at IS NULL AND expired_at IS NULL AND expires_at IS NULL
        )
)
WHERE since <= :as_of
ORDER BY since, run_id, step_key
LIMIT :take
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

    async def get_stalled_steps(self, *, as_of: datetime | None, take: int) -> tuple[StalledStep, ...]:
        def stalled(db: sqlite3.Connection) -> tuple[StalledStep, ...]:
            at = self._database.now() if as_of is None else to_us(as_of)
            rows = db.execute(GET_STALLED_STEPS, {"as_of": at, "take": take})
            return tuple(
                StalledStep(
                    run_id=UUID(bytes=run_id),
                    step_key=step_key,
                    status=StepStatus(status),
                    reason=StallReason(reason),
                    since=from_us(since),
                )
                for run_id, step_key, status, reason, since in rows
            )

        return await self._database.read(stalled)


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
