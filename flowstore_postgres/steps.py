"""Steps and their attempts on PostgreSQL: start, complete, skip, statuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple
from uuid import UUID

from flowstore_core import (
    ClaimLostError,
    FlowStepRecord,
    RunCompletedError,
    RunNotFoundError,
    StaleAttemptError,
    StepAlreadyCompletedError,
    StepNotFoundError,
    StepStatus,
)
from flowstore_core.steps import SUPERSEDED_BY, superseded_by
from flowstore_postgres.batch_statement import BatchStatement, Row, decode_flags
from flowstore_postgres.database import Database
from flowstore_postgres.recovery import Recovery
from flowstore_postgres.requests import ARCHIVE_ATTEMPTS, SKIP_STEP
from flowstore_postgres.runs import ATTEMPT_COLUMNS, STEP_COLUMNS, attempt_record, lock_run, step_record
from flowstore_postgres.transactions import Transaction

START_ATTEMPT = """
SET status = 'Running', step_type = a.step_type, input_json = a.input_json, job_id = a.job_id,
    output_json = NULL, error_message = NULL, completed_at = NULL,
    -- Not before the end of the previous attempt: this statement may have waited for the row.
    started_at = coalesce($2, greatest(now, completed_at)),
    first_started_at = coalesce(first_started_at, now), last_attempt = last_attempt + 1,
    reopened = false, rescheduled = false, started_owner = a.owner, started_token = a.token,
    closed_token = NULL
"""
MAY_START = """
(s.status IS NULL OR reopened)
AND (a.owner IS NULL OR claim_owned AND claim_token = a.owner
                        AND (claim_expires_at IS NULL OR claim_expires_at > now))
"""
# Fast path: updates a row that has no attempt to archive, as at the first start of a step. It leaves every
# other row unchanged for RECORD_STEP_START_SLOW_PATH. now is read after the run is locked, as for a
# claim: the owner's lease may expire during that wait.
RECORD_STEP_START = """
WITH guard AS MATERIALIZED (
    SELECT clock_timestamp() < $1 AS before_deadline
), requested AS MATERIALIZED (
    SELECT a.*, (SELECT status = 'Running' FROM {schema}.runs r WHERE r.run_id = a.run_id FOR SHARE) AS open,
           coalesce($2, clock_timestamp()) AS now
    FROM guard, unnest($3::uuid[], $4::text[], $5::bigint[], $6::text[], $7::text[], $8::text[], $9::text[])
                WITH ORDINALITY AS a (run_id, step_key, token, step_type, input_json, job_id, owner, n)
    WHERE before_deadline
), started AS (
    UPDATE {schema}.steps s
    {start}
    FROM requested a
    WHERE open AND s.run_id = a.run_id AND s.step_key = a.step_key AND {may_start}
    RETURNING n, last_attempt
)
SELECT before_deadline, n, attempts,
       CASE WHEN NOT every THEN (SELECT array_agg(open ORDER BY n) FROM requested) END AS open
FROM guard, (SELECT array_agg(n) AS n, array_agg(last_attempt) AS attempts,
                    count(*) = cardinality($3::uuid[]) AS every FROM started) started
""".replace("{start}", START_ATTEMPT).replace("{may_start}", MAY_START)
# Fast path for one start.
RECORD_STEP_START_SINGLE = """
UPDATE {schema}.steps s
{start}
FROM (SELECT run_id FROM {schema}.runs WHERE run_id = $3 AND status = 'Running' FOR SHARE) run,
     LATERAL (SELECT coalesce($2, clock_timestamp()) AS now, $5::bigint AS token, $6::text AS step_type,
                     $7::text AS input_json, $8::text AS job_id, $9::text AS owner
              WHERE run.run_id = $3) a
WHERE clock_timestamp() < $1 AND s.run_id = $3 AND s.step_key = $4 AND {may_start}
RETURNING last_attempt AS attempt
""".replace("{start}", START_ATTEMPT).replace("{may_start}", MAY_START)
# Slow path, of try_start_step too. The step's row holds the newest attempt. Before the next attempt it is
# archived in table attempts, closed as Failed if it was open (STP-1). FOR UPDATE returns the row as it is
# after the wait for its lock, and every decision uses that row only. If attempt is NULL, another call
# inserted the row during the statement.
START_SLOW_PATH = """
WITH guard AS MATERIALIZED (
    SELECT clock_timestamp() < $1 AS before_deadline
), run AS MATERIALIZED (
    SELECT status = 'Running' AS open, stall_bound > '-infinity' AS has_bound
    FROM {schema}.runs WHERE run_id = $3 FOR SHARE
), old AS MATERIALIZED (
    SELECT s.* FROM {schema}.steps s, guard, run
    WHERE before_deadline AND open AND s.run_id = $3 AND s.step_key = $4 FOR UPDATE OF s
), locked AS MATERIALIZED (
    SELECT old.*, coalesce($2, clock_timestamp()) AS now FROM old
), facts AS MATERIALIZED (
    SELECT locked.*, {facts} FROM locked
), verdict AS MATERIALIZED (
    SELECT facts.*, claimed AND NOT finished AND NOT repeated AS starts FROM facts
), archived AS (
    INSERT INTO {schema}.attempts (run_id, step_key, attempt, step_type, status, input_json, output_json,
                                   error_message, job_id, started_at, completed_at, started_token,
                                   closed_token)
    SELECT run_id, step_key, last_attempt, step_type,
           CASE status WHEN 'Running' THEN 'Failed' ELSE status END, input_json, output_json,
           CASE status WHEN 'Running' THEN $10 || (last_attempt + 1)::text ELSE error_message END,
           job_id, started_at, CASE status WHEN 'Running' THEN now ELSE completed_at END,
           started_token, closed_token
    FROM verdict WHERE starts AND status IS NOT NULL AND NOT reopened
), updated AS (
    UPDATE {schema}.steps s
    SET {claim} status = 'Running', step_type = $5, input_json = $6, job_id = $7, output_json = NULL,
        error_message = NULL, completed_at = NULL, started_at = v.now,
        first_started_at = coalesce(v.first_started_at, v.now), last_attempt = v.last_attempt + 1,
        reopened = false, rescheduled = false, started_owner = $8, started_token = $9, closed_token = NULL
    FROM verdict v WHERE v.starts AND s.run_id = v.run_id AND s.step_key = v.step_key
    RETURNING s.last_attempt
), inserted AS (
    INSERT INTO {schema}.steps (run_id, step_key, status, step_type, input_json, job_id, started_at,
                                first_started_at, last_attempt, started_token, stall_noted)
    SELECT $3, $4, 'Running', $5, $6, $7, now, now, 1, $9, has_bound
    FROM (SELECT coalesce($2, clock_timestamp()) AS now, has_bound FROM guard, run
          WHERE before_deadline AND open AND $8::text IS NULL AND NOT EXISTS (SELECT FROM old)) fresh
    ON CONFLICT (run_id, step_key) DO NOTHING
    RETURNING last_attempt
)
SELECT guard.before_deadline, run.open, v.finished, v.claimed,
       CASE WHEN v.repeated THEN v.last_attempt ELSE coalesce(updated.last_attempt, inserted.last_attempt)
       END AS attempt
FROM guard LEFT JOIN run ON true LEFT JOIN verdict v ON true
     LEFT JOIN updated ON true LEFT JOIN inserted ON true
"""
START_FACTS = """
           coalesce(status IN ('Succeeded', 'Skipped'), false) AS finished,
           $8::text IS NULL
           OR coalesce(claim_owned AND claim_token = $8
                       AND (claim_expires_at IS NULL OR status = 'Failed'
                            OR claim_expires_at > now), false) AS claimed,
           coalesce(status = 'Running' AND started_owner = $8, false) AS repeated
"""
RECORD_STEP_START_SLOW_PATH = START_SLOW_PATH.replace("{facts}", START_FACTS).replace("{claim}", "")
FIND_STEP_START = """
SELECT true AS open, false AS finished, true AS claimed, attempt FROM (
    SELECT last_attempt AS attempt FROM {schema}.steps
    WHERE run_id = $1 AND step_key = $2 AND started_token = $3
    UNION ALL
    SELECT attempt FROM {schema}.attempts WHERE run_id = $1 AND step_key = $2 AND started_token = $3
) found LIMIT 1
"""

# Fast path: closes an open attempt whose number matches or is not given. It does not lock the run:
# complete_run and cleanup lock the rows of the steps.
RECORD_STEP_COMPLETE = """
WITH guard AS MATERIALIZED (SELECT clock_timestamp() < $1 AS before_deadline),
closed AS (
    UPDATE {schema}.steps s
    SET status = a.status, output_json = a.output_json, error_message = a.error_message,
        closed_token = a.token, completed_at = coalesce($2, greatest(clock_timestamp(), started_at))
    FROM guard, unnest($3::uuid[], $4::text[], $5::bigint[], $6::text[], $7::text[], $8::text[], $9::bigint[],
                       $10::text[])
         WITH ORDINALITY AS a (run_id, step_key, token, status, output_json, error_message, attempt, owner, n)
    WHERE before_deadline AND s.run_id = a.run_id AND s.step_key = a.step_key
      AND s.status = 'Running' AND coalesce(a.attempt, last_attempt) = last_attempt
      AND (a.owner IS NULL OR s.started_owner = a.owner)
    RETURNING n
)
SELECT before_deadline, every, CASE WHEN NOT every THEN (SELECT array_agg(n) FROM closed) END AS closed
FROM guard, (SELECT count(*) = cardinality($3::uuid[]) AS every FROM closed) closed
"""
RECORD_STEP_COMPLETE_SINGLE = """
UPDATE {schema}.steps
SET status = $6, output_json = $7, error_message = $8, closed_token = $5,
    completed_at = coalesce($2, greatest(clock_timestamp(), started_at))
WHERE clock_timestamp() < $1 AND run_id = $3 AND step_key = $4
  AND status = 'Running' AND coalesce($9, last_attempt) = last_attempt
  AND ($10::text IS NULL OR started_owner = $10)
RETURNING true AS closed
"""
# Slow path: finds out why the fast path closed nothing, and closes the attempt if that is possible by now.
RECORD_STEP_COMPLETE_SLOW_PATH = """
WITH guard AS MATERIALIZED (
    SELECT clock_timestamp() < $1 AS before_deadline
), run AS MATERIALIZED (
    SELECT true AS found FROM {schema}.runs WHERE run_id = $3 FOR SHARE
), old AS MATERIALIZED (
    SELECT s.* FROM {schema}.steps s, guard, run
    WHERE before_deadline AND s.run_id = $3 AND s.step_key = $4 AND s.status IS NOT NULL FOR UPDATE OF s
), verdict AS MATERIALIZED (
    SELECT run_id, step_key, last_attempt,
           reopened OR coalesce($8::bigint, last_attempt) <> last_attempt AS stale,
           coalesce($10::text <> started_owner, $10::text IS NOT NULL) AS lost,
           status = 'Running' AS open,
           status = $5 AND output_json IS NOT DISTINCT FROM $6
           AND error_message IS NOT DISTINCT FROM $7 AS same
    FROM old
), closed AS (
    UPDATE {schema}.steps s
    SET status = $5, output_json = $6, error_message = $7, closed_token = $9,
        completed_at = coalesce($2, greatest(clock_timestamp(), s.started_at))
    FROM verdict v
    WHERE NOT v.stale AND NOT v.lost AND v.open AND s.run_id = v.run_id AND s.step_key = v.step_key
)
SELECT guard.before_deadline, run.found, v.last_attempt, v.stale, v.lost, v.open, v.same
FROM guard LEFT JOIN run ON true LEFT JOIN verdict v ON true
"""
FIND_STEP_COMPLETE = """
SELECT true AS found, 1 AS last_attempt, false AS stale, false AS lost, true AS open, true AS same FROM (
    SELECT FROM {schema}.steps WHERE run_id = $1 AND step_key = $2 AND closed_token = $3
    UNION ALL
    SELECT FROM {schema}.attempts WHERE run_id = $1 AND step_key = $2 AND closed_token = $3
) found LIMIT 1
"""

READ_STEP = """
SELECT s.*, coalesce($3, clock_timestamp()) AS now FROM {schema}.steps s
WHERE run_id = $1 AND step_key = $2 FOR UPDATE
"""
CLAIM_SKIPPED_STEP = """
UPDATE {schema}.steps SET claim_token = $3, claim_owned = true, claimed_at = $4, claim_expires_at = NULL
WHERE run_id = $1 AND step_key = $2
"""

GET_STEP = f"""
SELECT s.run_id, {STEP_COLUMNS},
       ARRAY(SELECT ROW({ATTEMPT_COLUMNS}) FROM {{schema}}.attempts a
             WHERE a.run_id = s.run_id AND a.step_key = s.step_key ORDER BY a.attempt) AS attempts
FROM unnest($1::uuid[], $2::text[]) AS wanted (run_id, step_key)
JOIN {{schema}}.steps s ON s.run_id = wanted.run_id AND s.step_key = wanted.step_key
WHERE s.status IS NOT NULL
"""
GET_STEP_STATUSES = """
SELECT run_id, step_key, status FROM {schema}.steps WHERE run_id = ANY($1::uuid[]) AND status IS NOT NULL
ORDER BY run_id, step_key
"""


class Started(NamedTuple):
    """The result of the fast path of a start."""

    open: bool | None
    """Whether the run is Running; None if the run does not exist."""
    attempt: int | None
    """The number of the attempt; None if the fast path did not apply."""


def _start_size(row: Row) -> int:
    return len(row[4] or "")


def _completion_size(row: Row) -> int:
    return len(row[4] or "") + len(row[5] or "")


def _decode_starts(rows: Sequence[Row], found: Any) -> list[Started]:
    attempts = dict(zip(found["n"] or (), found["attempts"] or (), strict=True))
    if len(attempts) == len(rows):
        return [Started(True, attempts[n]) for n in range(1, len(rows) + 1)]
    return [Started(is_open, attempts.get(n)) for n, is_open in enumerate(found["open"], 1)]


START = BatchStatement(
    operation="record_step_start",
    batch_sql=RECORD_STEP_START,
    single_sql=RECORD_STEP_START_SINGLE,
    decode_batch=_decode_starts,
    probe_sql=FIND_STEP_START,
    decode_probe=lambda row: Started(True, row["attempt"]),
    size_of=_start_size,
)
COMPLETE = BatchStatement(
    operation="record_step_complete",
    batch_sql=RECORD_STEP_COMPLETE,
    single_sql=RECORD_STEP_COMPLETE_SINGLE,
    decode_batch=decode_flags("closed"),
    probe_sql=FIND_STEP_COMPLETE,
    decode_probe=lambda row: True,
    size_of=_completion_size,
)


class Steps(Recovery):
    """The contract of these operations is in flowstore_core/steps.py."""

    _database: Database

    async def record_step_start(
        self,
        *,
        run_id: UUID,
        step_key: str,
        step_type: str,
        input_json: str | None,
        job_id: str | None,
        owner: str | None,
    ) -> int:
        token = self._database.new_token()
        started: Started = await self._database.write(
            START, (run_id, step_key, token, step_type, input_json, job_id, owner)
        )
        if started.open is None:
            raise RunNotFoundError(run_id)
        if started.attempt is not None:
            return started.attempt
        while True:
            row = await self._database.statement(
                "record_step_start",
                RECORD_STEP_START_SLOW_PATH,
                run_id,
                step_key,
                step_type,
                input_json,
                job_id,
                owner,
                token,
                SUPERSEDED_BY,
                probe=(FIND_STEP_START, run_id, step_key, token),
            )
            if row["open"] is None:
                raise RunNotFoundError(run_id)
            if not row["open"]:
                raise RunCompletedError(run_id, step_key)
            if row["finished"]:
                raise StepAlreadyCompletedError(run_id, step_key)
            if row["claimed"] is False or (row["claimed"] is None and owner is not None):
                raise ClaimLostError(run_id, step_key)
            if row["attempt"] is not None:
                return int(row["attempt"])
            # Another caller inserted the row between the snapshot and the insert; the next try finds it.

    async def record_step_complete(
        self,
        *,
        run_id: UUID,
        step_key: str,
        status: StepStatus,
        output_json: str | None,
        error_message: str | None,
        attempt: int | None,
        owner: str | None,
    ) -> None:
        token = self._database.new_token()
        if await self._database.write(
            COMPLETE, (run_id, step_key, token, status.value, output_json, error_message, attempt, owner)
        ):
            return
        row = await self._database.statement(
            "record_step_complete",
            RECORD_STEP_COMPLETE_SLOW_PATH,
            run_id,
            step_key,
            status.value,
            output_json,
            error_message,
            attempt,
            token,
            owner,
            probe=(FIND_STEP_COMPLETE, run_id, step_key, token),
        )
        if row["found"] is None:
            raise RunNotFoundError(run_id)
        if row["last_attempt"] is None:
            raise StepNotFoundError(run_id, step_key)
        if row["stale"]:
            raise StaleAttemptError(run_id, step_key, attempt, row["last_attempt"])
        if row["lost"]:
            raise ClaimLostError(run_id, step_key)
        if not row["open"] and not row["same"]:
            raise StepAlreadyCompletedError(run_id, step_key, row["last_attempt"])

    async def record_skipped_step(
        self, *, run_id: UUID, step_key: str, step_type: str, reason: str | None, owner: str | None
    ) -> None:
        async def work(transaction: Transaction) -> None:
            await lock_run(transaction, run_id)
            row = await transaction.row(READ_STEP, run_id, step_key, transaction.now)
            now = await self._now(transaction) if row is None else row["now"]
            if row is not None and row["status"] in ("Succeeded", "Failed", "Skipped"):
                if owner is not None and (row["status"], row["started_owner"], row["error_message"]) == (
                    "Skipped",
                    owner,
                    reason,
                ):
                    return
                raise StepAlreadyCompletedError(run_id, step_key)
            owns_claim = False
            if row is not None and owner is not None and _is_live(row):
                owns_claim = row["claim_owned"] and row["claim_token"] == owner
                if not owns_claim:
                    raise ClaimLostError(run_id, step_key)
            if row is not None:
                error = superseded_by(row["last_attempt"] + 1)
                await transaction.execute(ARCHIVE_ATTEMPTS, run_id, [step_key], error, now)
            await transaction.execute(SKIP_STEP, run_id, step_key, step_type, reason, now, owner)
            if owner is not None and not owns_claim:
                await transaction.execute(CLAIM_SKIPPED_STEP, run_id, step_key, owner, now)

        await self._database.transaction("record_skipped_step", work)

    async def _now(self, transaction: Transaction) -> Any:
        return (await transaction.row("SELECT coalesce($1, clock_timestamp())", transaction.now))[0]

    async def get_step(self, *, run_id: UUID, step_key: str) -> FlowStepRecord | None:
        rows = await self._database.shared_reads.rows(GET_STEP, run_id, step_key)
        if not rows:
            return None
        _, *step, attempts = rows[0]
        return step_record(run_id, step, [attempt_record(run_id, one) for one in attempts])

    async def get_step_statuses(self, *, run_id: UUID) -> Mapping[str, StepStatus]:
        rows = await self._database.shared_reads.rows(GET_STEP_STATUSES, run_id)
        return MappingProxyType({row[1]: StepStatus(row[2]) for row in rows})


def _is_live(row: Any) -> bool:
    """Whether the step has a live claim at the row's ``now``."""
    return row["claimed_at"] is not None and (
        row["claim_expires_at"] is None or row["now"] < row["claim_expires_at"]
    )
