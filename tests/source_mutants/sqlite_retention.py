"""Mutants of cleanup in SQLite."""

from __future__ import annotations

from datetime import datetime, timedelta
from uuid import uuid4

from flowstore_core import (
    InvalidArgumentError,
    RunNotFoundError,
    RunStatus,
    SignalDeliveryStatus,
    StepStatus,
    open_store,
)
from tests.calls import FLOW, new_run, together
from tests.source_mutants import source_mutant
from tests.source_mutants.sqlite_setup import (
    begin,
    ended_run,
    error_of,
    new_step,
    raw_connection,
    write_lock,
)
from tests.virtual_clock import VirtualClock

INSERT_MANY_STEPS = """
WITH RECURSIVE numbers (number) AS (SELECT 1 UNION ALL SELECT number + 1 FROM numbers WHERE number < 5000)
INSERT INTO steps (
    run_id, step_key, status, last_attempt, started_at, attempt_started_at, attempt_completed_at, step_type,
    output_json
)
SELECT ?, number, 'Succeeded', 1, 0, 0, 0, 'map', hex(zeroblob(5000)) FROM numbers
"""

RETENTION = "flowstore_sqlite/retention.py"


@source_mutant(
    "sqlite",
    kind="time",
    clauses=("RET-1",),
    changes=[
        (
            RETENTION,
            "completed_at IS NOT NULL AND completed_at < ?",
            "completed_at IS NOT NULL AND completed_at <= ?",
        ),
        (RETENTION, "WHERE run_id = ? AND completed_at < ?", "WHERE run_id = ? AND completed_at <= ?"),
    ],
)
async def run_that_ended_at_the_cutoff_is_deleted(url: str) -> None:
    """cleanup deletes a run that was completed exactly at the cutoff."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await ended_run(store)
        await store.cleanup(clock())
        assert await store.get_run_status(run_id) is RunStatus.SUCCEEDED


@source_mutant(
    "sqlite",
    kind="concurrency",
    clauses=("RET-2",),
    changes=[
        (
            RETENTION,
            "SELECT 1 FROM runs WHERE run_id = ? AND completed_at < ?",
            "SELECT 1 FROM runs WHERE run_id = ? AND ? IS NOT NULL",
        )
    ],
)
async def run_that_is_reopened_meanwhile_is_deleted(url: str) -> None:
    """cleanup deletes a run that was reopened after cleanup had found it."""
    clock = VirtualClock()
    # One reader, so that a second read ends after the first.
    async with open_store(url, clock=clock, readers=1) as store:
        run_id = await new_run(store)
        await new_step(store, run_id, status=StepStatus.FAILED)
        await store.complete_run(run_id, RunStatus.FAILED)
        with write_lock(url) as other_process:
            cleanup = await begin(store.cleanup(clock.advance(days=1)))
            await store.get_run_status(run_id)
            other_process.execute("UPDATE runs SET status = 'Running', completed_at = NULL")
        await cleanup
        assert await store.get_run_status(run_id) is RunStatus.RUNNING


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("RET-1",),
    changes=[(RETENTION, '    "DELETE FROM deliveries WHERE run_id = ?",\n', "")],
)
async def cleanup_leaves_the_delivery_ids(url: str) -> None:
    """cleanup leaves the delivery ids of a run, which answer deliveries to the next run of that id."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = uuid4()
        for _ in range(2):
            await new_run(store, run_id=run_id)
            await store.register_waiter(run_id, "charge", "paid")
            await store.deliver_signal(run_id, "paid", "{}", delivery_id="1")
            waiter = await store.get_waiter(run_id, "charge")
            assert waiter is not None
            assert waiter.payload_json == "{}"
            await store.complete_run(run_id, RunStatus.SUCCEEDED)
            await store.cleanup(clock.advance(days=1))


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("RET-1", "IDM-4"),
    changes=[(RETENTION, '    "DELETE FROM idempotency_keys WHERE run_id = ?",\n', "")],
)
async def cleanup_keeps_young_idempotency_keys(url: str) -> None:
    """cleanup leaves the key of a run that it deletes, until the key itself is an hour old."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        result = await store.trigger_run(FLOW, "orders", uuid4(), "manual", idempotency_key="order")
        await store.complete_run(result.run.run_id, RunStatus.SUCCEEDED)
        await store.cleanup(clock.advance(minutes=1))
        assert await store.find_run_id_by_idempotency_key(FLOW, "manual", "order") is None


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("RET-1",),
    changes=[(RETENTION, '    "DELETE FROM waiters WHERE run_id = ?",\n', "")],
)
async def cleanup_leaves_the_waiters(url: str) -> None:
    """cleanup leaves the waiters of a run, which receive the signals of the next run of that id."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.register_waiter(run_id, "charge", "paid")
        await store.complete_run(run_id, RunStatus.SUCCEEDED)
        await store.cleanup(clock.advance(days=1))
        await new_run(store, run_id=run_id)
        result = await store.deliver_signal(run_id, "paid", "{}")
        assert result.status is SignalDeliveryStatus.NOT_FOUND


@source_mutant(
    "sqlite",
    kind="time",
    clauses=("RET-4",),
    changes=[
        (
            RETENTION,
            "SELECT run_id FROM controls\n    WHERE created_at < :cutoff AND created_at <= :grace",
            "SELECT run_id FROM controls\n    WHERE created_at < :cutoff",
        )
    ],
)
async def young_control_record_is_an_orphan(url: str) -> None:
    """cleanup deletes a control record whose run has not started yet, however young it is."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = uuid4()
        await store.configure_run(run_id, FLOW, "manual")
        await store.cleanup(clock.advance(minutes=59))
        assert await store.get_run_control(run_id) is not None


@source_mutant(
    "sqlite",
    kind="time",
    clauses=("RET-4",),
    changes=[
        (
            RETENTION,
            "FROM idempotency_keys\n    WHERE created_at < :cutoff AND created_at <= :grace",
            "FROM idempotency_keys\n    WHERE created_at < :cutoff AND created_at < :grace",
        )
    ],
)
async def key_of_an_hour_is_no_orphan(url: str) -> None:
    """cleanup keeps an orphaned idempotency key that is exactly an hour old."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        await store.try_register_idempotency_key(FLOW, "manual", "order", uuid4())
        await store.cleanup(clock.advance(hours=1))
        assert await store.find_run_id_by_idempotency_key(FLOW, "manual", "order") is None


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("RET-4", "IDM-4"),
    changes=[
        (
            RETENTION,
            "WHERE runs.run_id = idempotency_keys.run_id)",
            "WHERE runs.run_id = idempotency_keys.run_id AND runs.status = 'Running')",
        )
    ],
)
async def key_of_an_ended_run_is_an_orphan(url: str) -> None:
    """cleanup deletes the key of a run that has ended, although it keeps the run."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        result = await store.trigger_run(FLOW, "orders", uuid4(), "manual", idempotency_key="order")
        clock.advance(days=1)
        await store.complete_run(result.run.run_id, RunStatus.SUCCEEDED)
        await store.cleanup(clock() - timedelta(hours=1))
        assert await store.find_run_id_by_idempotency_key(FLOW, "manual", "order") is not None


@source_mutant(
    "sqlite",
    kind="batching",
    clauses=("RET-1",),
    changes=[(RETENTION, "deleted += count", "deleted = count")],
)
async def cleanup_counts_its_last_batch(url: str) -> None:
    """cleanup returns the number of runs that its last batch deleted."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        await together(ended_run(store) for _ in range(600))
        assert await store.cleanup(clock.advance(days=1)) == 600


@source_mutant(
    "sqlite",
    kind="batching",
    clauses=("RET-1",),
    changes=[
        (RETENTION, "        while found := await self", "        if found := await self"),
    ],
)
async def cleanup_stops_after_one_read(url: str) -> None:
    """cleanup deletes at most the runs that its first read has found."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        await together(ended_run(store) for _ in range(600))
        await store.cleanup(clock.advance(days=1))
        assert list(await store.get_runs(take=1)) == []


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("RET-1",),
    changes=[(RETENTION, '    "DELETE FROM attempts WHERE run_id = ?",\n', "")],
)
async def cleanup_leaves_the_attempts(url: str) -> None:
    """cleanup leaves the earlier attempts of a run, which the next run of that id shows as its own."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        for _ in range(2):
            await new_step(store, run_id, status=StepStatus.FAILED)
        await store.complete_run(run_id, RunStatus.FAILED)
        await store.cleanup(clock.advance(days=1))
        assert await error_of(store.record_step_start(run_id, "charge", "http")) is RunNotFoundError
        await new_run(store, run_id=run_id)
        await new_step(store, run_id)
        detail = await store.get_run_detail(run_id)
        assert detail is not None
        assert len(detail.steps[0].attempts) == 1


@source_mutant(
    "sqlite",
    kind="batching",
    clauses=("RET-4",),
    changes=[
        (
            RETENTION,
            "            while await paced.run_slice(partial(_delete_orphans, statement, before)):\n"
            "                pass\n",
            "            await paced.run_slice(partial(_delete_orphans, statement, before))\n",
        )
    ],
)
async def cleanup_deletes_one_batch_of_orphans(url: str) -> None:
    """cleanup deletes at most one batch of orphaned keys."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        keys = [str(number) for number in range(501)]
        await together(store.try_register_idempotency_key(FLOW, "manual", key, uuid4()) for key in keys)
        await store.cleanup(clock.advance(days=1))
        found = await together(store.find_run_id_by_idempotency_key(FLOW, "manual", key) for key in keys)
        assert set(found) == {None}


@source_mutant(
    "sqlite",
    kind="transaction",
    clauses=("RET-3", "CON-1"),
    changes=[
        (
            RETENTION,
            "            _delete_whole(db, row[0], indexed=indexed)\n            deleted += 1\n",
            "            for statement in DELETE_RUN:\n"
            "                db.execute(statement, row)\n"
            "                if time.monotonic() > until:\n"
            "                    return done, deleted\n"
            "            deleted += 1\n",
        )
    ],
)
async def cleanup_stops_inside_a_run(url: str) -> None:
    """A slice of cleanup that takes too long ends in the middle of a run, whose steps are gone."""
    clock = VirtualClock()
    is_cleaning = False
    slices = 0

    def now() -> datetime:
        # Each slice reads the clock once. The second one fails, so cleanup stops halfway.
        nonlocal slices
        slices += is_cleaning
        return clock() if slices < 2 else clock().replace(tzinfo=None)

    async with open_store(url, clock=now) as store:
        run_id = await ended_run(store)
        with raw_connection(url) as db:
            db.execute(INSERT_MANY_STEPS, (run_id.bytes,))
        is_cleaning = True
        assert await error_of(store.cleanup(clock.advance(days=1))) is InvalidArgumentError
        detail = await store.get_run_detail(run_id)
        assert detail is None or len(detail.steps) == 5000


@source_mutant(
    "sqlite",
    kind="time",
    clauses=("RET-4",),
    changes=[
        (RETENTION, "ORPHAN_GRACE // timedelta(microseconds=1)", "ORPHAN_GRACE // timedelta(milliseconds=1)")
    ],
)
async def grace_is_measured_in_milliseconds(url: str) -> None:
    """The hour for which orphans are kept is computed in milliseconds, so it lasts 3.6 seconds."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        await store.try_register_idempotency_key(FLOW, "manual", "order", uuid4())
        await store.cleanup(clock.advance(minutes=59))
        assert await store.find_run_id_by_idempotency_key(FLOW, "manual", "order") is not None
