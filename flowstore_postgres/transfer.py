"""Exporting and importing whole runs on PostgreSQL (XFR).

Concurrent imports share a transaction, in which each table gets one statement. An import that meets a key or
a run of another writer gets a transaction of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, NoReturn
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
    StoreUnavailableError,
    new_claim_token,
)
from flowstore_core.tags import encode_tags
from flowstore_core.transfer import is_same_run, step_at_export
from flowstore_postgres.database import Database
from flowstore_postgres.errors import RetryableError
from flowstore_postgres.events import event_record
from flowstore_postgres.retention import LOCK_KEYS_OF_RUNS
from flowstore_postgres.runs import ATTEMPT_COLUMNS, RUN_COLUMNS, attempt_record, plain_uuid, run_record
from flowstore_postgres.shared_transactions import BatchRejectedError
from flowstore_postgres.signals import NO_STEP, buffered_signal, waiter_record
from flowstore_postgres.transactions import Transaction, affected_rows

EXPORT_RUNS = f"""
SELECT {RUN_COLUMNS}, clock_timestamp() AS now,
    ARRAY(SELECT ROW(s.step_key, s.status, s.last_attempt, s.reopened, s.rescheduled, s.started_owner,
                     s.step_type, s.input_json, s.output_json, s.error_message, s.job_id, s.started_at,
                     s.completed_at, s.claimed_at, s.claim_token, s.claim_owned, s.claim_expires_at,
                     s.dispatched_at, s.due_at, s.dispatch_job_id, s.dispatch_queue, s.dispatch_priority,
                     s.dispatch_step_type, s.dispatch_input_json)
          FROM {{schema}}.steps s WHERE s.run_id = r.run_id ORDER BY s.step_key) AS steps,
    ARRAY(SELECT ROW({ATTEMPT_COLUMNS}) FROM {{schema}}.attempts a
          WHERE a.run_id = r.run_id ORDER BY a.step_key, a.attempt) AS attempts,
    (SELECT ROW(c.flow_id, c.trigger_key, c.idempotency_key, c.timeout_at, c.cancel_requested_at,
                c.cancel_reason, c.timed_out_at, c.timed_out_reason, c.created_at)
     FROM {{schema}}.controls c WHERE c.run_id = r.run_id) AS control,
    ARRAY(SELECT ROW(k.flow_id, k.trigger_key, k.idempotency_key, k.created_at)
          FROM {{schema}}.idempotency_keys k WHERE k.run_id = r.run_id
          ORDER BY k.flow_id, k.trigger_key, k.idempotency_key) AS keys,
    ARRAY(SELECT ROW(w.step_key, w.signal_name, w.created_at, w.expires_at, w.delivered_at, w.payload_json,
                     w.expired_at)
          FROM {{schema}}.waiters w WHERE w.run_id = r.run_id ORDER BY w.step_key) AS waiters,
    ARRAY(SELECT ROW(d.delivery_id, d.step_key, d.delivered_at)
          FROM {{schema}}.deliveries d WHERE d.run_id = r.run_id ORDER BY d.delivery_id) AS deliveries,
    ARRAY(SELECT ROW(b.signal_name, b.payload_json, b.buffered_at)
          FROM {{schema}}.buffered_signals b WHERE b.run_id = r.run_id ORDER BY b.number) AS buffered,
    ARRAY(SELECT ROW(o.key, o.value_json)
          FROM {{schema}}.outputs o WHERE o.run_id = r.run_id ORDER BY o.key) AS outputs,
    ARRAY(SELECT ROW(e.sequence, e.timestamp, e.event_type, e.step_key, e.message)
          FROM {{schema}}.events e WHERE e.run_id = r.run_id ORDER BY e.sequence) AS events
FROM {{schema}}.runs r WHERE r.run_id = ANY($1::uuid[])
"""

# Keys, runs, then the rest: the order of trigger_run and cleanup, so that no import deadlocks with them. A
# run that was started under one of these keys meanwhile makes IMPORT_RUNS conflict.
LOCK_ORPHANED_KEYS = LOCK_KEYS_OF_RUNS + "SELECT count(*) FROM keys"
DELETE_ORPHANED_KEYS = "DELETE FROM {schema}.idempotency_keys WHERE run_id = ANY($1::uuid[])"
DELETE_ORPHANED_CONTROLS = "DELETE FROM {schema}.controls WHERE run_id = ANY($1::uuid[])"
IMPORT_KEYS = """
INSERT INTO {schema}.idempotency_keys (flow_id, trigger_key, idempotency_key, run_id, created_at)
SELECT * FROM unnest($1::uuid[], $2::text[], $3::text[], $4::uuid[], $5::timestamptz[])
    AS a (flow_id, trigger_key, idempotency_key, run_id, created_at)
ORDER BY flow_id, trigger_key COLLATE "C", idempotency_key COLLATE "C"
ON CONFLICT DO NOTHING
"""
FIND_HOLDER = """
SELECT run_id FROM {schema}.idempotency_keys
WHERE flow_id = $1 AND trigger_key = $2 AND idempotency_key = $3
"""
IMPORT_RUNS = """
INSERT INTO {schema}.runs (run_id, tags, flow_id, flow_name, status, trigger_key, trigger_data, job_id,
                           started_at, completed_at, source_run_id, last_event, start_token)
SELECT a.*, gen_random_uuid()
FROM unnest($1::uuid[], $2::jsonb[], $3::uuid[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[],
            $9::timestamptz[], $10::timestamptz[], $11::uuid[], $12::bigint[])
    AS a (run_id, tags, flow_id, flow_name, status, trigger_key, trigger_data, job_id, started_at,
          completed_at, source_run_id, last_event)
ORDER BY run_id
ON CONFLICT (run_id) DO NOTHING
"""
# ended as get_runs_to_stop would set it (migration 9). A control record without a run is updated in place, so
# that a statement that waits for it finds the new values.
IMPORT_CONTROLS = """
INSERT INTO {schema}.controls (run_id, flow_id, trigger_key, idempotency_key, timeout_at, cancel_requested_at,
                               cancel_reason, timed_out_at, timed_out_reason, created_at, ended)
SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::timestamptz[], $6::timestamptz[],
                     $7::text[], $8::timestamptz[], $9::text[], $10::timestamptz[], $11::boolean[])
ON CONFLICT (run_id) DO UPDATE
    SET (flow_id, trigger_key, idempotency_key, timeout_at, cancel_requested_at, cancel_reason, timed_out_at,
         timed_out_reason, created_at, ended)
      = (excluded.flow_id, excluded.trigger_key, excluded.idempotency_key, excluded.timeout_at,
         excluded.cancel_requested_at, excluded.cancel_reason, excluded.timed_out_at,
         excluded.timed_out_reason, excluded.created_at, excluded.ended)
"""
IMPORT_WAITERS = """
INSERT INTO {schema}.waiters (run_id, step_key, signal_name, created_at, expires_at, delivered_at,
                              payload_json, expired_at)
SELECT * FROM unnest($1::uuid[], $2::text[], $3::text[], $4::timestamptz[], $5::timestamptz[],
                     $6::timestamptz[], $7::text[], $8::timestamptz[])
"""
# After the waiters: the trigger of table pending reads them. Tokens of calls stay NULL, except that of a
# claim without owner, because the calls of the exporting store have ended.
IMPORT_STEPS = """
INSERT INTO {schema}.steps (run_id, step_key, status, last_attempt, reopened, rescheduled, started_owner,
                            first_started_at, started_at, completed_at, step_type, input_json, output_json,
                            error_message, job_id, claimed_at, claim_token, claim_owned, claim_expires_at,
                            dispatched_at, due_at, dispatch_job_id, dispatch_queue, dispatch_priority,
                            dispatch_step_type, dispatch_input_json, pending_writes, stall_noted)
SELECT a.*, CASE WHEN a.dispatch_queue IS NOT NULL THEN 0 END, false
FROM unnest($1::uuid[], $2::text[], $3::text[], $4::bigint[], $5::boolean[], $6::boolean[], $7::text[],
            $8::timestamptz[], $9::timestamptz[], $10::timestamptz[], $11::text[], $12::text[], $13::text[],
            $14::text[], $15::text[], $16::timestamptz[], $17::text[], $18::boolean[], $19::timestamptz[],
            $20::timestamptz[], $21::timestamptz[], $22::text[], $23::text[], $24::smallint[],
            $25::text[], $26::text[])
    AS a (run_id, step_key, status, last_attempt, reopened, rescheduled, started_owner, first_started_at,
          started_at, completed_at, step_type, input_json, output_json, error_message, job_id, claimed_at,
          claim_token, claim_owned, claim_expires_at, dispatched_at, due_at, dispatch_job_id, dispatch_queue,
          dispatch_priority, dispatch_step_type, dispatch_input_json)
"""
IMPORT_ATTEMPTS = """
INSERT INTO {schema}.attempts (run_id, step_key, attempt, step_type, status, input_json, output_json,
                               error_message, job_id, started_at, completed_at)
SELECT * FROM unnest($1::uuid[], $2::text[], $3::bigint[], $4::text[], $5::text[], $6::text[], $7::text[],
                     $8::text[], $9::text[], $10::timestamptz[], $11::timestamptz[])
"""
IMPORT_DELIVERIES = """
INSERT INTO {schema}.deliveries (run_id, delivery_id, step_key, delivered_at)
SELECT * FROM unnest($1::uuid[], $2::text[], $3::text[], $4::timestamptz[])
"""
IMPORT_BUFFERED = """
INSERT INTO {schema}.buffered_signals (run_id, number, signal_name, payload_json, buffered_at)
SELECT * FROM unnest($1::uuid[], $2::bigint[], $3::text[], $4::text[], $5::timestamptz[])
"""
IMPORT_OUTPUTS = """
INSERT INTO {schema}.outputs (run_id, key, value_json)
SELECT * FROM unnest($1::uuid[], $2::text[], $3::text[])
"""
IMPORT_EVENTS = """
INSERT INTO {schema}.events (run_id, sequence, timestamp, event_type, step_key, message, token)
SELECT a.*, gen_random_uuid()
FROM unnest($1::uuid[], $2::bigint[], $3::timestamptz[], $4::text[], $5::text[], $6::text[])
    AS a (run_id, sequence, timestamp, event_type, step_key, message)
"""

Row = tuple[Any, ...]


class Transfer:
    """The contract of these operations is in flowstore_core/transfer.py."""

    _database: Database

    async def export_run(self, *, run_id: UUID) -> RunArchive | None:
        now = self._database.now()
        rows = await self._database.shared_reads.rows(EXPORT_RUNS, run_id)
        return _archive(rows[0], now) if rows else None

    async def import_run(self, *, archive: RunArchive) -> bool:
        imported: bool = await self._database.shared_transactions.run(
            "import_run", archive.run.run_id, archive, _import_runs, size_of=_size_of
        )
        return imported


# Exporting


def _archive(row: Any, virtual_now: datetime | None) -> RunArchive:
    """The archive of a row of EXPORT_RUNS."""
    run = run_record(row)
    run_id, now = run.run_id, virtual_now or row["now"]
    attempts: dict[str, list[FlowStepAttemptRecord]] = {}
    for attempt in row["attempts"]:
        attempts.setdefault(attempt[0], []).append(attempt_record(run_id, attempt))
    steps = (
        step_at_export(_archived_step(run_id, step, tuple(attempts.get(step[0], ()))), now)
        for step in row["steps"]
    )
    return RunArchive(
        run=run,
        control=_archived_control(run_id, row["control"]),
        idempotency_keys=tuple(
            ArchivedKey(
                flow_id=plain_uuid(one[0]), trigger_key=one[1], idempotency_key=one[2], created_at=one[3]
            )
            for one in row["keys"]
        ),
        steps=tuple(step for step in steps if step is not None),
        waiters=tuple(waiter_record(run_id, one) for one in row["waiters"]),
        deliveries=tuple(
            ArchivedDelivery(delivery_id=one[0], step_key=one[1], delivered_at=one[2])
            if one[1] != NO_STEP
            else ArchivedDelivery(delivery_id=one[0])
            for one in row["deliveries"]
        ),
        buffered=tuple(buffered_signal(run_id, one) for one in row["buffered"]),
        outputs=tuple((one[0], one[1]) for one in row["outputs"]),
        events=tuple(event_record(run_id, one) for one in row["events"]),
    )


def _archived_step(run_id: UUID, row: Any, attempts: tuple[FlowStepAttemptRecord, ...]) -> ArchivedStep:
    step_key, status, last_attempt, reopened, rescheduled, started_owner = (row[n] for n in range(6))
    if status is not None and not reopened:
        newest = (step_key, last_attempt, row[6], status, *(row[n] for n in range(7, 13)))
        attempts += (attempt_record(run_id, newest),)
    claim = dispatch = None
    if row[13] is not None:
        claim = StepClaim(
            run_id=run_id,
            step_key=step_key,
            owner=row[14] if row[15] else None,
            claimed_at=row[13],
            expires_at=row[16],
        )
    if row[17] is not None:
        queued = row[20] is not None
        dispatch = StepDispatch(
            run_id=run_id,
            step_key=step_key,
            dispatched_at=row[17],
            due_at=row[18],
            job_id=row[19],
            queue=row[20],
            priority=row[21] if queued else 0,
            step_type=row[22] if queued else None,
            input_json=row[23] if queued else None,
        )
    return ArchivedStep(
        run_id=run_id,
        step_key=step_key,
        status=None if status is None else StepStatus(status),
        reopened=reopened,
        rescheduled=rescheduled,
        started_owner=started_owner,
        attempts=attempts,
        claim=claim,
        dispatch=dispatch,
    )


def _archived_control(run_id: UUID, row: Any) -> ArchivedControl | None:
    if row is None:
        return None
    return ArchivedControl(
        run_id=run_id,
        flow_id=plain_uuid(row[0]),
        trigger_key=row[1],
        idempotency_key=row[2],
        timeout_at=row[3],
        cancel_requested_at=row[4],
        cancel_reason=row[5],
        timed_out_at=row[6],
        timed_out_reason=row[7],
        created_at=row[8],
    )


# Importing


async def _import_runs(transaction: Transaction, archives: Sequence[RunArchive]) -> list[bool | Exception]:
    """Import runs with different ids; the result of each is that of import_run, or its error."""
    run_ids = [archive.run.run_id for archive in archives]
    rows = await transaction.rows(EXPORT_RUNS, run_ids)
    stored = {plain_uuid(row[0]): _archive(row, transaction.now) for row in rows}
    outcomes: list[bool | Exception] = []
    new = []
    for archive in archives:
        run_id = archive.run.run_id
        if run_id not in stored:
            new.append(archive)
            outcomes.append(True)
        elif is_same_run(stored[run_id], archive):
            outcomes.append(False)
        else:
            outcomes.append(RunAlreadyExistsError(run_id))
    if new:
        await _insert_runs(transaction, new, alone=len(archives) == 1)
    return outcomes


async def _insert_runs(transaction: Transaction, archives: Sequence[RunArchive], *, alone: bool) -> None:
    """Insert runs that are not stored; ``alone`` if the transaction is that of one call."""
    run_ids = [archive.run.run_id for archive in archives]
    await transaction.row(LOCK_ORPHANED_KEYS, run_ids)
    await transaction.execute(DELETE_ORPHANED_KEYS, run_ids)
    keys = [row for archive in archives for row in _key_rows(archive)]
    if keys and affected_rows(await _insert(transaction, IMPORT_KEYS, keys)) < len(keys):
        if not alone:
            raise BatchRejectedError
        await _refuse_keys(transaction, archives[0])
    runs = [_run_row(archive) for archive in archives]
    if affected_rows(await _insert(transaction, IMPORT_RUNS, runs)) < len(runs):
        # Started since it was looked up: the next attempt compares it.
        raise _lost_race()
    without = [archive.run.run_id for archive in archives if archive.control is None]
    if without:
        await transaction.execute(DELETE_ORPHANED_CONTROLS, without)
    for statement, rows in (
        (IMPORT_CONTROLS, _control_rows),
        (IMPORT_WAITERS, _waiter_rows),
        (IMPORT_STEPS, _step_rows),
        (IMPORT_ATTEMPTS, _attempt_rows),
        (IMPORT_DELIVERIES, _delivery_rows),
        # After the waiters: an inserted waiter takes a payload.
        (IMPORT_BUFFERED, _buffered_rows),
        (IMPORT_OUTPUTS, _output_rows),
        (IMPORT_EVENTS, _event_rows),
    ):
        if found := [row for archive in archives for row in rows(archive)]:
            await _insert(transaction, statement, found)


async def _insert(transaction: Transaction, statement: str, rows: Sequence[Row]) -> str:
    return await transaction.execute(statement, *map(list, zip(*rows, strict=True)))


async def _refuse_keys(transaction: Transaction, archive: RunArchive) -> NoReturn:
    """Raise the error for keys that are taken; the transaction is rolled back."""
    run_id = archive.run.run_id
    for key in archive.idempotency_keys:
        row = await transaction.row(FIND_HOLDER, key.flow_id, key.trigger_key, key.idempotency_key)
        # The driver's own UUID is unequal to every plain one.
        if row is not None and plain_uuid(row[0]) != run_id:
            message = f"an idempotency key of run {run_id} is registered to another run"
            raise ConflictError(message, run_id=run_id)
    # Registered to this run since the orphans were deleted, or free again.
    raise _lost_race()


def _lost_race() -> RetryableError:
    return RetryableError(StoreUnavailableError("other calls kept changing the run while it was imported"))


def _size_of(archive: RunArchive) -> int:
    """The approximate size of a batch's archive in bytes."""
    texts = [archive.run.trigger_data, *(value for _, value in archive.outputs)]
    for step in archive.steps:
        for one in step.attempts:
            texts += (one.input_json, one.output_json, one.error_message)
        if step.dispatch is not None:
            texts.append(step.dispatch.input_json)
    texts += (waiter.payload_json for waiter in archive.waiters)
    texts += (signal.payload_json for signal in archive.buffered)
    texts += (event.message for event in archive.events)
    return sum(len(text) for text in texts if text is not None)


def _key_rows(archive: RunArchive) -> Iterator[Row]:
    for one in archive.idempotency_keys:
        yield one.flow_id, one.trigger_key, one.idempotency_key, archive.run.run_id, one.created_at


def _run_row(archive: RunArchive) -> Row:
    run = archive.run
    return (
        run.run_id,
        encode_tags(run.tags),
        run.flow_id,
        run.flow_name,
        run.status.value,
        run.trigger_key,
        run.trigger_data,
        run.job_id,
        run.started_at,
        run.completed_at,
        run.source_run_id,
        len(archive.events),
    )


def _control_rows(archive: RunArchive) -> Iterator[Row]:
    if (one := archive.control) is not None:
        yield (
            one.run_id,
            one.flow_id,
            one.trigger_key,
            one.idempotency_key,
            one.timeout_at,
            one.cancel_requested_at,
            one.cancel_reason,
            one.timed_out_at,
            one.timed_out_reason,
            one.created_at,
            archive.run.status.is_terminal,
        )


def _waiter_rows(archive: RunArchive) -> Iterator[Row]:
    for one in archive.waiters:
        yield (
            one.run_id,
            one.step_key,
            one.signal_name,
            one.created_at,
            one.expires_at,
            one.delivered_at,
            one.payload_json,
            one.expired_at,
        )


def _step_rows(archive: RunArchive) -> Iterator[Row]:
    for step in archive.steps:
        yield (*_state_columns(step), *_claim_columns(step.claim), *_dispatch_columns(step.dispatch))


def _state_columns(step: ArchivedStep) -> Row:
    status, newest = step.status, step.attempts[-1] if step.attempts else None
    marks = (step.reopened, step.rescheduled, step.started_owner)
    head = (step.run_id, step.step_key, None if status is None else status.value, len(step.attempts), *marks)
    if newest is None:
        return (*head, *[None] * 8)
    first = step.attempts[0].started_at
    if status is None:
        # A reset step keeps the start of its first attempt.
        return (*head, first, *[None] * 7)
    return (
        *head,
        first,
        newest.started_at,
        newest.completed_at,
        newest.step_type,
        newest.input_json,
        None if step.reopened else newest.output_json,
        None if step.reopened else newest.error_message,
        newest.job_id,
    )


def _claim_columns(claim: StepClaim | None) -> Row:
    if claim is None:
        return (None,) * 4
    is_owned = claim.owner is not None
    return claim.claimed_at, claim.owner if is_owned else new_claim_token(), is_owned, claim.expires_at


def _dispatch_columns(dispatch: StepDispatch | None) -> Row:
    if dispatch is None:
        return (None,) * 7
    is_queued = dispatch.queue is not None
    return (
        dispatch.dispatched_at,
        dispatch.due_at,
        dispatch.job_id,
        dispatch.queue,
        dispatch.priority if is_queued else None,
        dispatch.step_type,
        dispatch.input_json,
    )


def _attempt_rows(archive: RunArchive) -> Iterator[Row]:
    """All attempts that are not in the row of their step."""
    for step in archive.steps:
        in_step = step.status is not None and not step.reopened
        for one in step.attempts[:-1] if in_step else step.attempts:
            yield (
                one.run_id,
                one.step_key,
                one.attempt,
                one.step_type,
                one.status.value,
                one.input_json,
                one.output_json,
                one.error_message,
                one.job_id,
                one.started_at,
                one.completed_at,
            )


def _delivery_rows(archive: RunArchive) -> Iterator[Row]:
    for one in archive.deliveries:
        # No read shows the time at which a payload was buffered.
        delivered_at = one.delivered_at or archive.run.started_at
        yield archive.run.run_id, one.delivery_id, one.step_key or NO_STEP, delivered_at


def _buffered_rows(archive: RunArchive) -> Iterator[Row]:
    for number, one in enumerate(archive.buffered, 1):
        yield one.run_id, number, one.signal_name, one.payload_json, one.buffered_at


def _output_rows(archive: RunArchive) -> Iterator[Row]:
    for key, value in archive.outputs:
        yield archive.run.run_id, key, value


def _event_rows(archive: RunArchive) -> Iterator[Row]:
    for one in archive.events:
        yield one.run_id, one.sequence, one.timestamp, one.event_type, one.step_key, one.message
