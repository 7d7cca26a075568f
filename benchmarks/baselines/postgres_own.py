"""PostgreSQL, flowstore's own statement for a single claim, prepared on a kept connection, without a store.

It uses flowstore's tables and the session settings of its prepared connections. The difference to flowstore
is the cost of Python: validation, the check for concurrent calls, and the timeout of the connection.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from random import getrandbits
from typing import Any
from uuid import UUID

import asyncpg

from benchmarks.baselines.postgres_checked import ARRIVAL
from benchmarks.workload import StoreRecords
from flowstore_core import FlowStore, open_store
from flowstore_postgres.batch_statement import with_single_note
from flowstore_postgres.claims import TRY_CLAIM_STEP_SINGLE
from flowstore_postgres.connection import Notes
from flowstore_postgres.prepared_connections import INDEX_ONLY_SETTINGS
from flowstore_postgres.sql_placeholders import fill_in

SCHEMA = "own"


class OwnClaim(StoreRecords):
    """Claims of one caller; a store creates and counts the records."""

    def __init__(self, store: FlowStore, statement: Any) -> None:
        super().__init__(store)
        self._statement = statement
        self._notes = Notes()

    async def try_claim_step(self, run_id: UUID, step_key: str, /) -> bool:
        call = getrandbits(63)
        deadline = datetime.now(UTC) + ARRIVAL
        note = self._notes.next()
        found = await self._statement.fetchval(deadline, None, run_id, step_key, None, None, call, *note)
        return found is not None


@asynccontextmanager
async def own_claim(url: str) -> AsyncIterator[OwnClaim]:
    async with open_store(url, schema=SCHEMA) as store:
        connection = await asyncpg.connect(url)
        try:
            await connection.execute(INDEX_ONLY_SETTINGS)
            statement = await connection.prepare(fill_in(with_single_note(TRY_CLAIM_STEP_SINGLE), SCHEMA))
            yield OwnClaim(store, statement)
        finally:
            await connection.close()
