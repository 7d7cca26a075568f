"""Random histories of many clients while replies and requests are lost and the server is killed (CON-1).

Every call is recorded with its times and its result. The checker then searches for an order of all calls
that explains every result. A call of unknown outcome may have taken effect at any later time or never; a call
refused as unavailable did not take effect.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from flowstore_conformance.context import VirtualClock
from flowstore_conformance.history import UNKNOWN
from flowstore_conformance.races import ClientResult, ClientTask, Phase, assemble, phases_of, run_tasks

from flowstore_chaos.context import RunContext
from flowstore_chaos.histories import CLIENTS, draw_race, verify_history
from flowstore_chaos.history_worker import Worker
from flowstore_chaos.proxy import Fault, MessageMatch, Proxy, proxy_before_port
from flowstore_chaos.scenario import FaultScenario
from flowstore_chaos.scenarios.replies_lost import BlindRetryMutant
from flowstore_chaos.server import Server
from flowstore_core import FlowStore, open_store

STORES = 2
"""Stores of one history; its clients share them evenly."""
CONCURRENT_HISTORIES = 8
"""Each history has its own stores and proxy; a kill of the server affects all."""
WORKERS = 4
"""Client processes on SQLite, each with clients of every history."""
OPTIONS = {"pool_size": 3, "statement_timeout": 1.0, "acquire_timeout": 10.0, "retry_timeout": 15.0}
DOWN_SECONDS = (0.0, 0.3)


@dataclass(frozen=True, slots=True)
class _Target:
    """The proxy and the stores of one history."""

    proxy: Proxy
    stores: tuple[Any, ...]
    rng: random.Random


@dataclass(frozen=True, slots=True)
class _Fault:
    name: str
    inject: Callable[[RunContext, Server, Sequence[_Target]], Coroutine[Any, Any, None]]
    """Injects the fault while clients run."""


async def run(context: RunContext) -> None:
    if context.backend == "postgresql":
        await _with_server(context)
    else:
        await _with_processes(context)


async def _with_server(context: RunContext) -> None:
    clock = VirtualClock()
    # Durable: after a kill and a restart it must hold all acknowledged writes.
    async with context.server() as server, AsyncExitStack() as stack:
        direct = await stack.enter_async_context(open_store(server.url(schema="chaos"), clock=clock))
        count = min(CONCURRENT_HISTORIES, context.planned)
        targets = [await _open(context, server, clock, stack) for _ in range(count)]
        round_number = 0
        while not context.done:
            await _run_round(context, server, direct, targets, clock, FAULTS[round_number % len(FAULTS)])
            round_number += 1


async def _open(context: RunContext, server: Server, clock: VirtualClock, stack: AsyncExitStack) -> _Target:
    proxy = await stack.enter_async_context(proxy_before_port(server.port, delay=0.1))
    options: dict[str, Any] = {**OPTIONS, "retry_timeout": 0} if context.is_mutant else dict(OPTIONS)
    through = server.url(port=proxy.port, schema="chaos")
    stores: list[Any] = [
        await stack.enter_async_context(open_store(through, clock=clock, **options)) for _ in range(STORES)
    ]
    if context.is_mutant:
        stores = [BlindRetryMutant(store) for store in stores]
    return _Target(proxy, tuple(stores), random.Random(context.rng.getrandbits(64)))


async def _run_round(
    context: RunContext,
    server: Server,
    direct: FlowStore,
    targets: Sequence[_Target],
    clock: VirtualClock,
    fault: _Fault,
) -> None:
    """Run one history per target concurrently, under one kind of fault."""
    races = [draw_race(target.rng, clock) for target in targets]
    begin, middle, end = phases_of(races)
    done = [await _run_sequentially(direct, begin, clock)]
    jobs = [(targets[task.race].stores[task.client % STORES], task) for task in middle.client_tasks]
    injecting: list[asyncio.Task[None]] = []

    async def inject() -> None:
        injecting.append(asyncio.ensure_future(fault.inject(context, server, targets)))

    done.append(await run_tasks(jobs, clock.now, True, inject))
    for task in injecting:
        await task
    faults = [target.proxy.injected.total() + target.proxy.broken_in_flight for target in targets]
    for target in targets:
        target.proxy.heal()
        await target.proxy.settle()
    done.append(await _run_sequentially(direct, end, clock))
    for history, injected in zip(assemble(races, done, one_loop=True), faults, strict=True):
        verify_history(context.counts, history.history, history.unavailable)
        if injected:
            context.record_faults()
            context.counts.add_detail(f"histories with {fault.name}")
            context.counts.add_detail(f"calls affected by {fault.name}", injected)


async def _run_sequentially(direct: FlowStore, phase: Phase, clock: VirtualClock) -> list[ClientResult]:
    """Run the calls before or after the concurrent clients, each race's calls in sequence."""
    jobs: list[tuple[FlowStore, ClientTask]] = [(direct, task) for task in phase.client_tasks]
    return await run_tasks(jobs, clock.now, True)


async def _lose_replies(context: RunContext, server: Server, targets: Sequence[_Target]) -> None:
    for target in targets:
        times = target.rng.randint(1, 6)
        target.proxy.arm(target.rng.randint(1, 6), Fault.REPLY_LOST, match=MessageMatch.COMMIT, times=times)


async def _lose_requests(context: RunContext, server: Server, targets: Sequence[_Target]) -> None:
    faults = [Fault.REQUEST_LOST, Fault.REQUEST_LATE, Fault.RESET, Fault.BLACK_HOLE]
    for target in targets:
        fault, times = target.rng.choice(faults), target.rng.randint(1, 4)
        target.proxy.arm(target.rng.randint(1, 12), fault, times=times)


async def _kill(context: RunContext, server: Server, targets: Sequence[_Target]) -> None:
    for target in targets:
        target.proxy.arm(0, Fault.REPLY_LOST)
    await asyncio.sleep(context.rng.uniform(0.0, 0.1))
    if context.rng.random() < 0.5:
        await server.kill()
    else:
        await server.stop("immediate")
    await asyncio.sleep(context.rng.choice(DOWN_SECONDS))
    await server.start()


FAULTS = (
    _Fault("lost replies", _lose_replies),
    _Fault("lost requests", _lose_requests),
    _Fault("a killed server", _kill),
)


async def _with_processes(context: RunContext) -> None:
    clock = VirtualClock()
    async with context.store_url() as url, open_store(url, clock=clock) as direct:
        starting = [Worker.start(url, mutant=context.is_mutant) for _ in range(WORKERS)]
        workers = await asyncio.gather(*starting)
        duration = 0.2
        try:
            while not context.done:
                duration = await _run_process_round(context, direct, workers, clock, duration)
                for number, worker in enumerate(workers):
                    if not worker.alive:
                        workers[number] = await Worker.start(url, mutant=context.is_mutant)
        finally:
            await asyncio.gather(*(worker.end() for worker in workers))


async def _run_process_round(
    context: RunContext, direct: FlowStore, workers: Sequence[Worker], clock: VirtualClock, usual: float
) -> float:
    """Run histories concurrently and kill processes. Returns the smoothed duration in seconds."""
    rng = context.rng
    races = [draw_race(rng, clock) for _ in range(min(CONCURRENT_HISTORIES, context.planned))]
    begin, middle, end = phases_of(races)
    done = [await _run_sequentially(direct, begin, clock)]
    targets: list[list[ClientTask]] = [[] for _ in workers]
    for task in middle.client_tasks:
        targets[(task.race + task.client) % len(workers)].append(task)
    started_at = asyncio.get_running_loop().time()
    working = asyncio.gather(
        *(worker.run(jobs, clock.now) for worker, jobs in zip(workers, targets, strict=True))
    )
    await asyncio.wait({working}, timeout=rng.uniform(0, usual))
    for worker in rng.sample(workers, rng.randint(1, len(workers) - 1)):
        worker.kill()
    done.append([result for results in await working for result in results])
    duration = asyncio.get_running_loop().time() - started_at
    done.append(await _run_sequentially(direct, end, clock))
    for history in assemble(races, done, one_loop=False):
        verify_history(context.counts, history.history, history.unavailable)
        faults = sum(one.outcome is UNKNOWN for one in history.history.operations)
        if faults:
            context.record_faults()
            context.counts.add_detail("calls affected by killed clients", faults)
    # Killed processes end early, so an undisturbed round takes longer than this.
    return max(0.05, (usual + duration) / 2)


SCENARIO = FaultScenario(
    number=7,
    name="histories",
    fault=f"{CLIENTS} clients on the same runs; lost messages, killed servers; on SQLite, killed clients",
    unit="affected histories",
    planned=500,
    min_faults=24,
    backends=("postgresql", "sqlite"),
    pass_criterion="an order of the calls explains every result; none is undecided",
    mutant="calls of unknown outcome are retried blindly; on SQLite, writes are acknowledged before commit",
    minutes=10,
    run=run,
)
