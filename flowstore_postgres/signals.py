"""Signal waiters, deliveries and buffered signals on PostgreSQL.

Every write locks the run first. Deliveries of one run are therefore serial, and each sees the effect of the
previous one, so none skips a waiter that is locked by another delivery (SIG-3), and a waiter and a payload
that is buffered for it never miss each other (MBX-1). complete_run locks the run too, so the status that is
read with the lock is valid until the delivery commits (RUN-4).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from flowstore_core import (
    BufferedSignal,
    ConflictError,
    FlowSignalWaiter,
    RunNotFoundError,
    RunStatus,
    SignalDeliveryResult,
    SignalDeliveryStatus,
)
from flowstore_core.signals import MAX_BUFFERED_SIGNALS, buffer_is_full
from flowstore_postgres.database import Database
from flowstore_postgres.transactions import Transaction

WAITER_COLUMNS = "step_key, signal_name, created_at, expires_at, delivered_at, payload_json, expired_at"

# Returns the waiter that was there before. Nothing changes if that is expired, or delivered under another
# name. Otherwise a trigger of migration 11 delivers the oldest payload that is buffered under the name to a
# waiter that is undelivered.
REGISTER_WAITER = """
WITH before AS MATERIALIZED (
    SELECT signal_name, delivered_at, expired_at FROM {schema}.waiters WHERE run_id = $1 AND step_key = $2
), registered AS (
    INSERT INTO {schema}.waiters (run_id, step_key, signal_name, expires_at, created_at)
    SELECT $1, $2, $3, $4, coalesce($5, clock_timestamp()) WHERE NOT EXISTS (
        SELECT FROM before WHERE expired_at IS NOT NULL OR (delivered_at IS NOT NULL AND signal_name <> $3))
    ON CONFLICT (run_id, step_key) DO UPDATE
    SET signal_name = excluded.signal_name, expires_at = excluded.expires_at
)
SELECT before.*, EXISTS (
    SELECT FROM {schema}.buffered_signals WHERE run_id = $1 AND signal_name = $3) AS buffered
FROM (SELECT) one LEFT JOIN before ON true
"""
# Only with a virtual clock, which the trigger does not know.
SET_DELIVERED_AT = "UPDATE {schema}.waiters SET delivered_at = $3 WHERE run_id = $1 AND step_key = $2"
# $3: whether the run is Running. Returns the first result of the delivery_id, or the waiter that this call
# delivered to, or else the oldest delivered waiter; no row without any of them.
DELIVER_SIGNAL = """
WITH first AS MATERIALIZED (
    SELECT step_key, delivered_at FROM {schema}.deliveries WHERE run_id = $1 AND delivery_id = $6
), delivered AS (
    UPDATE {schema}.waiters SET delivered_at = coalesce($4, clock_timestamp()), payload_json = $5
    WHERE run_id = $1 AND step_key = (
        SELECT step_key FROM {schema}.waiters
        WHERE $3 AND NOT EXISTS (SELECT FROM first) AND run_id = $1 AND signal_name = $2
          AND delivered_at IS NULL AND expired_at IS NULL
        ORDER BY created_at, step_key LIMIT 1)
    RETURNING step_key, delivered_at
), remembered AS (
    INSERT INTO {schema}.deliveries (run_id, delivery_id, step_key, delivered_at)
    SELECT $1, $6, step_key, delivered_at FROM delivered WHERE $6 IS NOT NULL
)
SELECT 'first' AS found, step_key, delivered_at FROM first
UNION ALL SELECT 'open', step_key, delivered_at FROM delivered
UNION ALL SELECT 'delivered', before.* FROM (
    SELECT step_key, delivered_at FROM {schema}.waiters
    WHERE run_id = $1 AND signal_name = $2 AND delivered_at IS NOT NULL ORDER BY created_at, step_key LIMIT 1
) before
WHERE NOT EXISTS (SELECT FROM first) AND NOT EXISTS (SELECT FROM delivered)
"""
# No row if the run has $6 buffered payloads.
BUFFER_SIGNAL = """
WITH buffered AS (
    INSERT INTO {schema}.buffered_signals (run_id, signal_name, number, payload_json, buffered_at)
    SELECT $1::uuid, $2, coalesce(max(number), 0) + 1, $4, coalesce($3, clock_timestamp())
    FROM {schema}.buffered_signals WHERE run_id = $1 HAVING count(*) < $6
    RETURNING buffered_at
), remembered AS (
    INSERT INTO {schema}.deliveries (run_id, delivery_id, step_key, delivered_at)
    SELECT $1, $5::text, '', buffered_at FROM buffered WHERE $5 IS NOT NULL
)
SELECT FROM buffered
"""
NO_STEP = ""
"""The step_key of a remembered delivery whose payload was buffered."""
GET_BUFFERED_SIGNALS = """
SELECT signal_name, payload_json, buffered_at FROM {schema}.buffered_signals WHERE run_id = $1 ORDER BY number
"""
GET_WAITER = f"SELECT {WAITER_COLUMNS} FROM {{schema}}.waiters WHERE run_id = $1 AND step_key = $2"
GET_WAITERS = f"SELECT {WAITER_COLUMNS} FROM {{schema}}.waiters WHERE run_id = $1 ORDER BY step_key"
REMOVE_WAITER = f"""
DELETE FROM {{schema}}.waiters WHERE run_id = $1 AND step_key = $2 RETURNING {WAITER_COLUMNS}
"""
EXPIRE_WAITER = """
UPDATE {schema}.waiters SET expired_at = coalesce($3, clock_timestamp())
WHERE run_id = $1 AND step_key = $2 AND delivered_at IS NULL AND expired_at IS NULL
  AND expires_at <= coalesce($3, clock_timestamp())
"""


class Signals:
    """The contract of these operations is in flowstore_core/signals.py."""

    _database: Database

    async def register_waiter(
        self, *, run_id: UUID, step_key: str, signal_name: str, expires_at: datetime | None
    ) -> None:
        await self._register_waiter(run_id, step_key, signal_name, expires_at)

    async def _register_waiter(
        self, run_id: UUID, step_key: str, signal_name: str, expires_at: datetime | None
    ) -> bool:
        """Register, and return whether the waiter took a buffered payload."""

        async def work(transaction: Transaction) -> bool:
            if transaction.run_status is None:
                raise RunNotFoundError(run_id)
            row = await transaction.row(
                REGISTER_WAITER, run_id, step_key, signal_name, expires_at, transaction.now
            )
            _check_registrable(run_id, step_key, signal_name, row)
            took = row["buffered"] and row["delivered_at"] is None
            if took and transaction.now is not None:
                await transaction.execute(SET_DELIVERED_AT, run_id, step_key, transaction.now)
            return bool(took)

        return await self._database.transaction("register_waiter", work, lock_run=run_id)

    async def deliver_signal(
        self,
        *,
        run_id: UUID,
        signal_name: str,
        payload_json: str,
        delivery_id: str | None,
        buffer: bool = False,
    ) -> SignalDeliveryResult:
        async def work(transaction: Transaction) -> SignalDeliveryResult:
            if transaction.run_status is None:
                return _result(SignalDeliveryStatus.NOT_FOUND)
            is_running = transaction.run_status is RunStatus.RUNNING
            row = await transaction.row(
                DELIVER_SIGNAL, run_id, signal_name, is_running, transaction.now, payload_json, delivery_id
            )
            found = None if row is None else row["found"]
            if found == "open" or (found == "first" and row["step_key"] != NO_STEP):
                return _result(SignalDeliveryStatus.DELIVERED, row)
            if found != "first":
                if not is_running or not buffer:
                    status = SignalDeliveryStatus.ALREADY_DELIVERED if row else SignalDeliveryStatus.NOT_FOUND
                    return _result(status, row)
                await _buffer(transaction, run_id, signal_name, payload_json, delivery_id)
            return _result(SignalDeliveryStatus.BUFFERED)

        return await self._database.transaction("deliver_signal", work, lock_run=run_id)

    async def get_buffered_signals(self, *, run_id: UUID) -> Sequence[BufferedSignal]:
        rows = await self._database.read(GET_BUFFERED_SIGNALS, run_id)
        return tuple(buffered_signal(run_id, row) for row in rows)

    async def get_waiter(self, *, run_id: UUID, step_key: str) -> FlowSignalWaiter | None:
        row = await self._database.read_row(GET_WAITER, run_id, step_key)
        return None if row is None else waiter_record(run_id, row)

    async def get_waiters(self, *, run_id: UUID) -> Sequence[FlowSignalWaiter]:
        rows = await self._database.read(GET_WAITERS, run_id)
        return tuple(waiter_record(run_id, row) for row in rows)

    async def remove_waiter(self, *, run_id: UUID, step_key: str) -> FlowSignalWaiter | None:
        async def work(transaction: Transaction) -> FlowSignalWaiter | None:
            row = await transaction.row(REMOVE_WAITER, run_id, step_key)
            return None if row is None else waiter_record(run_id, row)

        return await self._database.transaction("remove_waiter", work, lock_run=run_id)

    async def expire_waiter(self, *, run_id: UUID, step_key: str) -> FlowSignalWaiter | None:
        async def work(transaction: Transaction) -> FlowSignalWaiter | None:
            await transaction.execute(EXPIRE_WAITER, run_id, step_key, transaction.now)
            row = await transaction.row(GET_WAITER, run_id, step_key)
            return None if row is None else waiter_record(run_id, row)

        return await self._database.transaction("expire_waiter", work, lock_run=run_id)


async def _buffer(
    transaction: Transaction, run_id: UUID, signal_name: str, payload_json: str, delivery_id: str | None
) -> None:
    row = await transaction.row(
        BUFFER_SIGNAL,
        run_id,
        signal_name,
        transaction.now,
        payload_json,
        delivery_id,
        MAX_BUFFERED_SIGNALS,
    )
    if row is None:
        raise buffer_is_full(run_id)


def _check_registrable(run_id: UUID, step_key: str, signal_name: str, row: Any) -> None:
    if row["expired_at"] is not None:
        message = (
            f"the waiter of step {step_key!r} has expired; call remove_waiter before registering another"
        )
    elif row["delivered_at"] is not None and row["signal_name"] != signal_name:
        message = (
            f"the waiter of step {step_key!r} was delivered under another signal name; "
            "call remove_waiter before registering another"
        )
    else:
        return
    raise ConflictError(message, run_id=run_id, step_key=step_key)


def _result(status: SignalDeliveryStatus, row: Any = None) -> SignalDeliveryResult:
    step_key, delivered_at = (None, None) if row is None else (row["step_key"], row["delivered_at"])
    return SignalDeliveryResult(status=status, step_key=step_key, delivered_at=delivered_at)


def waiter_record(run_id: UUID, row: Any) -> FlowSignalWaiter:
    return FlowSignalWaiter(
        run_id=run_id,
        step_key=row[0],
        signal_name=row[1],
        created_at=row[2],
        expires_at=row[3],
        delivered_at=row[4],
        payload_json=row[5],
        expired_at=row[6],
    )


def buffered_signal(run_id: UUID, row: Any) -> BufferedSignal:
    return BufferedSignal(run_id=run_id, signal_name=row[0], payload_json=row[1], buffered_at=row[2])
