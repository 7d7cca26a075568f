"""Signals in SQLite: waiters, deliveries and buffered signals."""

from __future__ import annotations

import sqlite3
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
from flowstore_sqlite.codecs import from_optional_us, from_us, to_optional_us
from flowstore_sqlite.database import Database
from flowstore_sqlite.runs import read_run_status

# A trigger of migration 8 delivers the oldest buffered payload of the name to the waiter.
REGISTER_WAITER = """
INSERT INTO waiters (run_id, step_key, signal_name, expires_at, created_at) VALUES (?, ?, ?, ?, ?)
ON CONFLICT (run_id, step_key) DO UPDATE SET
    signal_name = excluded.signal_name, expires_at = excluded.expires_at
"""

# To a waiter that took a payload under another name: its trigger does not know the store's time.
SET_DELIVERED_AT = """
UPDATE waiters SET delivered_at = ? WHERE run_id = ? AND step_key = ? AND delivered_at IS NOT NULL
"""

FIND_DELIVERY = "SELECT step_key, delivered_at FROM deliveries WHERE run_id = ? AND delivery_id = ?"
FIND_OPEN_WAITER = """
SELECT step_key FROM waiters JOIN runs USING (run_id)
WHERE run_id = ? AND status = 'Running' AND signal_name = ? AND delivered_at IS NULL AND expired_at IS NULL
ORDER BY created_at, step_key LIMIT 1
"""
FIND_DELIVERED_WAITER = """
SELECT step_key, delivered_at FROM waiters
WHERE run_id = ? AND signal_name = ? AND delivered_at IS NOT NULL
ORDER BY created_at, step_key LIMIT 1
"""
DELIVER_SIGNAL = """
UPDATE waiters SET delivered_at = ?, payload_json = ? WHERE run_id = ? AND step_key = ?
"""
RECORD_DELIVERY = """
INSERT INTO deliveries (run_id, delivery_id, step_key, delivered_at) VALUES (?, ?, ?, ?)
"""
COUNT_BUFFERED = "SELECT COUNT(*) FROM buffered_signals WHERE run_id = ?"
BUFFER_SIGNAL = """
INSERT INTO buffered_signals (run_id, signal_name, payload_json, buffered_at) VALUES (?, ?, ?, ?)
"""
NO_STEP = ""
"""The step_key of a remembered delivery whose payload was buffered."""
GET_BUFFERED_SIGNALS = """
SELECT signal_name, payload_json, buffered_at FROM buffered_signals WHERE run_id = ? ORDER BY number
"""

SELECT_WAITERS = """
SELECT step_key, signal_name, created_at, expires_at, delivered_at, payload_json, expired_at
FROM waiters
"""
GET_WAITER = SELECT_WAITERS + "WHERE run_id = ? AND step_key = ?"
GET_WAITERS = SELECT_WAITERS + "WHERE run_id = ? ORDER BY step_key"

REMOVE_WAITER = "DELETE FROM waiters WHERE run_id = ? AND step_key = ?"

EXPIRE_WAITER = """
UPDATE waiters SET expired_at = :now
WHERE run_id = :run_id AND step_key = :step_key AND delivered_at IS NULL AND expired_at IS NULL
    AND expires_at <= :now
"""

NOT_FOUND = SignalDeliveryResult(status=SignalDeliveryStatus.NOT_FOUND, step_key=None, delivered_at=None)
BUFFERED = SignalDeliveryResult(status=SignalDeliveryStatus.BUFFERED, step_key=None, delivered_at=None)


class Signals:
    """See flowstore_core.signals for the contract."""

    _database: Database

    async def register_waiter(
        self, run_id: UUID, step_key: str, signal_name: str, *, expires_at: datetime | None
    ) -> None:
        def register(db: sqlite3.Connection, now: int) -> None:
            if read_run_status(db, run_id) is None:
                raise RunNotFoundError(run_id)
            waiter = _read_waiter(db, run_id, step_key)
            if waiter is not None and waiter.expired_at is not None:
                raise _conflict(run_id, step_key, "has expired")
            if waiter is not None and waiter.delivered_at is not None and waiter.signal_name != signal_name:
                raise _conflict(run_id, step_key, "was delivered under another signal name")
            row = (run_id.bytes, step_key, signal_name, to_optional_us(expires_at), now)
            db.execute(REGISTER_WAITER, row)
            if waiter is not None and waiter.delivered_at is None:
                db.execute(SET_DELIVERED_AT, (now, run_id.bytes, step_key))

        await self._database.write(register)

    async def deliver_signal(
        self,
        run_id: UUID,
        signal_name: str,
        payload_json: str,
        *,
        delivery_id: str | None,
        buffer: bool = False,
    ) -> SignalDeliveryResult:
        def deliver(db: sqlite3.Connection, now: int) -> SignalDeliveryResult:
            if delivery_id is not None:
                found = db.execute(FIND_DELIVERY, (run_id.bytes, delivery_id)).fetchone()
                if found is not None:
                    return BUFFERED if found[0] == NO_STEP else _to_result(_DELIVERED, *found)
            found = db.execute(FIND_OPEN_WAITER, (run_id.bytes, signal_name)).fetchone()
            if found is not None:
                (step_key,) = found
                db.execute(DELIVER_SIGNAL, (now, payload_json, run_id.bytes, step_key))
                result = _to_result(_DELIVERED, step_key, now)
            elif buffer and read_run_status(db, run_id) == RunStatus.RUNNING:
                if db.execute(COUNT_BUFFERED, (run_id.bytes,)).fetchone()[0] >= MAX_BUFFERED_SIGNALS:
                    raise buffer_is_full(run_id)
                db.execute(BUFFER_SIGNAL, (run_id.bytes, signal_name, payload_json, now))
                step_key, result = NO_STEP, BUFFERED
            else:
                found = db.execute(FIND_DELIVERED_WAITER, (run_id.bytes, signal_name)).fetchone()
                return NOT_FOUND if found is None else _to_result(_ALREADY, *found)
            if delivery_id is not None:
                db.execute(RECORD_DELIVERY, (run_id.bytes, delivery_id, step_key, now))
            return result

        return await self._database.write(deliver)

    async def get_waiter(self, run_id: UUID, step_key: str) -> FlowSignalWaiter | None:
        return await self._database.read(lambda db: _read_waiter(db, run_id, step_key))

    async def remove_waiter(self, run_id: UUID, step_key: str) -> FlowSignalWaiter | None:
        def remove(db: sqlite3.Connection, now: int) -> FlowSignalWaiter | None:
            waiter = _read_waiter(db, run_id, step_key)
            db.execute(REMOVE_WAITER, (run_id.bytes, step_key))
            return waiter

        return await self._database.write(remove)

    async def expire_waiter(self, run_id: UUID, step_key: str) -> FlowSignalWaiter | None:
        def expire(db: sqlite3.Connection, now: int) -> FlowSignalWaiter | None:
            db.execute(EXPIRE_WAITER, {"run_id": run_id.bytes, "step_key": step_key, "now": now})
            return _read_waiter(db, run_id, step_key)

        return await self._database.write(expire)

    async def get_waiters(self, run_id: UUID) -> tuple[FlowSignalWaiter, ...]:
        rows = await self._database.read(lambda db: db.execute(GET_WAITERS, (run_id.bytes,)).fetchall())
        return tuple(to_waiter(run_id, row) for row in rows)

    async def get_buffered_signals(self, run_id: UUID) -> tuple[BufferedSignal, ...]:
        rows = await self._database.read(
            lambda db: db.execute(GET_BUFFERED_SIGNALS, (run_id.bytes,)).fetchall()
        )
        return tuple(to_buffered(run_id, row) for row in rows)


def to_buffered(run_id: UUID, row: tuple[Any, ...]) -> BufferedSignal:
    name, payload, buffered_at = row
    return BufferedSignal(
        run_id=run_id, signal_name=name, payload_json=payload, buffered_at=from_us(buffered_at)
    )


_DELIVERED = SignalDeliveryStatus.DELIVERED
_ALREADY = SignalDeliveryStatus.ALREADY_DELIVERED


def _conflict(run_id: UUID, step_key: str, why: str) -> ConflictError:
    message = f"the waiter of step {step_key!r} of run {run_id} {why}; remove it first"
    return ConflictError(message, run_id=run_id, step_key=step_key)


def _to_result(status: SignalDeliveryStatus, step_key: str, delivered_at: int) -> SignalDeliveryResult:
    return SignalDeliveryResult(status=status, step_key=step_key, delivered_at=from_us(delivered_at))


def _read_waiter(db: sqlite3.Connection, run_id: UUID, step_key: str) -> FlowSignalWaiter | None:
    row = db.execute(GET_WAITER, (run_id.bytes, step_key)).fetchone()
    return None if row is None else to_waiter(run_id, row)


def to_waiter(run_id: UUID, row: tuple[Any, ...]) -> FlowSignalWaiter:
    step_key, signal_name, created_at, expires_at, delivered_at, payload_json, expired_at = row
    return FlowSignalWaiter(
        run_id=run_id,
        step_key=step_key,
        signal_name=signal_name,
        created_at=from_us(created_at),
        expires_at=from_optional_us(expires_at),
        delivered_at=from_optional_us(delivered_at),
        payload_json=payload_json,
        expired_at=from_optional_us(expired_at),
    )
