"""Recovery on PostgreSQL: rescheduling steps and finding stalled ones (STP-7, STP-8)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from flowstore_core import (
    RunStatus,
    StaleAttemptError,
    StalledStep,
    StallReason,
    StepAlreadyCompletedError,
    StepNotFoundError,
    StepStatus,
)
from flowstore_postgres.database import Database
from flowstore_postgres.runs import lock_run, plain_uuid
from flowstore_postgres.transactions import Transaction

READ_ATTEMPT = """
SELECT status, last_attempt, reopened, rescheduled, coalesce($3, clock_timestamp()) AS now
FROM {schema}.steps WHERE run_id = $1 AND step_key = $2 AND status IS NOT NULL FOR UPDATE
"""
# An attempt that was already closed as Pending keeps its output.
RESCHEDULE_STEP = """
UPDATE {schema}.steps
SET output_json = CASE status WHEN 'Running' THEN $3 ELSE output_json END,
    completed_at = coalesce(completed_at, $5), status = 'Pending', rescheduled = true,
    claim_token = NULL, claim_owned = NULL, claimed_at = NULL, claim_expires_at = NULL,
    dispatch_token = NULL, dispatch_job_id = NULL,
    dispatched_at = CASE WHEN $6 THEN $5::timestamptz END, due_at = CASE WHEN $6 THEN $4::timestamptz END
WHERE run_id = $1 AND step_key = $2
"""

# A claimed step stalls when its lease expires, a dispatched step when its dispatch is due, any other step
# at the end of its last attempt. A claim without a lease never expires, so its step never stalls.
GET_STALLED_STEPS = """
SELECT s.run_id, s.step_key, s.status, f.reason, f.since
FROM {schema}.runs r
JOIN {schema}.steps s USING (run_id)
CROSS JOIN LATERAL (
    SELECT CASE WHEN s.claimed_at IS NOT NULL THEN 'LeaseExpired'
                WHEN s.dispatched_at IS NOT NULL THEN 'DispatchDue' ELSE 'NotDispatched' END AS reason,
           CASE WHEN s.claimed_at IS NOT NULL THEN s.claim_expires_at
                WHEN s.dispatched_at IS NOT NULL THEN coalesce(s.due_at, s.dispatched_at)
                WHEN s.status IS NOT NULL THEN coalesce(s.completed_at, s.started_at) END AS since
) f
LEFT JOIN {schema}.waiters w ON w.run_id = s.run_id AND w.step_key = s.step_key
WHERE r.status = 'Running' AND (s.status IS NULL OR s.status IN ('Pending', 'Running'))
  AND f.since <= coalesce($1, $2, clock_timestamp())
  AND (w.run_id IS NULL OR w.delivered_at IS NOT NULL OR w.expired_at IS NOT NULL
       OR w.expires_at <= coalesce($1, $2, clock_timestamp()))
ORDER BY f.since, s.run_id, s.step_key LIMIT $3
"""


class Recovery:
    """The contract of these operations is in flowstore_core/steps.py."""

    _database: Database

    async def reschedule_step(
        self,
        *,
        run_id: UUID,
        step_key: str,
        attempt: int,
        output_json: str | None,
        due_at: datetime | None,
    ) -> None:
        async def work(transaction: Transaction) -> None:
            open_run = await lock_run(transaction, run_id) is RunStatus.RUNNING
            row = await transaction.row(READ_ATTEMPT, run_id, step_key, transaction.now)
            if row is None:
                raise StepNotFoundError(run_id, step_key)
            if row["reopened"] or attempt != row["last_attempt"]:
                raise StaleAttemptError(run_id, step_key, attempt, row["last_attempt"])
            if row["status"] not in ("Running", "Pending"):
                raise StepAlreadyCompletedError(run_id, step_key, attempt)
            if row["rescheduled"]:
                return
            await transaction.execute(
                RESCHEDULE_STEP, run_id, step_key, output_json, due_at, row["now"], open_run
            )

        await self._database.transaction("reschedule_step", work)

    async def get_stalled_steps(self, *, as_of: datetime | None, take: int) -> Sequence[StalledStep]:
        rows = await self._database.read(GET_STALLED_STEPS, as_of, self._database.now(), take)
        return tuple(
            StalledStep(
                run_id=plain_uuid(row[0]),
                step_key=row[1],
                status=StepStatus.PENDING if row[2] is None else StepStatus(row[2]),
                reason=StallReason(row[3]),
                since=row[4],
            )
            for row in rows
        )
