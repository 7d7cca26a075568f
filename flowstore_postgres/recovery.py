"""Recovery on PostgreSQL: rescheduling steps (STP-7)."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from flowstore_core import (
    ClaimLostError,
    RunStatus,
    StaleAttemptError,
    StepAlreadyCompletedError,
    StepNotFoundError,
)
from flowstore_postgres.database import Database
from flowstore_postgres.requests import ARCHIVE_ATTEMPTS, DELETE_UNDELIVERED
from flowstore_postgres.runs import lock_run
from flowstore_postgres.transactions import Transaction

READ_ATTEMPT = """
SELECT status, last_attempt, reopened, rescheduled, started_owner, output_json, error_message,
       coalesce($3, clock_timestamp()) AS now
FROM {schema}.steps WHERE run_id = $1 AND step_key = $2 AND status IS NOT NULL FOR UPDATE
"""
# A new dispatch keeps the queue of the old one (STP-7).
KEEP_QUEUE = """dispatch_queue = CASE WHEN $6 THEN dispatch_queue END,
    dispatch_priority = CASE WHEN $6 THEN dispatch_priority END,
    dispatch_step_type = CASE WHEN $6 THEN dispatch_step_type END,
    dispatch_input_json = CASE WHEN $6 THEN dispatch_input_json END"""
# An attempt that was already closed as Pending keeps its output.
RESCHEDULE_STEP = """
UPDATE {schema}.steps
SET output_json = CASE status WHEN 'Running' THEN $3 ELSE output_json END,
    completed_at = coalesce(completed_at, $5), status = 'Pending', rescheduled = true,
    claim_token = NULL, claim_owned = NULL, claimed_at = NULL, claim_expires_at = NULL,
    dispatch_token = NULL, dispatch_job_id = NULL,
    dispatched_at = CASE WHEN $6 THEN $5::timestamptz END, due_at = CASE WHEN $6 THEN $4::timestamptz END,
    {keep_queue}
WHERE run_id = $1 AND step_key = $2
""".replace("{keep_queue}", KEEP_QUEUE)
# With an error, in three statements: the attempt ends Failed, it is archived, and the step is reopened. On a
# terminal run the first one is all.
FAIL_STEP = """
UPDATE {schema}.steps
SET output_json = $3, error_message = $4, completed_at = coalesce(completed_at, $5), status = 'Failed',
    rescheduled = true, claim_token = NULL, claim_owned = NULL, claimed_at = NULL, claim_expires_at = NULL,
    dispatch_token = NULL, dispatch_job_id = NULL,
    dispatched_at = CASE WHEN $7 THEN $5::timestamptz END, due_at = CASE WHEN $7 THEN $6::timestamptz END,
    {keep_queue}
WHERE run_id = $1 AND step_key = $2
""".replace("{keep_queue}", KEEP_QUEUE.replace("$6", "$7"))
REOPEN_FAILED_STEP = """
UPDATE {schema}.steps
SET status = 'Pending', reopened = true, output_json = NULL, error_message = NULL, started_owner = NULL
WHERE run_id = $1 AND step_key = $2
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
        owner: str | None,
        error_message: str | None = None,
    ) -> None:
        failed = error_message is not None

        async def work(transaction: Transaction) -> None:
            open_run = await lock_run(transaction, run_id) is RunStatus.RUNNING
            row = await transaction.row(READ_ATTEMPT, run_id, step_key, transaction.now)
            if row is None:
                raise StepNotFoundError(run_id, step_key)
            if failed and row["reopened"] and row["rescheduled"] and attempt == row["last_attempt"]:
                # This call, made before, reopened the step; retry_step keeps the mark of such a call.
                return
            if row["reopened"] or attempt != row["last_attempt"]:
                raise StaleAttemptError(run_id, step_key, attempt, row["last_attempt"])
            if owner is not None and row["started_owner"] != owner:
                raise ClaimLostError(run_id, step_key)
            if error_message is not None:
                if row["status"] != "Running":
                    if row["rescheduled"] and row["status"] == "Failed":
                        return
                    if (row["status"], row["output_json"], row["error_message"]) != (
                        "Failed",
                        output_json,
                        error_message,
                    ):
                        raise StepAlreadyCompletedError(run_id, step_key, attempt)
                now = row["now"]
                await transaction.execute(
                    FAIL_STEP, run_id, step_key, output_json, error_message, now, due_at, open_run
                )
                if open_run:
                    await transaction.execute(ARCHIVE_ATTEMPTS, run_id, [step_key], "", now)
                    await transaction.execute(REOPEN_FAILED_STEP, run_id, step_key)
                    await transaction.execute(DELETE_UNDELIVERED, run_id, [step_key])
                return
            if row["status"] not in ("Running", "Pending"):
                raise StepAlreadyCompletedError(run_id, step_key, attempt)
            if row["rescheduled"]:
                return
            await transaction.execute(
                RESCHEDULE_STEP, run_id, step_key, output_json, due_at, row["now"], open_run
            )

        await self._database.transaction("reschedule_step", work)
