"""PostgreSQL, one prepared claim with the contract's checks on a held connection.

A single statement that also locks the run against completion and checks that it is Running (RUN-4, CON-1),
respects terminal steps, owners and leases (CLM-5, CLM-6), stores a token for probes, and has no effect after
its deadline (CON-3). There is no store in front of it. This is the minimum latency of a claim of flowstore.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from random import getrandbits
from typing import Any
from uuid import UUID

import asyncpg

from benchmarks.baselines.postgres_tables import Tables

STEPS = """
CREATE TABLE {schema}.claimed_steps (
    run_id           uuid NOT NULL,
    step_key         text COLLATE "C" NOT NULL,
    status           text,
    claim_token      text,
    claim_owned      boolean,
    claimed_at       timestamptz,
    claim_expires_at timestamptz,
    PRIMARY KEY (run_id, step_key)
)
"""
CLAIM = """
INSERT INTO {schema}.claimed_steps AS s
    (run_id, step_key, claim_token, claim_owned, claimed_at, claim_expires_at)
SELECT $2, $3, $4, $5, now, now + $6::interval
FROM (SELECT run_id FROM {schema}.runs WHERE run_id = $2 AND status = 'Running' FOR SHARE) run,
     LATERAL (SELECT clock_timestamp() AS now WHERE run.run_id = $2) locked
WHERE clock_timestamp() < $1
ON CONFLICT (run_id, step_key) DO UPDATE SET
    claim_token = excluded.claim_token, claim_owned = excluded.claim_owned, claimed_at = excluded.claimed_at,
    claim_expires_at = excluded.claim_expires_at
WHERE (s.status IS NULL OR s.status IN ('Pending', 'Running'))
  AND (s.claimed_at IS NULL OR s.claim_expires_at <= excluded.claimed_at)
RETURNING true
"""
COUNT_CLAIMED = """
SELECT count(*) FROM {schema}.claimed_steps WHERE run_id = ANY($1::uuid[]) AND claimed_at IS NOT NULL
"""
ARRIVAL = timedelta(seconds=5)


class CheckedClaim(Tables):
    """Claims of one caller; other calls are not implemented."""

    statement: Any

    async def create(self) -> None:
        await super().create()
        await self._pool.execute(self.sql(STEPS))
        # Like flowstore's prepared connections: a cached generic plan that uses the key.
        await self._pool.execute("SET enable_seqscan = off; SET plan_cache_mode = force_generic_plan")
        self.statement = await self._pool.prepare(self.sql(CLAIM))

    async def try_claim_step(self, run_id: UUID, step_key: str, /) -> bool:
        token = f"{getrandbits(63):x}"
        not_after = datetime.now(UTC) + ARRIVAL
        found = await self.statement.fetchval(not_after, run_id, step_key, token, False, None)
        return found is not None

    async def count_claimed(self, run_ids: Sequence[UUID]) -> int:
        return int(await self._pool.fetchval(self.sql(COUNT_CLAIMED), run_ids))


@asynccontextmanager
async def checked_claim(url: str) -> AsyncIterator[CheckedClaim]:
    connection = await asyncpg.connect(url)
    try:
        baseline = CheckedClaim(connection, "checked")
        await baseline.create()
        yield baseline
    finally:
        await connection.close()
