"""Step claims and the dispatch ledger on PostgreSQL."""

from __future__ import annotations

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
from flowstore_postgres.batched import Batched, Row, read_done
from flowstore_postgres.database import Database, in_microseconds

log = logging.getLogger("flowstore_postgres")

# PostgreSQL re-reads a conflicting row after waiting for it, so of many claimants exactly one sees it
# free; the others write nothing. The owner of a live claim gets its own row back unchanged.
TAKE_CLAIM = """
ON CONFLICT (run_id, step_key) DO UPDATE SET
    claim_token = excluded.claim_token,
    claim_owned = excluded.claim_owned,
    claim_call = CASE WHEN s.claim_token = excluded.claim_token
                       AND (s.claim_expires_at IS NULL OR s.claim_expires_at > excluded.claimed_at)
                      THEN s.claim_call ELSE excluded.claim_call END,
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
# The runs are locked against completion and cleanup (SHARE: claims of one run do not wait for each
# other), then one upsert decides, row by row in the order of the keys. What was lost before the
# statement began is not tried: lost_to says to which owner, '' if no owner can win. now is taken behind
# the lock, because a claim that waited for its run must not begin, nor its lease run, before it was free.
TRY_CLAIM_STEP = """
WITH guard AS MATERIALIZED (
    SELECT clock_timestamp() < $1 AS in_time, coalesce($2, clock_timestamp()) AS began
), asked AS MATERIALIZED (
    SELECT a.*, coalesce(owner, to_hex(call)) AS token, owner IS NOT NULL AS owned,
           (SELECT status = 'Running' FROM {schema}.runs r WHERE r.run_id = a.run_id FOR SHARE) AS open,
           coalesce($2, clock_timestamp()) AS now,
           (SELECT CASE WHEN status IN ('Succeeded', 'Failed', 'Skipped') THEN ''
                        WHEN claim_expires_at <= began THEN NULL
                        WHEN claim_token = coalesce(owner, to_hex(call)) THEN NULL
                        WHEN claim_owned THEN claim_token
                        WHEN claimed_at IS NOT NULL THEN '' END
            FROM {schema}.steps s WHERE s.run_id = a.run_id AND s.step_key = a.step_key) AS lost_to
    FROM guard, unnest($3::uuid[], $4::text[], $5::text[], $6::bigint[], $7::bigint[])
                WITH ORDINALITY AS a (run_id, step_key, owner, lease, call, n) WHERE in_time
), won AS (
    INSERT INTO {schema}.steps AS s
        (run_id, step_key, claim_token, claim_owned, claimed_at, claim_expires_at, claim_call)
    SELECT run_id, step_key, token, owned, now,
           CASE WHEN lease IS NULL THEN NULL
                WHEN now < {latest} - lease * {microsecond} THEN now + lease * {microsecond}
                ELSE {latest} END,
           call
    FROM asked WHERE open AND lost_to IS NULL
    {take}
    RETURNING run_id, step_key
)
SELECT in_time, every,
       CASE WHEN NOT every THEN (SELECT array_agg(open ORDER BY n) FROM asked) END AS open,
       CASE WHEN NOT every THEN (SELECT array_agg(lost_to ORDER BY n) FROM asked) END AS lost_to,
       CASE WHEN NOT every THEN (SELECT array_agg(run_id) FROM won) END AS run_ids,
       CASE WHEN NOT every THEN (SELECT array_agg(step_key) FROM won) END AS step_keys
FROM guard, (SELECT count(*) = cardinality($3::uuid[]) AS every FROM won) won
""".replace("{take}", TAKE_CLAIM)
# The same for a claim that goes alone, as plain as can be. No row: it was not won, and why is for the above.
TRY_CLAIM_STEP_ALONE = """
INSERT INTO {schema}.steps AS s
    (run_id, step_key, claim_token, claim_owned, claimed_at, claim_expires_at, claim_call)
SELECT $3, $4, coalesce($5, to_hex($7::bigint)), $5 IS NOT NULL, now,
       CASE WHEN $6::bigint IS NULL THEN NULL
            WHEN now < {latest} - $6 * {microsecond} THEN now + $6 * {microsecond}
            ELSE {latest} END, $7
FROM (SELECT run_id FROM {schema}.runs WHERE run_id = $3 AND status = 'Running' FOR SHARE) run,
     LATERAL (SELECT coalesce($2, clock_timestamp()) AS now WHERE run.run_id = $3) locked
WHERE clock_timestamp() < $1
{take}
RETURNING true AS won
""".replace("{take}", TAKE_CLAIM)
# By the call's own token, which stays when the claim goes: the owner may have held it from before, and what
# was won may have been released since, or its run be over, so that asking again would be answered no.
# A call of an owner that found its claim there has changed nothing, and may be made again.
FIND_CLAIM = "SELECT FROM {schema}.steps WHERE run_id = $1 AND step_key = $2 AND claim_call = $3"
# What a cancelled call had won goes, whoever claimed since keeps (CON-4).
GIVE_BACK_CLAIM = """
UPDATE {schema}.steps SET claim_token = NULL, claim_owned = NULL, claimed_at = NULL, claim_expires_at = NULL
WHERE run_id = $1 AND step_key = $2 AND claim_token = to_hex($3::bigint) RETURNING true
"""

RELEASE_STEP_CLAIM = """
WITH guard AS MATERIALIZED (SELECT clock_timestamp() < $1 AS in_time, $2::timestamptz AS now),
released AS (
    UPDATE {schema}.steps s
    SET claim_token = NULL, claim_owned = NULL, claimed_at = NULL, claim_expires_at = NULL,
        release_token = a.token
    FROM guard, unnest($3::uuid[], $4::text[], $5::bigint[], $6::text[]) AS a (run_id, step_key, token, owner)
    WHERE in_time AND s.run_id = a.run_id AND s.step_key = a.step_key AND claimed_at IS NOT NULL
      AND (a.owner IS NULL OR claim_owned AND claim_token = a.owner)
)
SELECT in_time FROM guard
"""
FIND_RELEASE = "SELECT FROM {schema}.steps WHERE run_id = $1 AND step_key = $2 AND release_token = $3"

RENEW_STEP_CLAIM = """
WITH guard AS MATERIALIZED (SELECT clock_timestamp() < $1 AS in_time),
renewed AS (
    UPDATE {schema}.steps s
    SET claim_expires_at = greatest(claim_expires_at, CASE
            WHEN coalesce($2, clock_timestamp()) < {latest} - lease * {microsecond}
            THEN coalesce($2, clock_timestamp()) + lease * {microsecond} ELSE {latest} END)
    FROM guard, unnest($3::uuid[], $4::text[], $5::text[], $6::bigint[])
                WITH ORDINALITY AS a (run_id, step_key, owner, lease, n)
    WHERE in_time AND s.run_id = a.run_id AND s.step_key = a.step_key AND claim_owned
      AND claim_token = a.owner AND claim_expires_at > coalesce($2, clock_timestamp())
    RETURNING n
)
SELECT in_time, every, CASE WHEN NOT every THEN (SELECT array_agg(n) FROM renewed) END AS renewed
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

TAKE_DISPATCH = """
ON CONFLICT (run_id, step_key) DO UPDATE SET
    dispatch_token = excluded.dispatch_token,
    dispatched_at = excluded.dispatched_at,
    due_at = excluded.due_at
WHERE (s.status IS NULL OR s.status IN ('Pending', 'Running')) AND s.dispatched_at IS NULL
"""
TRY_RECORD_DISPATCH = """
WITH guard AS MATERIALIZED (
    SELECT clock_timestamp() < $1 AS in_time, coalesce($2, clock_timestamp()) AS now
), asked AS MATERIALIZED (
    SELECT a.*, (SELECT status = 'Running' FROM {schema}.runs r WHERE r.run_id = a.run_id FOR SHARE) AS open
    FROM guard, unnest($3::uuid[], $4::text[], $5::bigint[], $6::timestamptz[])
                WITH ORDINALITY AS a (run_id, step_key, token, due_at, n) WHERE in_time
), won AS (
    INSERT INTO {schema}.steps AS s (run_id, step_key, dispatch_token, dispatched_at, due_at)
    SELECT run_id, step_key, token, now, due_at FROM guard, asked WHERE open
    {take}
    RETURNING dispatch_token
)
SELECT in_time, every,
       CASE WHEN NOT every THEN (SELECT array_agg(open ORDER BY n) FROM asked) END AS open,
       CASE WHEN NOT every THEN (SELECT array_agg(dispatch_token) FROM won) END AS won
FROM guard, (SELECT count(*) = cardinality($3::uuid[]) AS every FROM won) won
""".replace("{take}", TAKE_DISPATCH)
TRY_RECORD_DISPATCH_ALONE = """
INSERT INTO {schema}.steps AS s (run_id, step_key, dispatch_token, dispatched_at, due_at)
SELECT $3, $4, $5, now, $6
FROM (SELECT run_id FROM {schema}.runs WHERE run_id = $3 AND status = 'Running' FOR SHARE) run,
     LATERAL (SELECT coalesce($2, clock_timestamp()) AS now WHERE run.run_id = $3) locked
WHERE clock_timestamp() < $1
{take}
RETURNING true AS won
""".replace("{take}", TAKE_DISPATCH)
# The token stays when the dispatch goes, as with claims.
FIND_DISPATCH = "SELECT FROM {schema}.steps WHERE run_id = $1 AND step_key = $2 AND dispatch_token = $3"
GIVE_BACK_DISPATCH = """
UPDATE {schema}.steps
SET dispatch_token = NULL, dispatched_at = NULL, due_at = NULL, dispatch_job_id = NULL
WHERE run_id = $1 AND step_key = $2 AND dispatch_token = $3 AND dispatched_at IS NOT NULL RETURNING true
"""

ANNOTATE_DISPATCH = """
WITH guard AS MATERIALIZED (SELECT clock_timestamp() < $1 AS in_time, $2::timestamptz AS now),
annotated AS (
    UPDATE {schema}.steps s SET dispatch_job_id = a.job_id
    FROM guard, unnest($3::uuid[], $4::text[], $5::text[]) AS a (run_id, step_key, job_id)
    WHERE in_time AND s.run_id = a.run_id AND s.step_key = a.step_key AND dispatched_at IS NOT NULL
)
SELECT in_time FROM guard
"""
ANNOTATE_DISPATCH_ALONE = """
UPDATE {schema}.steps SET dispatch_job_id = $5
WHERE clock_timestamp() < $1 AND $2::timestamptz IS NULL
  AND run_id = $3 AND step_key = $4 AND dispatched_at IS NOT NULL
RETURNING true AS done
"""
FIND_ANNOTATION = "SELECT FROM {schema}.steps WHERE run_id = $1 AND step_key = $2 AND dispatch_job_id = $3"

RELEASE_DISPATCH = """
WITH guard AS MATERIALIZED (SELECT clock_timestamp() < $1 AS in_time, $2::timestamptz AS now),
released AS (
    UPDATE {schema}.steps s SET dispatched_at = NULL, due_at = NULL, dispatch_job_id = NULL,
                                release_token = a.token
    FROM guard, unnest($3::uuid[], $4::text[], $5::bigint[]) AS a (run_id, step_key, token)
    WHERE in_time AND s.run_id = a.run_id AND s.step_key = a.step_key AND dispatched_at IS NOT NULL
)
SELECT in_time FROM guard
"""

GET_DISPATCHES = """
SELECT step_key, dispatched_at, due_at, dispatch_job_id FROM {schema}.steps
WHERE run_id = $1 AND dispatched_at IS NOT NULL ORDER BY step_key
"""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a claim or a dispatch."""

    open: bool | None
    """Whether the run is; None if there is no such run."""
    won: bool
    lost_to: str | None = None


WON = Answer(True, True)
LOST = Answer(True, False, "")


def _read_claims(rows: Sequence[Row], found: Any) -> list[Answer]:
    if found["every"]:
        return [WON] * len(rows)
    keys = set(zip(found["run_ids"] or (), found["step_keys"] or (), strict=True))
    return [
        WON if row[:2] in keys else Answer(is_open, False, lost_to)
        for row, is_open, lost_to in zip(rows, found["open"], found["lost_to"], strict=True)
    ]


def _share_claim(first: Row, answer: Answer, later: Row) -> Answer:
    """What a claim gets that was made at the same moment as the first one of its step."""
    owner = later[2]
    if answer.won:
        return LOST if owner is None or owner != first[2] else answer
    if not answer.open:
        return answer
    # Nobody here knows whether it was lost to the later one's own owner.
    again: Answer = REQUEUE
    return again if answer.lost_to is None or owner == answer.lost_to else LOST


def _read_dispatches(rows: Sequence[Row], found: Any) -> list[Answer]:
    if found["every"]:
        return [WON] * len(rows)
    won = set(found["won"] or ())
    return [
        WON if row[2] in won else Answer(is_open, False)
        for row, is_open in zip(rows, found["open"], strict=True)
    ]


def _share_dispatch(first: Row, answer: Answer, later: Row) -> Answer:
    return LOST if answer.won else answer


def _tell(row: Row, answer: Answer) -> bool:
    if answer.open is None:
        raise RunNotFoundError(row[0])
    return answer.won


CLAIM = Batched(
    operation="try_claim_step",
    statement=TRY_CLAIM_STEP,
    alone=TRY_CLAIM_STEP_ALONE,
    read=_read_claims,
    find=FIND_CLAIM,
    found=lambda row: WON,
    token=4,
    coalesce=_share_claim,
    to_result=_tell,
)
RELEASE = Batched(operation="release_step_claim", statement=RELEASE_STEP_CLAIM, find=FIND_RELEASE)
RENEW = Batched(operation="renew_step_claim", statement=RENEW_STEP_CLAIM, read=read_done("renewed"))
DISPATCH = Batched(
    operation="try_record_dispatch",
    statement=TRY_RECORD_DISPATCH,
    alone=TRY_RECORD_DISPATCH_ALONE,
    read=_read_dispatches,
    find=FIND_DISPATCH,
    found=lambda row: WON,
    coalesce=_share_dispatch,
    to_result=_tell,
)
ANNOTATE = Batched(
    operation="annotate_dispatch",
    statement=ANNOTATE_DISPATCH,
    alone=ANNOTATE_DISPATCH_ALONE,
    find=FIND_ANNOTATION,
)
FREE = Batched(operation="release_dispatch", statement=RELEASE_DISPATCH, find=FIND_RELEASE)


class Claims:
    _database: Database

    def try_claim_step(
        self, *, run_id: UUID, step_key: str, owner: str | None, lease: timedelta | None
    ) -> Coroutine[Any, Any, bool]:
        if owner is not None:
            # The claim may be the owner's from before, so nothing is given back: it asks again, or lets
            # it expire.
            length = None if lease is None else in_microseconds(lease)
            mine = (run_id, step_key, owner, length, self._database.new_token())
            return self._database.write(CLAIM, mine)
        row = (run_id, step_key, None, None, self._database.new_token())
        return self._database.write(CLAIM, row, partial(self._give_back, CLAIM, GIVE_BACK_CLAIM, row))

    async def _give_back(
        self, batched: Batched, statement: str, row: Row, answer: Answer | OutcomeUnknownError
    ) -> None:
        key = (row[0], row[1], row[batched.token])
        if isinstance(answer, OutcomeUnknownError):
            await self._database.give_back(statement, *key, lost=self._database.unacknowledged(answer))
        elif answer.won:
            await self._database.give_back(statement, *key)

    async def release_step_claim(self, *, run_id: UUID, step_key: str, owner: str | None) -> None:
        await self._database.write(RELEASE, (run_id, step_key, self._database.new_token(), owner))

    async def renew_step_claim(self, *, run_id: UUID, step_key: str, owner: str, lease: timedelta) -> bool:
        renewed: bool = await self._database.write(RENEW, (run_id, step_key, owner, in_microseconds(lease)))
        return renewed

    async def get_claimed_step_keys(self, *, run_id: UUID) -> frozenset[str]:
        rows = await self._database.read(GET_CLAIMED_STEP_KEYS, run_id, self._database.now())
        return frozenset(row[0] for row in rows)

    async def get_step_claims(self, *, run_id: UUID) -> Sequence[StepClaim]:
        rows = await self._database.read(GET_STEP_CLAIMS, run_id)
        return tuple(_claim_record(run_id, row) for row in rows)

    def try_record_dispatch(
        self, *, run_id: UUID, step_key: str, due_at: datetime | None
    ) -> Coroutine[Any, Any, bool]:
        row = (run_id, step_key, self._database.new_token(), due_at)
        return self._database.write(
            DISPATCH, row, partial(self._give_back, DISPATCH, GIVE_BACK_DISPATCH, row)
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
        await self._database.write(FREE, (run_id, step_key, self._database.new_token()))

    async def get_dispatched_step_keys(self, *, run_id: UUID) -> frozenset[str]:
        return frozenset(one.step_key for one in await self.get_dispatches(run_id=run_id))

    async def get_dispatches(self, *, run_id: UUID) -> Sequence[StepDispatch]:
        rows = await self._database.read(GET_DISPATCHES, run_id)
        return tuple(
            StepDispatch(run_id=run_id, step_key=row[0], dispatched_at=row[1], due_at=row[2], job_id=row[3])
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
