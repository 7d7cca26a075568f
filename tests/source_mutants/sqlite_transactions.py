"""Mutants of transactions, connections and cancellations in SQLite."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from datetime import datetime, timedelta
from uuid import uuid4

from flowstore_core import (
    FlowStoreError,
    InvalidArgumentError,
    RunAlreadyExistsError,
    RunNotFoundError,
    StoreUnavailableError,
    open_store,
)
from flowstore_sqlite.url import database_path
from tests.calls import FLOW, new_run, together
from tests.source_mutants import source_mutant
from tests.source_mutants.sqlite_setup import begin, error_of, in_one_group, raw_connection, write_lock
from tests.virtual_clock import VirtualClock

GROUP_COMMIT = "flowstore_sqlite/group_commit.py"
CONNECTION = "flowstore_sqlite/connection.py"
DATABASE = "flowstore_sqlite/database.py"
ERRORS = "flowstore_sqlite/errors.py"
OPEN_FILES = "flowstore_sqlite/open_files.py"


@source_mutant(
    "sqlite",
    kind="transaction",
    clauses=("IDM-3", "CON-1"),
    changes=[
        (
            GROUP_COMMIT,
            "                if db.total_changes != changes:\n"
            "                    raise _DirtyFailureError from error\n",
            "",
        )
    ],
)
async def failed_write_commits_its_first_half(url: str) -> None:
    """A write that fails after a change is committed with the writes of its group."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        trigger = store.trigger_run(FLOW, "orders", run_id, "manual", idempotency_key="order")
        assert await error_of(trigger) is RunAlreadyExistsError
        assert await store.find_run_id_by_idempotency_key(FLOW, "manual", "order") is None


@source_mutant(
    "sqlite",
    kind="transaction",
    clauses=("IDM-3", "CON-1"),
    changes=[
        (
            GROUP_COMMIT,
            '        if isinstance(result, Exception):\n            db.execute("ROLLBACK TO call")\n',
            "",
        )
    ],
)
async def savepoint_is_released_without_rollback(url: str) -> None:
    """A write that fails in a savepoint keeps the change that it made before."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        trigger = store.trigger_run(FLOW, "orders", run_id, "manual", idempotency_key="order")
        assert await error_of(trigger) is RunAlreadyExistsError
        assert await store.find_run_id_by_idempotency_key(FLOW, "manual", "order") is None


@source_mutant(
    "sqlite",
    kind="batching",
    clauses=("CON-1", "CLM-2"),
    changes=[
        (
            GROUP_COMMIT,
            '            db.execute("ROLLBACK TO call")\n',
            '            db.execute("ROLLBACK")\n            db.execute("BEGIN IMMEDIATE")\n'
            "            return result\n",
        )
    ],
)
async def failed_write_rolls_back_the_group(url: str) -> None:
    """A write that fails after a change rolls back the earlier writes of its group, which then succeed."""
    async with open_store(url) as store:
        run_id, other = await new_run(store), uuid4()
        await in_one_group(
            store,
            run_id,
            new_run(store, run_id=other),
            store.trigger_run(FLOW, "orders", run_id, "manual", idempotency_key="order"),
        )
        assert await store.get_run_status(other) is not None


@source_mutant(
    "sqlite",
    kind="batching",
    clauses=("CON-1", "CLM-2"),
    changes=[
        (
            GROUP_COMMIT,
            "return self._run_with_savepoints(calls)\n            results = self",
            "return results + self._run_with_savepoints(calls[len(results) :])\n            results = self",
        )
    ],
)
async def rolled_back_writes_do_not_run_again(url: str) -> None:
    """Writes that succeeded before another failed are reported as done, although they were rolled back."""
    async with open_store(url) as store:
        run_id, other = await new_run(store), uuid4()
        await in_one_group(
            store,
            run_id,
            new_run(store, run_id=other),
            store.trigger_run(FLOW, "orders", run_id, "manual", idempotency_key="order"),
        )
        assert await store.get_run_status(other) is not None


@source_mutant(
    "sqlite",
    kind="batching",
    clauses=("CON-1", "EVT-1"),
    changes=[
        (
            GROUP_COMMIT,
            "self._roll_back()\n                return self._run_with_savepoints(calls)",
            'self.db.execute("COMMIT")\n                return self._run_with_savepoints(calls)',
        )
    ],
)
async def committed_writes_run_again(url: str) -> None:
    """A group with a failed write is committed and then runs again, so its other writes happen twice."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await in_one_group(
            store,
            run_id,
            store.append_event(run_id, "second"),
            store.trigger_run(FLOW, "orders", run_id, "manual", idempotency_key="order"),
        )
        events = await store.get_run_events(run_id)
        assert [event.event_type for event in events] == ["first", "second"]


@source_mutant(
    "sqlite",
    kind="batching",
    clauses=("CON-1", "UNK"),
    changes=[
        (
            GROUP_COMMIT,
            "                result = error\n            results.append",
            "                raise\n            results.append",
        )
    ],
)
async def failed_write_fails_the_group(url: str) -> None:
    """The error of one write is raised by every write of its group, and none of them happens."""
    async with open_store(url) as store:
        run_id, other = await new_run(store), uuid4()
        started, failed = await in_one_group(
            store,
            run_id,
            new_run(store, run_id=other),
            store.append_event(uuid4(), "second"),
        )
        assert started == other
        assert isinstance(failed, RunNotFoundError)


@source_mutant(
    "sqlite",
    kind="batching",
    clauses=("CLM-2", "CON-1"),
    changes=[(GROUP_COMMIT, "results += [REQUEUE] *", "results += [None] *")],
)
async def writes_that_were_not_reached_are_done(url: str) -> None:
    """When a group takes too long, its remaining writes are reported as done without being executed."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        keys = [str(number) for number in range(100)]
        await together(store.save_output(run_id, key, "x" * 1_000_000) for key in keys)
        assert len(await store.get_outputs(run_id)) == 100


@source_mutant(
    "sqlite",
    kind="batching",
    clauses=("CON-1", "EVT-1"),
    changes=[
        (
            GROUP_COMMIT,
            "results += [REQUEUE] * (len(calls) - len(results))",
            "results = [REQUEUE] * (len(calls) - len(results)) + results",
        )
    ],
)
async def results_of_a_long_group_go_to_its_last_callers(url: str) -> None:
    """When a group takes too long, its first results go to its last callers, and its first writes repeat."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        messages = [str(number) + "x" * 1_000_000 for number in range(100)]
        await together(store.append_event(run_id, "sent", message=message) for message in messages)
        events = await store.get_run_events(run_id)
        assert sorted(event.message or "" for event in events) == sorted(messages)


@source_mutant(
    "sqlite",
    kind="time",
    clauses=("CLM-6",),
    changes=[
        (
            GROUP_COMMIT,
            "            has_begun = self._writer_lock.holds_slice()",
            "            self._began_at = self._now()\n"
            "            has_begun = self._writer_lock.holds_slice()",
        ),
        (GROUP_COMMIT, "result = call.item(db, now())", "result = call.item(db, self._began_at)"),
        (
            GROUP_COMMIT,
            "db, monotonic, now = self.db, time.monotonic, self._now",
            "db, monotonic = self.db, time.monotonic",
        ),
    ],
)
async def clock_is_read_before_the_lock(url: str) -> None:
    """A write reads the clock before it waits for the write lock, so its lease begins in the past."""
    clock = VirtualClock()
    was_read = asyncio.Event()
    loop = asyncio.get_running_loop()

    def now() -> datetime:
        at = clock()
        loop.call_soon_threadsafe(was_read.set)
        return at

    async with open_store(url, clock=now) as store:
        run_id = await new_run(store)
        was_read.clear()
        with write_lock(url):
            claim = await begin(store.try_claim_step(run_id, "charge", owner="a", lease=timedelta(seconds=5)))
            # Only the mutant reads the clock while another process holds the lock.
            with suppress(TimeoutError):
                await asyncio.wait_for(was_read.wait(), 3)
            clock.advance(minutes=1)
        assert await claim
        assert not await store.try_claim_step(run_id, "charge", owner="b")


@source_mutant(
    "sqlite",
    kind="time",
    clauses=("CON-2",),
    changes=[
        (
            GROUP_COMMIT,
            "return [StoreUnavailableError(reason) if call.queued_at <= latest else REQUEUE for "
            "call in calls]",
            "return [StoreUnavailableError(reason) for call in calls]",
        ),
        (GROUP_COMMIT, "        latest = now - self._busy_timeout\n", ""),
    ],
)
async def young_write_times_out_with_an_old_one(url: str) -> None:
    """When the oldest write of a group has waited too long for the lock, the whole group fails."""
    async with open_store(url, busy_timeout=3) as store:
        run_id = await new_run(store)
        with write_lock(url):
            first = await begin(store.append_event(run_id, "first"))
            second = await begin(store.append_event(run_id, "second"))
            await asyncio.sleep(2.5)
            third = await begin(store.append_event(run_id, "third"))
            assert await error_of(first) is StoreUnavailableError
            assert await error_of(second) is StoreUnavailableError
        assert await error_of(third) is None


@source_mutant(
    "sqlite",
    kind="concurrency",
    clauses=("CON-2",),
    changes=[
        (
            ERRORS,
            "frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED,",
            "frozenset({sqlite3.SQLITE_LOCKED,",
        )
    ],
)
async def locked_file_is_not_waited_for(url: str) -> None:
    """A write fails at once while another process writes."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        with write_lock(url):
            write = await begin(store.append_event(run_id, "first"))
            # The mutant's write fails while the lock is held, if it is given the time.
            await asyncio.wait({write}, timeout=1)
        assert await error_of(write) is None


@source_mutant(
    "sqlite",
    kind="connection",
    clauses=("CON-2",),
    changes=[
        (
            CONNECTION,
            "    try:\n"
            "        return work(db)\n"
            "    finally:\n"
            "        # Unlike COMMIT, ROLLBACK never fails because of a lock.\n"
            "        if db.in_transaction:\n"
            '            db.execute("ROLLBACK")\n',
            '    result = work(db)\n    db.execute("ROLLBACK")\n    return result\n',
        )
    ],
)
async def failed_read_leaves_its_transaction_open(url: str) -> None:
    """A read that raises leaves its transaction open, so the next read on that connection fails."""
    clock = VirtualClock()
    broken = False
    async with open_store(
        url, clock=lambda: clock().replace(tzinfo=None) if broken else clock(), readers=1
    ) as store:
        run_id = await new_run(store)
        broken = True
        assert await error_of(store.get_claimed_step_keys(run_id)) is InvalidArgumentError
        assert await error_of(store.get_run_status(run_id)) is None


@source_mutant(
    "sqlite",
    kind="cancellation",
    clauses=("CON-4", "CON-2"),
    changes=[
        (
            DATABASE,
            "            try:\n"
            "                return await self._read_on(reader, work)\n"
            "            finally:\n"
            "                self._idle_readers.append(reader)\n",
            "            result = await self._read_on(reader, work)\n"
            "            self._idle_readers.append(reader)\n"
            "            return result\n",
        )
    ],
)
async def cancelled_read_loses_its_connection(url: str) -> None:
    """The connection of a cancelled read does not return to the pool."""
    async with open_store(url, readers=1) as store:
        run_id = await new_run(store)
        read = await begin(store.get_run_status(run_id))
        read.cancel()
        await asyncio.wait({read})
        try:
            await store.get_run_status(run_id)
        except IndexError:
            raise AssertionError("the pool has no connection left") from None


@source_mutant(
    "sqlite",
    kind="cancellation",
    clauses=("CON-4",),
    changes=[
        (
            DATABASE,
            "self._write_queue.write(None, work, on_abandoned)",
            "self._write_queue.write(None, work)",
        )
    ],
)
async def cancelled_writes_are_not_compensated(url: str) -> None:
    """A claim that a cancelled call has won stays."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        with write_lock(url):
            claim = await begin(store.try_claim_step(run_id, "charge"))
            claim.cancel()
    async with open_store(url) as store:
        assert await store.get_claimed_step_keys(run_id) == frozenset()


@source_mutant(
    "sqlite",
    kind="connection",
    clauses=("CLM-2", "CON-5", "CON-2"),
    changes=[
        (
            OPEN_FILES,
            "for path, fingerprint, recorded in self._recorded:",
            "for path, fingerprint, recorded in self._recorded[:1]:",
        )
    ],
)
async def removed_log_is_not_noticed(url: str) -> None:
    """A write succeeds after the write-ahead log was removed, and no other process ever sees it."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        with raw_connection(url) as keeper:
            keeper.execute("SELECT COUNT(*) FROM runs").fetchone()
            os.remove(database_path(url) + "-wal")
            write = await error_of(store.append_event(run_id, "lost"))
        assert write is StoreUnavailableError


@source_mutant(
    "sqlite",
    kind="connection",
    clauses=("CLM-2",),
    changes=[
        (
            CONNECTION,
            "            result = work(db)\n            self.files.verify()\n            return result\n",
            "            return work(db)\n",
        )
    ],
)
async def ping_of_a_removed_file_succeeds(url: str) -> None:
    """ping, like every read, succeeds after the file was removed."""
    async with open_store(url) as store:
        path = database_path(url)
        os.rename(path, path + ".moved")
        assert await error_of(store.ping()) is StoreUnavailableError


@source_mutant(
    "sqlite",
    kind="connection",
    clauses=("CLM-2",),
    changes=[
        (
            OPEN_FILES,
            "self._failure: str | None = None\n",
            "self._failure: str | None = None\n        self._is_checked = False\n",
        ),
        (
            OPEN_FILES,
            "        if self._failure is None:\n            self._failure = self._find_change()\n",
            "        if not self._is_checked:\n"
            "            self._failure, self._is_checked = self._find_change(), True\n",
        ),
    ],
)
async def files_are_verified_once(url: str) -> None:
    """A store notices a removed file only before its first call."""
    async with open_store(url) as store:
        await new_run(store)
        path = database_path(url)
        os.rename(path, path + ".moved")
        assert await error_of(new_run(store)) is StoreUnavailableError


@source_mutant(
    "sqlite",
    kind="cancellation",
    clauses=("CON-4",),
    changes=[
        (
            "flowstore_core/batching/queue.py",
            "            if future.done() and not future.cancelled():\n"
            "                scheduler.compensate(call, future.exception() or future.result())\n",
            "",
        )
    ],
)
async def claim_that_is_cancelled_as_it_wins_stays(url: str) -> None:
    """A claim whose caller is cancelled between its result and its return is not compensated for."""
    async with open_store(url) as store:
        run_id = await new_run(store)

        async def append_and_cancel() -> None:
            # The results of a group are handed out in order, and this call is resumed first.
            await store.append_event(run_id, "second")
            claim.cancel()

        first = asyncio.create_task(store.append_event(run_id, "first"))
        second = asyncio.create_task(append_and_cancel())
        claim = asyncio.create_task(store.try_claim_step(run_id, "charge"))
        await asyncio.wait({first, second, claim})
        assert claim.cancelled()
    async with open_store(url) as store:
        assert await store.get_claimed_step_keys(run_id) == frozenset()


@source_mutant(
    "sqlite",
    kind="batching",
    clauses=("CLM-1", "CON-1", "CON-2"),
    changes=[
        (
            "flowstore_core/batching/scheduler.py",
            "        operation.queue.extendleft(reversed(calls))\n",
            "        operation.queue.extendleft(reversed(calls[1:]))\n",
        )
    ],
)
async def first_requeued_call_is_lost(url: str) -> None:
    """The first call that a group did not reach is not requeued, so its caller waits forever."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        keys = [str(number) for number in range(40)]
        saves = [asyncio.create_task(store.save_output(run_id, key, "x" * 1_000_000)) for key in keys]
        _, pending = await asyncio.wait(saves, timeout=30)
        for save in pending:
            save.cancel()
        assert not pending


@source_mutant(
    "sqlite",
    kind="connection",
    clauses=("CON-2",),
    changes=[
        (GROUP_COMMIT, "self._busy_timeout = busy_timeout\n", "self._busy_timeout = busy_timeout / 1000\n")
    ],
)
async def busy_timeout_is_measured_in_milliseconds(url: str) -> None:
    """A write fails after thirty milliseconds of a lock instead of thirty seconds."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        with write_lock(url):
            write = await begin(store.append_event(run_id, "first"))
            # The mutant's write fails while the lock is held, if it is given the time.
            await asyncio.wait({write}, timeout=1)
        assert await error_of(write) is None


@source_mutant(
    "sqlite",
    kind="batching",
    clauses=("CON-1", "EVT-1"),
    changes=[
        (
            GROUP_COMMIT,
            "return self._run_with_savepoints(calls[:middle]) + self._run_with_savepoints(calls[middle:])",
            "return self._run_with_savepoints(calls[middle:]) + self._run_with_savepoints(calls[:middle])",
        )
    ],
)
async def halves_of_a_group_get_each_others_results(url: str) -> None:
    """After an error that ended the transaction, the callers of a group get the results of others."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        with raw_connection(url) as db:
            # Ends the transaction, as a full disk does.
            db.execute(
                "CREATE TRIGGER full BEFORE INSERT ON events WHEN NEW.event_type = 'bad'"
                " BEGIN SELECT RAISE(ROLLBACK, 'full'); END"
            )
        outcomes = await in_one_group(
            store,
            run_id,
            store.append_event(run_id, "bad"),
            store.append_event(run_id, "good"),
        )
        assert isinstance(outcomes[0], FlowStoreError)
        assert outcomes[1] == 2
