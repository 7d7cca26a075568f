"""Lost requests, reset connections and silent connections: no call hangs (CON-2).

The store retries a call, or the call ends within the time set by the store's options. A call refused as
unavailable had no effect, and a call of unknown outcome is atomic.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from random import Random
from typing import Any

from flowstore_conformance.context import VirtualClock
from flowstore_conformance.execution import execute, is_unavailable
from flowstore_conformance.history import UNKNOWN, Call, Outcome

from flowstore_chaos.context import RunContext
from flowstore_chaos.proxy import Fault, MessageMatch, Proxy, proxy_before_port
from flowstore_chaos.scenario import FaultScenario
from flowstore_chaos.server import Server
from flowstore_chaos.write_situations import Preparer, Source, verify, writes
from flowstore_core import FlowStore, open_store
from flowstore_core.operations import OPERATIONS

MAX_WORKERS = 10
CALLERS = 6
"""Concurrent callers of each worker's store."""
POOL_SIZE = 3
ALL = 10_000
OPTIONS = {"connect_timeout": 0.5, "acquire_timeout": 0.5, "statement_timeout": 0.5, "retry_timeout": 1.5}
LIMIT_SECONDS = 2 * OPTIONS["acquire_timeout"] + OPTIONS["statement_timeout"] + OPTIONS["retry_timeout"] + 5.0
"""The maximum duration of a call by docs/using-it-in-an-engine.md, plus five seconds for a slow machine."""
CLOSE_SECONDS = 15.0
SILENCE_SECONDS = (0.1, 0.5, 1.5, 4.0)
"""Seconds for which the proxy stays armed, if it affects all messages."""


@dataclass(frozen=True, slots=True)
class FaultCase:
    """A fault, the messages it affects, and its name in the details."""

    fault: Fault
    match: MessageMatch
    name: str


FAULT_CASES = (
    FaultCase(Fault.REQUEST_LOST, MessageMatch.ANY, "requests lost"),
    FaultCase(Fault.REQUEST_LATE, MessageMatch.ANY, "requests late"),
    FaultCase(Fault.RESET, MessageMatch.ANY, "resets"),
    FaultCase(Fault.RESET, MessageMatch.CONNECT, "resets while connecting"),
    FaultCase(Fault.BLACK_HOLE, MessageMatch.ANY, "black holes"),
    FaultCase(Fault.BLACK_HOLE, MessageMatch.CONNECT, "black holes while connecting"),
    FaultCase(Fault.HALF_REPLY, MessageMatch.ANY, "truncated replies"),
)


class _CallTimer:
    """Measures calls and counts how they ended."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self.slowest = 0.0

    async def call(self, store: Any, call: Call) -> Outcome | None:
        """Make a call. A call beyond the time limit counts as wrong; None if it hung."""
        started_at = time.monotonic()
        counts = self._context.counts
        try:
            # Some slack, so that a slow call is distinguished from a hung one.
            outcome = await asyncio.wait_for(execute(store, call), LIMIT_SECONDS + 0.5)
        except TimeoutError:
            counts.count_wrong(f"{call.method} did not end within {LIMIT_SECONDS:g} s")
            return None
        seconds = time.monotonic() - started_at
        self.slowest = max(self.slowest, seconds)
        if seconds > LIMIT_SECONDS:
            counts.count_wrong(f"{call.method} took {seconds:.1f} s of at most {LIMIT_SECONDS:g}")
        counts.operations += 1
        if outcome is UNKNOWN:
            counts.add_detail("outcomes unknown")
        elif is_unavailable(outcome):
            counts.add_detail("calls refused")
        else:
            counts.add_detail("calls answered")
        return outcome


async def run(context: RunContext) -> None:
    timer = _CallTimer(context)
    workers = min(MAX_WORKERS, max(1, context.planned // CALLERS))
    seeds = [context.rng.getrandbits(64) for _ in range(workers)]
    # No server crashes in this scenario, so fsync is off.
    async with context.server({"fsync": "off"}) as server:
        tasks = asyncio.all_tasks()
        async with asyncio.TaskGroup() as group:
            for number, seed in enumerate(seeds):
                group.create_task(_work(context, server, timer, number, Random(seed)))
        for task in asyncio.all_tasks() - tasks:
            context.counts.count_leak(f"task {task.get_coro()} is still running")
        for _ in range(await _count_sessions(server)):
            context.counts.count_leak("a session of a closed store is still open on the server")
    context.counts.details["slowest call, in seconds"] = round(timer.slowest, 2)
    context.counts.details["time limit of a call, in seconds"] = LIMIT_SECONDS


async def _count_sessions(server: Server) -> int:
    """Number of the stores' sessions that remain on the server."""
    probes = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'flowstore'"
    until = time.monotonic() + 5
    while (count := int(await server.psql(probes))) and time.monotonic() < until:  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    return count


async def _work(context: RunContext, server: Server, timer: _CallTimer, number: int, rng: Random) -> None:
    clock = VirtualClock()
    schema = f"worker_{number}"
    options: dict[str, Any] = dict(OPTIONS)
    if context.is_mutant:
        options["statement_timeout"] = 3600
    async with proxy_before_port(server.port, delay=0.1) as proxy:
        async with open_store(server.url(schema=schema), clock=clock, pool_size=2) as direct:
            preparer = Preparer(direct, clock, rng)
            stack = AsyncExitStack()
            through = server.url(port=proxy.port, schema=schema)
            store = await stack.enter_async_context(
                open_store(through, clock=clock, pool_size=POOL_SIZE, **options)
            )
            round_number = number
            while not context.done:
                await _inject(
                    context, preparer, store, proxy, FAULT_CASES[round_number % len(FAULT_CASES)], timer, rng
                )
                round_number += 1
            await _close(context, stack)
        if proxy.max_clients > POOL_SIZE + CALLERS:
            context.counts.count_leak(f"a pool of {POOL_SIZE} held {proxy.max_clients} connections at once")
        until = time.monotonic() + 5
        while proxy.clients and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        for _ in range(proxy.clients):
            context.counts.count_leak("a closed store still holds a connection")


async def _inject(
    context: RunContext,
    preparer: Preparer,
    store: FlowStore,
    proxy: Proxy,
    case: FaultCase,
    timer: _CallTimer,
    rng: Random,
) -> None:
    """Make concurrent calls and inject a fault into one or several of their messages."""
    methods = [name for name in writes() if not OPERATIONS[name].spans_runs]
    prepared_writes = [
        await preparer.prepare(method, rng.choice(tuple(Source))) for method in rng.sample(methods, CALLERS)
    ]
    proxy.arm(
        1 if case.match is MessageMatch.CONNECT else rng.randint(1, 8),
        case.fault,
        match=case.match,
        times=rng.choice((1, 1, 2, CALLERS, ALL)),
    )
    if case.match is MessageMatch.CONNECT:
        # Force new connections.
        proxy.drop_idle()
    calls = asyncio.gather(*(timer.call(store, one.call) for one in prepared_writes))
    # The network recovers at some time, perhaps after all calls have ended.
    await asyncio.wait({calls}, timeout=rng.choice(SILENCE_SECONDS))
    # New messages pass; hanging connections stay silent.
    proxy.disarm()
    outcomes = await calls
    proxy.heal()
    # If all messages are affected, retries are too; they count as one fault per caller.
    injected = min(proxy.injected.total(), CALLERS)
    context.counts.add_detail("messages affected in total", proxy.injected.total())
    await proxy.settle()
    for prepared, outcome in zip(prepared_writes, outcomes, strict=True):
        if outcome is not None:
            await verify(context.counts, prepared, outcome, preparer.store, reachable=False)
    context.record_faults(injected)
    context.counts.add_detail(case.name, injected)


async def _close(context: RunContext, stack: AsyncExitStack) -> None:
    try:
        await asyncio.wait_for(stack.aclose(), CLOSE_SECONDS)
    except TimeoutError:
        context.counts.count_leak(f"the store could not be closed within {CLOSE_SECONDS:.0f} s")


SCENARIO = FaultScenario(
    number=2,
    name="requests-lost",
    fault="lost and late requests, reset and silent connections: while connecting, before and amid messages",
    unit="affected messages",
    planned=1_000,
    min_faults=30,
    backends=("postgresql",),
    pass_criterion="each call returns or raises StoreUnavailableError in time; every call is atomic",
    mutant="statement_timeout is an hour",
    minutes=6,
    run=run,
)
