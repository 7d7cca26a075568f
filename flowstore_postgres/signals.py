"""Signal waiters and deliveries on PostgreSQL.

Every write locks the run first. Deliveries of one run are therefore serial, and each sees the effect of the
previous one, so none skips a waiter that is locked by another delivery (SIG-3). complete_run locks
the run too, so the status that is read with the lock is valid until the delivery commits (RUN-4).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from flowstore_core import (
    ConflictError,
    FlowSignalWaiter,
    RunStatus,
    SignalDeliveryResult,
    SignalDeliveryStatus,
)
from flowstore_postgres.database import Database
from flowstore_postgres.runs import LOCK_RUN, lock_run
from flowstore_postgres.transactions import Transaction

WAITER_COLUMNS = "step_key, signal_name, created_at, expires_at, delivered_at, payload_json, expired_at"

REGISTER_WAITER = """
INSERT INTO {schema}.waiters (run_id, step_key, signal_name, expires_at, created_at)
VALUES ($1, $2, $3, $4, coalesce($5, clock_timestamp()))
ON CONFLICT (run_id, step_key) DO UPDATE
    SET signal_name = excluded.signal_name, expires_at = excluded.expires_at
"""
FIND_DELIVERY = (
    "SELECT step_key, delivered_at FROM {schema}.deliveries WHERE run_id = $1 AND delivery_id = $2"
)
DELIVER_SIGNAL = """
UPDATE {schema}.waiters SET delivered_at = coalesce($3, clock_timestamp()), payload_json = $4
WHERE run_id = $1 AND step_key = (
    SELECT step_key FROM {schema}.waiters
    WHERE run_id = $1 AND signal_name = $2 AND delivered_at IS NULL AND expired_at IS NULL
    ORDER BY created_at, step_key LIMIT 1)
RETURNING step_key, delivered_at
"""
REMEMBER_DELIVERY = """
INSERT INTO {schema}.deliveries (run_id, delivery_id, step_key, delivered_at) VALUES ($1, $2, $3, $4)
"""
FIND_DELIVERED = """
SELECT step_key, delivered_at FROM {schema}.waiters
WHERE run_id = $1 AND signal_name = $2 AND delivered_at IS NOT NULL ORDER BY created_at, step_key LIMIT 1
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
        async def work(transaction: Transaction) -> None:
            await lock_run(transaction, run_id)
            row = await transaction.row(GET_WAITER, run_id, step_key)
            if row is not None:
                _check_registrable(run_id, step_key, signal_name, row)
            await transaction.execute(
                REGISTER_WAITER, run_id, step_key, signal_name, expires_at, transaction.now
            )

        await self._database.transaction("register_waiter", work)

    async def deliver_signal(
        self, *, run_id: UUID, signal_name: str, payload_json: str, delivery_id: str | None
    ) -> SignalDeliveryResult:
        async def work(transaction: Transaction) -> SignalDeliveryResult:
            run = await transaction.row(LOCK_RUN, run_id)
            if run is None:
                return _result(SignalDeliveryStatus.NOT_FOUND)
            if delivery_id is not None:
                first = await transaction.row(FIND_DELIVERY, run_id, delivery_id)
                if first is not None:
                    return _result(SignalDeliveryStatus.DELIVERED, first)
            row = None
            if not RunStatus(run[0]).is_terminal:
                row = await transaction.row(
                    DELIVER_SIGNAL, run_id, signal_name, transaction.now, payload_json
                )
            if row is None:
                delivered = await transaction.row(FIND_DELIVERED, run_id, signal_name)
                if delivered is None:
                    return _result(SignalDeliveryStatus.NOT_FOUND)
                return _result(SignalDeliveryStatus.ALREADY_DELIVERED, delivered)
            if delivery_id is not None:
                await transaction.execute(REMEMBER_DELIVERY, run_id, delivery_id, row[0], row[1])
            return _result(SignalDeliveryStatus.DELIVERED, row)

        return await self._database.transaction("deliver_signal", work)

    async def get_waiter(self, *, run_id: UUID, step_key: str) -> FlowSignalWaiter | None:
        row = await self._database.read_row(GET_WAITER, run_id, step_key)
        return None if row is None else waiter_record(run_id, row)

    async def get_waiters(self, *, run_id: UUID) -> Sequence[FlowSignalWaiter]:
        rows = await self._database.read(GET_WAITERS, run_id)
        return tuple(waiter_record(run_id, row) for row in rows)

    async def remove_waiter(self, *, run_id: UUID, step_key: str) -> FlowSignalWaiter | None:
        async def work(transaction: Transaction) -> FlowSignalWaiter | None:
            await transaction.row(LOCK_RUN, run_id)
            row = await transaction.row(REMOVE_WAITER, run_id, step_key)
            return None if row is None else waiter_record(run_id, row)

        return await self._database.transaction("remove_waiter", work)

    async def expire_waiter(self, *, run_id: UUID, step_key: str) -> FlowSignalWaiter | None:
        async def work(transaction: Transaction) -> FlowSignalWaiter | None:
            await transaction.row(LOCK_RUN, run_id)
            await transaction.execute(EXPIRE_WAITER, run_id, step_key, transaction.now)
            row = await transaction.row(GET_WAITER, run_id, step_key)
            return None if row is None else waiter_record(run_id, row)

        return await self._database.transaction("expire_waiter", work)


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
    step_key, delivered_at = (None, None) if row is None else (row[0], row[1])
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
