"""Faults of snapshots, locks, caches and compensations on PostgreSQL that span several operations."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from uuid import uuid4

from flowstore_core import RunNotFoundError, RunStatus, StepStatus, open_store
from tests.calls import FLOW, new_run
from tests.source_mutants import source_mutant
from tests.source_mutants.postgres_setup import (
    connection,
    end,
    finish,
    outcome,
    send,
    wait_until_blocked,
)
from tests.virtual_clock import VirtualClock

RUNS = "flowstore_postgres/runs.py"
PAGES = "flowstore_postgres/pages.py"
STEPS = "flowstore_postgres/steps.py"
RETRIES = "flowstore_postgres/retries.py"
CONTROLS = "flowstore_postgres/controls.py"
OUTPUTS = "flowstore_postgres/outputs.py"
RETENTION = "flowstore_postgres/retention.py"
WRITER = "flowstore_postgres/batch_writer.py"


# Snapshots and transactions


@source_mutant(
    "postgresql",
    kind="transaction",
    clauses=("QRY-3", "CON-1"),
    changes=[
        (
            RUNS,
            "       ARRAY(SELECT ROW({ATTEMPT_COLUMNS}) FROM {{schema}}.attempts a\n"
            "             WHERE a.run_id = r.run_id ORDER BY a.step_key, a.attempt) AS attempts\n",
            "       NULL AS attempts\n",
        ),
        (
            RUNS,
            'GET_RUN_STATUS = "',
            'GET_ATTEMPTS = f"""\n'
            "SELECT {ATTEMPT_COLUMNS} FROM {{schema}}.attempts a\n"
            "WHERE a.run_id = $1 ORDER BY a.step_key, a.attempt\n"
            '"""\n'
            'GET_RUN_STATUS = "',
        ),
        (
            RUNS,
            'for attempt in row["attempts"]:',
            "for attempt in await self._database.read(GET_ATTEMPTS, run_id):",
        ),
    ],
)
async def detail_reads_attempts_in_a_second_snapshot(url: str) -> None:
    """get_run_detail reads the earlier attempts after the steps, so one can be there twice."""
    async with open_store(url) as store, connection(url) as other:
        run_id = await new_run(store)
        await store.record_step_start(run_id, "a", "task")
        async with other.transaction():
            await other.execute("LOCK TABLE attempts IN ACCESS EXCLUSIVE MODE")
            reading = asyncio.ensure_future(store.get_run_detail(run_id))
            await wait_until_blocked(url, other)
            # The second start of the step.
            await other.execute(
                "INSERT INTO attempts "
                "(run_id, step_key, attempt, step_type, status, started_at, completed_at) "
                "SELECT run_id, step_key, 1, step_type, 'Failed', started_at, now() FROM steps"
            )
            await other.execute("UPDATE steps SET last_attempt = 2, started_at = now()")
        detail = await reading
        assert detail is not None
        assert [one.attempt for one in detail.steps[0].attempts] == [1, 2], "the attempts are torn"


@source_mutant(
    "postgresql",
    kind="transaction",
    clauses=("QRY-3",),
    changes=[
        (
            PAGES,
            "row = await self._database.read_row(statement.text(GET_RUNS_PAGE), *statement.arguments)\n",
            "rows = await self._database.read(statement.text(GET_RUNS), *statement.arguments)\n"
            "            count = _Statement(flow_id, status, None, 0, 10, rarest)\n"
            '            total = count.text("SELECT {total} AS total")\n'
            "            row = await self._database.read_row(total, *count.arguments)\n"
            '            row = {"page": rows, "total": row["total"]}\n',
        )
    ],
)
async def page_is_counted_in_a_second_snapshot(url: str) -> None:
    """get_runs_page counts the runs after it has read them, so a run that starts between is only counted."""
    async with open_store(url) as store, connection(url) as other:
        await new_run(store)
        async with other.transaction():
            await other.execute("LOCK TABLE run_changes IN ACCESS EXCLUSIVE MODE")
            reading = asyncio.ensure_future(store.get_runs_page())
            await wait_until_blocked(url, other)
            await other.execute(
                "INSERT INTO runs (run_id, flow_id, flow_name, status, trigger_key, started_at, start_token) "
                "VALUES (gen_random_uuid(), $1, 'orders', 'Running', 'manual', now(), gen_random_uuid())",
                FLOW,
            )
        page = await reading
        assert page.total_count == len(page.runs), "the page and its count are of two snapshots"


@source_mutant(
    "postgresql",
    kind="transaction",
    clauses=("STP-6", "CON-1"),
    changes=[
        (
            RETRIES,
            "            if status is not RunStatus.RUNNING:\n"
            "                await transaction.execute(REOPEN_RUN, run_id)\n",
            "            return status\n\n"
            "        async def reopen(transaction: Transaction) -> None:\n"
            "            if True:\n"
            '                sql = "SELECT coalesce($1, now()) AS now"\n'
            "                row = await transaction.row(sql, transaction.now)\n"
            "                await transaction.execute(REOPEN_RUN, run_id)\n",
        ),
        (
            RETRIES,
            '        await self._database.transaction("retry_step", work)\n',
            '        if await self._database.transaction("retry_step", work) is not RunStatus.RUNNING:\n'
            '            await self._database.transaction("retry_step", reopen)\n',
        ),
    ],
)
async def retry_reopens_the_run_in_a_second_transaction(url: str) -> None:
    """retry_step reopens the step in one transaction and its run in the next."""
    async with open_store(url) as store, connection(url) as other:
        run_id = await new_run(store)
        await store.configure_run(run_id, FLOW, "manual")
        await finish(store, run_id, "a", StepStatus.FAILED)
        await end(store, run_id, RunStatus.FAILED)
        async with other.transaction():
            await other.execute("SELECT FROM controls WHERE run_id = $1 FOR UPDATE", run_id)
            retrying = asyncio.ensure_future(store.retry_step(run_id, "a"))
            await wait_until_blocked(url, other, retrying)
            detail = await store.get_run_detail(run_id)
        await retrying
        assert detail is not None
        assert detail.steps[0].status == StepStatus.FAILED, "the step of an ended run is reopened"


# Locks


@source_mutant(
    "postgresql",
    kind="concurrency",
    clauses=("IDM-2", "IDM-3", "RET-4"),
    changes=[(CONTROLS, 'LOCK_KEY = FIND_RUN_ID + " FOR UPDATE"', "LOCK_KEY = FIND_RUN_ID")],
)
async def key_of_a_starting_run_is_swept(url: str) -> None:
    """trigger_run does not lock a taken key, and cleanup deletes it while the key's run is being started."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store, connection(url) as other:
        run_id = uuid4()
        await store.try_register_idempotency_key(FLOW, "manual", "k", run_id)
        clock.advance(days=1)
        transaction = other.transaction()
        await transaction.start()
        # Holds the trigger between its key and its run.
        await other.execute(
            "INSERT INTO runs (run_id, flow_id, flow_name, status, trigger_key, started_at, start_token) "
            "VALUES ($1, $2, 'orders', 'Running', 'manual', now(), gen_random_uuid())",
            run_id,
            FLOW,
        )
        triggering = asyncio.ensure_future(
            store.trigger_run(FLOW, "orders", uuid4(), "manual", idempotency_key="k")
        )
        await wait_until_blocked(url, other)
        cleaning = asyncio.ensure_future(store.cleanup(clock.now))
        await wait_until_blocked(url, other, cleaning, number=2)
        await transaction.rollback()
        assert (await triggering).run.run_id == run_id
        await cleaning
        found = await store.find_run_id_by_idempotency_key(FLOW, "manual", "k")
        assert found == run_id, "the key of a stored run was swept"


@source_mutant(
    "postgresql",
    kind="concurrency",
    clauses=("RET-4", "IDM-2"),
    changes=[
        (
            RETENTION,
            "AND k.idempotency_key = o.idempotency_key\n"
            "  AND NOT EXISTS (SELECT FROM {schema}.runs r WHERE r.run_id = k.run_id)\n",
            "AND k.idempotency_key = o.idempotency_key\n",
        )
    ],
)
async def sweep_does_not_look_for_the_run_again(url: str) -> None:
    """cleanup deletes an orphaned key although its run was started while cleanup waited for the key."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store, connection(url) as other:
        run_id = uuid4()
        await store.try_register_idempotency_key(FLOW, "manual", "k", run_id)
        clock.advance(days=1)
        async with other.transaction():
            await other.execute("SELECT FROM idempotency_keys FOR UPDATE")
            cleaning = asyncio.ensure_future(store.cleanup(clock.now))
            await wait_until_blocked(url, other, cleaning)
            await new_run(store, run_id=run_id)
        await cleaning
        found = await store.find_run_id_by_idempotency_key(FLOW, "manual", "k")
        assert found == run_id, "the key of a stored run was swept"


@source_mutant(
    "postgresql",
    kind="concurrency",
    clauses=("IDM-4", "CON-1"),
    changes=[
        (
            CONTROLS,
            "                # After the key, as cleanup locks them.\n"
            "                await transaction.row(SHARE_RUN, run_id)\n",
            "                pass\n",
        )
    ],
)
async def key_outlives_the_run_it_was_registered_for(url: str) -> None:
    """try_register_idempotency_key does not lock the run, and leaves a key when delete_run deletes it."""
    async with open_store(url) as store, connection(url) as other:
        run_id = await new_run(store)
        await store.try_record_dispatch(run_id, "a")
        await end(store, run_id, RunStatus.FAILED)
        async with other.transaction():
            # Holds delete_run in its last statement, whose snapshot has no key.
            await other.execute("SELECT FROM steps WHERE run_id = $1 FOR UPDATE", run_id)
            deleting = asyncio.ensure_future(store.delete_run(run_id))
            await wait_until_blocked(url, other, deleting)
            registering = asyncio.ensure_future(
                store.try_register_idempotency_key(FLOW, "manual", "k", run_id)
            )
            await asyncio.wait({registering}, timeout=2)
            was_stored = registering.done() and await store.get_run_status(run_id) is not None
        assert await deleting
        assert await registering
        found = await store.find_run_id_by_idempotency_key(FLOW, "manual", "k")
        assert not (was_stored and found), "a key that was registered for a stored run outlives it"


@source_mutant(
    "postgresql",
    kind="concurrency",
    clauses=("RET-1", "UNK", "CON-1"),
    changes=[
        (
            OUTPUTS,
            "FROM (SELECT FROM {schema}.runs WHERE run_id = $3 FOR SHARE) run\n",
            "FROM (SELECT FROM {schema}.runs WHERE run_id = $3) run\n",
        )
    ],
)
async def output_survives_the_deletion_of_its_run(url: str) -> None:
    """save_output does not lock the run, and leaves an output when cleanup deletes it."""
    async with open_store(url) as store, connection(url) as other:
        run_id = await new_run(store)
        async with other.transaction():
            await other.execute("DELETE FROM runs WHERE run_id = $1", run_id)
            saving = asyncio.ensure_future(outcome(store.save_output(run_id, "k", "1")))
            await wait_until_blocked(url, other, saving)
        assert await saving is RunNotFoundError, "an output of a deleted run was saved"
        assert await store.get_output(run_id, "k") is None


@source_mutant(
    "postgresql",
    kind="concurrency",
    clauses=("CTL-2", "CON-1"),
    changes=[
        (
            CONTROLS,
            "row = await transaction.row(MARK_TIMED_OUT, run_id, transaction.now, reason, as_of)\n",
            "control = await transaction.row(GET_RUN_CONTROL, run_id)\n"
            "            now = transaction.now\n"
            "            due = None if control is None else control[3]\n"
            "            if as_of is not None and (due is None or due > as_of):\n"
            "                return False\n"
            "            row = await transaction.row(MARK_TIMED_OUT, run_id, now, reason, None)\n",
        )
    ],
)
async def extended_deadline_is_timed_out(url: str) -> None:
    """mark_timed_out reads the deadline before it waits, and sets the latch although it was extended."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store, connection(url) as other:
        run_id = await new_run(store)
        await store.configure_run(run_id, FLOW, "manual", timeout_at=clock.now)
        async with other.transaction():
            later = clock.now + timedelta(hours=1)
            await other.execute("UPDATE controls SET timeout_at = $1", later)
            marking = asyncio.ensure_future(store.mark_timed_out(run_id, as_of=clock.now))
            await wait_until_blocked(url, other, marking)
        assert not await marking, "a run with an extended deadline timed out"


@source_mutant(
    "postgresql",
    kind="concurrency",
    clauses=("SIG-3", "SIG-2", "RUN-4", "CON-1"),
    changes=[
        (
            "flowstore_postgres/transactions.py",
            "WHERE run_id = $3 FOR UPDATE) AS status",
            "WHERE run_id = $3) AS status",
        )
    ],
)
async def signal_reaches_a_run_that_has_ended(url: str) -> None:
    """deliver_signal does not lock the run, and delivers while the run is being completed."""
    async with open_store(url) as store, connection(url) as other:
        run_id = await new_run(store)
        await store.register_waiter(run_id, "a", "paid")
        async with other.transaction():
            await other.execute(
                "UPDATE runs SET status = 'Succeeded', completed_at = now() WHERE run_id = $1", run_id
            )
            delivering = asyncio.ensure_future(store.deliver_signal(run_id, "paid", "{}"))
            await wait_until_blocked(url, other, delivering)
        assert (await delivering).status == "NotFound", "a signal was delivered to an ended run"


# Caches


@source_mutant(
    "postgresql",
    kind="cache",
    clauses=("IDM-4", "RET-1", "CLM-2"),
    changes=[
        (
            CONTROLS,
            "row = await self._database.read_row(FIND_RUN_ID, flow_id, trigger_key, idempotency_key)\n"
            "        return None if row is None else plain_uuid(row[0])\n",
            'cache = self._database.__dict__.setdefault("keys", {})\n'
            "        scope = (flow_id, trigger_key, idempotency_key)\n"
            "        if scope not in cache:\n"
            "            row = await self._database.read_row(FIND_RUN_ID, *scope)\n"
            "            if row is None:\n"
            "                return None\n"
            "            cache[scope] = plain_uuid(row[0])\n"
            "        return cache[scope]\n",
        )
    ],
)
async def idempotency_keys_are_cached(url: str) -> None:
    """A key that was found once is found for ever, although cleanup has deleted it."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = uuid4()
        await store.trigger_run(FLOW, "orders", run_id, "manual", idempotency_key="k")
        assert await store.find_run_id_by_idempotency_key(FLOW, "manual", "k") == run_id
        await end(store, run_id)
        assert await store.cleanup(clock.advance(seconds=1)) == 1
        found = await store.find_run_id_by_idempotency_key(FLOW, "manual", "k")
        assert found is None, "the key of a deleted run is found"


@source_mutant(
    "postgresql",
    kind="cache",
    clauses=("CLM-2", "STP-6", "RUN-4", "CON-1"),
    changes=[
        (
            STEPS,
            '            if not row["open"]:\n',
            '            if not row["open"]:\n'
            '                self._database.__dict__.setdefault("ended", set()).add(run_id)\n',
        ),
        (
            STEPS,
            "        started: Started = await self._database.write(\n",
            '        if run_id in self._database.__dict__.get("ended", ()):\n'
            "            raise RunCompletedError(run_id, step_key)\n"
            "        started: Started = await self._database.write(\n",
        ),
    ],
)
async def ended_runs_are_cached_by_starts(url: str) -> None:
    """record_step_start remembers that a run has ended, although another store can reopen it."""
    async with open_store(url) as store, open_store(url) as second:
        run_id = await new_run(store)
        await finish(store, run_id, "a", StepStatus.FAILED)
        await end(store, run_id, RunStatus.FAILED)
        await outcome(store.record_step_start(run_id, "a", "task"))
        await second.retry_step(run_id, "a")
        started = await outcome(store.record_step_start(run_id, "a", "task"))
        assert started == 2, "the reopened run counts as ended"


@source_mutant(
    "postgresql",
    kind="cache",
    clauses=("CLM-2", "EVT-2"),
    changes=[
        (
            OUTPUTS,
            "        row = await self._database.read_row(GET_OUTPUT, run_id, key)\n"
            "        return None if row is None else row[0]\n",
            '        cache = self._database.__dict__.setdefault("outputs", {})\n'
            "        if (run_id, key) not in cache:\n"
            "            row = await self._database.read_row(GET_OUTPUT, run_id, key)\n"
            "            if row is None:\n"
            "                return None\n"
            "            cache[run_id, key] = row[0]\n"
            "        value: str = cache[run_id, key]\n"
            "        return value\n",
        ),
        (
            OUTPUTS,
            "        if not await self._database.write(SAVE_ONE, (run_id, key, value_json)):\n",
            '        self._database.__dict__.setdefault("outputs", {}).pop((run_id, key), None)\n'
            "        if not await self._database.write(SAVE_ONE, (run_id, key, value_json)):\n",
        ),
    ],
)
async def outputs_are_cached_by_each_store(url: str) -> None:
    """get_output returns the value that the store read first, although another store has replaced it."""
    async with open_store(url) as store, open_store(url) as second:
        run_id = await new_run(store)
        await store.save_output(run_id, "k", "1")
        assert await store.get_output(run_id, "k") == "1"
        await second.save_output(run_id, "k", "2")
        assert await store.get_output(run_id, "k") == "2", "the output is from a cache"


# Cancellation


@source_mutant(
    "postgresql",
    kind="cancellation",
    clauses=("CON-4",),
    changes=[
        (
            WRITER,
            "            if on_abandoned is not None:\n                unacked.append(",
            "            if on_abandoned is not None and unacked:\n                unacked.append(",
        )
    ],
)
async def direct_call_is_not_compensated(url: str) -> None:
    """A claim that is cancelled while its caller itself sends it is kept."""
    async with open_store(url) as store, connection(url) as other:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "first", owner="one")
        async with other.transaction():
            await other.execute("SELECT FROM runs WHERE run_id = $1 FOR UPDATE", run_id)
            claiming = asyncio.ensure_future(store.try_claim_step(run_id, "second"))
            await send(claiming)
            claiming.cancel()
        await asyncio.wait([claiming])
        # Waits for the request if the server still has it.
        await store.append_event(run_id, "later")
    async with open_store(url) as store:
        assert await store.get_claimed_step_keys(run_id) == {"first"}, "the cancelled claim is kept"
