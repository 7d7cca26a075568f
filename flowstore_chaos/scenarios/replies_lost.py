"""The reply to a write is lost after its commit: the call still returns the correct result (CON-3)."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from random import Random
from typing import Any

from flowstore_conformance.context import VirtualClock
from flowstore_conformance.execution import execute
from flowstore_conformance.history import Call

from flowstore_chaos.context import RunContext
from flowstore_chaos.proxy import Fault, MessageMatch, Proxy, proxy_before_port
from flowstore_chaos.scenario import FaultScenario
from flowstore_chaos.server import Server
from flowstore_chaos.write_situations import Preparer, Source, verify, writes
from flowstore_core import FlowStore, OutcomeUnknownError, open_store
from flowstore_core.operations import OPERATIONS

WORKERS = 6
CONCURRENT_CALLERS = 4
"""Number of concurrent callers, so that calls of one method are batched."""
MAX_RANDOM_CALLS = 40
"""Maximum random calls per fault: many write nothing and have no commit. A listed call follows them."""
CALL_SECONDS = 60.0


class BlindRetryMutant:
    """A store that retries calls of unknown outcome and trusts the second result."""

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
    """The remaining faults, round robin over all writing methods."""

    def __init__(self, planned: int, rng: Random) -> None:
        methods = writes()
        rng.shuffle(methods)
        # Listed and random, single and concurrent, round robin for each method.
        variants = [
            (Source.LISTED, 1),
            (Source.DRAWN, 1),
            (Source.LISTED, CONCURRENT_CALLERS),
            (Source.DRAWN, CONCURRENT_CALLERS),
        ]
        self.remaining = deque(
            (methods[number % len(methods)], *variants[(number // len(methods)) % len(variants)])
            for number in range(planned)
        )
        self.injected = Counter(dict.fromkeys(methods, 0))


async def run(context: RunContext) -> None:
    plan = _Plan(context.planned, context.rng)
    seeds = [context.rng.getrandbits(64) for _ in range(WORKERS)]
    # No server crashes in this scenario, so fsync is off.
    async with context.server({"fsync": "off"}) as server, asyncio.TaskGroup() as group:
        for number, seed in enumerate(seeds):
            group.create_task(_work(context, server, plan, f"worker_{number}", Random(seed)))
    context.counts.details["methods"] = len(plan.injected)
    context.counts.details["minimum per method"] = min(plan.injected.values())
    context.counts.details["maximum per method"] = max(plan.injected.values())


async def _work(context: RunContext, server: Server, plan: _Plan, schema: str, rng: Random) -> None:
    clock = VirtualClock()
    # Without retries every lost reply becomes an unknown outcome.
    options: dict[str, Any] = {"retry_timeout": 0} if context.is_mutant else {}
    async with (
        proxy_before_port(server.port) as proxy,
        open_store(server.url(schema=schema), clock=clock, pool_size=2) as direct,
        open_store(server.url(port=proxy.port, schema=schema), clock=clock, pool_size=3, **options) as opened,
    ):
        store: Any = BlindRetryMutant(opened) if context.is_mutant else opened
        preparer = Preparer(direct, clock, rng)
        while plan.remaining and not context.is_detected:
            method, source, callers = plan.remaining.popleft()
            # Its preparation deletes all earlier runs, so it runs alone.
            callers = 1 if OPERATIONS[method].spans_runs else callers
            for tried in [source] * MAX_RANDOM_CALLS + [Source.LISTED]:
                injected = await _inject(context, preparer, store, proxy, method, tried, callers, rng)
                if injected:
                    break
            else:
                context.counts.count_wrong(f"{method} was never seen to commit")
            plan.injected[method] += injected


async def _inject(
    context: RunContext,
    preparer: Preparer,
    store: Any,
    proxy: Proxy,
    method: str,
    source: Source,
    callers: int,
    rng: Random,
) -> int:
    """Make concurrent calls, and lose the reply to the first commit and sometimes to the next."""
    prepared_writes = [await preparer.prepare(method, source) for _ in range(callers)]
    times = rng.choice((1, 1, 1, 2))
    proxy.arm(1, Fault.REPLY_LOST, match=MessageMatch.COMMIT, times=times)
    outcomes = await asyncio.gather(*(_call(context, store, one.call) for one in prepared_writes))
    injected = proxy.injected.total()
    proxy.heal()
    for prepared, outcome in zip(prepared_writes, outcomes, strict=True):
        if outcome is not None:
            context.counts.operations += 1
            await verify(context.counts, prepared, outcome, preparer.store, reachable=True)
    context.record_faults(injected)
    if callers > 1:
        context.counts.add_detail("from concurrent callers", injected)
    if injected > 1:
        context.counts.add_detail("lost again on retry", injected - 1)
    return injected


async def _call(context: RunContext, store: Any, call: Call) -> Any:
    try:
        return await asyncio.wait_for(execute(store, call), CALL_SECONDS)
    except TimeoutError:
        context.counts.count_wrong(f"{call.method} did not return within {CALL_SECONDS:.0f} s")
        return None


SCENARIO = FaultScenario(
    number=1,
    name="replies-lost",
    fault="the reply to a write is lost after its commit, for every writing method",
    unit="lost replies",
    planned=1_000,
    min_faults=64,
    backends=("postgresql",),
    pass_criterion="every result and the final state are the same as without the fault",
    mutant="the store retries calls of unknown outcome and trusts the second result",
    minutes=6,
    run=run,
)
