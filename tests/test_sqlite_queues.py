"""SQLite's table of queued steps: its triggers, its index, its migration, and claims of cancelled calls."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import pytest

from flowstore_core import FlowStore, RunStatus, StepRequest, StepStatus, new_run_id, open_store
from flowstore_sqlite.queues import FIND_READY_STEPS
from flowstore_sqlite.schema_migrations import load_migrations
from tests.source_mutants.sqlite_setup import begin, write_lock
from tests.virtual_clock import VirtualClock

FLOW = UUID(int=1)
LEASE = timedelta(seconds=30)
MINUTE = timedelta(minutes=1)

# ready_at of the table, and as its definition has it.
WRONG_TIMES = """
SELECT queued_steps.step_key, queued_steps.ready_at, step_readiness.ready_at
FROM queued_steps LEFT JOIN step_readiness USING (run_id, step_key)
WHERE queued_steps.ready_at IS NOT step_readiness.ready_at
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "flows.db"


@pytest.fixture
def url(path: Path) -> str:
    return f"sqlite:///{path}"


def _execute(path: Path, statement: str, *row: object) -> list[tuple[object, ...]]:
    """Run a statement of another program."""
    with closing(sqlite3.connect(path)) as db, db:
        return db.execute(statement, row).fetchall()


async def _trigger(store: FlowStore, *keys: str, queue: str = "default") -> UUID:
    """A new run whose steps are dispatched."""
    run_id = new_run_id()
    requests = [StepRequest(step_key=key, step_type="http", queue=queue) for key in keys]
    await store.trigger_run(FLOW, "flow", run_id, "manual", dispatch=requests)
    return run_id


def test_the_claim_reads_the_index_alone_and_sorts_nothing(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        for migration in load_migrations():
            db.executescript(migration.sql)
        values = {"queue": "default", "now": 0, "limit": 1}
        plan = db.execute(f"EXPLAIN QUERY PLAN {FIND_READY_STEPS}", values).fetchall()
    assert [detail for *_, detail in plan] == [
        "SEARCH queued_steps USING COVERING INDEX queued_steps_ready (queue=? AND priority=? AND ready_at<?)"
    ]


async def test_statements_of_other_programs_move_a_step_too(url: str, path: Path) -> None:
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:

        async def is_ready() -> bool:
            statistics = await store.get_queues()
            assert _execute(path, WRONG_TIMES) == []
            return bool(statistics and statistics[0].ready)

        run_id = await _trigger(store, "charge")
        assert await is_ready()
        for change, undo in (
            ("UPDATE steps SET status = 'Failed', attempt_completed_at = 1", "attempt_completed_at = NULL"),
            ("UPDATE steps SET due_at = 9000000000000000", "due_at = NULL"),
            ("UPDATE steps SET claimed_at = 1", "claimed_at = NULL"),
        ):
            _execute(path, change)
            assert not await is_ready()
            _execute(path, f"UPDATE steps SET status = NULL, {undo}")
            assert await is_ready()
        for change, undo in (
            ("UPDATE runs SET status = 'Failed', completed_at = 1", "UPDATE runs SET status = 'Running'"),
            (
                "INSERT INTO waiters (run_id, step_key, signal_name, created_at) "
                "SELECT run_id, step_key, 'paid', 1 FROM steps",
                "UPDATE waiters SET delivered_at = 1",
            ),
            ("UPDATE waiters SET delivered_at = NULL", "DELETE FROM waiters"),
        ):
            _execute(path, change)
            assert not await is_ready()
            _execute(path, undo)
            assert await is_ready()
        _execute(path, "UPDATE steps SET dispatched_at = NULL")
        assert await store.get_queues() == ()
        # A later dispatch without queue inherits nothing from the removed one.
        await store.try_record_dispatch(run_id, "charge")
        assert [dispatch.queue for dispatch in await store.get_dispatches(run_id)] == [None]
        assert await store.claim_next_steps(["default"], lease=LEASE) == ()


async def test_ended_steps_runs_and_deleted_runs_leave_the_index(url: str, path: Path) -> None:
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        ended = await _trigger(store, "charge", "ship")
        (claimed,) = await store.claim_next_steps(["default"], lease=LEASE)
        await store.advance_run(ended, claimed.step_key, StepStatus.SUCCEEDED, attempt=1, owner=claimed.owner)
        await store.complete_run(ended, RunStatus.CANCELLED)
        assert _execute(path, "SELECT COUNT(*) FROM queued_steps WHERE ready_at IS NOT NULL") == [(0,)]
        await store.retry_step(ended, "charge")
        assert [step.step_key for step in await store.claim_next_steps(["default"], lease=LEASE)] == ["ship"]
        await store.complete_run(ended, RunStatus.CANCELLED)
        await store.cleanup(clock.advance(days=1))
        assert _execute(path, "SELECT COUNT(*) FROM queued_steps") == [(0,)]


async def test_a_version_4_file_is_migrated_and_its_code_works_beside_the_new_one(
    url: str, path: Path
) -> None:
    clock = VirtualClock()
    assert load_migrations()[4].works_from <= 4
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE flowstore_schema (version, name, works_from, applied_at)")
        for migration in load_migrations()[:4]:
            db.executescript(migration.sql)
            row = (migration.version, migration.name, migration.works_from, 0)
            db.execute("INSERT INTO flowstore_schema VALUES (?, ?, ?, ?)", row)
        db.execute(
            "INSERT INTO runs (run_id, flow_id, status, started_at, flow_name, trigger_key) "
            "VALUES (?, ?, 'Running', 0, 'flow', 'manual')",
            (UUID(int=7).bytes, FLOW.bytes),
        )
        db.execute(
            "INSERT INTO steps (run_id, step_key, dispatched_at) VALUES (?, 'charge', 0)",
            (UUID(int=7).bytes,),
        )
        db.commit()
    async with open_store(url, clock=clock) as store:
        # A dispatch of before names no queue.
        assert await store.get_queues() == ()
        assert [dispatch.queue for dispatch in await store.get_dispatches(UUID(int=7))] == [None]
        await store.release_dispatch(UUID(int=7), "charge")
        assert await store.try_record_dispatch(UUID(int=7), "charge", queue="default", step_type="http")
        # The statements of version 4: release the dispatch, dispatch again without a queue.
        _execute(path, "UPDATE steps SET dispatched_at = NULL, due_at = NULL, dispatch_token = NULL")
        assert await store.get_queues() == ()
        _execute(path, "UPDATE steps SET dispatched_at = 0")
        assert await store.claim_next_steps(["default"], lease=LEASE) == ()


async def test_que_3_a_cancelled_call_returns_its_claims(url: str, path: Path) -> None:
    async with open_store(url) as store:
        run_id = await _trigger(store, "charge", "ship")
        with write_lock(url):
            cancelled = await begin(store.claim_next_steps(["default"], lease=LEASE, limit=2))
            cancelled.cancel()
    # Closing the store waits for the compensation.
    async with open_store(url) as store:
        assert await store.get_step_claims(run_id) == ()
        detail = await store.get_run_detail(run_id)
        assert detail is not None
        assert {step.status for step in detail.steps} <= {StepStatus.PENDING}
        assert len(await store.claim_next_steps(["default"], lease=LEASE, limit=2)) == 2


async def test_que_2_a_claim_among_sleeping_steps_reads_only_the_ready_ones(url: str, path: Path) -> None:
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        sleeping = new_run_id()
        requests = [
            StepRequest(
                step_key=f"s-{number}", step_type="http", due_at=clock.now + MINUTE, priority=number % 10
            )
            for number in range(1000)
        ]
        await store.trigger_run(FLOW, "flow", sleeping, "manual", dispatch=requests)
        await _trigger(store, "ready")
        (claimed,) = await store.claim_next_steps(["default", "empty"], lease=LEASE, limit=10)
        assert claimed.step_key == "ready"
        (statistics,) = await store.get_queues()
        assert (statistics.ready, statistics.scheduled, statistics.running) == (0, 1000, 1)
