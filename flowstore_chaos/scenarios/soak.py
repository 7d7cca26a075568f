"""All faults together for a long time: resource use stays constant and the ledger matches the store.

The soak consists of cycles. In each cycle clients work while faults are injected. Then the faults stop, the
ledger is verified, the runs are deleted and the resources of the process are measured. Two stores stay open
during all cycles, two are opened and closed in each.
"""

from __future__ import annotations

import asyncio
import gc
import sqlite3
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psutil

from flowstore_chaos.clients import ClientGroup
from flowstore_chaos.context import RunContext
from flowstore_chaos.proxy import Fault, Proxy, proxy_before_port
from flowstore_chaos.scenario import FaultScenario
from flowstore_chaos.server import Server
from flowstore_chaos.server_crashes import KINDS, crash
from flowstore_core import FlowStore, FlowStoreError, RunStatus, new_claim_token, new_run_id, open_store
from flowstore_core.urls import parse_url

LONG_LIVED = 2
SHORT_LIVED = 2
GROUPS = 3
POOL_SIZE = 3
CYCLE_SECONDS = 10.0
MIN_CYCLES = 4
"""Minimum number of cycles."""
PAUSE_SECONDS = (0.02, 0.4)
"""Seconds between two faults."""
HOLD_SECONDS = (0.05, 0.4)
QUERY = {"pool_size": str(POOL_SIZE), "statement_timeout": "1", "retry_timeout": "5", "connect_timeout": "3"}
COUNT_CONNECTIONS = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'flowstore'"
COUNT_OPEN_TRANSACTIONS = f"{COUNT_CONNECTIONS} AND state LIKE 'idle in transaction%'"
TERMINATE = """
SELECT count(pg_terminate_backend(pid)) FROM (SELECT pid FROM pg_stat_activity
WHERE application_name = 'flowstore' ORDER BY random() LIMIT 1) one
"""
LOCK = "LOCK TABLE chaos.{table} IN EXCLUSIVE MODE; SELECT pg_sleep({seconds})"
SETTLE_SECONDS = 5.0

MEMORY_SHARE = 0.10
MEMORY_BYTES = 20 << 20
"""Maximum growth of the process in the second half; both limits apply."""
MEMORY_NOISE = 8 << 20
"""Growth that says nothing: the allocator keeps freed memory, and a share of a small process is little."""
FEW_BLOCKS = 400
BLOCKS_PER_OPERATION = 0.5
"""Maximum growth of Python's allocated blocks: a constant, and an amount per call."""
STATEMENT_BLOCKS = 1000
"""Blocks held by the statement cache of a PostgreSQL connection."""
CALLS_PER_RUN = 40


class CacheRepliesMutant:
    """A store that keeps every result in memory."""

    def __init__(self, store: FlowStore) -> None:
        self._store = store
        self._answers: list[object] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        async def call(*arguments: Any, **named: Any) -> Any:
            answer = await method(*arguments, **named)
            self._answers.append((arguments, named, answer))
            return answer

        return call


@dataclass(frozen=True, slots=True)
class Sample:
    """Resources of the idle process."""

    memory: int
    blocks: int
    files: int
    threads: int
    tasks: int
    operations: int

    @classmethod
    def now(cls, operations: int) -> Sample:
        gc.collect()
        me = psutil.Process()
        return cls(
            memory=me.memory_info().rss,
            blocks=sys.getallocatedblocks(),
            files=me.num_fds(),
            threads=threading.active_count(),
            tasks=len(asyncio.all_tasks()),
            operations=operations,
        )


@dataclass(slots=True)
class Target:
    """The stores' URL, and the means to inject faults."""

    url: str
    server: Server | None = None
    proxy: Proxy | None = None


async def run(context: RunContext) -> None:
    async with _open_target(context) as target, AsyncExitStack() as stack:
        shared = [
            _new_store(context, await stack.enter_async_context(open_store(target.url)))
            for _ in range(LONG_LIVED)
        ]
        # Stores that the mutant does not close.
        leaked = await stack.enter_async_context(AsyncExitStack())
        cycle_seconds = min(CYCLE_SECONDS, context.planned / MIN_CYCLES)
        samples: list[Sample] = []
        while not context.done:
            await _run_cycle(
                context, target, shared, leaked, min(cycle_seconds, context.planned - context.counts.injected)
            )
            if target.server is not None:
                await _expect_connections(context, target.server, LONG_LIVED * POOL_SIZE)
            samples.append(Sample.now(context.counts.operations))
        if not context.is_detected:
            _compare_samples(context, samples)


@asynccontextmanager
async def _open_target(context: RunContext) -> AsyncIterator[Target]:
    if context.backend != "postgresql":
        async with context.store_url() as url:
            yield Target(url.replace("memory://", "memory://soak"))
        return
    async with context.server() as server, proxy_before_port(server.port) as proxy:
        yield Target(server.url(schema="chaos", port=proxy.port, **QUERY), server, proxy)


def _new_store(context: RunContext, opened: FlowStore) -> Any:
    return CacheRepliesMutant(opened) if context.is_mutant else opened


async def _run_cycle(
    context: RunContext, target: Target, shared: list[Any], leaked: AsyncExitStack, seconds: float
) -> None:
    """Work under faults for some seconds, then verify the ledger and delete the runs."""
    counts = context.counts
    async with AsyncExitStack() as stack:
        closing_them = leaked if context.is_mutant else stack
        short_lived = [
            await closing_them.enter_async_context(open_store(target.url)) for _ in range(SHORT_LIVED)
        ]
        stores = [*shared, *short_lived]
        clients = ClientGroup(stores, counts, context.rng)
        until = time.monotonic() + seconds
        whole = round(seconds)

        def is_over() -> bool:
            return time.monotonic() > until

        before = counts.operations
        work = [
            asyncio.create_task(clients.run(is_over, groups=GROUPS)),
            asyncio.create_task(_inject(context, target, is_over)),
            asyncio.create_task(_cancel(context, stores, is_over)),
        ]
        try:
            await asyncio.gather(*work)
        finally:
            for task in work:
                task.cancel()
            await asyncio.wait(work)
        counts.add_detail("calls refused", clients.refused)
        await clients.ledger.verify(shared[0], counts)
        for run in await shared[0].get_active_runs():
            await shared[0].complete_run(run.run_id, RunStatus.CANCELLED)
        await shared[0].cleanup(datetime.now(UTC) + timedelta(days=1))
    if counts.operations > before:
        context.record_faults(max(1, whole))


async def _inject(context: RunContext, target: Target, is_over: Callable[[], bool]) -> None:
    faults = _faults(context, target)
    while faults and not is_over():
        await asyncio.sleep(context.rng.uniform(*PAUSE_SECONDS))
        name = context.rng.choice(sorted(faults))
        if await faults[name]():
            context.counts.add_detail(name)


def _faults(context: RunContext, target: Target) -> dict[str, Callable[[], Awaitable[bool]]]:
    rng, server, proxy = context.rng, target.server, target.proxy

    async def lock_file() -> bool:
        with closing(sqlite3.connect(parse_url(target.url).path, timeout=0, isolation_level=None)) as other:
            until = time.monotonic() + 1.0
            while True:
                try:
                    other.execute("BEGIN IMMEDIATE")
                    break
                except sqlite3.OperationalError:
                    if time.monotonic() > until:
                        return False
                await asyncio.sleep(0.001)
            await asyncio.sleep(rng.uniform(*HOLD_SECONDS))
            other.execute("ROLLBACK")
        return True

    if server is None or proxy is None:
        return {"file locked by another process": lock_file} if context.backend == "sqlite" else {}

    async def inject_message_fault() -> bool:
        proxy.arm(rng.randrange(1, 20), rng.choice(list(Fault)))
        await asyncio.sleep(rng.uniform(*HOLD_SECONDS))
        injected = proxy.has_injected
        proxy.heal()
        return injected

    async def go_down() -> bool:
        return await crash(server, rng.choice(KINDS), rng)

    async def ask(statement: str) -> bool:
        try:
            return await server.psql(statement) != "0"
        except RuntimeError:
            # The server is still recovering from the previous fault.
            return False

    async def lock_table() -> bool:
        table = rng.choice(("runs", "steps", "outputs"))
        return await ask(LOCK.format(table=table, seconds=rng.uniform(*HOLD_SECONDS)))

    return {
        "messages lost": inject_message_fault,
        "server crashed": go_down,
        "connection terminated": lambda: ask(TERMINATE),
        "table locked by another session": lock_table,
    }


async def _cancel(context: RunContext, stores: list[Any], is_over: Callable[[], bool]) -> None:
    """Cancel pending calls on runs that are not in the ledger."""
    rng = context.rng
    run_id = new_run_id()
    calls: list[Callable[[Any], Awaitable[object]]] = [
        lambda store: store.start_run(run_id, "cancelled", run_id, "manual"),
        lambda store: store.trigger_run(
            UUID(int=1), "cancelled", new_run_id(), "t", idempotency_key=new_claim_token()
        ),
        lambda store: store.try_claim_step(run_id, rng.choice("abc"), owner=new_claim_token()),
        lambda store: store.try_record_dispatch(run_id, rng.choice("abc")),
        lambda store: store.record_step_start(run_id, rng.choice("abc"), "python"),
        lambda store: store.save_output(run_id, rng.choice("abc"), "1"),
        lambda store: store.append_event(run_id, "note", message="cancelled"),
        lambda store: store.register_waiter(run_id, rng.choice("abc"), "go"),
        lambda store: store.deliver_signal(run_id, "go", "1", buffer=True),
        lambda store: store.get_run_detail(run_id),
        lambda store: store.get_runs_page(search="cancel"),
    ]
    number = 0
    while not is_over():
        number += 1
        if number % CALLS_PER_RUN == 0:
            run_id = new_run_id()
        task = asyncio.ensure_future(rng.choice(calls)(rng.choice(stores)))
        await asyncio.sleep(rng.choice((0, rng.uniform(0, 0.02))))
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            context.counts.add_detail("calls cancelled")
        except FlowStoreError:
            # Expected: the run does not exist, or the server is unavailable.
            continue
        except Exception as error:  # noqa: BLE001 - counted
            context.counts.count_wrong(f"a cancelled call raised {type(error).__name__}")


async def _expect_connections(context: RunContext, server: Server, limit: int) -> None:
    """Check that the server has at most ``limit`` connections and no open transaction."""
    until = time.monotonic() + SETTLE_SECONDS
    while True:
        count, idle = (
            int(await server.psql(COUNT_CONNECTIONS)),
            int(await server.psql(COUNT_OPEN_TRANSACTIONS)),
        )
        if count <= limit and not idle:
            return
        if time.monotonic() > until:
            if count > limit:
                context.counts.count_leak(
                    f"the server has {count} connections, more than the {limit} of the pools"
                )
            if idle:
                context.counts.count_leak(f"the server has {idle} abandoned transactions")
            return
        await asyncio.sleep(0.1)


def _compare_samples(context: RunContext, samples: list[Sample]) -> None:
    """Compare the last sample with the middle one; the first half is warm-up."""
    counts, half = context.counts, len(samples) // 2
    middle, end = samples[half - 1], samples[-1]
    grown = end.memory - middle.memory
    counts.details["memory, MB"] = round(end.memory / (1 << 20), 1)
    counts.details["grown in the second half, MB"] = round(grown / (1 << 20), 1)
    counts.details["files"], counts.details["threads"] = end.files, end.threads
    if grown > min(MEMORY_BYTES, max(MEMORY_NOISE, middle.memory * MEMORY_SHARE)):
        counts.count_leak(
            f"memory grew from {middle.memory >> 20} to {end.memory >> 20} MB in the second half"
        )
    blocks, calls = end.blocks - middle.blocks, end.operations - middle.operations
    counts.details["blocks grown per call"] = round(blocks / max(1, calls), 2)
    # A pool may reach its size late. Each connection needs a file in the store, two in the proxy, some tasks,
    # and a statement cache.
    room = LONG_LIVED * POOL_SIZE if context.backend == "postgresql" else 0
    if blocks > FEW_BLOCKS + STATEMENT_BLOCKS * room + BLOCKS_PER_OPERATION * calls:
        counts.count_leak(f"{blocks} more blocks of memory are allocated after {calls} more calls")
    for name, each in (("files", 3), ("threads", 0), ("tasks", 4)):
        limit = max(getattr(sample, name) for sample in samples[:half])
        if getattr(end, name) > limit + room * each:
            counts.count_leak(f"{name}: {getattr(end, name)} at the end, at most {limit} in the first half")


SCENARIO = FaultScenario(
    number=16,
    name="soak",
    fault="lost messages, server crashes, locks, broken connections and cancelled calls, continuously",
    unit="seconds of soak",
    planned=600,
    min_faults=4,
    backends=("memory", "sqlite", "postgresql"),
    pass_criterion="memory, files and threads stay constant; nothing is lost, duplicated or wrong",
    mutant="every result is kept in memory, and stores are not closed",
    minutes=25,
    run=run,
)
