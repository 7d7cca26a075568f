"""Source mutants of queues on PostgreSQL: the index of queued steps, claims and advances."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from uuid import UUID

from flowstore_core import FlowStore, StepRequest, StepStatus, new_run_id, open_store
from tests.source_mutants import source_mutant
from tests.source_mutants.postgres_setup import connection
from tests.virtual_clock import VirtualClock

QUEUES = "flowstore_postgres/queues.py"
ADVANCES = "flowstore_postgres/advances.py"
MIGRATION = "flowstore_postgres/migrations/0008_queues.sql"

LEASE = timedelta(seconds=30)


def _request(step_key: str, *after: str, priority: int = 0) -> StepRequest:
    return StepRequest(step_key=step_key, step_type="task", queue="q", priority=priority, after=after)


async def _trigger(store: FlowStore, *requests: StepRequest) -> UUID:
    run_id = new_run_id()
    await store.trigger_run(new_run_id(), "flow", run_id, "manual", dispatch=requests)
    return run_id


async def _claim(store: FlowStore, limit: int = 10) -> list[str]:
    claimed = await asyncio.wait_for(store.claim_next_steps(["q"], lease=LEASE, limit=limit), 20)
    return [one.step_key for one in claimed]


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("QUE-2",),
    changes=[(QUEUES, "FROM found ORDER BY priority DESC,", "FROM found ORDER BY priority,")],
)
async def lower_priorities_come_first(url: str) -> None:
    """claim_next_steps takes the steps with the lowest priority first."""
    async with open_store(url) as store:
        await _trigger(store, _request("low"), _request("high", priority=5))
        assert await _claim(store, 1) == ["high"], "a step of lower priority was claimed first"


@source_mutant(
    "postgresql",
    kind="concurrency",
    clauses=("QUE-2",),
    changes=[(QUEUES, "FOR KEY SHARE SKIP LOCKED", "FOR KEY SHARE")],
)
async def claim_waits_for_a_locked_run(url: str) -> None:
    """claim_next_steps waits for a run that another call changes, instead of passing over its steps."""
    async with open_store(url) as store, connection(url) as other:
        busy = await _trigger(store, _request("busy"))
        await _trigger(store, _request("free"))
        async with other.transaction():
            await other.execute("SELECT FROM runs WHERE run_id = $1 FOR UPDATE", busy)
            try:
                claimed = await _claim(store)
            except Exception as error:
                raise AssertionError("the claim waited for the run") from error
            assert claimed == ["free"]


@source_mutant(
    "postgresql",
    kind="index",
    clauses=("QUE-5", "QUE-1"),
    changes=[(MIGRATION, "AFTER INSERT OR DELETE OR UPDATE OF expires_at", "AFTER UPDATE OF expires_at")],
)
async def new_waiter_leaves_its_step_ready(url: str) -> None:
    """Registering a waiter does not change the time from which its queued step is ready."""
    async with open_store(url) as store:
        run_id = await _trigger(store, _request("a"))
        await store.register_waiter(run_id, "a", "paid")
        assert await _claim(store) == [], "a step that waits was claimed"


@source_mutant(
    "postgresql",
    kind="index",
    clauses=("QUE-5", "STP-6"),
    changes=[(MIGRATION, "    WHEN (NEW.completed_at IS NULL) ", "    WHEN (NEW.completed_at IS NOT NULL) ")],
)
async def reopened_run_does_not_bring_back_its_steps(url: str) -> None:
    """After a claim has passed over the steps of an ended run, reopening it does not make them ready."""
    async with open_store(url) as store:
        run_id = await _trigger(store, _request("a"), _request("b", priority=5))
        assert await _claim(store, 1) == ["b"]
        await store.advance_run(run_id, "b", StepStatus.FAILED, attempt=1)
        await store.complete_run(run_id, "Failed")
        assert await _claim(store) == []
        await store.retry_step(run_id, "b")
        assert await _claim(store) == ["a"], "the step of a reopened run is not ready"


@source_mutant(
    "postgresql",
    kind="index",
    clauses=("QUE-5", "QUE-1"),
    changes=[(QUEUES, "SET ready_at = c.claim_expires_at", "SET ready_at = p.ready_at")],
)
async def claimed_step_stays_first_in_the_index(url: str) -> None:
    """A claim leaves the time of its step in the index, so a live claim does not protect it."""
    async with open_store(url) as store:
        await _trigger(store, _request("a"))
        assert await _claim(store) == ["a"]
        assert await _claim(store) == [], "a step was claimed twice"


@source_mutant(
    "postgresql",
    kind="time",
    clauses=("QUE-1",),
    changes=[(QUEUES, "AND ready_at <= guard.now", "AND ready_at < guard.now")],
)
async def step_is_not_ready_at_its_due_time(url: str) -> None:
    """A step that is due exactly now is not claimed."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        await _trigger(store, _request("a"))
        assert await _claim(store) == ["a"], "a step that is due now was not claimed"


@source_mutant(
    "postgresql",
    kind="batching",
    clauses=("QUE-4",),
    changes=[(ADVANCES, "earlier = changes[run_id] = Changes(rows)", "earlier = Changes(rows)")],
)
async def advances_in_one_transaction_ignore_each_other(url: str) -> None:
    """Of the steps that end in one transaction none finds the others ended."""
    async with open_store(url) as store:
        parts = [f"part {n}" for n in range(6)]
        run_id = await _trigger(store, *(_request(key) for key in parts))
        assert len(await _claim(store)) == 6
        await asyncio.gather(
            *(
                store.advance_run(
                    run_id, key, StepStatus.SUCCEEDED, attempt=1, dispatch=[_request("join", *parts)]
                )
                for key in parts
            )
        )
        assert await _claim(store) == ["join"], "the step behind the parts was not dispatched"
