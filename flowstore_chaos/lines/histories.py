"""Random histories of many clients while replies and requests are lost and the server is killed (CON-1).

Every call is recorded with its times and its answer, and then an order of all calls is searched in which
every answer is right. A call whose outcome is unknown may have happened at any later time, or not; one
that was refused as unavailable has not happened.
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

from flowstore_chaos.histories import CLIENTS, draw_race, judge
from flowstore_chaos.history_worker import Worker
from flowstore_chaos.line import Line
from flowstore_chaos.lines.replies_lost import RepeatsBlindly
from flowstore_chaos.proxy import Aim, Fault, Proxy, proxy_before_port
from flowstore_chaos.server import Server
from flowstore_chaos.trial import Trial
from flowstore_core import FlowStore, open_store

STORES = 2
"""Of one history, each shared by half of its clients."""
AT_ONCE = 8
"""Histories, each with stores and a proxy of its own; a kill of the server strikes all."""
WORKERS = 4
"""Processes of clients on SQLite, each with clients of every history."""
OPTIONS = {"pool_size": 3, "statement_timeout": 1.0, "acquire_timeout": 10.0, "retry_timeout": 15.0}
DOWN_SECONDS = (0.0, 0.3)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a history happens."""

    proxy: Proxy
    stores: tuple[Any, ...]
    rng: random.Random


@dataclass(frozen=True, slots=True)
class _Fault:
    name: str
    strike: Callable[[Trial, Server, Sequence[_Place]], Coroutine[Any, Any, None]]
    """Runs beside the clients."""


async def run(trial: Trial) -> None:
    if trial.backend == "postgresql":
        await _with_server(trial)
    else:
        await _with_processes(trial)


async def _with_server(trial: Trial) -> None:
    clock = VirtualClock()
    # Killed and started again, it must hold what was acknowledged: it is durable.
    async with trial.server() as server, AsyncExitStack() as stack:
        direct = await stack.enter_async_context(open_store(server.url(schema="chaos"), clock=clock))
        count = min(AT_ONCE, trial.planned)
        places = [await _open(trial, server, clock, stack) for _ in range(count)]
        turn = 0
        while not trial.done:
            await _volley(trial, server, direct, places, clock, FAULTS[turn % len(FAULTS)])
            turn += 1


async def _open(trial: Trial, server: Server, clock: VirtualClock, stack: AsyncExitStack) -> _Place:
    proxy = await stack.enter_async_context(proxy_before_port(server.port, delay=0.1))
    options: dict[str, Any] = {**OPTIONS, "retry_timeout": 0} if trial.broken else dict(OPTIONS)
    through = server.url(port=proxy.port, schema="chaos")
    stores: list[Any] = [
        await stack.enter_async_context(open_store(through, clock=clock, **options)) for _ in range(STORES)
    ]
    if trial.broken:
        stores = [RepeatsBlindly(store) for store in stores]
    return _Place(proxy, tuple(stores), random.Random(trial.rng.getrandbits(64)))


async def _volley(
    trial: Trial,
    server: Server,
    direct: FlowStore,
    places: Sequence[_Place],
    clock: VirtualClock,
    fault: _Fault,
) -> None:
    """Histories at the same time, one for each place, under one kind of fault."""
    races = [draw_race(place.rng, clock) for place in places]
    begin, middle, end = phases_of(races)
    done = [await _alone(direct, begin, clock)]
    jobs = [(places[job.race].stores[job.client % STORES], job) for job in middle.client_tasks]
    striking: list[asyncio.Task[None]] = []

    async def strike() -> None:
        striking.append(asyncio.ensure_future(fault.strike(trial, server, places)))

    done.append(await run_tasks(jobs, clock.now, True, strike))
    for task in striking:
        await task
    struck = [place.proxy.landed.total() + place.proxy.broken_in_flight for place in places]
    for place in places:
        place.proxy.heal()
        await place.proxy.settle()
    done.append(await _alone(direct, end, clock))
    for history, landed in zip(assemble(races, done, one_loop=True), struck, strict=True):
        judge(trial.tally, history.history, history.unavailable)
        if landed:
            trial.landed()
            trial.tally.add(f"histories with {fault.name}")
            trial.tally.add(f"calls struck by {fault.name}", landed)


async def _alone(direct: FlowStore, phase: Phase, clock: VirtualClock) -> list[ClientResult]:
    """What comes before the clients, or after them, each race's calls one after the other."""
    jobs: list[tuple[FlowStore, ClientTask]] = [(direct, job) for job in phase.client_tasks]
    return await run_tasks(jobs, clock.now, True)


async def _lose_replies(trial: Trial, server: Server, places: Sequence[_Place]) -> None:
    for place in places:
        exact_times = place.rng.randint(1, 6)
        place.proxy.arm(place.rng.randint(1, 6), Fault.REPLY_LOST, aim=Aim.COMMIT, exact_times=exact_times)


async def _lose_requests(trial: Trial, server: Server, places: Sequence[_Place]) -> None:
    faults = [Fault.REQUEST_LOST, Fault.REQUEST_LATE, Fault.RESET, Fault.BLACK_HOLE]
    for place in places:
        fault, exact_times = place.rng.choice(faults), place.rng.randint(1, 4)
        place.proxy.arm(place.rng.randint(1, 12), fault, exact_times=exact_times)


async def _kill(trial: Trial, server: Server, places: Sequence[_Place]) -> None:
    for place in places:
        place.proxy.arm(0, Fault.REPLY_LOST)
    await asyncio.sleep(trial.rng.uniform(0.0, 0.1))
    if trial.rng.random() < 0.5:
        await server.kill()
    else:
        await server.stop("immediate")
    await asyncio.sleep(trial.rng.choice(DOWN_SECONDS))
    await server.start()


FAULTS = (
    _Fault("lost replies", _lose_replies),
    _Fault("lost requests", _lose_requests),
    _Fault("a killed server", _kill),
)


async def _with_processes(trial: Trial) -> None:
    clock = VirtualClock()
    async with trial.store_url() as url, open_store(url, clock=clock) as direct:
        starting = [Worker.start(url, broken=trial.broken) for _ in range(WORKERS)]
        workers = await asyncio.gather(*starting)
        took = 0.2
        try:
            while not trial.done:
                took = await _volley_of_processes(trial, direct, workers, clock, took)
                for number, worker in enumerate(workers):
                    if not worker.alive:
                        workers[number] = await Worker.start(url, broken=trial.broken)
        finally:
            await asyncio.gather(*(worker.end() for worker in workers))


async def _volley_of_processes(
    trial: Trial, direct: FlowStore, workers: Sequence[Worker], clock: VirtualClock, usual: float
) -> float:
    """Histories at the same time, in whose midst processes are killed; how long they took."""
    rng = trial.rng
    races = [draw_race(rng, clock) for _ in range(min(AT_ONCE, trial.planned))]
    begin, middle, end = phases_of(races)
    done = [await _alone(direct, begin, clock)]
    places: list[list[ClientTask]] = [[] for _ in workers]
    for job in middle.client_tasks:
        places[(job.race + job.client) % len(workers)].append(job)
    began = asyncio.get_running_loop().time()
    working = asyncio.gather(
        *(worker.do(jobs, clock.now) for worker, jobs in zip(workers, places, strict=True))
    )
    await asyncio.wait({working}, timeout=rng.uniform(0, usual))
    for worker in rng.sample(workers, rng.randint(1, len(workers) - 1)):
        worker.kill()
    done.append([one for told in await working for one in told])
    took = asyncio.get_running_loop().time() - began
    done.append(await _alone(direct, end, clock))
    for history in assemble(races, done, one_loop=False):
        judge(trial.tally, history.history, history.unavailable)
        struck = sum(one.outcome is UNKNOWN for one in history.history.operations)
        if struck:
            trial.landed()
            trial.tally.add("calls struck by killed clients", struck)
    # The killed are gone early, so the others take longer than this when none is.
    return max(0.05, (usual + took) / 2)


LINE = Line(
    number=7,
    name="histories",
    fault=f"{CLIENTS} clients on the same runs; messages lost, the server killed; on SQLite, clients killed",
    unit="histories struck",
    planned=500,
    least=24,
    backends=("postgresql", "sqlite"),
    passes_when="an order of the calls explains every answer; none is left undecided",
    broken="a call of unknown outcome is repeated and believed; on SQLite, answered before it is written",
    minutes=10,
    run=run,
)
