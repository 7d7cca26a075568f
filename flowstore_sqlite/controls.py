"""Run control in SQLite: latches, deadlines, idempotency keys and the atomic trigger."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from functools import partial
from types import MappingProxyType
from uuid import UUID

from flowstore_core import (
    FlowRunControlRecord,
    FlowRunRecord,
    RunAlreadyExistsError,
    StepRequest,
    TriggerResult,
)
from flowstore_core.tags import NO_TAGS
from flowstore_sqlite.codecs import from_optional_us, from_us, to_optional_us, to_us
from flowstore_sqlite.database import Database
from flowstore_sqlite.requests import settle_requests
from flowstore_sqlite.runs import insert_run, new_run, read_run, to_run

CONFIGURE_RUN = """
INSERT INTO controls (run_id, flow_id, trigger_key, idempotency_key, timeout_at, created_at)
VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT (run_id) DO UPDATE SET
    flow_id = excluded.flow_id, trigger_key = excluded.trigger_key,
    idempotency_key = excluded.idempotency_key, timeout_at = excluded.timeout_at
"""

GET_RUN_CONTROL = """
SELECT flow_id, trigger_key, idempotency_key, timeout_at, cancelled_at, cancel_reason, timed_out_at,
    timed_out_reason, created_at
FROM controls WHERE run_id = ?
"""

CONTROL_CANCELLED_RUN = """
INSERT INTO controls (run_id, flow_id, trigger_key, created_at)
SELECT run_id, flow_id, trigger_key, ? FROM runs WHERE run_id = ?
ON CONFLICT (run_id) DO NOTHING
"""
REQUEST_CANCEL = """
UPDATE controls SET cancelled_at = ?, cancel_reason = ? WHERE run_id = ? AND cancelled_at IS NULL
"""

MARK_TIMED_OUT = """
UPDATE controls SET timed_out_at = :now, timed_out_reason = :reason
WHERE run_id = :run_id AND timed_out_at IS NULL AND (:as_of IS NULL OR timeout_at <= :as_of)
"""

# CROSS JOIN fixes the join order: from the controls, in the order of an index of migration 6, to their runs.
RUNS_OF_CONTROLS = """
SELECT runs.run_id, runs.flow_id, flow_name, status, runs.trigger_key, trigger_data, job_id, started_at,
    completed_at, source_run_id, tags, timeout_at
FROM controls CROSS JOIN runs ON runs.run_id = controls.run_id
"""
GET_RUNS_TO_STOP = """
SELECT * FROM (
    {runs_of_controls}
    WHERE ended = 0 AND timeout_at <= :as_of AND status = 'Running'
    ORDER BY timeout_at, controls.run_id
    LIMIT :take
)
UNION
SELECT * FROM (
    {runs_of_controls}
    WHERE ended = 0 AND (cancelled_at IS NOT NULL OR timed_out_at IS NOT NULL) AND status = 'Running'
    ORDER BY timeout_at IS NULL, timeout_at, controls.run_id
    LIMIT :take
)
ORDER BY timeout_at NULLS LAST, run_id
LIMIT :take
""".replace("{runs_of_controls}", RUNS_OF_CONTROLS.strip())

EXTEND_DEADLINE = """
UPDATE controls SET timeout_at = ?, timed_out_at = NULL, timed_out_reason = NULL WHERE run_id = ?
"""

FIND_RUN_ID_BY_IDEMPOTENCY_KEY = """
SELECT run_id FROM idempotency_keys WHERE flow_id = ? AND trigger_key = ? AND idempotency_key = ?
"""

TRY_REGISTER_IDEMPOTENCY_KEY = """
INSERT INTO idempotency_keys (flow_id, trigger_key, idempotency_key, run_id, created_at)
VALUES (?, ?, ?, ?, ?)
ON CONFLICT (flow_id, trigger_key, idempotency_key) DO NOTHING
"""


class Controls:
    """See flowstore_core.controls for the contract."""

    _database: Database

    async def configure_run(
        self,
        run_id: UUID,
        flow_id: UUID,
        trigger_key: str,
        *,
        idempotency_key: str | None,
        timeout_at: datetime | None,
    ) -> None:
        timeout = to_optional_us(timeout_at)
        await self._database.write(
            lambda db, now: _configure_run(db, run_id, flow_id, trigger_key, idempotency_key, timeout, now)
        )

    async def get_run_control(self, run_id: UUID) -> FlowRunControlRecord | None:
        return await self._database.read(partial(_read_control, run_id))

    async def get_run_controls(self, run_ids: Collection[UUID]) -> Mapping[UUID, FlowRunControlRecord]:
        def controls(db: sqlite3.Connection) -> Mapping[UUID, FlowRunControlRecord]:
            found = {run_id: _read_control(run_id, db) for run_id in run_ids}
            return MappingProxyType({run_id: one for run_id, one in found.items() if one is not None})

        return await self._database.read(controls)

    async def request_cancel(self, run_id: UUID, reason: str | None) -> bool:
        def cancel(db: sqlite3.Connection, now: int) -> bool:
            db.execute(CONTROL_CANCELLED_RUN, (now, run_id.bytes))
            return db.execute(REQUEST_CANCEL, (now, reason, run_id.bytes)).rowcount == 1

        return await self._database.write(cancel)

    async def mark_timed_out(self, run_id: UUID, reason: str | None, *, as_of: datetime | None) -> bool:
        def latch(db: sqlite3.Connection, now: int) -> bool:
            row = {"run_id": run_id.bytes, "reason": reason, "as_of": to_optional_us(as_of), "now": now}
            return db.execute(MARK_TIMED_OUT, row).rowcount == 1

        return await self._database.write(latch)

    async def get_runs_to_stop(self, *, as_of: datetime | None, take: int) -> tuple[FlowRunRecord, ...]:
        def stop(db: sqlite3.Connection) -> tuple[FlowRunRecord, ...]:
            at = self._database.now() if as_of is None else to_us(as_of)
            return tuple(to_run(row) for row in db.execute(GET_RUNS_TO_STOP, {"as_of": at, "take": take}))

        return await self._database.read(stop)

    async def extend_deadline(self, run_id: UUID, timeout_at: datetime) -> bool:
        row = (to_us(timeout_at), run_id.bytes)
        return await self._database.write(lambda db, now: db.execute(EXTEND_DEADLINE, row).rowcount == 1)

    async def find_run_id_by_idempotency_key(
        self, flow_id: UUID, trigger_key: str, idempotency_key: str
    ) -> UUID | None:
        return await self._database.read(lambda db: _find_run_id(db, flow_id, trigger_key, idempotency_key))

    async def try_register_idempotency_key(
        self, flow_id: UUID, trigger_key: str, idempotency_key: str, run_id: UUID
    ) -> bool:
        def register(db: sqlite3.Connection, now: int) -> bool:
            row = (flow_id.bytes, trigger_key, idempotency_key, run_id.bytes, now)
            if db.execute(TRY_REGISTER_IDEMPOTENCY_KEY, row).rowcount == 1:
                return True
            return _find_run_id(db, flow_id, trigger_key, idempotency_key) == run_id

        return await self._database.write(register)

    async def trigger_run(
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
        idempotency_key: str | None,
        timeout_at: datetime | None,
        dispatch: Sequence[StepRequest] = (),
    ) -> TriggerResult:
        timeout = to_optional_us(timeout_at)

        def trigger(db: sqlite3.Connection, now: int) -> TriggerResult:
            chosen = run_id
            if idempotency_key is not None:
                row = (flow_id.bytes, trigger_key, idempotency_key, run_id.bytes, now)
                if db.execute(TRY_REGISTER_IDEMPOTENCY_KEY, row).rowcount == 0:
                    found = _find_run_id(db, flow_id, trigger_key, idempotency_key)
                    assert found is not None
                    chosen = found
                    if (existing := read_run(db, chosen)) is not None:
                        return TriggerResult(run=existing, created=False)
            run = new_run(
                flow_id,
                flow_name,
                chosen,
                trigger_key,
                trigger_data,
                job_id,
                source_run_id,
                tags,
                from_us(now),
            )
            if not insert_run(db, run, now):
                # The error rolls the idempotency key back.
                raise RunAlreadyExistsError(chosen)
            _configure_run(db, chosen, flow_id, trigger_key, idempotency_key, timeout, now)
            settle_requests(db, chosen, dispatch, now)
            return TriggerResult(run=run, created=True)

        return await self._database.write(trigger)


def _configure_run(
    db: sqlite3.Connection,
    run_id: UUID,
    flow_id: UUID,
    trigger_key: str,
    idempotency_key: str | None,
    timeout: int | None,
    now: int,
) -> None:
    row = (run_id.bytes, flow_id.bytes, trigger_key, idempotency_key, timeout, now)
    db.execute(CONFIGURE_RUN, row)


def _find_run_id(
    db: sqlite3.Connection, flow_id: UUID, trigger_key: str, idempotency_key: str
) -> UUID | None:
    row = (flow_id.bytes, trigger_key, idempotency_key)
    found = db.execute(FIND_RUN_ID_BY_IDEMPOTENCY_KEY, row).fetchone()
    return None if found is None else UUID(bytes=found[0])


def _read_control(run_id: UUID, db: sqlite3.Connection) -> FlowRunControlRecord | None:
    row = db.execute(GET_RUN_CONTROL, (run_id.bytes,)).fetchone()
    if row is None:
        return None
    flow_id, trigger_key, idempotency_key, timeout_at, *latches, created_at = row
    cancelled_at, cancel_reason, timed_out_at, timed_out_reason = latches
    # The latch of the user takes precedence over that of the timeout.
    is_cancelled = cancelled_at is not None
    return FlowRunControlRecord(
        run_id=run_id,
        flow_id=UUID(bytes=flow_id),
        trigger_key=trigger_key,
        idempotency_key=idempotency_key,
        timeout_at=from_optional_us(timeout_at),
        cancel_requested=is_cancelled or timed_out_at is not None,
        cancel_reason=cancel_reason if is_cancelled else timed_out_reason,
        cancel_requested_at=from_optional_us(cancelled_at if is_cancelled else timed_out_at),
        timed_out_at=from_optional_us(timed_out_at),
        created_at=from_us(created_at),
    )
