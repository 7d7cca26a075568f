"""The reply to a write is lost after its commit: the answer is the true one all the same (CON-3)."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from random import Random
from typing import Any

from flowstore_conformance.context import VirtualClock
from flowstore_conformance.execution import execute
from flowstore_conformance.history import Call

from flowstore_chaos.line import Line
from flowstore_chaos.proxy import Aim, Fault, Proxy, proxy_before_port
from flowstore_chaos.server import Server
from flowstore_chaos.situations import Origin, Stage, judge, writes
from flowstore_chaos.trial import Trial
from flowstore_core import FlowStore, OutcomeUnknownError, open_store

WORKERS = 6
CROWD = 4
"""Callers at once, so that calls of one method go out together."""
MOST_TRIES = 40
"""Some drawn calls write nothing, so that no reply to a commit can be lost."""
CALL_SECONDS = 60.0


class RepeatsBlindly:
    """A store that, where it does not know what became of a call, makes it again and believes the answer."""

    def __init__(self, store: FlowStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        async def call(**arguments: Any) -> Any:
            try:
                return await method(**arguments)
            except OutcomeUnknownError:
                return await method(**arguments)

        return call


class _Plan:
    """Which replies are still to be lost, every method in its turn."""

    def __init__(self, planned: int, rng: Random) -> None:
        methods = writes()
        rng.shuffle(methods)
        # Listed, drawn, and in a crowd, by turns for each method.
        turns = [(Origin.LISTED, 1), (Origin.DRAWN, 1), (Origin.LISTED, CROWD), (Origin.DRAWN, CROWD)]
        self.left = deque(
            (methods[number % len(methods)], *turns[(number // len(methods)) % len(turns)])
            for number in range(planned)
        )
        self.landed = Counter(dict.fromkeys(methods, 0))


async def run(trial: Trial) -> None:
    plan = _Plan(trial.planned, trial.rng)
    seeds = [trial.rng.getrandbits(64) for _ in range(WORKERS)]
    # Nothing crashes here, so nothing needs to reach a disk.
    async with trial.server({"fsync": "off"}) as server, asyncio.TaskGroup() as group:
        for number, seed in enumerate(seeds):
            group.create_task(_work(trial, server, plan, f"worker_{number}", Random(seed)))
    trial.tally.details["methods"] = len(plan.landed)
    trial.tally.details["fewest of a method"] = min(plan.landed.values())
    trial.tally.details["most of a method"] = max(plan.landed.values())


async def _work(trial: Trial, server: Server, plan: _Plan, schema: str, rng: Random) -> None:
    clock = VirtualClock()
    # Without a time to go on trying it does not know, and asks nobody.
    options: dict[str, Any] = {"retry_timeout": 0} if trial.broken else {}
    async with (
        proxy_before_port(server.port) as proxy,
        open_store(server.url(schema=schema), clock=clock, pool_size=2) as direct,
        open_store(server.url(port=proxy.port, schema=schema), clock=clock, pool_size=3, **options) as opened,
    ):
        store: Any = RepeatsBlindly(opened) if trial.broken else opened
        stage = Stage(direct, clock, rng)
        while plan.left:
            method, origin, crowd = plan.left.popleft()
            # A cleanup acts on all runs, so it goes alone.
            crowd = 1 if method == "cleanup" else crowd
            for _ in range(MOST_TRIES):
                landed = await _lose(trial, stage, store, proxy, method, origin, crowd, rng)
                plan.landed[method] += landed
                if landed:
                    break
            else:
                trial.tally.mistrust(f"{method} was never seen to commit")


async def _lose(
    trial: Trial, stage: Stage, store: Any, proxy: Proxy, method: str, origin: Origin, crowd: int, rng: Random
) -> int:
    """Make calls at once, and lose the reply of the first that commits, and of the next now and then."""
    situations = [await stage.prepare(method, origin) for _ in range(crowd)]
    exact_times = rng.choice((1, 1, 1, 2))
    proxy.arm(1, Fault.REPLY_LOST, aim=Aim.COMMIT, exact_times=exact_times)
    outcomes = await asyncio.gather(*(_call(trial, store, one.call) for one in situations))
    landed = proxy.landed.total()
    proxy.heal()
    for situation, outcome in zip(situations, outcomes, strict=True):
        if outcome is not None:
            trial.tally.operations += 1
            await judge(trial.tally, situation, outcome, stage.store, reachable=True)
    trial.landed(landed)
    if crowd > 1:
        trial.tally.add("among callers at once", landed)
    if landed > 1:
        trial.tally.add("lost again when repeated", landed - 1)
    return landed


async def _call(trial: Trial, store: Any, call: Call) -> Any:
    try:
        return await asyncio.wait_for(execute(store, call), CALL_SECONDS)
    except TimeoutError:
        trial.tally.mistrust(f"{call.method} did not answer within {CALL_SECONDS:.0f} s")
        return None


LINE = Line(
    number=1,
    name="replies-lost",
    fault="the reply to a write is lost after its commit, for every writing method",
    unit="lost replies",
    planned=1_000,
    least=52,
    backends=("postgresql",),
    passes_when="every answer, and all that is seen afterwards, is as without the fault",
    broken="the store repeats a call of unknown outcome and believes what it is told then",
    minutes=6,
    run=run,
)
