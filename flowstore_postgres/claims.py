"""Step claims and the dispatch ledger on PostgreSQL."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from flowstore_core import (
    RunNotFoundError,
    StepClaim,
    StepDispatch,
    StoreUnavailableError,
    new_claim_token,
)
from flowstore_core.timeseries import LATEST
from flowstore_postgres.database import Database

log = logging.getLogger("flowstore_postgres")

# The run is locked against completion and cleanup (SHARE: claims of one run do not wait for each
# other), then one upsert decides. PostgreSQL re-reads the conflicting row after waiting for it, so of
# many claimants exactly one sees it free; the others write nothing. The owner of a live claim gets its
# own row back unchanged.
TRY_CLAIM_STEP = """
WITH guard AS MATERIALIZED (
    SELECT clock_timestamp() < $1 AS in_time, coalesce($2, clock_timestamp()) AS now
), run AS MATERIALIZED (
    SELECT status = 'Running' AS open FROM {schema}.runs WHERE run_id = $3 FOR SHARE
), won AS (
    INSERT INTO {schema}.steps AS s
        (run_id, step_key, claim_token, claim_owned, claimed_at, claim_expires_at)
    SELECT $3, $4, $5, $6, now, CASE WHEN $7::interval IS NULL THEN NULL
                                     WHEN now < $8::timestamptz - $7 THEN now + $7 ELSE $8::timestamptz END
    FROM guard, run WHERE in_time AND open
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
    RETURNING true AS won
)
SELECT guard.in_time, run.open, won.won FROM guard LEFT JOIN run ON true LEFT JOIN won ON true
"""
FIND_CLAIM = """
SELECT true AS open, true AS won FROM {schema}.steps
WHERE run_id = $1 AND step_key = $2 AND claim_token = $3
"""

RELEASE_STEP_CLAIM = """
WITH guard AS MATERIALIZED (SELECT clock_timestamp() < $1 AS in_time, $2::timestamptz AS now),
released AS (
    UPDATE {schema}.steps SET claim_token = NULL, claim_owned = NULL, claimed_at = NULL,
                              claim_expires_at = NULL, release_token = $5
    FROM guard
    WHERE in_time AND run_id = $3 AND step_key = $4 AND claimed_at IS NOT NULL
      AND ($6::text IS NULL OR claim_owned AND claim_token = $6)
)
SELECT in_time FROM guard
"""
# What a cancelled call had won goes, whoever claimed since keeps (CON-4).
GIVE_BACK_CLAIM = """
UPDATE {schema}.steps SET claim_token = NULL, claim_owned = NULL, claimed_at = NULL, claim_expires_at = NULL
WHERE run_id = $1 AND step_key = $2 AND claim_token = $3
"""
FIND_RELEASE = """
SELECT true AS in_time FROM {schema}.steps WHERE run_id = $1 AND step_key = $2 AND release_token = $3
"""

RENEW_STEP_CLAIM = """
WITH guard AS MATERIALIZED (SELECT clock_timestamp() < $1 AS in_time),
renewed AS (
    UPDATE {schema}.steps
    SET claim_expires_at = greatest(claim_expires_at, CASE
            WHEN coalesce($2, clock_timestamp()) < $7::timestamptz - $6::interval
            THEN coalesce($2, clock_timestamp()) + $6 ELSE $7::timestamptz END)
    FROM guard
    WHERE in_time AND run_id = $3 AND step_key = $4 AND claim_owned AND claim_token = $5
      AND claim_expires_at > coalesce($2, clock_timestamp())
    RETURNING true AS renewed
)
SELECT guard.in_time, renewed.renewed FROM guard LEFT JOIN renewed ON true
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

TRY_RECORD_DISPATCH = """
WITH guard AS MATERIALIZED (
    SELECT clock_timestamp() < $1 AS in_time, coalesce($2, clock_timestamp()) AS now
), run AS MATERIALIZED (
    SELECT status = 'Running' AS open FROM {schema}.runs WHERE run_id = $3 FOR SHARE
), won AS (
    INSERT INTO {schema}.steps AS s (run_id, step_key, dispatch_token, dispatched_at, due_at)
    SELECT $3, $4, $5, now, $6 FROM guard, run WHERE in_time AND open
    ON CONFLICT (run_id, step_key) DO UPDATE SET
        dispatch_token = excluded.dispatch_token,
        dispatched_at = excluded.dispatched_at,
        due_at = excluded.due_at
    WHERE (s.status IS NULL OR s.status IN ('Pending', 'Running')) AND s.dispatched_at IS NULL
    RETURNING true AS won
)
SELECT guard.in_time, run.open, won.won FROM guard LEFT JOIN run ON true LEFT JOIN won ON true
"""
FIND_DISPATCH = """
SELECT true AS open, true AS won FROM {schema}.steps
WHERE run_id = $1 AND step_key = $2 AND dispatch_token = $3
"""
GIVE_BACK_DISPATCH = """
UPDATE {schema}.steps
SET dispatch_token = NULL, dispatched_at = NULL, due_at = NULL, dispatch_job_id = NULL
WHERE run_id = $1 AND step_key = $2 AND dispatch_token = $3
"""

ANNOTATE_DISPATCH = """
WITH guard AS MATERIALIZED (SELECT clock_timestamp() < $1 AS in_time, $2::timestamptz AS now),
annotated AS (
    UPDATE {schema}.steps SET dispatch_job_id = $5 FROM guard
    WHERE in_time AND run_id = $3 AND step_key = $4 AND dispatched_at IS NOT NULL
)
SELECT in_time FROM guard
"""
FIND_ANNOTATION = """
SELECT true AS in_time FROM {schema}.steps
WHERE run_id = $1 AND step_key = $2 AND dispatch_job_id = $3
"""

RELEASE_DISPATCH = """
WITH guard AS MATERIALIZED (SELECT clock_timestamp() < $1 AS in_time, $2::timestamptz AS now),
released AS (
    UPDATE {schema}.steps SET dispatch_token = NULL, dispatched_at = NULL, due_at = NULL,
                              dispatch_job_id = NULL, release_token = $5
    FROM guard WHERE in_time AND run_id = $3 AND step_key = $4 AND dispatched_at IS NOT NULL
)
SELECT in_time FROM guard
"""

GET_DISPATCHES = """
SELECT step_key, dispatched_at, due_at, dispatch_job_id FROM {schema}.steps
WHERE run_id = $1 AND dispatched_at IS NOT NULL ORDER BY step_key
"""


class Claims:
    _database: Database

    async def try_claim_step(
        self, *, run_id: UUID, step_key: str, owner: str | None, lease: timedelta | None
    ) -> bool:
        token = new_claim_token() if owner is None else owner

        async def give_back(row: Any) -> None:
            if row["won"]:
                await self._database.give_back(GIVE_BACK_CLAIM, run_id, step_key, token)

        row = await self._database.statement(
            "try_claim_step",
            TRY_CLAIM_STEP,
            run_id,
            step_key,
            token,
            owner is not None,
            lease,
            LATEST,
            # An owner asks again; only an owner knows its token, so only one without can have lost it.
            look=(FIND_CLAIM, run_id, step_key, token) if owner is None else None,
            # With an owner the claim may be the owner's from before; it asks again or lets it expire.
            give_back=give_back if owner is None else None,
        )
        if row["open"] is None:
            raise RunNotFoundError(run_id)
        return row["won"] is not None

    async def release_step_claim(self, *, run_id: UUID, step_key: str, owner: str | None) -> None:
        token = uuid4()
        await self._database.statement(
            "release_step_claim",
            RELEASE_STEP_CLAIM,
            run_id,
            step_key,
            token,
            owner,
            look=(FIND_RELEASE, run_id, step_key, token),
        )

    async def renew_step_claim(self, *, run_id: UUID, step_key: str, owner: str, lease: timedelta) -> bool:
        row = await self._database.statement(
            "renew_step_claim", RENEW_STEP_CLAIM, run_id, step_key, owner, lease, LATEST, look=None
        )
        return row["renewed"] is not None

    async def get_claimed_step_keys(self, *, run_id: UUID) -> frozenset[str]:
        rows = await self._database.read(GET_CLAIMED_STEP_KEYS, run_id, self._database.now())
        return frozenset(row[0] for row in rows)

    async def get_step_claims(self, *, run_id: UUID) -> Sequence[StepClaim]:
        rows = await self._database.read(GET_STEP_CLAIMS, run_id)
        return tuple(_claim_record(run_id, row) for row in rows)

    async def try_record_dispatch(self, *, run_id: UUID, step_key: str, due_at: datetime | None) -> bool:
        token = uuid4()

        async def give_back(row: Any) -> None:
            if row["won"]:
                await self._database.give_back(GIVE_BACK_DISPATCH, run_id, step_key, token)

        row = await self._database.statement(
            "try_record_dispatch",
            TRY_RECORD_DISPATCH,
            run_id,
            step_key,
            token,
            due_at,
            look=(FIND_DISPATCH, run_id, step_key, token),
            give_back=give_back,
        )
        if row["open"] is None:
            raise RunNotFoundError(run_id)
        return row["won"] is not None

    async def annotate_dispatch(self, *, run_id: UUID, step_key: str, job_id: str) -> None:
        try:
            await self._database.statement(
                "annotate_dispatch",
                ANNOTATE_DISPATCH,
                run_id,
                step_key,
                job_id,
                look=(FIND_ANNOTATION, run_id, step_key, job_id),
            )
        except StoreUnavailableError as error:
            log.warning("the job id of a dispatch was not stored: %s", error)

    async def release_dispatch(self, *, run_id: UUID, step_key: str) -> None:
        token = uuid4()
        await self._database.statement(
            "release_dispatch",
            RELEASE_DISPATCH,
            run_id,
            step_key,
            token,
            look=(FIND_RELEASE, run_id, step_key, token),
        )

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
