"""Steps in SQLite: opening, closing and reopening attempts.

The row of a step contains its newest attempt; earlier ones are rows of ``attempts``. While a step is
reopened or reset, its newest attempt is stored there too.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Coroutine, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple
from uuid import UUID

from flowstore_core import (
    ClaimLostError,
    FlowStepAttemptRecord,
    FlowStepRecord,
    RunCompletedError,
    RunNotFoundError,
    RunStatus,
    StaleAttemptError,
    StepAlreadyCompletedError,
    StepNotFoundError,
    StepStatus,
)
from flowstore_core.status import TERMINAL_STEP_STATUSES
from flowstore_core.steps import superseded_by
from flowstore_sqlite.codecs import from_optional_us, from_us, join_sql
from flowstore_sqlite.database import Database

LOAD_STEP = """
SELECT runs.status, steps.status, COALESCE(last_attempt, 0), COALESCE(reopened, 0), rescheduled,
    claimed_at, expires_at, claim_owner, started_owner, dispatched_at
FROM runs LEFT JOIN steps ON steps.run_id = runs.run_id AND steps.step_key = ?
WHERE runs.run_id = ?
"""

# Fast path of record_step_start: the first attempt of a step that is claimed or dispatched.
RECORD_STEP_START = """
UPDATE steps SET status = 'Running', last_attempt = 1, started_at = ?, attempt_started_at = ?,
    started_owner = ?, step_type = ?, job_id = ?, input_json = ?
WHERE run_id = ? AND step_key = ? AND last_attempt = 0
    AND EXISTS (SELECT 1 FROM runs WHERE runs.run_id = steps.run_id AND runs.status = 'Running')
"""
RECORD_STEP_START_OWNED = f"""
{RECORD_STEP_START.rstrip()} AND claim_owner = ? AND (expires_at IS NULL OR expires_at > ?)
"""

# Slow path: any attempt, after load_step has checked the step.
RECORD_STEP_START_SLOW_PATH = """
INSERT INTO steps (
    run_id, step_key, status, last_attempt, started_at, attempt_started_at, started_owner, step_type,
    job_id, input_json
)
VALUES (:run_id, :step_key, 'Running', :attempt, :now, :now, :owner, :step_type, :job_id, :input_json)
ON CONFLICT (run_id, step_key) DO UPDATE SET
    status = 'Running', last_attempt = :attempt, reopened = 0, rescheduled = 0,
    started_at = COALESCE(started_at, :now), attempt_started_at = :now, attempt_completed_at = NULL,
    started_owner = :owner, step_type = :step_type, job_id = :job_id, error_message = NULL,
    output_json = NULL, input_json = :input_json
"""

# Updates no row unless the attempt is open. NULL stands for the newest attempt and for any owner.
RECORD_STEP_COMPLETE = """
UPDATE steps SET status = ?1, output_json = ?2, error_message = ?3, attempt_completed_at = ?4
WHERE run_id = ?5 AND step_key = ?6 AND status = 'Running' AND last_attempt = IFNULL(?7, last_attempt)
    AND (?8 IS NULL OR started_owner = ?8)
"""

HAS_OUTCOME = """
SELECT status = ? AND output_json IS ? AND error_message IS ? FROM steps WHERE run_id = ? AND step_key = ?
"""

RECORD_SKIPPED_STEP = """
INSERT INTO steps (
    run_id, step_key, status, last_attempt, started_at, attempt_started_at, attempt_completed_at,
    started_owner, step_type, error_message
)
VALUES (:run_id, :step_key, 'Skipped', :attempt, :now, :now, :now, :owner, :step_type, :reason)
ON CONFLICT (run_id, step_key) DO UPDATE SET
    status = 'Skipped', last_attempt = :attempt, reopened = 0, rescheduled = 0,
    started_at = COALESCE(started_at, :now), attempt_started_at = :now, attempt_completed_at = :now,
    started_owner = :owner, step_type = :step_type, job_id = NULL, error_message = :reason,
    output_json = NULL, input_json = NULL
"""
CLAIM_SKIPPED_STEP = """
UPDATE steps SET claimed_at = ?, claim_owner = ?, expires_at = NULL, claim_token = NULL
WHERE run_id = ? AND step_key = ?
"""
IS_SKIPPED_FOR_REASON = "SELECT error_message IS ? FROM steps WHERE run_id = ? AND step_key = ?"

CLOSE_SUPERSEDED = """
UPDATE steps SET status = 'Failed', output_json = NULL, error_message = ?, attempt_completed_at = ?
WHERE run_id = ? AND step_key = ?
"""
ARCHIVE_ATTEMPT = """
INSERT INTO attempts (
    run_id, step_key, attempt, status, started_at, completed_at, step_type, job_id, error_message,
    output_json, input_json
)
SELECT run_id, step_key, last_attempt, status, attempt_started_at, attempt_completed_at, step_type, job_id,
    error_message, output_json, input_json
FROM steps WHERE run_id = ? AND step_key = ?
"""

GET_STEP_STATUSES = """
SELECT step_key, status FROM steps WHERE run_id = ? AND status IS NOT NULL ORDER BY step_key
"""

SELECT_STEPS = """
SELECT step_key, step_type, status, input_json, output_json, error_message, job_id, started_at,
    attempt_started_at, attempt_completed_at, last_attempt, reopened
FROM steps WHERE run_id = ? AND status IS NOT NULL
"""
SELECT_ATTEMPTS = """
SELECT step_key, attempt, step_type, status, input_json, output_json, error_message, job_id, started_at,
    completed_at
FROM attempts WHERE run_id = ?
"""
GET_STEPS = join_sql(SELECT_STEPS, "ORDER BY started_at, step_key")
GET_ATTEMPTS = join_sql(SELECT_ATTEMPTS, "ORDER BY step_key, attempt")
GET_STEP = join_sql(SELECT_STEPS, "AND step_key = ?")
GET_ATTEMPTS_OF_STEP = join_sql(SELECT_ATTEMPTS, "AND step_key = ? ORDER BY attempt")


class StepState(NamedTuple):
    """The state that decides about the next operation on a step; a row of LOAD_STEP."""

    run_status: str
    status: str | None
    last_attempt: int
    reopened: int
    rescheduled: int | None
    claimed_at: int | None
    expires_at: int | None
    claim_owner: str | None
    started_owner: str | None
    dispatched_at: int | None

    @property
    def run_is_terminal(self) -> bool:
        return self.run_status != RunStatus.RUNNING

    @property
    def is_terminal(self) -> bool:
        return self.status in TERMINAL_STEP_STATUSES

    @property
    def is_open(self) -> bool:
        """Whether the newest attempt is open."""
        return self.status == StepStatus.RUNNING

    def has_live_claim(self, now: int) -> bool:
        # The claim of a finished step does not expire (CLM-4).
        return self.claimed_at is not None and (
            self.expires_at is None or now < self.expires_at or self.is_terminal
        )


def load_step(db: sqlite3.Connection, run_id: UUID, step_key: str) -> StepState:
    """The state of a step, stored or not. Raises RunNotFoundError."""
    row = db.execute(LOAD_STEP, (step_key, run_id.bytes)).fetchone()
    if row is None:
        raise RunNotFoundError(run_id)
    return StepState._make(row)


class Steps:
    """See flowstore_core.steps for the contract."""

    _database: Database

    # Not ``async``, like other frequent operations: saves one coroutine per call.
    def record_step_start(
        self,
        run_id: UUID,
        step_key: str,
        step_type: str,
        *,
        input_json: str | None,
        job_id: str | None,
        owner: str | None,
    ) -> Coroutine[Any, Any, int]:
        values = (step_type, job_id, input_json)
        return self._database.write(partial(start_step, run_id, step_key, owner, values))

    def record_step_complete(
        self,
        run_id: UUID,
        step_key: str,
        status: StepStatus,
        *,
        output_json: str | None,
        error_message: str | None,
        attempt: int | None,
        owner: str | None,
    ) -> Coroutine[Any, Any, None]:
        outcome = (status.value, output_json, error_message)
        return self._database.write(partial(_record_step_complete, run_id, step_key, outcome, attempt, owner))

    async def record_skipped_step(
        self, run_id: UUID, step_key: str, step_type: str, reason: str | None, *, owner: str | None
    ) -> None:
        await self._database.write(partial(_record_skipped_step, run_id, step_key, step_type, reason, owner))

    async def get_step(self, run_id: UUID, step_key: str) -> FlowStepRecord | None:
        return await self._database.read(lambda db: _read_step(db, run_id, step_key))

    async def get_step_statuses(self, run_id: UUID) -> Mapping[str, StepStatus]:
        rows = await self._database.read(lambda db: db.execute(GET_STEP_STATUSES, (run_id.bytes,)).fetchall())
        return MappingProxyType({step_key: StepStatus(status) for step_key, status in rows})


def start_step(
    run_id: UUID,
    step_key: str,
    owner: str | None,
    values: tuple[str, str | None, str | None],
    db: sqlite3.Connection,
    now: int,
) -> int:
    """Open the next attempt with a step_type, job_id and input_json, and return its number (STP-1)."""
    first = (now, now, owner, *values, run_id.bytes, step_key)
    if owner is None:
        started = db.execute(RECORD_STEP_START, first)
    else:
        started = db.execute(RECORD_STEP_START_OWNED, (*first, owner, now))
    if started.rowcount == 1:
        return 1
    step = load_step(db, run_id, step_key)
    if step.run_is_terminal:
        raise RunCompletedError(run_id, step_key)
    if step.status in (StepStatus.SUCCEEDED, StepStatus.SKIPPED):
        raise StepAlreadyCompletedError(run_id, step_key)
    if owner is not None:
        if not step.has_live_claim(now) or step.claim_owner != owner:
            raise ClaimLostError(run_id, step_key)
        if step.is_open and step.started_owner == owner:
            return step.last_attempt
    attempt = archive_attempt(db, run_id, step_key, step, now)
    step_type, job_id, input_json = values
    row = {
        "run_id": run_id.bytes,
        "step_key": step_key,
        "attempt": attempt,
        "owner": owner,
        "step_type": step_type,
        "job_id": job_id,
        "input_json": input_json,
        "now": now,
    }
    db.execute(RECORD_STEP_START_SLOW_PATH, row)
    return attempt


def archive_attempt(db: sqlite3.Connection, run_id: UUID, step_key: str, step: StepState, now: int) -> int:
    """Close the newest attempt, copy it to ``attempts`` and return the number of its successor."""
    successor = step.last_attempt + 1
    if step.status is not None and not step.reopened:
        if step.is_open:
            db.execute(CLOSE_SUPERSEDED, (superseded_by(successor), now, run_id.bytes, step_key))
        db.execute(ARCHIVE_ATTEMPT, (run_id.bytes, step_key))
    return successor


def check_attempt(
    step: StepState, run_id: UUID, step_key: str, attempt: int | None, owner: str | None
) -> None:
    """Raise an error unless the attempt (None: the newest) is current, and the owner's (None: anybody's)."""
    if step.status is None:
        raise StepNotFoundError(run_id, step_key)
    if step.reopened or attempt not in (None, step.last_attempt):
        raise StaleAttemptError(run_id, step_key, attempt, step.last_attempt)
    if owner is not None and step.started_owner != owner:
        raise ClaimLostError(run_id, step_key)


def _record_step_complete(
    run_id: UUID,
    step_key: str,
    outcome: tuple[str, str | None, str | None],
    attempt: int | None,
    owner: str | None,
    db: sqlite3.Connection,
    now: int,
) -> None:
    row = (*outcome, now, run_id.bytes, step_key, attempt, owner)
    if db.execute(RECORD_STEP_COMPLETE, row).rowcount == 1:
        return
    step = load_step(db, run_id, step_key)
    check_attempt(step, run_id, step_key, attempt, owner)
    if not db.execute(HAS_OUTCOME, (*outcome, run_id.bytes, step_key)).fetchone()[0]:
        raise StepAlreadyCompletedError(run_id, step_key, step.last_attempt)


def _record_skipped_step(
    run_id: UUID,
    step_key: str,
    step_type: str,
    reason: str | None,
    owner: str | None,
    db: sqlite3.Connection,
    now: int,
) -> None:
    step = load_step(db, run_id, step_key)
    if step.is_terminal:
        is_repeat = step.status == StepStatus.SKIPPED and owner is not None and step.started_owner == owner
        if is_repeat and db.execute(IS_SKIPPED_FOR_REASON, (reason, run_id.bytes, step_key)).fetchone()[0]:
            return
        raise StepAlreadyCompletedError(run_id, step_key)
    is_claimed = step.has_live_claim(now)
    if owner is not None and is_claimed and step.claim_owner != owner:
        raise ClaimLostError(run_id, step_key)
    skip_step(db, run_id, step_key, step, step_type, reason, owner, now)
    if owner is not None and not is_claimed:
        db.execute(CLAIM_SKIPPED_STEP, (now, owner, run_id.bytes, step_key))


def skip_step(
    db: sqlite3.Connection,
    run_id: UUID,
    step_key: str,
    step: StepState,
    step_type: str,
    reason: str | None,
    owner: str | None,
    now: int,
) -> None:
    """Record one attempt that starts and ends Skipped (STP-5)."""
    row = {
        "run_id": run_id.bytes,
        "step_key": step_key,
        "attempt": archive_attempt(db, run_id, step_key, step, now),
        "owner": owner,
        "step_type": step_type,
        "reason": reason,
        "now": now,
    }
    db.execute(RECORD_SKIPPED_STEP, row)


def read_steps(db: sqlite3.Connection, run_id: UUID) -> tuple[FlowStepRecord, ...]:
    """The started steps of a run with their attempts, in the order of QRY-3."""
    earlier: dict[str, list[FlowStepAttemptRecord]] = defaultdict(list)
    for step_key, *values in db.execute(GET_ATTEMPTS, (run_id.bytes,)):
        earlier[step_key].append(to_attempt(run_id, step_key, values))
    rows = db.execute(GET_STEPS, (run_id.bytes,))
    return tuple(_to_step(run_id, row, earlier.get(row[0], [])) for row in rows)


def _read_step(db: sqlite3.Connection, run_id: UUID, step_key: str) -> FlowStepRecord | None:
    """One started step with its attempts."""
    of_step = (run_id.bytes, step_key)
    if (row := db.execute(GET_STEP, of_step).fetchone()) is None:
        return None
    earlier = [to_attempt(run_id, step_key, one[1:]) for one in db.execute(GET_ATTEMPTS_OF_STEP, of_step)]
    return _to_step(run_id, row, earlier)


def _to_step(run_id: UUID, row: Any, earlier: Sequence[FlowStepAttemptRecord]) -> FlowStepRecord:
    """The record of a row of SELECT_STEPS, which holds the newest attempt, and the earlier attempts."""
    step_key, step_type, status, input_json, output_json, error_message, job_id = row[:7]
    started_at, attempt_started_at, attempt_completed_at, last_attempt, reopened = row[7:]
    attempts = tuple(earlier)
    if not reopened:
        newest = (last_attempt, *row[1:7], attempt_started_at, attempt_completed_at)
        attempts += (to_attempt(run_id, step_key, newest),)
    is_terminal = StepStatus(status).is_terminal
    return FlowStepRecord(
        run_id=run_id,
        step_key=step_key,
        step_type=step_type,
        status=StepStatus(status),
        input_json=input_json,
        output_json=output_json,
        error_message=error_message,
        job_id=job_id,
        started_at=from_us(started_at),
        completed_at=from_optional_us(attempt_completed_at) if is_terminal else None,
        attempt_count=last_attempt + reopened,
        attempts=attempts,
    )


def to_attempt(run_id: UUID, step_key: str, row: Any) -> FlowStepAttemptRecord:
    """The record of a row of SELECT_ATTEMPTS, without its first column, the step key."""
    return FlowStepAttemptRecord(
        run_id=run_id,
        step_key=step_key,
        attempt=row[0],
        step_type=row[1],
        status=StepStatus(row[2]),
        input_json=row[3],
        output_json=row[4],
        error_message=row[5],
        job_id=row[6],
        started_at=from_us(row[7]),
        completed_at=from_optional_us(row[8]),
    )
