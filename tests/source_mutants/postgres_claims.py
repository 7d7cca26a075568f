"""Faults of claims and the dispatch ledger on PostgreSQL."""

from __future__ import annotations

from datetime import timedelta

from flowstore_core import open_store
from tests.scenes import new_run
from tests.source_mutants import source_mutant
from tests.virtual_clock import VirtualClock

CLAIMS = "flowstore_postgres/claims.py"


@source_mutant(
    "postgresql",
    kind="time",
    clauses=("CLM-6",),
    changes=[
        (
            CLAIMS,
            "AND (s.claimed_at IS NULL OR s.claim_expires_at <= excluded",
            "AND (s.claimed_at IS NULL OR s.claim_expires_at < excluded",
        ),
    ],
)
async def lease_blocks_at_its_end(url: str) -> None:
    """A claim whose lease ends exactly now cannot be taken yet."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        assert await store.try_claim_step(run_id, "a", owner="one", lease=timedelta(seconds=5))
        clock.advance(seconds=5)
        assert await store.try_claim_step(run_id, "a", owner="two"), "the ended lease blocks"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("CLM-3",),
    changes=[
        (
            CLAIMS,
            "s SET dispatched_at = NULL, due_at = NULL, dispatch_job_id = NULL,",
            "s SET dispatched_at = NULL, due_at = NULL,",
        ),
    ],
)
async def released_dispatch_keeps_job_id(url: str) -> None:
    """A dispatch recorded after a release shows the job id of the released one."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.try_record_dispatch(run_id, "a")
        await store.annotate_dispatch(run_id, "a", "job-1")
        await store.release_dispatch(run_id, "a")
        await store.try_record_dispatch(run_id, "a")
        (dispatch,) = await store.get_dispatches(run_id)
        assert dispatch.job_id is None, "the new dispatch has the old job id"
