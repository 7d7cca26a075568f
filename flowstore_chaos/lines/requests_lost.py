"""Requests that never arrive, connections that are reset or carry nothing any more: no call hangs (CON-2).

A call is repeated by the store, or ends within the time that its options give it. What it says it did not
do it did not do, and of what it cannot know nothing is done by half.
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

from flowstore_chaos.line import Line
from flowstore_chaos.proxy import Aim, Fault, Proxy, proxy_before_port
from flowstore_chaos.server import Server
from flowstore_chaos.situations import Origin, Stage, judge, writes
from flowstore_chaos.trial import Trial
from flowstore_core import FlowStore, open_store

MOST_WORKERS = 10
CALLERS = 6
"""Of each worker's store, at once."""
POOL_SIZE = 3
ALL = 10_000
OPTIONS = {"connect_timeout": 0.5, "acquire_timeout": 0.5, "statement_timeout": 0.5, "retry_timeout": 1.5}
LIMIT_SECONDS = 2 * OPTIONS["acquire_timeout"] + OPTIONS["statement_timeout"] + OPTIONS["retry_timeout"] + 1.0
"""What docs/using-it-in-an-engine.md says that a call takes at most, and a second."""
CLOSE_SECONDS = 15.0
SILENCE_SECONDS = (0.1, 0.5, 1.5, 4.0)
"""So long messages are struck, where it is all of them."""


@dataclass(frozen=True, slots=True)
class Strike:
    """A kind of fault, where it strikes, and how it is called in the details."""

    fault: Fault
    aim: Aim
    name: str


STRIKES = (
    Strike(Fault.REQUEST_LOST, Aim.ANY, "requests lost"),
    Strike(Fault.REQUEST_LATE, Aim.ANY, "requests late"),
    Strike(Fault.RESET, Aim.ANY, "resets"),
    Strike(Fault.RESET, Aim.CONNECT, "resets while connecting"),
    Strike(Fault.BLACK_HOLE, Aim.ANY, "black holes"),
    Strike(Fault.BLACK_HOLE, Aim.CONNECT, "black holes while connecting"),
    Strike(Fault.HALF_REPLY, Aim.ANY, "replies that stop half-way"),
)


class _Watch:
    """How long the calls took, and how they ended."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self.slowest = 0.0

    async def call(self, store: Any, call: Call) -> Outcome | None:
        """Make a call; None, and counted as wrong, when it took longer than it may."""
        began = time.monotonic()
        tally = self._trial.tally
        try:
            # One that hangs is to be told by the time that it took, so it gets a little more of it.
            outcome = await asyncio.wait_for(execute(store, call), LIMIT_SECONDS + 0.5)
        except TimeoutError:
            tally.mistrust(f"{call.method} did not end within {LIMIT_SECONDS:g} s")
            return None
        seconds = time.monotonic() - began
        self.slowest = max(self.slowest, seconds)
        if seconds > LIMIT_SECONDS:
            tally.mistrust(f"{call.method} took {seconds:.1f} s of at most {LIMIT_SECONDS:g}")
        tally.operations += 1
        if outcome is UNKNOWN:
            tally.add("outcomes unknown")
        elif is_unavailable(outcome):
            tally.add("calls refused")
        else:
            tally.add("calls answered")
        return outcome


async def run(trial: Trial) -> None:
    watch = _Watch(trial)
    workers = min(MOST_WORKERS, max(1, trial.planned // CALLERS))
    seeds = [trial.rng.getrandbits(64) for _ in range(workers)]
    # Nothing crashes here, so nothing needs to reach a disk.
    async with trial.server({"fsync": "off"}) as server:
        tasks = asyncio.all_tasks()
        async with asyncio.TaskGroup() as group:
            for number, seed in enumerate(seeds):
                group.create_task(_work(trial, server, watch, number, Random(seed)))
        for task in asyncio.all_tasks() - tasks:
            trial.tally.leak(f"task {task.get_coro()} still runs")
        for _ in range(await _sessions_left(server)):
            trial.tally.leak("a session of a closed store is still open on the server")
    trial.tally.details["slowest call, in seconds"] = round(watch.slowest, 2)
    trial.tally.details["a call may take, in seconds"] = LIMIT_SECONDS


async def _sessions_left(server: Server) -> int:
    """Sessions that stay on the server though nobody is there any more."""
    asked = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'flowstore'"
    until = time.monotonic() + 5
    while (count := int(await server.psql(asked))) and time.monotonic() < until:  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    return count


async def _work(trial: Trial, server: Server, watch: _Watch, number: int, rng: Random) -> None:
    clock = VirtualClock()
    schema = f"worker_{number}"
    options: dict[str, Any] = dict(OPTIONS)
    if trial.broken:
        options["statement_timeout"] = 3600
    async with proxy_before_port(server.port, delay=0.1) as proxy:
        async with open_store(server.url(schema=schema), clock=clock, pool_size=2) as direct:
            stage = Stage(direct, clock, rng)
            stack = AsyncExitStack()
            through = server.url(port=proxy.port, schema=schema)
            store = await stack.enter_async_context(
                open_store(through, clock=clock, pool_size=POOL_SIZE, **options)
            )
            turn = number
            while not trial.done:
                await _strike(trial, stage, store, proxy, STRIKES[turn % len(STRIKES)], watch, rng)
                turn += 1
            await _close(trial, stack)
        if proxy.most_clients > POOL_SIZE + CALLERS:
            trial.tally.leak(f"a pool of {POOL_SIZE} held {proxy.most_clients} connections at once")
        until = time.monotonic() + 5
        while proxy.clients and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        for _ in range(proxy.clients):
            trial.tally.leak("a closed store still holds a connection")


async def _strike(
    trial: Trial, stage: Stage, store: FlowStore, proxy: Proxy, strike: Strike, watch: _Watch, rng: Random
) -> None:
    """Callers at once, and one or several of their messages lost."""
    methods = [name for name in writes() if name != "cleanup"]
    situations = [
        await stage.prepare(method, rng.choice(tuple(Origin))) for method in rng.sample(methods, CALLERS)
    ]
    proxy.arm(
        1 if strike.aim is Aim.CONNECT else rng.randint(1, 8),
        strike.fault,
        aim=strike.aim,
        exact_times=rng.choice((1, 1, 2, CALLERS, ALL)),
    )
    if strike.aim is Aim.CONNECT:
        # So that they have to connect.
        proxy.cut()
    calls = asyncio.gather(*(watch.call(store, one.call) for one in situations))
    # Sooner or later the network heals, perhaps when everybody has given up.
    await asyncio.wait({calls}, timeout=rng.choice(SILENCE_SECONDS))
    # From now on messages pass; what was swallowed stays swallowed.
    proxy.disarm()
    outcomes = await calls
    proxy.heal()
    # Where everything is struck, what is repeated is too; that makes it no other fault.
    landed = min(proxy.landed.total(), CALLERS)
    trial.tally.add("messages struck in all", proxy.landed.total())
    await proxy.settle()
    for situation, outcome in zip(situations, outcomes, strict=True):
        if outcome is not None:
            await judge(trial.tally, situation, outcome, stage.store, reachable=False)
    trial.landed(landed)
    trial.tally.add(strike.name, landed)


async def _close(trial: Trial, stack: AsyncExitStack) -> None:
    try:
        await asyncio.wait_for(stack.aclose(), CLOSE_SECONDS)
    except TimeoutError:
        trial.tally.leak(f"the store could not be closed within {CLOSE_SECONDS:.0f} s")


LINE = Line(
    number=2,
    name="requests-lost",
    fault="requests lost or late, connections reset, black holes: before, while connecting, half-way",
    unit="messages struck",
    planned=1_000,
    least=30,
    backends=("postgresql",),
    passes_when="each call is answered, or raises StoreUnavailableError in its time; nothing is half done",
    broken="statements are waited for without an end (statement_timeout of an hour)",
    minutes=6,
    run=run,
)
