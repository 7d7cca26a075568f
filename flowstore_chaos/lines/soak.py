"""All faults at once for a long time: what the process holds stays as it was, and the books are right.

The soak goes in spells. In each, clients work while faults are injected; then it is quiet, the books are
verified, the runs deleted, and what the process holds is measured. Two stores last from the first spell
to the last, two are opened and closed in each.
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

from flowstore_chaos.crashes import KINDS, crash
from flowstore_chaos.line import Line
from flowstore_chaos.proxy import Fault, Proxy, proxy_before_port
from flowstore_chaos.server import Server
from flowstore_chaos.trial import Trial
from flowstore_chaos.work import Clients
from flowstore_core import FlowStore, FlowStoreError, RunStatus, new_claim_token, new_run_id, open_store
from flowstore_core.urls import parse_url

LASTING = 2
PASSING = 2
GROUPS = 3
POOL_SIZE = 3
SPELL_SECONDS = 10.0
SPELLS = 4
"""There are at least so many."""
PAUSE_SECONDS = (0.02, 0.4)
"""Between two faults."""
HOLD_SECONDS = (0.05, 0.4)
QUERY = {"pool_size": str(POOL_SIZE), "statement_timeout": "1", "retry_timeout": "5", "connect_timeout": "3"}
CONNECTIONS = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'flowstore'"
OPEN = f"{CONNECTIONS} AND state LIKE 'idle in transaction%'"
TERMINATE = """
SELECT count(pg_terminate_backend(pid)) FROM (SELECT pid FROM pg_stat_activity
WHERE application_name = 'flowstore' ORDER BY random() LIMIT 1) one
"""
LOCK = "LOCK TABLE chaos.{table} IN EXCLUSIVE MODE; SELECT pg_sleep({seconds})"
SETTLE_SECONDS = 5.0

MEMORY_SHARE = 0.10
MEMORY_BYTES = 20 << 20
"""In its second half the process may grow by less than both."""
FEW_BLOCKS = 400
BLOCKS_PER_OPERATION = 0.5
"""Python's own count of what it has allocated may grow by so many, and by so many for each call."""
STATEMENT_BLOCKS = 1000
"""What a connection to PostgreSQL remembers of the statements it was asked."""
CALLS_PER_RUN = 40


class KeepsAnswers:
    """A store that remembers every answer it ever gave."""

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
    """What the process holds in a quiet moment."""

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
class Place:
    """Where the stores are, and what can be done to them from outside."""

    url: str
    server: Server | None = None
    proxy: Proxy | None = None


async def run(trial: Trial) -> None:
    async with _new_place(trial) as place, AsyncExitStack() as stack:
        shared = [
            _new_store(trial, await stack.enter_async_context(open_store(place.url))) for _ in range(LASTING)
        ]
        # Of the broken variant.
        leaked = await stack.enter_async_context(AsyncExitStack())
        spell_seconds = min(SPELL_SECONDS, trial.planned / SPELLS)
        samples: list[Sample] = []
        while not trial.done:
            await _spell(trial, place, shared, leaked, min(spell_seconds, trial.planned - trial.tally.landed))
            if place.server is not None:
                await _expect_connections(trial, place.server, LASTING * POOL_SIZE)
            samples.append(Sample.now(trial.tally.operations))
        _judge(trial, samples)


@asynccontextmanager
async def _new_place(trial: Trial) -> AsyncIterator[Place]:
    if trial.backend != "postgresql":
        async with trial.store_url() as url:
            yield Place(url.replace("memory://", "memory://soak"))
        return
    async with trial.server() as server, proxy_before_port(server.port) as proxy:
        yield Place(server.url(schema="chaos", port=proxy.port, **QUERY), server, proxy)


def _new_store(trial: Trial, opened: FlowStore) -> Any:
    return KeepsAnswers(opened) if trial.broken else opened


async def _spell(
    trial: Trial, place: Place, shared: list[Any], leaked: AsyncExitStack, seconds: float
) -> None:
    """Work under faults for so long, then look that everything is as was told, and delete it."""
    tally = trial.tally
    async with AsyncExitStack() as stack:
        closing_them = leaked if trial.broken else stack
        passing = [await closing_them.enter_async_context(open_store(place.url)) for _ in range(PASSING)]
        stores = [*shared, *passing]
        clients = Clients(stores, tally, trial.rng)
        until = time.monotonic() + seconds
        whole = round(seconds)

        def over() -> bool:
            return time.monotonic() > until

        before = tally.operations
        work = [
            asyncio.create_task(clients.work(over, groups=GROUPS)),
            asyncio.create_task(_inject(trial, place, over)),
            asyncio.create_task(_cancel(trial, stores, over)),
        ]
        try:
            await asyncio.gather(*work)
        finally:
            for task in work:
                task.cancel()
            await asyncio.wait(work)
        tally.add("calls refused", clients.refused)
        await clients.books.verify(shared[0], tally)
        for run in await shared[0].get_active_runs():
            await shared[0].complete_run(run.run_id, RunStatus.CANCELLED)
        await shared[0].cleanup(datetime.now(UTC) + timedelta(days=1))
    if tally.operations > before:
        trial.landed(max(1, whole))


async def _inject(trial: Trial, place: Place, over: Callable[[], bool]) -> None:
    faults = _faults(trial, place)
    while faults and not over():
        await asyncio.sleep(trial.rng.uniform(*PAUSE_SECONDS))
        name = trial.rng.choice(sorted(faults))
        if await faults[name]():
            trial.tally.add(name)


def _faults(trial: Trial, place: Place) -> dict[str, Callable[[], Awaitable[bool]]]:
    rng, server, proxy = trial.rng, place.server, place.proxy

    async def lock_file() -> bool:
        with closing(sqlite3.connect(parse_url(place.url).path, timeout=0, isolation_level=None)) as other:
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
        return {"file locked by another": lock_file} if trial.backend == "sqlite" else {}

    async def strike() -> bool:
        proxy.arm(rng.randrange(1, 20), rng.choice(list(Fault)))
        await asyncio.sleep(rng.uniform(*HOLD_SECONDS))
        struck = proxy.struck
        proxy.heal()
        return struck

    async def go_down() -> bool:
        return await crash(server, rng.choice(KINDS), rng)

    async def ask(statement: str) -> bool:
        try:
            return await server.psql(statement) != "0"
        except RuntimeError:
            # It is still recovering from the last fault.
            return False

    async def lock_table() -> bool:
        table = rng.choice(("runs", "steps", "outputs"))
        return await ask(LOCK.format(table=table, seconds=rng.uniform(*HOLD_SECONDS)))

    return {
        "messages lost": strike,
        "server crashed": go_down,
        "connection terminated": lambda: ask(TERMINATE),
        "table locked by another": lock_table,
    }


async def _cancel(trial: Trial, stores: list[Any], over: Callable[[], bool]) -> None:
    """Cancel calls in the middle, on runs that are in no books."""
    rng = trial.rng
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
        lambda store: store.deliver_signal(run_id, "go", "1"),
        lambda store: store.get_run_detail(run_id),
        lambda store: store.get_runs_page(search="cancel"),
    ]
    number = 0
    while not over():
        number += 1
        if number % CALLS_PER_RUN == 0:
            run_id = new_run_id()
        task = asyncio.ensure_future(rng.choice(calls)(rng.choice(stores)))
        await asyncio.sleep(rng.choice((0, rng.uniform(0, 0.02))))
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            trial.tally.add("calls cancelled")
        except FlowStoreError:
            # The run is not there, or the server is not; it is no matter here.
            continue
        except Exception as error:  # noqa: BLE001 - counted
            trial.tally.mistrust(f"a cancelled call raised {type(error).__name__}")


async def _expect_connections(trial: Trial, server: Server, most: int) -> None:
    """Those of closed stores and of broken connections are gone from the server, and none has work left."""
    until = time.monotonic() + SETTLE_SECONDS
    while True:
        count, idle = int(await server.psql(CONNECTIONS)), int(await server.psql(OPEN))
        if count <= most and not idle:
            return
        if time.monotonic() > until:
            if count > most:
                trial.tally.leak(f"the server has {count} connections, where pools may hold {most}")
            if idle:
                trial.tally.leak(f"the server has {idle} open transactions of nobody")
            return
        await asyncio.sleep(0.1)


def _judge(trial: Trial, samples: list[Sample]) -> None:
    """Compare the end with the middle; the first half is for warming up."""
    tally, half = trial.tally, len(samples) // 2
    middle, end = samples[half - 1], samples[-1]
    grown = end.memory - middle.memory
    tally.details["memory, MB"] = round(end.memory / (1 << 20), 1)
    tally.details["grown in the second half, MB"] = round(grown / (1 << 20), 1)
    tally.details["files"], tally.details["threads"] = end.files, end.threads
    if grown > MEMORY_BYTES or grown > middle.memory * MEMORY_SHARE:
        tally.leak(f"memory grew from {middle.memory >> 20} to {end.memory >> 20} MB in the second half")
    blocks, calls = end.blocks - middle.blocks, end.operations - middle.operations
    tally.details["blocks grown per call"] = round(blocks / max(1, calls), 2)
    # A pool may only later have reached its size; a connection has a file here, two in the proxy, tasks, and
    # statements that it keeps.
    room = LASTING * POOL_SIZE if trial.backend == "postgresql" else 0
    if blocks > FEW_BLOCKS + STATEMENT_BLOCKS * room + BLOCKS_PER_OPERATION * calls:
        tally.leak(f"{blocks} more blocks of memory are allocated after {calls} more calls")
    for name, each in (("files", 3), ("threads", 0), ("tasks", 4)):
        most = max(getattr(sample, name) for sample in samples[:half])
        if getattr(end, name) > most + room * each:
            tally.leak(
                f"there were at most {most} {name} in the first half, and there are {getattr(end, name)}"
            )


LINE = Line(
    number=16,
    name="soak",
    fault="lost messages, crashes of the server, locks, broken connections and cancelled calls, all along",
    unit="seconds of soak",
    planned=600,
    least=4,
    backends=("memory", "sqlite", "postgresql"),
    passes_when="memory, files and threads stay as they are; nothing is lost, done twice or wrong",
    broken="every answer is kept, and stores are not closed",
    minutes=25,
    run=run,
)
