"""Dispatching steps to queues: requests and the ``after`` steps that they wait for (QUE-4)."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from flowstore_core.queues import StepRequest, not_accepted
from flowstore_core.status import TERMINAL_STEP_STATUSES, StepStatus
from flowstore_sqlite.codecs import to_optional_us
from flowstore_sqlite.steps import load_step, skip_step

# Updates no row if the step is dispatched, has a live claim, is Running or has ended.
DISPATCH_STEP = """
INSERT INTO steps (run_id, step_key, dispatched_at, due_at) VALUES (?, ?, ?, ?)
ON CONFLICT (run_id, step_key) DO UPDATE SET
    dispatched_at = excluded.dispatched_at, due_at = excluded.due_at, dispatch_job_id = NULL,
    dispatch_token = NULL
WHERE dispatched_at IS NULL AND (status IS NULL OR status = 'Pending')
    AND (claimed_at IS NULL OR expires_at <= excluded.dispatched_at)
"""

# Follows the dispatch in the same transaction. A dispatch has this row if and only if it names a queue.
QUEUE_STEP = """
INSERT INTO queued_steps (run_id, step_key, queue, priority, step_type, input_json, ready_at)
SELECT run_id, step_key, ?, ?, ?, ?, ready_at FROM step_readiness WHERE run_id = ? AND step_key = ?
"""

GET_STEP_STATUS = "SELECT status FROM steps WHERE run_id = ? AND step_key = ?"


@dataclass(frozen=True, slots=True)
class Settlement:
    """The effects of settling requests."""

    dispatched: tuple[str, ...]
    stayed_behind: bool
    """Whether the ``after`` steps of a request have not all ended."""


def settle_requests(
    db: sqlite3.Connection, run_id: UUID, requests: Sequence[StepRequest], now: int
) -> Settlement:
    """Settle the requests of a Running run in their order; each sees the effects of those before it."""
    dispatched: list[str] = []
    stayed_behind = False
    for request in requests:
        statuses = _read_ended(db, run_id, request.after)
        if statuses is not None and request.accept.issuperset(statuses.values()):
            if _dispatch(db, run_id, request, now):
                dispatched.append(request.step_key)
        elif not _is_taken(db, run_id, request.step_key, now):
            if statuses is None:
                stayed_behind = True
            else:
                _skip(db, run_id, request, statuses, now)
    return Settlement(tuple(dispatched), stayed_behind)


def _read_ended(
    db: sqlite3.Connection, run_id: UUID, step_keys: Sequence[str]
) -> dict[str, StepStatus] | None:
    """The statuses of steps that have all ended; None as soon as one has not."""
    statuses: dict[str, StepStatus] = {}
    # The last keys first: steps that were dispatched together end roughly in the order of their keys.
    for step_key in reversed(step_keys):
        row = db.execute(GET_STEP_STATUS, (run_id.bytes, step_key)).fetchone()
        if row is None or row[0] not in TERMINAL_STEP_STATUSES:
            return None
        statuses[step_key] = StepStatus(row[0])
    return statuses


def _dispatch(db: sqlite3.Connection, run_id: UUID, request: StepRequest, now: int) -> bool:
    row = (run_id.bytes, request.step_key, now, to_optional_us(request.due_at))
    if db.execute(DISPATCH_STEP, row).rowcount == 0:
        return False
    queued = (request.queue, request.priority, request.step_type, request.input_json)
    db.execute(QUEUE_STEP, (*queued, run_id.bytes, request.step_key))
    return True


def _is_taken(db: sqlite3.Connection, run_id: UUID, step_key: str, now: int) -> bool:
    """Whether a request leaves the step alone."""
    step = load_step(db, run_id, step_key)
    return step.dispatched_at is not None or step.has_live_claim(now) or step.is_open or step.is_terminal


def _skip(
    db: sqlite3.Connection,
    run_id: UUID,
    request: StepRequest,
    statuses: dict[str, StepStatus],
    now: int,
) -> None:
    refused = next(key for key in request.after if statuses[key] not in request.accept)
    reason = not_accepted(refused, statuses[refused])
    step = load_step(db, run_id, request.step_key)
    skip_step(db, run_id, request.step_key, step, request.step_type, reason, None, now)
