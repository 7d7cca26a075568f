"""Queues in SQLite: claiming the next steps and advancing runs (QUE).

A step that is dispatched to a queue has a row in ``queued_steps``. Its ``ready_at`` is the time from which
the step can be claimed. The triggers of migration 5 recompute it whenever the step, its waiter or its run
changes, so claim_next_steps reads the first entries of one index, and no statement here maintains it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Coroutine, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

from flowstore_core import (
    ClaimedStep,
    EndedStep,
    FlowStoreError,
    OutcomeUnknownError,
    QueueStatistics,
    RunAdvance,
    RunStatus,
    StepAlreadyCompletedError,
    new_claim_token,
)
from flowstore_core.queues import ADVANCE_ERRORS
from flowstore_sqlite.claims import lease_end_us
from flowstore_sqlite.codecs import from_optional_us, from_us, to_optional_us
from flowstore_sqlite.database import Database
from flowstore_sqlite.requests import settle_requests
from flowstore_sqlite.runs import COMPLETE_RUN, read_run_status
from flowstore_sqlite.steps import (
    HAS_OUTCOME,
    RECORD_STEP_COMPLETE,
    archive_attempt,
    check_attempt,
    load_step,
)

# claim_next_steps, first part: the ready steps of one queue in the order of QUE-2. SQLite seeks each priority
# in the index queued_steps_ready, the highest first, and reads at most :limit entries, however many steps
# sleep: their ready_at is later. The rows themselves are not read.
FIND_READY_STEPS = """
SELECT -priority, ready_at, run_id, step_key FROM queued_steps
WHERE queue = :queue AND priority IN (0, 1, 2, 3, 4, 5, 6, 7, 8, 9) AND ready_at <= :now
ORDER BY priority DESC, ready_at, run_id, step_key
LIMIT :limit
"""
# Second part: the record of one of them. A step claimed before has last_attempt > 0.
READ_READY_STEP = """
SELECT runs.flow_id, flow_name, queued_steps.step_type, queued_steps.input_json, queue, priority,
    dispatched_at, due_at, last_attempt, cancelled_at IS NOT NULL OR timed_out_at IS NOT NULL
FROM queued_steps JOIN steps USING (run_id, step_key) JOIN runs USING (run_id)
    LEFT JOIN controls USING (run_id)
WHERE run_id = ? AND step_key = ?
"""
# Third part: claim the step and open its next attempt, like try_claim_step and record_step_start by that
# owner. The new claim makes the step ready again at the end of the lease, by trigger.
CLAIM_READY_STEP = """
UPDATE steps SET
    claimed_at = :now, expires_at = :expires_at, claim_owner = :owner, claim_token = NULL,
    status = 'Running', last_attempt = :attempt, reopened = 0, rescheduled = 0,
    started_at = COALESCE(started_at, :now), attempt_started_at = :now, attempt_completed_at = NULL,
    started_owner = :owner, step_type = :step_type, job_id = :worker, error_message = NULL,
    output_json = NULL, input_json = :input_json
WHERE run_id = :run_id AND step_key = :step_key
"""

# For a cancelled claim_next_steps (QUE-3): releases the claim and closes its open attempt as Pending.
RETURN_STEP = """
UPDATE steps SET
    status = CASE WHEN is_open THEN 'Pending' ELSE status END,
    attempt_completed_at = CASE WHEN is_open THEN :now ELSE attempt_completed_at END,
    claimed_at = NULL, expires_at = NULL, claim_owner = NULL, claim_token = NULL
FROM (
    SELECT status = 'Running' AND started_owner = :owner AS is_open FROM steps
    WHERE run_id = :run_id AND step_key = :step_key
)
WHERE run_id = :run_id AND step_key = :step_key AND claim_owner = :owner
"""

# Whether something is left to do (QUE-6). The last keys first: steps that were dispatched together are
# claimed in the order of their keys.
HAS_OPEN_STEP = """
SELECT 1 FROM steps
WHERE run_id = ? AND (
    status IN ('Pending', 'Running')
    OR status IS NULL AND (
        dispatched_at IS NOT NULL OR claimed_at IS NOT NULL AND (expires_at IS NULL OR expires_at > ?)
    )
)
ORDER BY step_key DESC LIMIT 1
"""
HAS_FAILED_STEP = "SELECT 1 FROM steps WHERE run_id = ? AND status = 'Failed' LIMIT 1"

REDISPATCH_STEP = """
UPDATE steps SET
    dispatched_at = :now, due_at = COALESCE(:due_at, due_at), dispatch_job_id = NULL, dispatch_token = NULL
WHERE run_id = :run_id AND step_key = :step_key AND (status IS NULL OR status IN ('Pending', 'Running'))
    AND (claimed_at IS NULL OR expires_at <= :now)
    AND EXISTS (SELECT 1 FROM runs WHERE runs.run_id = steps.run_id AND runs.status = 'Running')
    AND EXISTS (SELECT 1 FROM queued_steps WHERE run_id = :run_id AND step_key = :step_key)
"""
CHANGE_QUEUE = """
UPDATE queued_steps SET queue = COALESCE(:queue, queue), priority = COALESCE(:priority, priority)
WHERE run_id = :run_id AND step_key = :step_key
"""

# A step without ready_at has ended, or its run has.
GET_QUEUES = """
SELECT queue, SUM(state = 'ready'), SUM(state = 'scheduled'), SUM(state = 'waiting'), SUM(state = 'running'),
    MIN(CASE WHEN state = 'ready' THEN ready_at END)
FROM (
    SELECT queue, ready_at,
        CASE
            WHEN claimed_at IS NOT NULL AND (steps.expires_at IS NULL OR steps.expires_at > :now)
                THEN 'running'
            WHEN signal_name IS NOT NULL AND delivered_at IS NULL AND expired_at IS NULL
                AND (waiters.expires_at IS NULL OR waiters.expires_at > :now) THEN 'waiting'
            WHEN ready_at > :now THEN 'scheduled'
            ELSE 'ready'
        END AS state
    FROM queued_steps JOIN steps USING (run_id, step_key) LEFT JOIN waiters USING (run_id, step_key)
    WHERE ready_at IS NOT NULL
)
GROUP BY queue ORDER BY queue
"""


class Queues:
    """See flowstore_core.queues for the contract."""

    _database: Database

    # Not ``async``, like other frequent operations: saves one coroutine per call.
    def claim_next_steps(
        self, queues: Sequence[str], *, lease: timedelta, limit: int = 1, worker: str | None = None
    ) -> Coroutine[Any, Any, tuple[ClaimedStep, ...]]:
        claim = _ClaimNextWrite(self._database, queues, lease, limit, worker)
        return self._database.write(claim, claim.compensate)

    def advance_run(self, **arguments: Any) -> Coroutine[Any, Any, RunAdvance]:
        return self._database.write(partial(_advance_run, EndedStep(**arguments)))

    def advance_runs(
        self, *, steps: Sequence[EndedStep]
    ) -> Coroutine[Any, Any, tuple[RunAdvance | FlowStoreError, ...]]:
        return self._database.write(partial(_advance_runs, steps))

    async def redispatch_step(
        self,
        run_id: UUID,
        step_key: str,
        *,
        queue: str | None = None,
        priority: int | None = None,
        due_at: datetime | None = None,
    ) -> bool:
        key = {"run_id": run_id.bytes, "step_key": step_key}

        def redispatch(db: sqlite3.Connection, now: int) -> bool:
            replaced = db.execute(REDISPATCH_STEP, {**key, "due_at": to_optional_us(due_at), "now": now})
            if replaced.rowcount == 0:
                return False
            db.execute(CHANGE_QUEUE, {**key, "queue": queue, "priority": priority})
            return True

        return await self._database.write(redispatch)

    async def get_queues(self) -> tuple[QueueStatistics, ...]:
        def count(db: sqlite3.Connection) -> tuple[QueueStatistics, ...]:
            return tuple(
                QueueStatistics(
                    queue=queue,
                    ready=ready,
                    scheduled=scheduled,
                    waiting=waiting,
                    running=running,
                    oldest_ready_at=from_optional_us(oldest_ready_at),
                )
                for queue, ready, scheduled, waiting, running, oldest_ready_at in db.execute(
                    GET_QUEUES, {"now": self._database.now()}
                )
            )

        return await self._database.read(count)


class _ClaimNextWrite:
    """The write of one claim_next_steps. It remembers its claims for its compensation (QUE-3)."""

    def __init__(
        self, database: Database, queues: Sequence[str], lease: timedelta, limit: int, worker: str | None
    ) -> None:
        self._database = database
        self._queues = queues
        self._lease = lease
        self._limit = limit
        self._worker = worker
        self._claimed: tuple[ClaimedStep, ...] = ()

    def __call__(self, db: sqlite3.Connection, now: int) -> tuple[ClaimedStep, ...]:
        found: list[tuple[int, int, bytes, str]] = []
        for queue in self._queues:
            found += db.execute(FIND_READY_STEPS, {"queue": queue, "now": now, "limit": self._limit})
        # Merges the queues. The first column is the negative priority.
        found.sort()
        expires_at = lease_end_us(self._lease, now)
        self._claimed = tuple(
            _claim_step(db, run_id, step_key, expires_at, self._worker, now)
            for _, _, run_id, step_key in found[: self._limit]
        )
        return self._claimed

    async def compensate(self, claimed: tuple[ClaimedStep, ...] | OutcomeUnknownError) -> None:
        """Release the claims that the cancelled call still holds."""
        if self._claimed:
            await self._database.write_while_closing(partial(_return_steps, self._claimed))


def _claim_step(
    db: sqlite3.Connection, run_bytes: bytes, step_key: str, expires_at: int, worker: str | None, now: int
) -> ClaimedStep:
    row = db.execute(READ_READY_STEP, (run_bytes, step_key)).fetchone()
    flow_id, flow_name, step_type, input_json, queue, priority, dispatched_at, due_at, last_attempt, stop = (
        row
    )
    run_id = UUID(bytes=run_bytes)
    if last_attempt:
        archive_attempt(db, run_id, step_key, load_step(db, run_id, step_key), now)
    owner = new_claim_token()
    values = {
        "run_id": run_bytes,
        "step_key": step_key,
        "attempt": last_attempt + 1,
        "owner": owner,
        "expires_at": expires_at,
        "step_type": step_type,
        "input_json": input_json,
        "worker": worker,
        "now": now,
    }
    db.execute(CLAIM_READY_STEP, values)
    return ClaimedStep(
        run_id=run_id,
        flow_id=UUID(bytes=flow_id),
        flow_name=flow_name,
        step_key=step_key,
        step_type=step_type,
        input_json=input_json,
        attempt=last_attempt + 1,
        owner=owner,
        queue=queue,
        priority=priority,
        dispatched_at=from_us(dispatched_at),
        due_at=from_optional_us(due_at),
        claimed_at=from_us(now),
        expires_at=from_us(expires_at),
        cancel_requested=bool(stop),
    )


def _return_steps(claimed: Sequence[ClaimedStep], db: sqlite3.Connection, now: int) -> None:
    for step in claimed:
        row = {"run_id": step.run_id.bytes, "step_key": step.step_key, "owner": step.owner, "now": now}
        db.execute(RETURN_STEP, row)


def _advance_runs(
    steps: Sequence[EndedStep], db: sqlite3.Connection, now: int
) -> tuple[RunAdvance | FlowStoreError, ...]:
    results: list[RunAdvance | FlowStoreError] = []
    for step in steps:
        try:
            results.append(_advance_run(step, db, now))
        except ADVANCE_ERRORS as error:
            # Raised before the first change of the step.
            results.append(error)
    return tuple(results)


def _record_outcome(db: sqlite3.Connection, ended: EndedStep, now: int) -> None:
    """Close the attempt, or check that it was closed with this outcome (STP-4)."""
    run_id, step_key, attempt, owner = ended.run_id, ended.step_key, ended.attempt, ended.owner
    outcome = (ended.status.value, ended.output_json, ended.error_message)
    row = (*outcome, now, run_id.bytes, step_key, attempt, owner)
    if db.execute(RECORD_STEP_COMPLETE, row).rowcount == 1:
        return
    step = load_step(db, run_id, step_key)
    check_attempt(step, run_id, step_key, attempt, owner)
    if not db.execute(HAS_OUTCOME, (*outcome, run_id.bytes, step_key)).fetchone()[0]:
        raise StepAlreadyCompletedError(run_id, step_key, attempt)


def _advance_run(ended: EndedStep, db: sqlite3.Connection, now: int) -> RunAdvance:
    """Record the outcome, settle the requests, and complete the run if nothing is left to do (QUE-6)."""
    _record_outcome(db, ended, now)
    run_id, requests = ended.run_id, ended.dispatch
    complete_as, failed_as = ended.complete_as, ended.failed_as
    if not (requests or complete_as) or read_run_status(db, run_id) is not RunStatus.RUNNING:
        return RunAdvance(dispatched=(), run_completed=False)
    settlement = settle_requests(db, run_id, requests, now)
    if (
        complete_as is None
        or settlement.dispatched
        or db.execute(HAS_OPEN_STEP, (run_id.bytes, now)).fetchone() is not None
    ):
        return RunAdvance(dispatched=settlement.dispatched, run_completed=False)
    status = complete_as
    if failed_as is not None and (
        settlement.stayed_behind or db.execute(HAS_FAILED_STEP, (run_id.bytes,)).fetchone() is not None
    ):
        status = failed_as
    db.execute(COMPLETE_RUN, (status.value, now, run_id.bytes))
    return RunAdvance(dispatched=(), run_completed=True)
