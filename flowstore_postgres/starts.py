"""try_start_step on PostgreSQL: a claim and the start of the next attempt, in one statement.

The fast path is the upsert of a claim (claims.py) with the columns of a started attempt. It covers steps
without an attempt to archive, as at the first start. The slow path is that of record_step_start (steps.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from flowstore_core import RunNotFoundError
from flowstore_core.batching import REQUEUE
from flowstore_core.steps import SUPERSEDED_BY
from flowstore_postgres.batch_statement import BatchStatement, Row
from flowstore_postgres.claims import HOLDER, RUN_STATE, TAKE_CLAIM
from flowstore_postgres.database import Database
from flowstore_postgres.sql_placeholders import in_microseconds
from flowstore_postgres.steps import FIND_STEP_START, START_SLOW_PATH

# As CLAIM_IF_FREE, for steps without an attempt to archive.
START_IF_FREE = f"""
{TAKE_CLAIM.rstrip()}
    status = 'Running', step_type = excluded.step_type, input_json = excluded.input_json,
    job_id = excluded.job_id, output_json = NULL, error_message = NULL, completed_at = NULL,
    started_at = coalesce($2, greatest(excluded.started_at, s.completed_at)),
    first_started_at = coalesce(s.first_started_at, excluded.first_started_at),
    last_attempt = s.last_attempt + 1, reopened = false, rescheduled = false,
    started_owner = excluded.started_owner, started_token = excluded.started_token, closed_token = NULL
WHERE (s.status IS NULL OR s.reopened)
  AND (s.claimed_at IS NULL OR s.claim_expires_at <= excluded.claimed_at
       OR s.claim_token = excluded.claim_token)
"""
STARTED_COLUMNS = """(run_id, step_key, claim_token, claim_owned, claimed_at, claim_expires_at, status,
     step_type, input_json, job_id, started_at, first_started_at, last_attempt, started_owner, started_token,
     stall_noted)"""
# Fast path for one start, with deadline $1, virtual now $2, run_id $3, step_key $4, owner $5, lease $6, the
# token of the call $7, step_type $8, input_json $9 and job_id $10.
TRY_START_STEP_SINGLE = """
INSERT INTO {schema}.steps AS s
    {columns}
SELECT $3, $4, $5, true, now, least(now + $6::bigint * {microsecond}, {latest}), 'Running', $8, $9, $10,
       now, now, 1, $5, $7, has_bound
FROM (SELECT run_id, stall_bound > '-infinity' AS has_bound
      FROM {schema}.runs WHERE run_id = $3 AND status = 'Running' FOR SHARE) run,
     LATERAL (SELECT coalesce($2, clock_timestamp()) AS now WHERE run.run_id = $3) locked
WHERE clock_timestamp() < $1
{start_if_free}
RETURNING last_attempt AS attempt
""".replace("{columns}", STARTED_COLUMNS).replace("{start_if_free}", START_IF_FREE)
# Fast path for any number of starts; see TRY_CLAIM_STEP.
TRY_START_STEP = (
    """
WITH guard AS MATERIALIZED (
    SELECT clock_timestamp() < $1 AS before_deadline, coalesce($2, clock_timestamp()) AS began
), requested AS MATERIALIZED (
    SELECT a.*, {run_state} AS run_state, coalesce($2, clock_timestamp()) AS now, {holder}
    FROM guard, unnest($3::uuid[], $4::text[], $5::text[], $6::bigint[], $7::bigint[], $8::text[], $9::text[],
                       $10::text[])
                WITH ORDINALITY AS a (run_id, step_key, owner, lease, call, step_type, input_json, job_id, n)
    WHERE before_deadline
), started AS (
    INSERT INTO {schema}.steps AS s
        {columns}
    SELECT run_id, step_key, owner, true, now, least(now + lease * {microsecond}, {latest}), 'Running',
           step_type, input_json, job_id, now, now, 1, owner, call, run_state = 2
    FROM requested WHERE run_state > 0 AND holder IS NULL
    {start_if_free}
    RETURNING run_id, step_key, last_attempt
)
SELECT before_deadline, started.*, requested.*
FROM guard,
     (SELECT array_agg(run_id) AS run_ids, array_agg(step_key) AS step_keys,
             array_agg(last_attempt) AS attempts FROM started) started,
     (SELECT array_agg(run_state > 0 ORDER BY n) AS open, array_agg(holder ORDER BY n) AS holder
      FROM requested) requested
""".replace("{columns}", STARTED_COLUMNS)
    .replace("{start_if_free}", START_IF_FREE)
    .replace("{run_state}", RUN_STATE)
    .replace("{holder}", HOLDER)
)
OWNED = """coalesce(claim_owned AND claim_token = $8
                    AND (claim_expires_at IS NULL OR claim_expires_at > now), false)"""
CLAIM_FACTS = """
           coalesce(status IN ('Succeeded', 'Failed', 'Skipped'), false) AS finished,
           {owned} AS owned,
           {owned} OR claimed_at IS NULL OR coalesce(claim_expires_at <= now, false) AS claimed,
           {owned} AND coalesce(status = 'Running' AND started_owner = $8, false) AS repeated
""".replace("{owned}", OWNED)
CLAIM_COLUMNS = """
        claim_token = $8, claim_owned = true,
        claimed_at = CASE WHEN v.owned THEN s.claimed_at ELSE v.now END,
        claim_expires_at = CASE WHEN v.owned THEN s.claim_expires_at
                                ELSE least(v.now + $11::bigint * {microsecond}, {latest}) END,
       """
# Any start, and the reason of a refusal. As RECORD_STEP_START_SLOW_PATH, with the lease $11.
TRY_START_STEP_SLOW_PATH = START_SLOW_PATH.replace("{facts}", CLAIM_FACTS).replace("{claim}", CLAIM_COLUMNS)


@dataclass(frozen=True, slots=True)
class StartResult:
    """The result of the fast path."""

    open: bool | None
    """Whether the run is Running; None if the run does not exist."""
    attempt: int | None = None
    """The number of the attempt; None if the fast path did not start one."""
    holder: str | None = None
    """The owner of the claim if the start was refused; '' if no owner can win it, None if unknown."""


def _decode_starts(rows: Sequence[Row], found: Any) -> list[StartResult]:
    keys = zip(found["run_ids"] or (), found["step_keys"] or (), strict=True)
    attempts = dict(zip(keys, found["attempts"] or (), strict=True))
    return [
        StartResult(is_open, attempts.get(row[:2]), holder)
        for row, is_open, holder in zip(rows, found["open"], found["holder"], strict=True)
    ]


def _coalesce_start(first: Row, result: StartResult, later: Row) -> StartResult:
    """The result of a later start of the same step in a batch, derived from that of the first."""
    owner = later[2]
    if result.attempt is not None:
        return result if owner == first[2] else StartResult(True, holder=first[2])
    if not result.open:
        return result
    # The later call may come from the holder itself, so it is sent.
    requeue: StartResult = REQUEUE
    return requeue if result.holder is None or owner == result.holder else result


START_CLAIMED = BatchStatement(
    operation="try_start_step",
    batch_sql=TRY_START_STEP,
    single_sql=TRY_START_STEP_SINGLE,
    decode_batch=_decode_starts,
    probe_sql=FIND_STEP_START,
    decode_probe=lambda row: StartResult(True, row["attempt"]),
    token_column=4,
    coalesce=_coalesce_start,
    size_of=lambda row: len(row[6] or ""),
)


class Starts:
    """The contract of try_start_step is in flowstore_core/claims.py."""

    _database: Database

    async def try_start_step(
        self,
        *,
        run_id: UUID,
        step_key: str,
        step_type: str,
        owner: str,
        lease: timedelta,
        input_json: str | None,
        job_id: str | None,
    ) -> int | None:
        token, duration = self._database.new_token(), in_microseconds(lease)
        while True:
            started: StartResult = await self._database.write(
                START_CLAIMED, (run_id, step_key, owner, duration, token, step_type, input_json, job_id)
            )
            if started.open is None:
                raise RunNotFoundError(run_id)
            if started.attempt is not None:
                return started.attempt
            if not started.open or started.holder is not None:
                return None
            row = await self._database.statement(
                "try_start_step",
                TRY_START_STEP_SLOW_PATH,
                run_id,
                step_key,
                step_type,
                input_json,
                job_id,
                owner,
                token,
                SUPERSEDED_BY,
                duration,
                probe=(FIND_STEP_START, run_id, step_key, token),
            )
            if row["open"] is None:
                raise RunNotFoundError(run_id)
            if row["attempt"] is not None:
                return int(row["attempt"])
            if not row["open"] or row["claimed"] is not None:
                return None
            # The run was deleted and started anew in between, so the step is gone: the fast path applies.
