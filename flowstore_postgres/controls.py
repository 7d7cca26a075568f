"""Latches, deadlines, idempotency keys and the atomic trigger on PostgreSQL."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from functools import partial
from types import MappingProxyType
from typing import Any
from uuid import UUID, uuid4

import asyncpg

from flowstore_core import (
    FlowRunControlRecord,
    FlowRunRecord,
    FlowStoreError,
    RunAlreadyExistsError,
    StepRequest,
    TriggerResult,
)
from flowstore_core.tags import NO_TAGS, encode_tags
from flowstore_postgres.database import Database
from flowstore_postgres.requests import settle_requests
from flowstore_postgres.runs import FIND_START, RUN_COLUMNS, plain_uuid, run_record, started_run
from flowstore_postgres.transactions import Transaction

log = logging.getLogger("flowstore_postgres")

REPLACE_CONFIGURATION = """
ON CONFLICT (run_id) DO UPDATE SET flow_id = excluded.flow_id, trigger_key = excluded.trigger_key,
    idempotency_key = excluded.idempotency_key, timeout_at = excluded.timeout_at
"""
CONFIGURE_RUN = f"""
INSERT INTO {{schema}}.controls (run_id, flow_id, trigger_key, idempotency_key, timeout_at, created_at)
VALUES ($1, $2, $3, $4, $5, coalesce($6, clock_timestamp())) {REPLACE_CONFIGURATION}
"""
GET_RUN_CONTROL = """
SELECT flow_id, trigger_key, idempotency_key, timeout_at, cancel_requested_at, cancel_reason,
       timed_out_at, timed_out_reason, created_at
FROM {schema}.controls WHERE run_id = $1
"""
GET_RUN_CONTROLS = """
SELECT flow_id, trigger_key, idempotency_key, timeout_at, cancel_requested_at, cancel_reason,
       timed_out_at, timed_out_reason, created_at, run_id
FROM unnest($1::uuid[]) WITH ORDINALITY AS asked (run_id, n) JOIN {schema}.controls USING (run_id) ORDER BY n
"""

# A shared lock on the run, so that no control record or key is created while the run is being deleted.
SHARE_RUN = "SELECT flow_id, trigger_key FROM {schema}.runs WHERE run_id = $1 FOR SHARE"
ADD_CONTROL = """
INSERT INTO {schema}.controls (run_id, flow_id, trigger_key, created_at)
VALUES ($1, $2, $3, coalesce($4, clock_timestamp())) ON CONFLICT (run_id) DO NOTHING
"""
REQUEST_CANCEL = """
UPDATE {schema}.controls SET cancel_requested_at = coalesce($2, clock_timestamp()), cancel_reason = $3
WHERE run_id = $1 AND cancel_requested_at IS NULL RETURNING run_id
"""
MARK_TIMED_OUT = """
UPDATE {schema}.controls SET timed_out_at = coalesce($2, clock_timestamp()), timed_out_reason = $3
WHERE run_id = $1 AND timed_out_at IS NULL AND ($4::timestamptz IS NULL OR timeout_at <= $4) RETURNING run_id
"""

FIND_RUN_ID = """
SELECT run_id FROM {schema}.idempotency_keys
WHERE flow_id = $1 AND trigger_key = $2 AND idempotency_key = $3
"""
REGISTER_KEY = """
INSERT INTO {schema}.idempotency_keys (flow_id, trigger_key, idempotency_key, run_id, created_at)
VALUES ($1, $2, $3, $4, coalesce($5, clock_timestamp())) ON CONFLICT DO NOTHING
"""
# FOR UPDATE keeps cleanup from sweeping the key of a run that is about to start.
LOCK_KEY = FIND_RUN_ID + " FOR UPDATE"


# Starts a run with its control record and dispatches. ``source`` says from where, and whether, the run is
# inserted. No call has recorded a step or a waiter of the run before, so each step is dispatched as by
# DISPATCH_STEPS. A row of table pending may be left from a deleted run.
def _trigger_sql(*, source: str, registered: str = "", key: str = "NULL", stored: str = "NULL") -> str:
    return f"""
WITH guard AS MATERIALIZED (
    SELECT clock_timestamp() < $1 AS before_deadline, coalesce($2, clock_timestamp()) AS now
), {registered}started AS (
    INSERT INTO {{schema}}.runs (run_id, flow_id, flow_name, status, trigger_key, trigger_data, job_id,
                                 source_run_id, start_token, tags, started_at)
    SELECT $3, $4, $5, 'Running', $6, $7, $8, $9, $10, $18::jsonb, now {source}
    RETURNING run_id, started_at
), configured AS (
    INSERT INTO {{schema}}.controls (run_id, flow_id, trigger_key, idempotency_key, timeout_at, created_at)
    SELECT run_id, $4, $6, {key}, $11, started_at FROM started {REPLACE_CONFIGURATION}
), dispatched AS (
    INSERT INTO {{schema}}.steps (run_id, step_key, dispatched_at, due_at, dispatch_queue, dispatch_priority,
                                  dispatch_step_type, dispatch_input_json, pending_writes, stall_noted)
    SELECT run_id, step_key, started_at, due_at, queue, priority, step_type, input_json, 1, false
    FROM started, unnest($12::text[], $13::timestamptz[], $14::text[], $15::smallint[], $16::text[],
                         $17::text[]) AS a (step_key, due_at, queue, priority, step_type, input_json)
    RETURNING run_id, step_key, dispatch_queue, dispatch_priority, coalesce(due_at, dispatched_at) AS ready_at
), queued AS (
    INSERT INTO {{schema}}.pending (run_id, step_key, queue, priority, ready_at, late)
    SELECT run_id, step_key, dispatch_queue, dispatch_priority, ready_at,
           ready_at < clock_timestamp() - interval '1 second'
    FROM dispatched
    ON CONFLICT (run_id, step_key) DO UPDATE
        SET queue = excluded.queue, priority = excluded.priority, ready_at = excluded.ready_at,
            late = excluded.late
)
SELECT guard.before_deadline, started.started_at, {stored} AS stored FROM guard LEFT JOIN started ON true
"""


# trigger_run without idempotency_key.
TRIGGER_RUN = _trigger_sql(source="FROM guard WHERE before_deadline\n    ON CONFLICT (run_id) DO NOTHING")
# The fast path of trigger_run with idempotency_key. It registers a new key and starts its run, or reads the
# stored run of a key. It changes nothing if the run_id is stored; if another call stores it at the same time,
# the statement fails.
TRIGGER_RUN_WITH_KEY = _trigger_sql(
    registered="""registered AS (
    INSERT INTO {schema}.idempotency_keys (flow_id, trigger_key, idempotency_key, run_id, created_at)
    SELECT $4, $6, $19, $3, now FROM guard
    WHERE before_deadline AND NOT EXISTS (SELECT FROM {schema}.runs WHERE run_id = $3)
    ON CONFLICT DO NOTHING RETURNING true
), """,
    source="FROM guard, registered",
    key="$19",
    stored=f"""(
    SELECT ROW({RUN_COLUMNS}) FROM {{schema}}.idempotency_keys k JOIN {{schema}}.runs r USING (run_id)
    WHERE k.flow_id = $4 AND k.trigger_key = $6 AND k.idempotency_key = $19
)""",
)
# The slow path: the key has no stored run, or the run_id is stored. It locks the key in the transaction.
READ_RUN = f"SELECT {RUN_COLUMNS} FROM {{schema}}.runs r WHERE r.run_id = $1"
CREATE_RUN = f"""
INSERT INTO {{schema}}.runs AS r (run_id, flow_id, flow_name, status, trigger_key, trigger_data, job_id,
                                  source_run_id, start_token, tags, started_at)
VALUES ($1, $2, $3, 'Running', $4, $5, $6, $7, gen_random_uuid(), $9::jsonb, coalesce($8, clock_timestamp()))
ON CONFLICT (run_id) DO NOTHING RETURNING {RUN_COLUMNS}
"""

# Reads up to $4 records of each index of migration 9. "ended" are the ended runs among them, and "more" is
# true if runs to stop may follow these records. IS TRUE keeps the planner from an index of Running runs, and
# OFFSET 0 from reading all runs where it expects few.
GET_RUNS_TO_STOP = f"""
WITH clock AS MATERIALIZED (
    SELECT coalesce($1, $2, clock_timestamp()) AS as_of
), entry AS MATERIALIZED (
    SELECT 'deadline' AS index, c.* FROM clock, LATERAL (
        SELECT run_id, timeout_at FROM {{schema}}.controls c
        WHERE c.timeout_at <= as_of AND NOT c.ended ORDER BY c.timeout_at, c.run_id LIMIT $4
    ) c
    UNION ALL
    SELECT 'latch', c.* FROM (
        SELECT run_id, timeout_at FROM {{schema}}.controls c
        WHERE (c.cancel_requested_at IS NOT NULL OR c.timed_out_at IS NOT NULL) AND NOT c.ended
        ORDER BY c.timeout_at, c.run_id LIMIT $4
    ) c
), found AS MATERIALIZED (
    SELECT e.index, e.run_id, (r.status = 'Running') AS open
    FROM entry e LEFT JOIN LATERAL (
        SELECT status FROM {{schema}}.runs WHERE run_id = e.run_id OFFSET 0
    ) r ON true
)
SELECT ARRAY(
    SELECT ROW({RUN_COLUMNS})
    FROM (SELECT DISTINCT run_id, timeout_at FROM entry) c, LATERAL (
        SELECT * FROM {{schema}}.runs r WHERE run_id = c.run_id AND (status = 'Running') IS TRUE OFFSET 0
    ) r
    ORDER BY c.timeout_at NULLS LAST, r.run_id LIMIT $3
) AS runs, ARRAY(SELECT DISTINCT run_id FROM found WHERE NOT open) AS ended, EXISTS (
    SELECT FROM found GROUP BY index HAVING count(*) = $4 AND count(*) FILTER (WHERE open) < $3
) AS more
"""
LOOKAHEAD = 100
"""The number of records beyond ``take`` that get_runs_to_stop reads of each index at first."""
MARKS_PER_TRANSACTION = 1_000
# The lock of the run keeps retry_step from reopening it, which resets the mark. Nothing waits for a lock; a
# later call marks the records of locked rows.
LOCK_ENDED_RUNS = """
SELECT r.run_id FROM {schema}.runs r JOIN {schema}.controls c ON c.run_id = r.run_id
WHERE r.run_id = ANY($1::uuid[]) AND r.status <> 'Running' ORDER BY r.run_id
FOR SHARE OF r SKIP LOCKED FOR NO KEY UPDATE OF c SKIP LOCKED
"""
MARK_ENDED = "UPDATE {schema}.controls SET ended = true WHERE run_id = ANY($1::uuid[]) AND NOT ended"
EXTEND_DEADLINE = """
UPDATE {schema}.controls SET timeout_at = $2, timed_out_at = NULL, timed_out_reason = NULL
WHERE run_id = $1 RETURNING run_id
"""


class Controls:
    """The contract of these operations is in flowstore_core/controls.py."""

    _database: Database

    async def configure_run(
        self,
        *,
        run_id: UUID,
        flow_id: UUID,
        trigger_key: str,
        idempotency_key: str | None,
        timeout_at: datetime | None,
    ) -> None:
        async def work(transaction: Transaction) -> None:
            # The run may not exist yet. If it does, the lock serializes this with cleanup.
            await transaction.row(SHARE_RUN, run_id)
            await transaction.execute(
                CONFIGURE_RUN, run_id, flow_id, trigger_key, idempotency_key, timeout_at, transaction.now
            )

        await self._database.transaction("configure_run", work)

    async def get_run_control(self, *, run_id: UUID) -> FlowRunControlRecord | None:
        row = await self._database.read_row(GET_RUN_CONTROL, run_id)
        return None if row is None else _control_record(run_id, row)

    async def get_run_controls(self, *, run_ids: Collection[UUID]) -> Mapping[UUID, FlowRunControlRecord]:
        rows = await self._database.read(GET_RUN_CONTROLS, run_ids)
        found = [(plain_uuid(row["run_id"]), row) for row in rows]
        return MappingProxyType({run_id: _control_record(run_id, row) for run_id, row in found})

    async def request_cancel(self, *, run_id: UUID, reason: str | None) -> bool:
        async def work(transaction: Transaction) -> bool:
            # The run is looked up afterwards: the statement may have waited for an import that replaced a
            # control record without a run.
            if await transaction.row(REQUEST_CANCEL, run_id, transaction.now, reason) is not None:
                return True
            run = await transaction.row(SHARE_RUN, run_id)
            if run is None:
                return False
            await transaction.execute(ADD_CONTROL, run_id, run[0], run[1], transaction.now)
            return await transaction.row(REQUEST_CANCEL, run_id, transaction.now, reason) is not None

        return await self._database.transaction("request_cancel", work)

    async def mark_timed_out(self, *, run_id: UUID, reason: str | None, as_of: datetime | None) -> bool:
        async def work(transaction: Transaction) -> bool:
            row = await transaction.row(MARK_TIMED_OUT, run_id, transaction.now, reason, as_of)
            return row is not None

        return await self._database.transaction("mark_timed_out", work)

    async def find_run_id_by_idempotency_key(
        self, *, flow_id: UUID, trigger_key: str, idempotency_key: str
    ) -> UUID | None:
        row = await self._database.read_row(FIND_RUN_ID, flow_id, trigger_key, idempotency_key)
        return None if row is None else plain_uuid(row[0])

    async def try_register_idempotency_key(
        self, *, flow_id: UUID, trigger_key: str, idempotency_key: str, run_id: UUID
    ) -> bool:
        async def work(transaction: Transaction) -> bool:
            key_run_id, existed = await _register(transaction, flow_id, trigger_key, idempotency_key, run_id)
            if not existed:
                # After the key, as cleanup locks them.
                await transaction.row(SHARE_RUN, run_id)
            return key_run_id == run_id

        return await self._database.transaction("try_register_idempotency_key", work)

    async def trigger_run(
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
        idempotency_key: str | None,
        timeout_at: datetime | None,
        dispatch: Sequence[StepRequest] = (),
    ) -> TriggerResult:
        ordered = tuple(tags.items()) if tags else ()
        token = uuid4()
        arguments = (
            run_id,
            flow_id,
            flow_name,
            trigger_key,
            trigger_data,
            job_id,
            source_run_id,
            token,
            timeout_at,
            [request.step_key for request in dispatch],
            [request.due_at for request in dispatch],
            [request.queue for request in dispatch],
            [request.priority for request in dispatch],
            [request.step_type for request in dispatch],
            [request.input_json for request in dispatch],
            encode_tags(ordered),
        )
        statement = partial(self._database.statement, "trigger_run", probe=(FIND_START, run_id, token))
        new_run = partial(
            started_run,
            run_id=run_id,
            flow_id=flow_id,
            flow_name=flow_name,
            trigger_key=trigger_key,
            trigger_data=trigger_data,
            job_id=job_id,
            source_run_id=source_run_id,
            tags=ordered,
        )
        if idempotency_key is None:
            return TriggerResult(run=new_run(await statement(TRIGGER_RUN, *arguments)), created=True)
        try:
            row = await statement(TRIGGER_RUN_WITH_KEY, *arguments, idempotency_key)
        except FlowStoreError as error:
            if error.database_code != asyncpg.UniqueViolationError.sqlstate:
                raise
        else:
            if row["started_at"] is not None:
                return TriggerResult(run=new_run(row), created=True)
            if row["stored"] is not None:
                return TriggerResult(run=run_record(row["stored"]), created=False)

        async def work(transaction: Transaction) -> TriggerResult:
            key_run_id, existed = await _register(transaction, flow_id, trigger_key, idempotency_key, run_id)
            row = await transaction.row(
                CREATE_RUN,
                key_run_id,
                flow_id,
                flow_name,
                trigger_key,
                trigger_data,
                job_id,
                source_run_id,
                transaction.now,
                encode_tags(ordered),
            )
            if row is None and existed:
                found = await transaction.row(READ_RUN, key_run_id)
                return TriggerResult(run=run_record(found), created=False)
            if row is None:
                raise RunAlreadyExistsError(run_id)
            await transaction.execute(
                CONFIGURE_RUN, key_run_id, flow_id, trigger_key, idempotency_key, timeout_at, transaction.now
            )
            run = run_record(row)
            await settle_requests(transaction, run.run_id, dispatch, run.started_at)
            return TriggerResult(run=run, created=True)

        return await self._database.transaction("trigger_run", work)

    async def get_runs_to_stop(self, *, as_of: datetime | None, take: int) -> Sequence[FlowRunRecord]:
        now, lookahead = self._database.now(), take + LOOKAHEAD
        while True:
            [found] = await self._database.read_by_index(GET_RUNS_TO_STOP, as_of, now, take, lookahead)
            await self._mark_ended(sorted(found["ended"]))
            if not found["more"]:
                return tuple(run_record(row) for row in found["runs"])
            lookahead *= 2

    async def _mark_ended(self, run_ids: Sequence[UUID]) -> None:
        """Remove the control records of ended runs from the indexes of get_runs_to_stop."""

        async def work(transaction: Transaction, batch: Sequence[UUID]) -> None:
            ended = [row[0] for row in await transaction.rows(LOCK_ENDED_RUNS, batch)]
            await transaction.execute(MARK_ENDED, ended)

        try:
            for start in range(0, len(run_ids), MARKS_PER_TRANSACTION):
                batch = run_ids[start : start + MARKS_PER_TRANSACTION]
                await self._database.transaction("get_runs_to_stop", partial(work, batch=batch))
        except FlowStoreError as error:
            # The next call finds them again.
            log.info("get_runs_to_stop: control records of ended runs were not marked: %s", error)

    async def extend_deadline(self, *, run_id: UUID, timeout_at: datetime) -> bool:
        async def work(transaction: Transaction) -> bool:
            return await transaction.row(EXTEND_DEADLINE, run_id, timeout_at) is not None

        return await self._database.transaction("extend_deadline", work)


async def _register(
    transaction: Transaction, flow_id: UUID, trigger_key: str, idempotency_key: str, run_id: UUID
) -> tuple[UUID, bool]:
    """Register a key, or lock its row. Returns the run id of the key, and whether the key existed before."""
    scope = (flow_id, trigger_key, idempotency_key)
    while True:
        tag = await transaction.execute(REGISTER_KEY, *scope, run_id, transaction.now)
        if tag == "INSERT 0 1":
            return run_id, False
        row = await transaction.row(LOCK_KEY, *scope)
        if row is not None:
            return plain_uuid(row[0]), True
        # Cleanup deleted the key in between, so the next try registers it.


def _control_record(run_id: UUID, row: Any) -> FlowRunControlRecord:
    by_user = row["cancel_requested_at"] is not None
    return FlowRunControlRecord(
        run_id=run_id,
        flow_id=plain_uuid(row["flow_id"]),
        trigger_key=row["trigger_key"],
        idempotency_key=row["idempotency_key"],
        timeout_at=row["timeout_at"],
        cancel_requested=by_user or row["timed_out_at"] is not None,
        cancel_reason=row["cancel_reason"] if by_user else row["timed_out_reason"],
        cancel_requested_at=row["cancel_requested_at"] if by_user else row["timed_out_at"],
        timed_out_at=row["timed_out_at"],
        created_at=row["created_at"],
    )
