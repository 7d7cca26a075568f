"""Stalled steps in SQLite (STP-8).

A run has a bound, before which none of its steps stalls. get_stalled_steps reads the runs in the order of
their bounds, those without one first, and reads no further than the steps that are due. It sets the bounds
itself: a run gets one when its steps sleep or have stalled, so a run without has been active lately. Triggers
remove the bound when a step or a waiter of the run changes (migration 9).
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from typing import NamedTuple
from uuid import UUID

from flowstore_core import FlowStoreError, StalledStep, StallReason, StepStatus
from flowstore_sqlite.codecs import from_us, to_us
from flowstore_sqlite.database import Database

log = logging.getLogger("flowstore_sqlite")

LOOKAHEAD = 100
"""The number of runs with a bound that are read beyond ``take``."""
MAX_UNBOUNDED = 10_000
"""The number of runs without a bound that are read at first."""
BOUNDS_PER_WRITE = 100
"""So many bounds are set in one write, which other writers wait for."""
SETTLED_US = 60_000_000
"""A run gets a bound if its steps have stalled, or will not within this time."""
NEVER = 2**63 - 1

# NULL while no time makes the step stall. -9223372036854775808 stands for a time that does not exist.
SINCE = """
    CASE WHEN signal_name IS NULL OR delivered_at IS NOT NULL OR expired_at IS NOT NULL
            OR waiters.expires_at IS NOT NULL
        THEN MAX(
            CASE
                -- NULL for a claim without lease, which never stalls
                WHEN claimed_at IS NOT NULL THEN steps.expires_at
                WHEN dispatched_at IS NOT NULL THEN COALESCE(due_at, dispatched_at)
                WHEN steps.status IS NOT NULL THEN COALESCE(attempt_completed_at, attempt_started_at)
            END,
            COALESCE(due_at, dispatched_at, -9223372036854775808),
            COALESCE(CASE WHEN delivered_at IS NULL THEN waiters.expires_at END, -9223372036854775808)
        )
    END"""
# INDEXED BY fixes the plan: from the runs, by index, to their open steps.
READ_RUNS = f"""
SELECT entry.run_id, stall_bound, steps.step_key, COALESCE(steps.status, 'Pending'),
    CASE
        WHEN claimed_at IS NOT NULL THEN 'LeaseExpired'
        WHEN dispatched_at IS NOT NULL THEN 'DispatchDue'
        ELSE 'NotDispatched'
    END, {SINCE}
FROM (
    SELECT * FROM (
        SELECT run_id, stall_bound FROM runs INDEXED BY runs_stall_bound
        WHERE status = 'Running' AND stall_bound IS NULL ORDER BY run_id LIMIT :unbounded
    )
    UNION ALL
    SELECT * FROM (
        SELECT run_id, stall_bound FROM runs INDEXED BY runs_stall_bound
        WHERE status = 'Running' AND stall_bound <= :as_of ORDER BY stall_bound, run_id LIMIT :bounded
    )
) AS entry
LEFT JOIN steps ON steps.run_id = entry.run_id
    AND (steps.status IS NULL OR steps.status IN ('Pending', 'Running'))
LEFT JOIN waiters ON waiters.run_id = steps.run_id AND waiters.step_key = steps.step_key
"""
READ_BOUND = f"""
SELECT MIN(COALESCE({SINCE}, {NEVER}))
FROM steps LEFT JOIN waiters ON waiters.run_id = steps.run_id AND waiters.step_key = steps.step_key
WHERE steps.run_id = ? AND (steps.status IS NULL OR steps.status IN ('Pending', 'Running'))
"""
NOTE_STEPS = """
UPDATE steps SET stall_noted = 1
WHERE run_id = ? AND (status IS NULL OR status IN ('Pending', 'Running')) AND NOT stall_noted
"""
SET_BOUND = "UPDATE runs SET stall_bound = ? WHERE run_id = ? AND stall_bound IS NOT ?"


class _Reading(NamedTuple):
    """What one snapshot shows of the runs that may have stalled steps."""

    listed: Sequence[tuple[int, bytes, str, str, str]]
    """Up to ``take`` stalled steps: since, run id, key, status, reason."""
    settled: Sequence[bytes]
    """The runs that can get a bound, or have a wrong one."""
    is_complete: bool
    """Whether no other run can have a step among them."""


class StalledSteps:
    """The contract of get_stalled_steps is in flowstore_core/steps.py."""

    _database: Database

    async def get_stalled_steps(self, *, as_of: datetime | None, take: int) -> tuple[StalledStep, ...]:
        bounded, unbounded = take + LOOKAHEAD, MAX_UNBOUNDED
        while True:
            now = self._database.now()
            at = now if as_of is None else to_us(as_of)
            found = await self._database.read(partial(_read, at, now, take, bounded, unbounded))
            await self._set_bounds(found.settled, at)
            if found.is_complete:
                return tuple(
                    StalledStep(
                        run_id=UUID(bytes=run_id),
                        step_key=step_key,
                        status=StepStatus(status),
                        reason=StallReason(reason),
                        since=from_us(since),
                    )
                    for since, run_id, step_key, status, reason in found.listed
                )
            # The runs that have got a bound now make room for others.
            if len(found.settled) < unbounded // 2:
                bounded, unbounded = 2 * bounded, 2 * unbounded

    async def _set_bounds(self, run_ids: Sequence[bytes], as_of: int) -> None:
        try:
            for start in range(0, len(run_ids), BOUNDS_PER_WRITE):
                await self._database.write(
                    partial(_set_bounds, run_ids[start : start + BOUNDS_PER_WRITE], as_of)
                )
        except FlowStoreError as error:
            # The next call finds the runs again.
            log.info("get_stalled_steps: bounds of runs were not set: %s", error)


def _read(as_of: int, now: int, take: int, bounded: int, unbounded: int, db: sqlite3.Connection) -> _Reading:
    bounds: dict[bytes, int] = {}
    stored: dict[bytes, int | None] = {}
    stalled: list[tuple[int, bytes, str, str, str]] = []
    for run_id, stored_bound, step_key, status, reason, since in db.execute(
        READ_RUNS, {"as_of": as_of, "bounded": bounded, "unbounded": unbounded}
    ):
        stored[run_id] = stored_bound
        bounds[run_id] = min(bounds.get(run_id, NEVER), NEVER if since is None else since)
        if since is not None and since <= as_of:
            stalled.append((since, run_id, step_key, status, reason))
    stalled.sort()
    listed = stalled[:take]
    settled = [
        run_id
        for run_id, bound in bounds.items()
        if stored[run_id] != bound and (stored[run_id] is not None or _is_settled(bound, as_of, now))
    ]
    # The steps of the runs that were not read come after those of the last run that was read.
    with_bound = [(bound, run_id) for run_id, bound in stored.items() if bound is not None]
    is_complete = len(stored) - len(with_bound) < unbounded and (
        len(with_bound) < bounded or (len(listed) == take and listed[-1][:2] <= max(with_bound))
    )
    return _Reading(listed, settled, is_complete)


def _set_bounds(run_ids: Sequence[bytes], as_of: int, db: sqlite3.Connection, now: int) -> None:
    for run_id in run_ids:
        [bound] = db.execute(READ_BOUND, (run_id,)).fetchone()
        if bound is None:
            bound = NEVER
        if _is_settled(bound, as_of, now):
            db.execute(NOTE_STEPS, (run_id,))
        else:
            bound = None
        db.execute(SET_BOUND, (bound, run_id, bound))


def _is_settled(bound: int, as_of: int, now: int) -> bool:
    return bound <= as_of or bound > now + SETTLED_US
