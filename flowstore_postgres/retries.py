"""Retries of steps on PostgreSQL: reopen the step and its run, and reset skipped steps (STP-6)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from flowstore_core import RunStatus, StaleAttemptError, StepNotFoundError, StepRequest
from flowstore_core.steps import superseded_by
from flowstore_postgres.database import Database
from flowstore_postgres.requests import ARCHIVE_ATTEMPTS, DELETE_UNDELIVERED, NO_DISPATCH, settle_requests
from flowstore_postgres.runs import lock_run
from flowstore_postgres.steps import READ_STEP
from flowstore_postgres.transactions import Transaction

REOPEN_STEP = """
UPDATE {schema}.steps
-- The mark of reschedule_step with an error stays: that call, repeated, is a no-op (STP-7).
SET status = 'Pending', reopened = true, rescheduled = rescheduled AND status = 'Failed', output_json = NULL,
    error_message = NULL, completed_at = coalesce(completed_at, $3), started_owner = NULL,
    claim_token = NULL, claim_owned = NULL, claimed_at = NULL, claim_expires_at = NULL,
    {no_dispatch}
WHERE run_id = $1 AND step_key = $2
""".replace("{no_dispatch}", NO_DISPATCH)
FIND_SKIPPED = """
SELECT step_key FROM {schema}.steps
WHERE run_id = $1 AND step_key = ANY($2::text[]) AND status = 'Skipped' FOR UPDATE
"""
# A reset step keeps only its attempts and their numbering.
RESET_STEPS = """
UPDATE {schema}.steps
SET status = NULL, output_json = NULL, error_message = NULL, completed_at = NULL, started_owner = NULL,
    claim_token = NULL, claim_owned = NULL, claimed_at = NULL, claim_expires_at = NULL,
    {no_dispatch}
WHERE run_id = $1 AND step_key = ANY($2::text[])
""".replace("{no_dispatch}", NO_DISPATCH)
REOPEN_RUN = "UPDATE {schema}.runs SET status = 'Running', completed_at = NULL WHERE run_id = $1"
CLEAR_LATCHES = """
UPDATE {schema}.controls
SET cancel_requested_at = NULL, cancel_reason = NULL, timed_out_at = NULL, timed_out_reason = NULL,
    timeout_at = CASE WHEN timeout_at <= $2 THEN NULL ELSE timeout_at END
WHERE run_id = $1
"""


class Retries:
    """The contract of these operations is in flowstore_core/steps.py."""

    _database: Database

    async def retry_step(
        self,
        *,
        run_id: UUID,
        step_key: str,
        attempt: int | None,
        reset: frozenset[str],
        dispatch: Sequence[StepRequest] = (),
    ) -> None:
        async def work(transaction: Transaction) -> None:
            status = await lock_run(transaction, run_id)
            row = await transaction.row(READ_STEP, run_id, step_key, transaction.now)
            if row is None or row["status"] is None:
                raise StepNotFoundError(run_id, step_key)
            if attempt is not None and attempt != row["last_attempt"]:
                raise StaleAttemptError(run_id, step_key, attempt, row["last_attempt"])
            if not row["reopened"]:
                error = superseded_by(row["last_attempt"] + 1)
                await transaction.execute(ARCHIVE_ATTEMPTS, run_id, [step_key], error, row["now"])
                await transaction.execute(REOPEN_STEP, run_id, step_key, row["now"])
                await self._reset(transaction, run_id, step_key, reset, row["now"])
            if status is not RunStatus.RUNNING:
                await transaction.execute(REOPEN_RUN, run_id)
                await transaction.execute(CLEAR_LATCHES, run_id, row["now"])
            await settle_requests(transaction, run_id, dispatch, row["now"])

        await self._database.transaction("retry_step", work)

    @staticmethod
    async def _reset(
        transaction: Transaction, run_id: UUID, step_key: str, reset: frozenset[str], now: datetime
    ) -> None:
        skipped: list[str] = []
        if others := sorted(reset - {step_key}):
            skipped = [row[0] for row in await transaction.rows(FIND_SKIPPED, run_id, others)]
        if skipped:
            # Skipped steps have no open attempt, so the message is not used.
            await transaction.execute(ARCHIVE_ATTEMPTS, run_id, skipped, "", now)
            await transaction.execute(RESET_STEPS, run_id, skipped)
        await transaction.execute(DELETE_UNDELIVERED, run_id, [step_key, *skipped])
