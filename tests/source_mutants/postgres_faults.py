"""Faults of PostgreSQL connections, lost replies, cancelled calls and transactions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

from flowstore_chaos.proxy import Fault, MessageMatch, Proxy, proxy_before
from flowstore_core import (
    FlowStore,
    RunStatus,
    StepStatus,
    StoreUnavailableError,
    open_store,
)
from flowstore_core.urls import parse_url
from tests.calls import FLOW, new_run
from tests.source_mutants import source_mutant
from tests.source_mutants.postgres_setup import (
    connection,
    end,
    finish,
    outcome,
    wait_until_blocked,
)
from tests.virtual_clock import VirtualClock

CLAIMS = "flowstore_postgres/claims.py"
STEPS = "flowstore_postgres/steps.py"
RUNS = "flowstore_postgres/runs.py"
EVENTS = "flowstore_postgres/events.py"
SIGNALS = "flowstore_postgres/signals.py"
RETENTION = "flowstore_postgres/retention.py"
DATABASE = "flowstore_postgres/database.py"
ERRORS = "flowstore_postgres/errors.py"
RETRY_LOOP = "flowstore_postgres/retry_loop.py"
RESOLUTION = "flowstore_postgres/commit_resolution.py"
TRANSACTIONS = "flowstore_postgres/transactions.py"
WRITER = "flowstore_postgres/batch_writer.py"
SESSION = "flowstore_postgres/session_settings.py"


@asynccontextmanager
async def _behind_proxy(url: str, **options: Any) -> AsyncIterator[tuple[Proxy, FlowStore, FlowStore]]:
    """A proxy, a store with one connection through it, and a store beside it."""
    delay = options.pop("delay", 0.2)
    async with (
        proxy_before(url, delay=delay) as (proxy, through),
        open_store(url) as direct,
        open_store(through, pool_size=1, **options) as store,
    ):
        await store.ping()
        yield proxy, store, direct


async def _without_reply(proxy: Proxy, call: Awaitable[Any]) -> asyncio.Future[Any]:
    """Start a call and lose the reply to its write; its store cannot connect again until ``disarm``."""
    proxy.arm(1, Fault.REPLY_LOST, match=MessageMatch.COMMIT)
    made = asyncio.ensure_future(call)
    while not proxy.has_injected:  # noqa: ASYNC110 - before the store retries
        await asyncio.sleep(0)
    proxy.arm(1, Fault.RESET, match=MessageMatch.CONNECT, times=1_000_000)
    return made


async def _deliver_late(proxy: Proxy) -> None:
    """Wait until the request that was held back has been delivered and executed."""
    assert proxy.has_injected
    await proxy.settle()
    await asyncio.sleep(1)


# Lost replies


@source_mutant(
    "postgresql",
    kind="connection",
    clauses=("CON-3", "RUN-1"),
    changes=[(RUNS, "probe=(FIND_START, run_id, token),", "probe=None,")],
)
async def repeated_start_finds_its_own_run(url: str) -> None:
    """start_run is retried after a lost reply without a probe, and fails on the row of its own first try."""
    async with _behind_proxy(url) as (proxy, store, _):
        proxy.arm(1, Fault.REPLY_LOST, match=MessageMatch.COMMIT)
        started = await outcome(store.start_run(FLOW, "orders", uuid4(), "manual"))
        assert proxy.has_injected
        assert not isinstance(started, type), "the call did not recognise its own run"


@source_mutant(
    "postgresql",
    kind="connection",
    clauses=("CON-3",),
    changes=[
        (
            EVENTS,
            "WHERE run_id = $1 AND token = $2",
            "WHERE run_id = $1 AND $2::uuid IS NOT NULL ORDER BY sequence DESC LIMIT 1",
        )
    ],
)
async def lost_event_is_taken_for_the_last_one(url: str) -> None:
    """append_event whose request was lost returns the sequence of an earlier event and appends nothing."""
    async with _behind_proxy(url) as (proxy, store, direct):
        run_id = await new_run(store)
        await store.append_event(run_id, "first")
        proxy.arm(1, Fault.REQUEST_LOST)
        assert await store.append_event(run_id, "second") == 2, "the event has the sequence of another"
        assert len(await direct.get_run_events(run_id)) == 2


@source_mutant(
    "postgresql",
    kind="connection",
    clauses=("CON-3",),
    changes=[
        (
            TRANSACTIONS,
            "if await resolve_commit(pool, UnackedCommit(process, note, transaction.xid), operation):",
            "if transaction is None:",
        )
    ],
)
async def lost_commit_counts_as_rolled_back(url: str) -> None:
    """A transaction whose COMMIT was not acknowledged is always repeated."""
    async with _behind_proxy(url) as (proxy, store, _):
        run_id = await new_run(store)
        proxy.arm(1, Fault.REPLY_LOST, match=MessageMatch.COMMIT)
        assert await store.request_cancel(run_id), "the call that set the latch is False"


@source_mutant(
    "postgresql",
    kind="connection",
    clauses=("CON-3", "CLM-1"),
    changes=[
        (
            WRITER,
            "            unacked.append(UnackedStatement(prepared.process, pool.expires_at(sent), note))\n"
            "            raise RetryableError",
            "            raise RetryableError",
        )
    ],
)
async def repeated_dispatch_loses_to_itself(url: str) -> None:
    """A dispatch is retried after a lost reply without a probe, and conflicts with its own first try."""
    async with _behind_proxy(url) as (proxy, store, _):
        run_id = await new_run(store)
        proxy.arm(1, Fault.REPLY_LOST, match=MessageMatch.COMMIT)
        assert await store.try_record_dispatch(run_id, "a"), "the call that won the dispatch is False"


@source_mutant(
    "postgresql",
    kind="connection",
    clauses=("CON-3",),
    changes=[
        (
            CLAIMS,
            '    batch_sql=with_note(TRY_CLAIM_STEP, "won"),\n'
            "    single_sql=with_single_note(TRY_CLAIM_STEP_SINGLE),\n",
            "    batch_sql=TRY_CLAIM_STEP,\n    single_sql=TRY_CLAIM_STEP_SINGLE,\n"
            '    probe_sql="SELECT FROM {schema}.steps "\n'
            '    "WHERE run_id = $1 AND step_key = $2 AND claim_token = to_hex($3::bigint)",\n',
        )
    ],
)
async def claim_that_was_released_is_made_again(url: str) -> None:
    """A claim whose reply was lost is repeated if another call has released it meanwhile."""
    async with _behind_proxy(url) as (proxy, store, direct):
        run_id = await new_run(store)
        claiming = await _without_reply(proxy, store.try_claim_step(run_id, "a"))
        await direct.release_step_claim(run_id, "a")
        proxy.disarm()
        assert await claiming
        assert await direct.get_step_claims(run_id) == (), "the released claim was made again"


@source_mutant(
    "postgresql",
    kind="connection",
    clauses=("CON-3",),
    changes=[
        (
            STEPS,
            "    UNION ALL\n    SELECT attempt FROM {schema}.attempts "
            "WHERE run_id = $1 AND step_key = $2 AND started_token = $3\n",
            "",
        )
    ],
)
async def superseded_start_is_made_again(url: str) -> None:
    """A start whose reply was lost opens another attempt if a start of another worker came meanwhile."""
    async with _behind_proxy(url) as (proxy, store, direct):
        run_id = await new_run(store)
        await direct.try_claim_step(run_id, "a")
        starting = await _without_reply(proxy, store.record_step_start(run_id, "a", "task"))
        await direct.record_step_start(run_id, "a", "task")
        proxy.disarm()
        assert await starting == 1, "the start opened a second attempt"


@source_mutant(
    "postgresql",
    kind="connection",
    clauses=("CON-3",),
    changes=[
        (
            EVENTS,
            "FROM guard WHERE before_deadline AND run_id = $3\n",
            "FROM guard WHERE run_id = $3\n",
        )
    ],
)
async def late_request_takes_effect(url: str) -> None:
    """An append_event that reaches the server after its deadline still takes effect."""
    # Behind a pooler the server process cannot be ended, so only the deadline stops the request.
    async with _behind_proxy(url, pgbouncer=True, statement_timeout=0.5, delay=5.0) as (proxy, store, direct):
        run_id = await new_run(store)
        await store.append_event(run_id, "first")
        # The first message prepares the statement.
        proxy.arm(2, Fault.REQUEST_LATE)
        assert await store.append_event(run_id, "second") == 2
        await _deliver_late(proxy)
        assert len(await direct.get_run_events(run_id)) == 2, "the late request appended the event again"


@source_mutant(
    "postgresql",
    kind="connection",
    clauses=("CON-3",),
    changes=[
        (
            RESOLUTION,
            "        elif loop.time() < statement.expires_at:\n",
            "        elif loop.time() < 0:\n",
        )
    ],
)
async def request_is_repeated_before_its_deadline(url: str) -> None:
    """Behind a pooler a lost request is retried while it can still take effect."""
    async with _behind_proxy(url, pgbouncer=True, statement_timeout=8, delay=4.0) as (proxy, store, direct):
        run_id = await new_run(store)
        await store.append_event(run_id, "first")
        # The first message prepares the statement.
        proxy.arm(2, Fault.REQUEST_LATE)
        await store.append_event(run_id, "second")
        await _deliver_late(proxy)
        assert len(await direct.get_run_events(run_id)) == 2, "the late request appended the event again"


@source_mutant(
    "postgresql",
    kind="connection",
    clauses=("CON-3",),
    changes=[
        (
            RESOLUTION,
            "if await terminate(pool, connection, process):",
            "if process.pid == 0:",
        )
    ],
)
async def server_process_of_a_lost_request_goes_on(url: str) -> None:
    """A lost request is retried although the server process that may still receive it is running."""
    async with _behind_proxy(url, delay=4.0) as (proxy, store, direct):
        run_id = await new_run(store)
        await store.append_event(run_id, "first")
        proxy.arm(1, Fault.REQUEST_LATE)
        await store.append_event(run_id, "second")
        await _deliver_late(proxy)
        assert len(await direct.get_run_events(run_id)) == 2, "the late request appended the event again"


# Connections


@source_mutant(
    "postgresql",
    kind="connection",
    clauses=("CON-2",),
    changes=[
        (
            DATABASE,
            '        await self.read("SELECT 1")\n',
            "        async with self.pool.connection():\n            pass\n",
        )
    ],
)
async def ping_asks_only_the_pool(url: str) -> None:
    """ping succeeds if the pool has an idle connection, although the server does not respond."""
    limits = {"statement_timeout": 2, "retry_timeout": 2, "connect_timeout": 2}
    async with _behind_proxy(url, **limits) as (proxy, store, _):
        proxy.arm(1, Fault.BLACK_HOLE, times=1_000_000)
        pinged = await outcome(store.ping())
        proxy.heal()
        assert pinged is StoreUnavailableError, "ping succeeds without an answer"


@source_mutant(
    "postgresql",
    kind="connection",
    clauses=("CON-2",),
    changes=[(RETRY_LOOP, "if left <= 0 or wait > left:", "if left <= 0 and failed:")],
    hangs=True,
)
async def retries_have_no_end(url: str) -> None:
    """Calls retry for ever while the server cannot be reached."""
    async with _behind_proxy(url, retry_timeout=0.5) as (proxy, store, _):
        proxy.arm(1, Fault.RESET, times=1_000_000)
        assert await outcome(store.ping()) is StoreUnavailableError
        proxy.heal()


@source_mutant(
    "postgresql",
    kind="connection",
    clauses=("CON-2",),
    changes=[(ERRORS, '        "40P01",  # deadlock_detected\n', "")],
)
async def deadlock_is_not_retried(url: str) -> None:
    """A transaction that the server ends because of a deadlock fails with StoreUnavailableError."""
    async with open_store(url) as store, connection(url) as other:
        run_id = await new_run(store)
        await other.execute(
            "CREATE SEQUENCE tries; CREATE FUNCTION fail_once() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "IF nextval('tries') = 1 THEN RAISE EXCEPTION USING ERRCODE = 'deadlock_detected'; END IF; "
            "RETURN NEW; END $$;"
        )
        # The store's search_path does not contain its schema.
        await other.execute(
            f'ALTER FUNCTION fail_once() SET search_path = "{parse_url(url).options["schema"]}"; '
            "CREATE TRIGGER fail_once BEFORE INSERT ON waiters FOR EACH ROW EXECUTE FUNCTION fail_once()"
        )
        registered = await outcome(store.register_waiter(run_id, "a", "paid"))
        assert registered is None, "a deadlock reaches the caller"


@source_mutant(
    "postgresql",
    kind="connection",
    clauses=("CON-2",),
    changes=[(WRITER, "        keep = pool_size > 1\n", "        keep = True\n")],
)
async def batches_keep_the_only_connection(url: str) -> None:
    """With a pool of one the batches keep its connection, and every other call fails."""
    async with open_store(url, pool_size=1, acquire_timeout=2) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "a")
        assert await outcome(store.get_run_status(run_id)) == RunStatus.RUNNING, "no connection is free"


@source_mutant(
    "postgresql",
    kind="connection",
    clauses=("CON-2", "RUN-1"),
    changes=[(SESSION, '    "default_transaction_read_only": "off",\n', "")],
)
async def default_of_the_role_makes_the_store_read_only(url: str) -> None:
    """A role whose transactions are read-only by default cannot write."""
    role = f"reader_{uuid4().hex}"
    async with open_store(url), connection(url) as other:
        await other.execute(f"CREATE ROLE {role} SUPERUSER LOGIN")
        await other.execute(f"ALTER ROLE {role} SET default_transaction_read_only = on")
        try:
            options = {**parse_url(url).options, "user": role}
            async with open_store(parse_url(url).with_options(options)) as store:
                started = await outcome(store.start_run(FLOW, "orders", uuid4(), "manual"))
        finally:
            await other.execute(f"DROP ROLE {role}")
        assert not isinstance(started, type), "the run cannot be started"


# Cancelled calls


@source_mutant(
    "postgresql",
    kind="cancellation",
    clauses=("CON-4",),
    changes=[
        (
            WRITER,
            "operation.submit((run_id.int, row[1]), row, on_abandoned)",
            "operation.submit((run_id.int, row[1]), row)",
        )
    ],
)
async def claim_on_a_locked_run_is_not_compensated(url: str) -> None:
    """A cancelled claim is kept if its run was locked when it was made."""
    async with open_store(url) as store, connection(url) as other:
        run_id = await new_run(store)
        async with other.transaction():
            await other.execute("SELECT FROM runs WHERE run_id = $1 FOR UPDATE", run_id)
            first = asyncio.ensure_future(store.try_claim_step(run_id, "first", owner="one"))
            await wait_until_blocked(url, other)
            second = asyncio.ensure_future(store.try_claim_step(run_id, "second"))
            await wait_until_blocked(url, other, number=2)
            second.cancel()
            await asyncio.wait([second])
        assert await first
    async with open_store(url) as store:
        assert await store.get_claimed_step_keys(run_id) == {"first"}, "the cancelled claim is kept"


# Transactions


@source_mutant(
    "postgresql",
    kind="transaction",
    clauses=("SIG-2", "CON-1"),
    changes=[
        (
            SIGNALS,
            "), remembered AS (\n"
            "    INSERT INTO {schema}.deliveries (run_id, delivery_id, step_key, delivered_at)\n"
            "    SELECT $1, $6, step_key, delivered_at FROM delivered WHERE $6 IS NOT NULL\n"
            ")\n",
            ")\n",
        ),
        (
            SIGNALS,
            '        return await self._database.transaction("deliver_signal", work, lock_run=run_id)\n',
            '        result = await self._database.transaction("deliver_signal", work, lock_run=run_id)\n'
            "        if delivery_id is not None and result.status is SignalDeliveryStatus.DELIVERED:\n\n"
            "            async def remember(transaction: Transaction) -> None:\n"
            "                await transaction.execute(\n"
            '                    "INSERT INTO {schema}.deliveries"\n'
            '                    " VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING",\n'
            "                    run_id, delivery_id, result.step_key, result.delivered_at,\n"
            "                )\n\n"
            '            await self._database.transaction("deliver_signal", remember)\n'
            "        return result\n",
        ),
    ],
)
async def delivery_id_is_remembered_in_a_second_transaction(url: str) -> None:
    """deliver_signal commits the delivery before its delivery_id, so a repeated call delivers again."""
    async with open_store(url) as store, connection(url) as other:
        run_id = await new_run(store)
        for key in ("a", "b"):
            await store.register_waiter(run_id, key, "paid")
        async with other.transaction():
            await other.execute("LOCK TABLE deliveries IN EXCLUSIVE MODE")
            deliveries = []
            for _ in range(2):
                call = store.deliver_signal(run_id, "paid", "{}", delivery_id="d")
                deliveries.append(asyncio.ensure_future(call))
                await wait_until_blocked(url, other, number=len(deliveries))
        first, again = await asyncio.gather(*deliveries)
        assert again == first, "the same delivery_id was delivered twice"


@source_mutant(
    "postgresql",
    kind="transaction",
    clauses=("RET-3", "RET-1", "RET-2", "CON-1"),
    changes=[
        (
            RETENTION,
            '    + " DELETE FROM {schema}.runs WHERE run_id = ANY($1::uuid[])"\n',
            '    + " SELECT 1"\n',
        ),
        (
            RETENTION,
            "                deleted += await self._run_paced(\n"
            "                    partial(_delete_runs, runs[start : start + RUNS_PER_TRANSACTION], cutoff)\n"
            "                )\n",
            "                some = runs[start : start + RUNS_PER_TRANSACTION]\n"
            "                await self._run_paced(partial(_delete_runs, some, cutoff))\n"
            "                deleted += await self._run_paced(partial(_delete_rows, some, cutoff))\n",
        ),
        (
            RETENTION,
            "async def _fold(transaction: Transaction)",
            "async def _delete_rows(\n"
            "    runs: Sequence[UUID], cutoff: datetime, transaction: Transaction\n"
            ") -> int:\n"
            '    sql = "DELETE FROM {schema}.runs WHERE run_id = ANY($1::uuid[]) AND completed_at < $2"\n'
            "    return _count(await transaction.execute(sql, runs, cutoff))\n\n\n"
            "async def _fold(transaction: Transaction)",
        ),
    ],
)
async def cleanup_deletes_steps_before_their_run(url: str) -> None:
    """cleanup deletes the steps of a run in one transaction and the run in the next."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store, connection(url) as other:
        run_id = await new_run(store)
        await finish(store, run_id, "a", StepStatus.SUCCEEDED)
        await end(store, run_id)
        clock.advance(seconds=1)
        async with other.transaction():
            # Prevents that rows of runs are deleted, not that they are locked.
            await other.execute("LOCK TABLE runs IN SHARE MODE")
            cleaning = asyncio.ensure_future(store.cleanup(clock.now))
            await wait_until_blocked(url, other, cleaning)
            detail = await store.get_run_detail(run_id)
        assert await cleaning == 1
        assert detail is not None
        assert len(detail.steps) == 1, "a run without its steps is visible"
