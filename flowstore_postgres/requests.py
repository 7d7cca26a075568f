"""Settling requests on PostgreSQL: dispatch or skip steps whose predecessors have ended (QUE-4).

The transaction holds the lock of the run, so no other call dispatches, claims, starts or skips its steps.
Each statement of the transaction takes a new snapshot, which shows everything that was committed before.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from flowstore_core import StepRequest, StepStatus
from flowstore_core.queues import not_accepted
from flowstore_core.steps import superseded_by
from flowstore_postgres.transactions import Transaction

StepRows = Mapping[str, Any]
"""Rows of READ_STEPS of one run, by step key."""

# Steps that are not terminal are locked, and read again once they are: record_step_complete does not lock the
# run. A terminal step does not change while the run is locked.
READ_STEPS = """
WITH found AS MATERIALIZED (
    SELECT {columns}
    FROM unnest($1::uuid[], $2::text[]) AS k (run_id, step_key)
    JOIN {schema}.steps s ON s.run_id = k.run_id AND s.step_key = k.step_key
), locked AS MATERIALIZED (
    SELECT {columns}
    FROM found f JOIN {schema}.steps s ON s.run_id = f.run_id AND s.step_key = f.step_key
    WHERE f.status IS NULL OR f.status IN ('Pending', 'Running')
    ORDER BY s.run_id, s.step_key FOR NO KEY UPDATE OF s
)
SELECT * FROM locked
UNION ALL SELECT * FROM found WHERE status IN ('Succeeded', 'Failed', 'Skipped')
""".replace(
    "{columns}",
    """s.run_id, s.step_key, s.status, s.last_attempt, s.reopened, s.started_owner,
           s.dispatched_at IS NOT NULL
           OR s.claimed_at IS NOT NULL AND (s.claim_expires_at IS NULL OR s.claim_expires_at > $3) AS held""",
)
# Writes table pending itself, in place of the trigger; its snapshot shows every waiter, because the run has
# been locked before. dispatch_token is cleared, because a cancelled try_record_dispatch is compensated for by
# it.
DISPATCH_STEPS = """
WITH dispatched AS (
    INSERT INTO {schema}.steps AS s (run_id, step_key, dispatched_at, due_at, dispatch_queue,
                                     dispatch_priority, dispatch_step_type, dispatch_input_json,
                                     pending_writes, stall_noted)
    SELECT a.run_id, a.step_key, a.now, a.due_at, a.queue, a.priority, a.step_type, a.input_json, 1, false
    FROM unnest($1::uuid[], $2::text[], $3::timestamptz[], $4::timestamptz[], $5::text[], $6::smallint[],
                $7::text[], $8::text[])
         AS a (run_id, step_key, now, due_at, queue, priority, step_type, input_json)
    ORDER BY a.run_id, a.step_key
    ON CONFLICT (run_id, step_key) DO UPDATE SET
        dispatched_at = excluded.dispatched_at, due_at = excluded.due_at, dispatch_token = NULL,
        dispatch_job_id = NULL, dispatch_queue = excluded.dispatch_queue,
        dispatch_priority = excluded.dispatch_priority, dispatch_step_type = excluded.dispatch_step_type,
        dispatch_input_json = excluded.dispatch_input_json,
        pending_writes = coalesce(s.pending_writes, 0) + 1
    RETURNING s.run_id, s.step_key, s.dispatch_queue, s.dispatch_priority, s.dispatched_at, s.due_at,
              s.claim_expires_at
)
INSERT INTO {schema}.pending (run_id, step_key, queue, priority, ready_at, late)
SELECT s.run_id, s.step_key, s.dispatch_queue, s.dispatch_priority,
       -- A claim, if there is one, has expired.
       greatest(coalesce(s.due_at, s.dispatched_at), s.claim_expires_at,
                CASE WHEN w.run_id IS NOT NULL THEN coalesce(w.expires_at, 'infinity') END),
       coalesce(s.due_at, s.dispatched_at) < clock_timestamp() - interval '1 second'
FROM dispatched s
LEFT JOIN {schema}.waiters w ON w.run_id = s.run_id AND w.step_key = s.step_key AND w.delivered_at IS NULL
ON CONFLICT (run_id, step_key) DO UPDATE
    SET queue = excluded.queue, priority = excluded.priority, ready_at = excluded.ready_at,
        late = excluded.late
"""
# Columns of a step without a dispatch.
NO_DISPATCH = """dispatched_at = NULL, due_at = NULL, dispatch_job_id = NULL, dispatch_queue = NULL,
    dispatch_priority = NULL, dispatch_step_type = NULL, dispatch_input_json = NULL"""
DELETE_UNDELIVERED = """
DELETE FROM {schema}.waiters WHERE run_id = $1 AND step_key = ANY($2::text[]) AND delivered_at IS NULL
"""
ARCHIVE_ATTEMPTS = """
INSERT INTO {schema}.attempts (run_id, step_key, attempt, step_type, status, input_json, output_json,
                               error_message, job_id, started_at, completed_at, started_token,
                               closed_token)
SELECT run_id, step_key, last_attempt, step_type,
       CASE status WHEN 'Running' THEN 'Failed' ELSE status END, input_json, output_json,
       CASE status WHEN 'Running' THEN $3 ELSE error_message END, job_id, started_at,
       coalesce(completed_at, $4), started_token, closed_token
FROM {schema}.steps
WHERE run_id = $1 AND step_key = ANY($2::text[]) AND status IS NOT NULL AND NOT reopened
"""
SKIP_STEP = """
INSERT INTO {schema}.steps (run_id, step_key, status, step_type, error_message, started_at, first_started_at,
                            completed_at, last_attempt, started_owner, stall_noted)
VALUES ($1, $2, 'Skipped', $3, $4, $5, $5, $5, 1, $6, false)
ON CONFLICT (run_id, step_key) DO UPDATE SET
    status = 'Skipped', step_type = $3, error_message = $4, input_json = NULL, output_json = NULL,
    job_id = NULL, started_at = $5, first_started_at = coalesce(steps.first_started_at, $5),
    completed_at = $5, last_attempt = steps.last_attempt + 1, reopened = false, rescheduled = false,
    started_owner = $6, started_token = NULL, closed_token = NULL
"""


@dataclass(frozen=True, slots=True)
class Settlement:
    """The effects that the requests of one run will have."""

    dispatched: Sequence[StepRequest]
    skipped: Sequence[tuple[StepRequest, str]]
    """With the error_message of each step."""
    stayed_behind: bool
    """Whether the ``after`` steps of a request have not all ended."""


class Changes:
    """Changes of one run that its transaction has decided on and not written yet."""

    def __init__(self, steps: StepRows) -> None:
        self.terminal = {
            key: StepStatus(step["status"])
            for key, step in steps.items()
            if step["status"] in ("Succeeded", "Failed", "Skipped")
        }
        """The terminal statuses that the transaction has found or will leave, by step key."""
        self.dispatched: set[str] = set()
        self._ended: set[str] = set()

    def end(self, step_key: str, status: StepStatus) -> None:
        self._ended.add(step_key)
        self.terminal[step_key] = status

    def affect(self, step_key: str) -> bool:
        """Whether they change the step."""
        return step_key in self._ended or step_key in self.dispatched


def requested_keys(requests: Iterable[StepRequest]) -> set[str]:
    """The keys of all steps that decide on the requests."""
    keys = {request.step_key for request in requests}
    return keys.union(*(request.after for request in requests))


async def read_steps(
    transaction: Transaction, keys: Mapping[UUID, Collection[str]], now: datetime
) -> dict[UUID, dict[str, Any]]:
    """Lock the rows of READ_STEPS of these keys of runs, and return those that exist by run and key."""
    run_ids = [run_id for run_id, step_keys in keys.items() for _ in step_keys]
    step_keys = [step_key for step_keys in keys.values() for step_key in step_keys]
    steps: dict[UUID, dict[str, Any]] = {run_id: {} for run_id in keys}
    for row in await transaction.rows(READ_STEPS, run_ids, step_keys, now):
        steps[row[0]][row[1]] = row
    return steps


def settle(requests: Sequence[StepRequest], steps: StepRows, changes: Changes) -> Settlement:
    """Decide on the requests in their order; each sees the effects of those before it.

    ``changes`` are those that the transaction has not written yet; those that the requests make are added.
    """
    dispatched: list[StepRequest] = []
    skipped: list[tuple[StepRequest, str]] = []
    stayed_behind = False
    terminal = changes.terminal
    for request in requests:
        step = steps.get(request.step_key)
        if step is not None and (step["held"] or step["status"] not in (None, "Pending")):
            continue
        if changes.affect(request.step_key):
            continue
        # Where a step waits for many others, most calls find one of them open.
        if not all(map(terminal.__contains__, request.after)):
            stayed_behind = True
            continue
        refused = next((key for key in request.after if terminal[key] not in request.accept), None)
        if refused is not None:
            skipped.append((request, not_accepted(refused, terminal[refused])))
            changes.end(request.step_key, StepStatus.SKIPPED)
        else:
            dispatched.append(request)
            changes.dispatched.add(request.step_key)
    return Settlement(dispatched, skipped, stayed_behind)


async def dispatch_steps(
    transaction: Transaction, dispatches: Sequence[tuple[UUID, StepRequest]], now: datetime
) -> None:
    """Record the dispatches of the requests, each with its run."""
    if dispatches:
        await transaction.execute(
            DISPATCH_STEPS,
            [run_id for run_id, _ in dispatches],
            [request.step_key for _, request in dispatches],
            [now for _ in dispatches],
            [request.due_at for _, request in dispatches],
            [request.queue for _, request in dispatches],
            [request.priority for _, request in dispatches],
            [request.step_type for _, request in dispatches],
            [request.input_json for _, request in dispatches],
        )


async def skip_steps(
    transaction: Transaction,
    run_id: UUID,
    skipped: Sequence[tuple[StepRequest, str]],
    steps: StepRows,
    now: datetime,
) -> None:
    """Record the steps as Skipped (STP-5)."""
    for request, reason in skipped:
        key = request.step_key
        if (step := steps.get(key)) is not None:
            error = superseded_by(step["last_attempt"] + 1)
            await transaction.execute(ARCHIVE_ATTEMPTS, run_id, [key], error, now)
        await transaction.execute(SKIP_STEP, run_id, key, request.step_type, reason, now, None)


async def settle_requests(
    transaction: Transaction, run_id: UUID, requests: Sequence[StepRequest], now: datetime
) -> None:
    """Settle the requests of a run that the transaction has locked."""
    if not requests:
        return
    steps = (await read_steps(transaction, {run_id: requested_keys(requests)}, now))[run_id]
    settlement = settle(requests, steps, Changes(steps))
    await skip_steps(transaction, run_id, settlement.skipped, steps, now)
    await dispatch_steps(transaction, [(run_id, request) for request in settlement.dispatched], now)
