"""Exporting and importing whole runs in SQLite (XFR)."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import Any
from uuid import UUID

from flowstore_core import (
    ArchivedControl,
    ArchivedDelivery,
    ArchivedKey,
    ArchivedStep,
    ConflictError,
    FlowStepAttemptRecord,
    RunAlreadyExistsError,
    RunArchive,
    StepClaim,
    StepDispatch,
    StepStatus,
)
from flowstore_core.transfer import is_same_run, step_at_export
from flowstore_sqlite.codecs import from_optional_us, from_us, to_optional_id, to_optional_us, to_us
from flowstore_sqlite.controls import FIND_RUN_ID_BY_IDEMPOTENCY_KEY
from flowstore_sqlite.database import Database
from flowstore_sqlite.events import to_event
from flowstore_sqlite.requests import QUEUE_STEP
from flowstore_sqlite.runs import read_run
from flowstore_sqlite.signals import (
    BUFFER_SIGNAL,
    GET_BUFFERED_SIGNALS,
    GET_WAITERS,
    NO_STEP,
    to_buffered,
    to_waiter,
)
from flowstore_sqlite.steps import GET_ATTEMPTS, to_attempt
from flowstore_sqlite.tags import save_tags

EXPORT_STEPS = """
SELECT step_key, status, last_attempt, reopened, rescheduled, started_owner,
    steps.step_type, steps.input_json, output_json, error_message, job_id, attempt_started_at,
    attempt_completed_at, claimed_at, claim_owner, expires_at, dispatched_at, due_at, dispatch_job_id,
    queue, COALESCE(priority, 0), queued_steps.step_type, queued_steps.input_json
FROM steps LEFT JOIN queued_steps USING (run_id, step_key) WHERE run_id = ? ORDER BY step_key
"""
EXPORT_CONTROL = """
SELECT flow_id, trigger_key, idempotency_key, timeout_at, cancelled_at, cancel_reason, timed_out_at,
    timed_out_reason, created_at
FROM controls WHERE run_id = ?
"""
EXPORT_KEYS = """
SELECT flow_id, trigger_key, idempotency_key, created_at FROM idempotency_keys WHERE run_id = ?
ORDER BY flow_id, trigger_key, idempotency_key
"""
EXPORT_DELIVERIES = """
SELECT delivery_id, step_key, delivered_at FROM deliveries WHERE run_id = ? ORDER BY delivery_id
"""
EXPORT_OUTPUTS = "SELECT output_key, value_json FROM outputs WHERE run_id = ? ORDER BY output_key"
EXPORT_EVENTS = """
SELECT sequence, created_at, event_type, step_key, message FROM events WHERE run_id = ? ORDER BY sequence
"""

DELETE_ORPHANS = (
    "DELETE FROM idempotency_keys WHERE run_id = ?",
    "DELETE FROM controls WHERE run_id = ?",
)
IMPORT_RUN = """
INSERT INTO runs (
    run_id, flow_id, flow_name, status, trigger_key, trigger_data, job_id, started_at, completed_at,
    source_run_id
)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
# Tokens of calls stay NULL: the calls of the exporting store have ended.
IMPORT_STEP = """
INSERT INTO steps (
    run_id, step_key, status, last_attempt, reopened, rescheduled, started_owner, started_at,
    attempt_started_at, attempt_completed_at, step_type, input_json, output_json, error_message, job_id,
    claimed_at, claim_owner, expires_at, dispatched_at, due_at, dispatch_job_id
)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
IMPORT_ATTEMPT = """
INSERT INTO attempts (
    run_id, step_key, attempt, status, started_at, completed_at, step_type, job_id, error_message,
    output_json, input_json
)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
# As note_late_change would: the record of an ended run is in no index of get_runs_to_stop.
IMPORT_CONTROL = """
INSERT INTO controls (
    run_id, flow_id, trigger_key, idempotency_key, timeout_at, cancelled_at, cancel_reason, timed_out_at,
    timed_out_reason, created_at, ended
)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
IMPORT_KEY = """
INSERT INTO idempotency_keys (run_id, flow_id, trigger_key, idempotency_key, created_at)
VALUES (?, ?, ?, ?, ?)
"""
IMPORT_WAITER = """
INSERT INTO waiters (
    run_id, step_key, signal_name, created_at, expires_at, delivered_at, payload_json, expired_at
)
VALUES (?, ?, ?, ?, ?, ?, ?, ?)
"""
IMPORT_DELIVERY = "INSERT INTO deliveries (run_id, delivery_id, step_key, delivered_at) VALUES (?, ?, ?, ?)"
IMPORT_OUTPUT = "INSERT INTO outputs (run_id, output_key, value_json) VALUES (?, ?, ?)"
IMPORT_EVENT = """
INSERT INTO events (run_id, sequence, created_at, event_type, step_key, message) VALUES (?, ?, ?, ?, ?, ?)
"""

Row = tuple[Any, ...]


class Transfer:
    """See flowstore_core.transfer for the contract."""

    _database: Database

    async def export_run(self, run_id: UUID) -> RunArchive | None:
        return await self._database.read(lambda db: _export_run(db, run_id, self._database.now()))

    async def import_run(self, archive: RunArchive) -> bool:
        return await self._database.write(partial(_import_run, archive))


# Exporting


def _export_run(db: sqlite3.Connection, run_id: UUID, now: int) -> RunArchive | None:
    run = read_run(db, run_id)
    if run is None:
        return None

    def rows(statement: str) -> Iterator[Row]:
        return db.execute(statement, (run_id.bytes,))

    attempts = defaultdict[str, list[FlowStepAttemptRecord]](list)
    for row in rows(GET_ATTEMPTS):
        attempts[row[0]].append(to_attempt(run_id, row[0], row[1:]))
    at = from_us(now)
    steps = [step_at_export(_archived_step(run_id, row, attempts), at) for row in rows(EXPORT_STEPS)]
    control = next(rows(EXPORT_CONTROL), None)
    return RunArchive(
        run=run,
        control=None if control is None else _archived_control(run_id, control),
        idempotency_keys=tuple(
            ArchivedKey(
                flow_id=UUID(bytes=row[0]),
                trigger_key=row[1],
                idempotency_key=row[2],
                created_at=from_us(row[3]),
            )
            for row in rows(EXPORT_KEYS)
        ),
        steps=tuple(step for step in steps if step is not None),
        waiters=tuple(to_waiter(run_id, row) for row in rows(GET_WAITERS)),
        deliveries=tuple(
            ArchivedDelivery(delivery_id=row[0], step_key=row[1], delivered_at=from_us(row[2]))
            if row[1] != NO_STEP
            else ArchivedDelivery(delivery_id=row[0])
            for row in rows(EXPORT_DELIVERIES)
        ),
        buffered=tuple(to_buffered(run_id, row) for row in rows(GET_BUFFERED_SIGNALS)),
        outputs=tuple(rows(EXPORT_OUTPUTS)),
        events=tuple(to_event(run_id, row) for row in rows(EXPORT_EVENTS)),
    )


def _archived_step(run_id: UUID, row: Row, earlier: dict[str, list[FlowStepAttemptRecord]]) -> ArchivedStep:
    """The step of a row of EXPORT_STEPS."""
    step_key, status, last_attempt, reopened, rescheduled, started_owner = row[:6]
    attempts = tuple(earlier.get(step_key, ()))
    if status is not None and not reopened:
        newest = (last_attempt, row[6], status, *row[7:13])
        attempts += (to_attempt(run_id, step_key, newest),)
    claim = dispatch = None
    if row[13] is not None:
        claim = StepClaim(
            run_id=run_id,
            step_key=step_key,
            owner=row[14],
            claimed_at=from_us(row[13]),
            expires_at=from_optional_us(row[15]),
        )
    if row[16] is not None:
        dispatch = StepDispatch(
            run_id=run_id,
            step_key=step_key,
            dispatched_at=from_us(row[16]),
            due_at=from_optional_us(row[17]),
            job_id=row[18],
            queue=row[19],
            priority=row[20],
            step_type=row[21],
            input_json=row[22],
        )
    return ArchivedStep(
        run_id=run_id,
        step_key=step_key,
        status=None if status is None else StepStatus(status),
        reopened=bool(reopened),
        rescheduled=bool(rescheduled),
        started_owner=started_owner,
        attempts=attempts,
        claim=claim,
        dispatch=dispatch,
    )


def _archived_control(run_id: UUID, row: Row) -> ArchivedControl:
    return ArchivedControl(
        run_id=run_id,
        flow_id=UUID(bytes=row[0]),
        trigger_key=row[1],
        idempotency_key=row[2],
        timeout_at=from_optional_us(row[3]),
        cancel_requested_at=from_optional_us(row[4]),
        cancel_reason=row[5],
        timed_out_at=from_optional_us(row[6]),
        timed_out_reason=row[7],
        created_at=from_us(row[8]),
    )


# Importing


def _import_run(archive: RunArchive, db: sqlite3.Connection, now: int) -> bool:
    run_id = archive.run.run_id
    if (stored := _export_run(db, run_id, now)) is not None:
        if is_same_run(stored, archive):
            return False
        raise RunAlreadyExistsError(run_id)
    number = run_id.bytes
    for one in archive.idempotency_keys:
        scope = (one.flow_id.bytes, one.trigger_key, one.idempotency_key)
        holder = db.execute(FIND_RUN_ID_BY_IDEMPOTENCY_KEY, scope).fetchone()
        if holder not in (None, (number,)):
            raise ConflictError(
                f"an idempotency key of run {run_id} is registered to another run", run_id=run_id
            )
    for statement in DELETE_ORPHANS:
        db.execute(statement, (number,))
    db.execute(IMPORT_RUN, _run_row(archive))
    if archive.run.tags:
        save_tags(db, run_id, (), archive.run.tags)
    db.executemany(IMPORT_STEP, [_step_row(number, step) for step in archive.steps])
    db.executemany(IMPORT_ATTEMPT, [row for step in archive.steps for row in _attempt_rows(number, step)])
    db.executemany(
        IMPORT_WAITER,
        [
            (
                number,
                one.step_key,
                one.signal_name,
                to_us(one.created_at),
                to_optional_us(one.expires_at),
                to_optional_us(one.delivered_at),
                one.payload_json,
                to_optional_us(one.expired_at),
            )
            for one in archive.waiters
        ],
    )
    # After the waiters, because ready_at depends on them.
    db.executemany(
        QUEUE_STEP,
        [
            (one.queue, one.priority, one.step_type, one.input_json, number, one.step_key)
            for one in (step.dispatch for step in archive.steps)
            if one is not None and one.queue is not None
        ],
    )
    if archive.control is not None:
        db.execute(IMPORT_CONTROL, _control_row(archive, archive.control))
    db.executemany(
        IMPORT_KEY,
        [
            (number, one.flow_id.bytes, one.trigger_key, one.idempotency_key, to_us(one.created_at))
            for one in archive.idempotency_keys
        ],
    )
    db.executemany(
        IMPORT_DELIVERY,
        [
            # No read shows the time at which a payload was buffered.
            (
                number,
                one.delivery_id,
                one.step_key or NO_STEP,
                to_us(one.delivered_at or archive.run.started_at),
            )
            for one in archive.deliveries
        ],
    )
    # After the waiters: an inserted waiter takes a payload.
    db.executemany(
        BUFFER_SIGNAL,
        [(number, one.signal_name, one.payload_json, to_us(one.buffered_at)) for one in archive.buffered],
    )
    db.executemany(IMPORT_OUTPUT, [(number, *one) for one in archive.outputs])
    db.executemany(
        IMPORT_EVENT,
        [
            (number, one.sequence, to_us(one.timestamp), one.event_type, one.step_key, one.message)
            for one in archive.events
        ],
    )
    return True


def _run_row(archive: RunArchive) -> Row:
    run = archive.run
    return (
        run.run_id.bytes,
        run.flow_id.bytes,
        run.flow_name,
        run.status.value,
        run.trigger_key,
        run.trigger_data,
        run.job_id,
        to_us(run.started_at),
        to_optional_us(run.completed_at),
        to_optional_id(run.source_run_id),
    )


def _step_row(run_id: bytes, step: ArchivedStep) -> Row:
    status, newest = step.status, step.attempts[-1] if step.attempts else None
    claim, dispatch = step.claim, step.dispatch
    marks = (step.reopened, step.rescheduled, step.started_owner)
    head = (run_id, step.step_key, None if status is None else status.value, len(step.attempts), *marks)
    tail = (
        None if claim is None else to_us(claim.claimed_at),
        None if claim is None else claim.owner,
        None if claim is None else to_optional_us(claim.expires_at),
        None if dispatch is None else to_us(dispatch.dispatched_at),
        None if dispatch is None else to_optional_us(dispatch.due_at),
        None if dispatch is None else dispatch.job_id,
    )
    if newest is None:
        return (*head, *[None] * 8, *tail)
    first = to_us(step.attempts[0].started_at)
    if status is None:
        # A reset step keeps the start of its first attempt.
        return (*head, first, *[None] * 7, *tail)
    return (
        *head,
        first,
        to_us(newest.started_at),
        to_optional_us(newest.completed_at),
        newest.step_type,
        newest.input_json,
        None if step.reopened else newest.output_json,
        None if step.reopened else newest.error_message,
        newest.job_id,
        *tail,
    )


def _attempt_rows(run_id: bytes, step: ArchivedStep) -> Iterator[Row]:
    """The rows of all attempts that are not in the row of the step."""
    in_step = step.status is not None and not step.reopened
    for one in step.attempts[:-1] if in_step else step.attempts:
        yield (
            run_id,
            step.step_key,
            one.attempt,
            one.status.value,
            to_us(one.started_at),
            to_optional_us(one.completed_at),
            one.step_type,
            one.job_id,
            one.error_message,
            one.output_json,
            one.input_json,
        )


def _control_row(archive: RunArchive, control: ArchivedControl) -> Row:
    times = (control.timeout_at, control.cancel_requested_at, control.timed_out_at)
    return (
        control.run_id.bytes,
        control.flow_id.bytes,
        control.trigger_key,
        control.idempotency_key,
        to_optional_us(control.timeout_at),
        to_optional_us(control.cancel_requested_at),
        control.cancel_reason,
        to_optional_us(control.timed_out_at),
        control.timed_out_reason,
        to_us(control.created_at),
        archive.run.status.is_terminal and any(at is not None for at in times),
    )
