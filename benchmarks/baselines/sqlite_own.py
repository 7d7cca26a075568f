"""SQLite, one callable per call, which runs flowstore's own statement for a claim.

It runs on a file of flowstore without a store. The difference to flowstore is Python: validation, group
commit, cancellation with compensation, and the queue of processes.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from random import getrandbits
from uuid import UUID

from benchmarks.baselines.sqlite_callables import CallablePerCall
from benchmarks.workload import StoreRecords, store_url
from flowstore_core import FlowStore, open_store
from flowstore_sqlite.claims import TRY_CLAIM_STEP


class OwnClaim(CallablePerCall):
    """Claims of one caller; a store creates and counts the records."""

    def __init__(self, path: Path, store: FlowStore) -> None:
        super().__init__(path, grouped=False)
        self._records = StoreRecords(store)
        self._tokens = count(getrandbits(62))

    async def try_claim_step(self, run_id: UUID, step_key: str, /) -> bool:
        row = (run_id.bytes, step_key, time.time_ns() // 1000, None, None, next(self._tokens))
        return await self._call(lambda db: db.execute(TRY_CLAIM_STEP, row).rowcount == 1)

    async def add_runs(self, run_ids: Sequence[UUID]) -> None:
        await self._records.add_runs(run_ids)

    async def count_claimed(self, run_ids: Sequence[UUID]) -> int:
        return await self._records.count_claimed(run_ids)


@asynccontextmanager
async def own_claim(path: Path) -> AsyncIterator[OwnClaim]:
    async with open_store(store_url(path)) as store:
        baseline = OwnClaim(path, store)
        try:
            yield baseline
        finally:
            baseline.stop()
