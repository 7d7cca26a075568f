"""Step claims and the dispatch ledger on PostgreSQL.

A claim is one upsert of the step's row, under a shared lock on its run. PostgreSQL re-reads a conflicting row
after waiting for it, so exactly one of many concurrent claimants finds the step free; the others write
nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

from flowstore_core import (
    OutcomeUnknownError,
    RunNotFoundError,
    StepClaim,
    StepDispatch,
    StoreUnavailableError,
)
from flowstore_core.batching import REQUEUE
from flowstore_postgres.batch_statement import BatchStatement, Row, decode_flags, with_note, with_single_note
from flowstore_postgres.database import Database
from flowstore_postgres.requests import NO_DISPATCH
from flowstore_postgres.sql_placeholders import in_microseconds

log = logging.getLogger("flowstore_postgres")

# Locks a run. 0: it has ended, 1: it is Running, 2: it is Running and has a stall_bound (migration 12).
RUN_STATE = """(SELECT CASE WHEN status <> 'Running' THEN 0 WHEN stall_bound = '-infinity' THEN 1 ELSE 2 END
            FROM {schema}.runs r WHERE r.run_id = a.run_id FOR SHARE)"""
# The conflict clause of every claim. It takes a step that is open and unclaimed, or whose lease has
# expired; the owner of a live claim gets its own row unchanged.
CLAIM_IF_FREE = """
ON CONFLICT (run_id, step_key) DO UPDATE SET
    claim_token = excluded.claim_token,
    claim_owned = excluded.claim_owned,
    claimed_at = CASE WHEN s.claim_token = excluded.claim_token
                       AND (s.claim_expires_at IS NULL OR s.claim_expires_at > excluded.claimed_at)
                      THEN s.claimed_at ELSE excluded.claimed_at END,
    claim_expires_at = CASE WHEN s.claim_token = excluded.claim_token
                             AND (s.claim_expires_at IS NULL OR s.claim_expires_at > excluded.claimed_at)
                            THEN s.claim_expires_at ELSE excluded.claim_expires_at END,
    started_owner = CASE WHEN s.claim_token = excluded.claim_token
                          AND (s.claim_expires_at IS NULL OR s.claim_expires_at > excluded.claimed_at)
                         THEN s.started_owner END
WHERE (s.status IS NULL OR s.status IN ('Pending', 'Running'))
  AND (s.claimed_at IS NULL OR s.claim_expires_at <= excluded.claimed_at
       OR s.claim_token = excluded.claim_token)
"""
# Fast path: one claim, with deadline $1, virtual now $2, run_id $3, step_key $4, owner $5, lease $6 and the
# token of the call $7. No row means that the claim was not won; TRY_CLAIM_STEP then finds the reason.
TRY_CLAIM_STEP_SINGLE = """
INSERT INTO {schema}.steps AS s
    (run_id, step_key, claim_token, claim_owned, claimed_at, claim_expires_at, stall_noted)
SELECT $3, $4, coalesce($5, to_hex($7::bigint)), $5 IS NOT NULL, now,
       CASE WHEN $6::bigint IS NULL THEN NULL
            WHEN now < {latest} - $6 * {microsecond} THEN now + $6 * {microsecond}
            ELSE {latest} END, has_bound
FROM (SELECT run_id, stall_bound > '-infinity' AS has_bound
      FROM {schema}.runs WHERE run_id = $3 AND status = 'Running' FOR SHARE) run,
     LATERAL (SELECT coalesce($2, clock_timestamp()) AS now WHERE run.run_id = $3) locked
WHERE clock_timestamp() < $1
{claim_if_free}
RETURNING true AS won
""".replace("{claim_if_free}", CLAIM_IF_FREE)
# Any number of claims, in key order. The runs are locked FOR SHARE against completion and cleanup, so
# claims of one run do not block each other. A step that is taken when the statement starts is not tried:
# holder is its owner, or '' if no owner can win. now is read after the lock is taken, so that neither the
# claim nor its lease begins before the run was free.
TRY_CLAIM_STEP = """
WITH guard AS MATERIALIZED (
    SELECT clock_timestamp() < $1 AS before_deadline, coalesce($2, clock_timestamp()) AS began
), requested AS MATERIALIZED (
    SELECT a.*, coalesce(owner, to_hex(call)) AS token, owner IS NOT NULL AS owned,
           {run_state} AS run_state,
           coalesce($2, clock_timestamp()) AS now,
           (SELECT CASE WHEN status IN ('Succeeded', 'Failed', 'Skipped') THEN ''
                        WHEN claim_expires_at <= began THEN NULL
                        WHEN claim_token = coalesce(owner, to_hex(call)) THEN NULL
                        WHEN claim_owned THEN claim_token
                        WHEN claimed_at IS NOT NULL THEN '' END
            FROM {schema}.steps s WHERE s.run_id = a.run_id AND s.step_key = a.step_key) AS holder
    FROM guard, unnest($3::uuid[], $4::text[], $5::text[], $6::bigint[], $7::bigint[])
                WITH ORDINALITY AS a (run_id, step_key, owner, lease, call, n) WHERE before_deadline
), won AS (
    INSERT INTO {schema}.steps AS s
        (run_id, step_key, claim_token, claim_owned, claimed_at, claim_expires_at, stall_noted)
    SELECT run_id, step_key, token, owned, now,
           CASE WHEN lease IS NULL THEN NULL
                WHEN now < {latest} - lease * {microsecond} THEN now + lease * {microsecond}
                ELSE {latest} END,
           run_state = 2
    FROM requested WHERE run_state > 0 AND holder IS NULL
    {claim_if_free}
    RETURNING run_id, step_key
)
SELECT before_deadline, every,
       CASE WHEN NOT every THEN (SELECT array_agg(run_state > 0 ORDER BY n) FROM requested) END AS open,
       CASE WHEN NOT every THEN (SELECT array_agg(holder ORDER BY n) FROM requested) END AS holder,
       CASE WHEN NOT every THEN (SELECT array_agg(run_id) FROM won) END AS run_ids,
       CASE WHEN NOT every THEN (SELECT array_agg(step_key) FROM won) END AS step_keys
FROM guard, (SELECT count(*) = cardinality($3::uuid[]) AS every FROM won) won
""".replace("{claim_if_free}", CLAIM_IF_FREE).replace("{run_state}", RUN_STATE)
# Releases the claim of a cancelled call unless another call has claimed the step since (CON-4).
COMPENSATE_CLAIM = """
UPDATE {schema}.steps SET claim_token = NULL, claim_owned = NULL, claimed_at = NULL, claim_expires_at = NULL
WHERE run_id = $1 AND step_key = $2 AND claim_token = to_hex($3::bigint) RETURNING true
"""

RELEASE_STEP_CLAIM = """
WITH guard AS MATERIALIZED (SELECT clock_timestamp() < $1 AS before_deadline, $2::timestamptz AS now),
released AS (
    UPDATE {schema}.steps s
    SET claim_token = NULL, claim_owned = NULL, claimed_at = NULL, claim_expires_at = NULL
    FROM guard, unnest($3::uuid[], $4::text[], $5::text[]) AS a (run_id, step_key, owner)
    WHERE before_deadline AND s.run_id = a.run_id AND s.step_key = a.step_key AND claimed_at IS NOT NULL
      AND (a.owner IS NULL OR claim_owned AND claim_token = a.owner)
)
SELECT before_deadline FROM guard
"""

RENEW_STEP_CLAIM = """
WITH guard AS MATERIALIZED (SELECT clock_timestamp() < $1 AS before_deadline),
renewed AS (
    UPDATE {schema}.steps s
    SET claim_expires_at = greatest(claim_expires_at, CASE
            WHEN coalesce($2, clock_timestamp()) < {latest} - lease * {microsecond}
            THEN coalesce($2, clock_timestamp()) + lease * {microsecond} ELSE {latest} END)
    FROM guard, unnest($3::uuid[], $4::text[], $5::text[], $6::bigint[])
                WITH ORDINALITY AS a (run_id, step_key, owner, lease, n)
    WHERE before_deadline AND s.run_id = a.run_id AND s.step_key = a.step_key AND claim_owned
      AND claim_token = a.owner AND claim_expires_at > coalesce($2, clock_timestamp())
    RETURNING n, s.run_id, s.step_key
)
SELECT before_deadline, every, CASE WHEN NOT every THEN (SELECT array_agg(n) FROM renewed) END AS renewed
FROM guard, (SELECT count(*) = cardinality($3::uuid[]) AS every FROM renewed) renewed
"""

GET_CLAIMED_STEP_KEYS = """
SELECT step_key FROM {schema}.steps
WHERE run_id = $1 AND claimed_at IS NOT NULL
  AND (claim_expires_at IS NULL OR claim_expires_at > coalesce($2, clock_timestamp()))
  AND (status IS NULL OR status IN ('Pending', 'Running'))
"""
GET_STEP_CLAIMS = """
SELECT step_key, claim_token, claim_owned, claimed_at, claim_expires_at FROM {schema}.steps
WHERE run_id = $1 AND claimed_at IS NOT NULL ORDER BY step_key
"""

DISPATCH_IF_FREE = """
ON CONFLICT (run_id, step_key) DO UPDATE SET
    dispatch_token = excluded.dispatch_token,
    dispatched_at = excluded.dispatched_at,
    due_at = excluded.due_at
WHERE (s.status IS NULL OR s.status IN ('Pending', 'Running')) AND s.dispatched_at IS NULL
"""
TRY_RECORD_DISPATCH = """
WITH guard AS MATERIALIZED (
    SELECT clock_timestamp() < $1 AS before_deadline, coalesce($2, clock_timestamp()) AS now
), requested AS MATERIALIZED (
    SELECT a.*, {run_state} AS run_state
    FROM guard, unnest($3::uuid[], $4::text[], $5::bigint[], $6::timestamptz[])
                WITH ORDINALITY AS a (run_id, step_key, token, due_at, n) WHERE before_deadline
), won AS (
    INSERT INTO {schema}.steps AS s (run_id, step_key, dispatch_token, dispatched_at, due_at, stall_noted)
    SELECT run_id, step_key, token, now, due_at, run_state = 2 FROM guard, requested WHERE run_state > 0
    {dispatch_if_free}
    RETURNING run_id, step_key, dispatch_token
)
SELECT before_deadline, every,
       CASE WHEN NOT every THEN (SELECT array_agg(run_state > 0 ORDER BY n) FROM requested) END AS open,
       CASE WHEN NOT every THEN (SELECT array_agg(dispatch_token) FROM won) END AS won
FROM guard, (SELECT count(*) = cardinality($3::uuid[]) AS every FROM won) won
""".replace("{dispatch_if_free}", DISPATCH_IF_FREE).replace("{run_state}", RUN_STATE)
TRY_RECORD_DISPATCH_SINGLE = """
INSERT INTO {schema}.steps AS s (run_id, step_key, dispatch_token, dispatched_at, due_at, stall_noted)
SELECT $3, $4, $5, now, $6, has_bound
FROM (SELECT run_id, stall_bound > '-infinity' AS has_bound
      FROM {schema}.runs WHERE run_id = $3 AND status = 'Running' FOR SHARE) run,
     LATERAL (SELECT coalesce($2, clock_timestamp()) AS now WHERE run.run_id = $3) locked
WHERE clock_timestamp() < $1
{dispatch_if_free}
RETURNING true AS won
""".replace("{dispatch_if_free}", DISPATCH_IF_FREE)
# With the queue, priority, step_type and input of the attempts to come (QUE-7). It leaves table pending to
# the trigger, whose snapshot shows a waiter that was registered while this statement waited for the run.
TRY_RECORD_QUEUED_DISPATCH = """
WITH guard AS MATERIALIZED (
    SELECT clock_timestamp() < $1 AS before_deadline, coalesce($2, clock_timestamp()) AS now
), requested AS MATERIALIZED (
    SELECT a.*, {run_state} AS run_state
    FROM guard, unnest($3::uuid[], $4::text[], $5::bigint[], $6::timestamptz[], $7::text[], $8::bigint[],
                       $9::text[], $10::text[])
                WITH ORDINALITY AS a (run_id, step_key, token, due_at, queue, priority, step_type,
                                         input_json, n)
    WHERE before_deadline
), won AS (
    INSERT INTO {schema}.steps AS s (run_id, step_key, dispatch_token, dispatched_at, due_at, dispatch_queue,
                                     dispatch_priority, dispatch_step_type, dispatch_input_json,
                                     pending_writes, stall_noted)
    SELECT run_id, step_key, token, now, due_at, queue, priority, step_type, input_json, 0, false
    FROM guard, requested WHERE run_state > 0
    {dispatch_if_free}
    RETURNING run_id, step_key, dispatch_token
)
SELECT before_deadline, every,
       CASE WHEN NOT every THEN (SELECT array_agg(run_state > 0 ORDER BY n) FROM requested) END AS open,
       CASE WHEN NOT every THEN (SELECT array_agg(dispatch_token) FROM won) END AS won
FROM guard, (SELECT count(*) = cardinality($3::uuid[]) AS every FROM won) won
""".replace("{run_state}", RUN_STATE).replace(
    "{dispatch_if_free}",
    DISPATCH_IF_FREE.replace(
        "due_at = excluded.due_at",
        "due_at = excluded.due_at, dispatch_queue = excluded.dispatch_queue, "
        "dispatch_priority = excluded.dispatch_priority, dispatch_step_type = excluded.dispatch_step_type, "
        "dispatch_input_json = excluded.dispatch_input_json, "
        "pending_writes = coalesce(s.pending_writes, 0)",
    ),
)
COMPENSATE_DISPATCH = """
UPDATE {schema}.steps
SET dispatch_token = NULL, {no_dispatch}
WHERE run_id = $1 AND step_key = $2 AND dispatch_token = $3 AND dispatched_at IS NOT NULL RETURNING true
""".replace("{no_dispatch}", NO_DISPATCH)

ANNOTATE_DISPATCH = """
WITH guard AS MATERIALIZED (SELECT clock_timestamp() < $1 AS before_deadline, $2::timestamptz AS now),
annotated AS (
    UPDATE {schema}.steps s SET dispatch_job_id = a.job_id
    FROM guard, unnest($3::uuid[], $4::text[], $5::text[]) AS a (run_id, step_key, job_id)
    WHERE before_deadline AND s.run_id = a.run_id AND s.step_key = a.step_key AND dispatched_at IS NOT NULL
)
SELECT before_deadline FROM guard
"""
ANNOTATE_DISPATCH_SINGLE = """
UPDATE {schema}.steps SET dispatch_job_id = $5
WHERE clock_timestamp() < $1 AND $2::timestamptz IS NULL
  AND run_id = $3 AND step_key = $4 AND dispatched_at IS NOT NULL
RETURNING true AS done
"""

RELEASE_DISPATCH = """
WITH guard AS MATERIALIZED (SELECT clock_timestamp() < $1 AS before_deadline, $2::timestamptz AS now),
released AS (
    UPDATE {schema}.steps s SET {no_dispatch}
    FROM guard, unnest($3::uuid[], $4::text[]) AS a (run_id, step_key)
    WHERE before_deadline AND s.run_id = a.run_id AND s.step_key = a.step_key AND dispatched_at IS NOT NULL
)
SELECT before_deadline FROM guard
""".replace("{no_dispatch}", NO_DISPATCH)

GET_DISPATCHES = """
SELECT step_key, dispatched_at, due_at, dispatch_job_id, dispatch_queue, dispatch_priority,
       dispatch_step_type, dispatch_input_json
FROM {schema}.steps
WHERE run_id = $1 AND dispatched_at IS NOT NULL ORDER BY step_key
"""


@dataclass(frozen=True, slots=True)
class ClaimResult:
    """The result of a claim or a dispatch."""

    open: bool | None
    """Whether the run is Running; None if the run does not exist."""
    won: bool
    holder: str | None = None
    """The owner of the claim if it was lost; '' if no owner can win it, None if unknown."""


CLAIMED = ClaimResult(True, True)
ALREADY_CLAIMED = ClaimResult(True, False, "")


def _decode_claims(rows: Sequence[Row], found: Any) -> list[ClaimResult]:
    if found["every"]:
        return [CLAIMED] * len(rows)
    keys = set(zip(found["run_ids"] or (), found["step_keys"] or (), strict=True))
    return [
        CLAIMED if row[:2] in keys else ClaimResult(is_open, False, holder)
        for row, is_open, holder in zip(rows, found["open"], found["holder"], strict=True)
    ]


def _coalesce_claim(first: Row, result: ClaimResult, later: Row) -> ClaimResult:
    """The result of a later claim of the same step in a batch, derived from that of the first."""
    owner = later[2]
    if result.won:
        return ALREADY_CLAIMED if owner is None or owner != first[2] else result
    if not result.open:
        return result
    # The later claim may come from the holder itself, so it is sent.
    requeue: ClaimResult = REQUEUE
    return requeue if result.holder is None or owner == result.holder else ALREADY_CLAIMED


def _decode_dispatches(rows: Sequence[Row], found: Any) -> list[ClaimResult]:
    if found["every"]:
        return [CLAIMED] * len(rows)
    won = set(found["won"] or ())
    return [
        CLAIMED if row[2] in won else ClaimResult(is_open, False)
        for row, is_open in zip(rows, found["open"], strict=True)
    ]


def _coalesce_dispatch(first: Row, result: ClaimResult, later: Row) -> ClaimResult:
    return ALREADY_CLAIMED if result.won else result


def _input_size(row: Row) -> int:
    return len(row[7] or "")


def _to_result(row: Row, result: ClaimResult) -> bool:
    if result.open is None:
        raise RunNotFoundError(row[0])
    return result.won


CLAIM = BatchStatement(
    operation="try_claim_step",
    batch_sql=with_note(TRY_CLAIM_STEP, "won"),
    single_sql=with_single_note(TRY_CLAIM_STEP_SINGLE),
    decode_batch=_decode_claims,
    decode_probe=lambda row: CLAIMED,
    token_column=4,
    coalesce=_coalesce_claim,
    to_result=_to_result,
)
RELEASE = BatchStatement(operation="release_step_claim", batch_sql=with_note(RELEASE_STEP_CLAIM))
RENEW = BatchStatement(
    operation="renew_step_claim",
    batch_sql=with_note(RENEW_STEP_CLAIM, "renewed"),
    decode_batch=decode_flags("renewed"),
    decode_probe=lambda row: True,
)
DISPATCH = BatchStatement(
    operation="try_record_dispatch",
    batch_sql=with_note(TRY_RECORD_DISPATCH, "won"),
    single_sql=with_single_note(TRY_RECORD_DISPATCH_SINGLE),
    decode_batch=_decode_dispatches,
    decode_probe=lambda row: CLAIMED,
    coalesce=_coalesce_dispatch,
    to_result=_to_result,
)
QUEUED_DISPATCH = BatchStatement(
    operation="try_record_dispatch",
    batch_sql=with_note(TRY_RECORD_QUEUED_DISPATCH, "won"),
    decode_batch=_decode_dispatches,
    decode_probe=lambda row: CLAIMED,
    coalesce=_coalesce_dispatch,
    to_result=_to_result,
    size_of=_input_size,
)
ANNOTATE = BatchStatement(
    operation="annotate_dispatch",
    batch_sql=with_note(ANNOTATE_DISPATCH),
    single_sql=with_single_note(ANNOTATE_DISPATCH_SINGLE),
)
DISPATCH_RELEASE = BatchStatement(operation="release_dispatch", batch_sql=with_note(RELEASE_DISPATCH))


class Claims:
    """The contract of these operations is in flowstore_core/claims.py."""

    _database: Database

    def try_claim_step(
        self, *, run_id: UUID, step_key: str, owner: str | None, lease: timedelta | None = None
    ) -> Coroutine[Any, Any, bool]:
        if owner is not None:
            # The owner may have held the claim before the call, so a cancelled call is not compensated for:
            # the owner claims again, or the lease expires.
            duration = None if lease is None else in_microseconds(lease)
            owned_row = (run_id, step_key, owner, duration, self._database.new_token())
            return self._database.write(CLAIM, owned_row)
        row = (run_id, step_key, None, None, self._database.new_token())
        return self._database.write(CLAIM, row, partial(self._compensate, CLAIM, COMPENSATE_CLAIM, row))

    async def _compensate(
        self, statement: BatchStatement, sql: str, row: Row, result: ClaimResult | OutcomeUnknownError
    ) -> None:
        key = (row[0], row[1], row[statement.token_column])
        if isinstance(result, OutcomeUnknownError):
            await self._database.compensate(sql, *key, unacked=self._database.unacked_statements(result))
        elif result.won:
            await self._database.compensate(sql, *key)

    async def release_step_claim(self, *, run_id: UUID, step_key: str, owner: str | None) -> None:
        await self._database.write(RELEASE, (run_id, step_key, owner))

    async def renew_step_claim(self, *, run_id: UUID, step_key: str, owner: str, lease: timedelta) -> bool:
        renewed: bool = await self._database.write(RENEW, (run_id, step_key, owner, in_microseconds(lease)))
        return renewed

    async def renew_step_claims(
        self, *, claims: Sequence[tuple[UUID, str, str]], lease: timedelta
    ) -> Sequence[bool]:
        # The writer sends them in one statement, or in a few.
        duration = in_microseconds(lease)
        calls = [self._database.write(RENEW, (*claim, duration)) for claim in claims]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return tuple(answer is True for answer in answers)

    async def get_claimed_step_keys(self, *, run_id: UUID) -> frozenset[str]:
        rows = await self._database.read(GET_CLAIMED_STEP_KEYS, run_id, self._database.now())
        return frozenset(row[0] for row in rows)

    async def get_step_claims(self, *, run_id: UUID) -> Sequence[StepClaim]:
        rows = await self._database.read(GET_STEP_CLAIMS, run_id)
        return tuple(_claim_record(run_id, row) for row in rows)

    def try_record_dispatch(
        self,
        *,
        run_id: UUID,
        step_key: str,
        due_at: datetime | None,
        queue: str | None = None,
        priority: int = 0,
        step_type: str | None = None,
        input_json: str | None = None,
    ) -> Coroutine[Any, Any, bool]:
        statement = DISPATCH
        row: Row = (run_id, step_key, self._database.new_token(), due_at)
        if queue is not None:
            statement = QUEUED_DISPATCH
            row = (*row, queue, priority, step_type, input_json)
        return self._database.write(
            statement, row, partial(self._compensate, statement, COMPENSATE_DISPATCH, row)
        )

    async def annotate_dispatch(self, *, run_id: UUID, step_key: str, job_id: str) -> None:
        try:
            await self._database.write(ANNOTATE, (run_id, step_key, job_id))
        except StoreUnavailableError as error:
            log.warning(
                "the job id of a dispatch was not stored: %s",
                error,
                extra={"flowstore.operation": "annotate_dispatch"},
            )

    async def release_dispatch(self, *, run_id: UUID, step_key: str) -> None:
        await self._database.write(DISPATCH_RELEASE, (run_id, step_key))

    async def get_dispatched_step_keys(self, *, run_id: UUID) -> frozenset[str]:
        return frozenset(one.step_key for one in await self.get_dispatches(run_id=run_id))

    async def get_dispatches(self, *, run_id: UUID) -> Sequence[StepDispatch]:
        rows = await self._database.read(GET_DISPATCHES, run_id)
        return tuple(
            StepDispatch(
                run_id=run_id,
                step_key=row[0],
                dispatched_at=row[1],
                due_at=row[2],
                job_id=row[3],
                queue=row[4],
                priority=row[5] or 0,
                step_type=row[6],
                input_json=row[7],
            )
            for row in rows
        )


def _claim_record(run_id: UUID, row: Any) -> StepClaim:
    return StepClaim(
        run_id=run_id,
        step_key=row["step_key"],
        owner=row["claim_token"] if row["claim_owned"] else None,
        claimed_at=row["claimed_at"],
        expires_at=row["claim_expires_at"],
    )
