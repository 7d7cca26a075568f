"""PostgreSQL, one prepared INSERT on a held connection: the least latency that a durable claim has."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import asyncpg

from benchmarks.baselines.postgres_tables import Tables
from benchmarks.baselines.postgres_transactions import CLAIM

RETURNING = " RETURNING true"


class PreparedInsert(Tables):
    """Claims of one caller; other calls are not implemented."""

    statement: Any

    async def create(self) -> None:
        await super().create()
        self.statement = await self._pool.prepare(self.sql(CLAIM + RETURNING))

    async def try_claim_step(self, run_id: UUID, step_key: str, /) -> bool:
        return await self.statement.fetchval(run_id, step_key) is not None


@asynccontextmanager
async def prepared_insert(url: str) -> AsyncIterator[PreparedInsert]:
    connection = await asyncpg.connect(url)
    try:
        baseline = PreparedInsert(connection, "prepared")
        await baseline.create()
        yield baseline
    finally:
        await connection.close()
