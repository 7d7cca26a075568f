"""Calls cancelled at every await and at random times: each is atomic (CON-4)."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from typing import Any
from uuid import UUID

from flowstore_conformance.cancellation_points import CancelledCall, CancelPoint, cancel_at, profile, sweep
from flowstore_conformance.context import ContractViolation
from flowstore_conformance.history import Raised, Returned, comparable, error_name
from flowstore_conformance.loop_errors import capture_callback_errors
from flowstore_conformance.state_probe import describe_outcome, find_partial_effect, invoke
from flowstore_conformance.write_scenarios import Scenario

from flowstore_chaos.context import RunContext
from flowstore_chaos.leaks import ResourceSnapshot
from flowstore_chaos.proxy import Fault, MessageMatch, proxy_before_port
from flowstore_chaos.scenario import FaultScenario
from flowstore_chaos.scenarios_from_suite import expected_state, factories_by_name, new_scenario
from flowstore_chaos.server import Server
from flowstore_core import FlowStore, FlowStoreError, TriggerResult, new_run_id, open_store
from flowstore_core.urls import parse_url

MAX_POINTS = 24
"""Maximum number of cancellation points in one sweep."""
MOMENTS_PER_POINT = 4
SWEEPS_PER_ROUND = 4
"""Number of calls swept in each round."""
CONCURRENCY = 24
OPENS_PER_ROUND = 6
SETTLE_SECONDS = 5.0
HANG_TIMEOUT = 30.0


class NonAtomicTriggerMutant:
    """A store whose trigger_run is two calls in sequence."""

    def __init__(self, store: FlowStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def trigger_run(
        self, flow_id: UUID, flow_name: str, run_id: UUID, trigger_key: str, **more: Any
    ) -> TriggerResult:
        if (key := more.get("idempotency_key")) is not None:
            await self._store.try_register_idempotency_key(flow_id, trigger_key, key, run_id)
            await asyncio.sleep(0)
        return await self._store.trigger_run(flow_id, flow_name, run_id, trigger_key, **more)


async def run(context: RunContext) -> None:
    async with _open_target(context) as (url, server):
        with capture_callback_errors() as surfaced:
            while not context.done:
                before = ResourceSnapshot.now()
                try:
                    async with asyncio.timeout(HANG_TIMEOUT * 4):
                        await _round(context, url, server)
                except TimeoutError:
                    context.counts.count_wrong(
                        f"a round of cancelled calls hung for {HANG_TIMEOUT * 4:.0f} s"
                    )
                    return
                for what in before.leaked(in_loop=True):
                    context.counts.count_leak(what)
                await _expect_released(context, url, server, connections=0)
        for error in surfaced:
            context.counts.count_wrong(f"a callback raised {type(error).__name__} in the event loop")


@asynccontextmanager
async def _open_target(context: RunContext) -> AsyncIterator[tuple[str, Server | None]]:
    if context.backend == "postgresql":
        async with context.server() as server:
            yield server.url(schema="chaos"), server
    else:
        async with context.store_url() as url:
            yield url, None


async def _round(context: RunContext, url: str, server: Server | None) -> None:
    async with AsyncExitStack() as stack:
        opened = await stack.enter_async_context(open_store(url))
        store: Any = NonAtomicTriggerMutant(opened) if context.is_mutant else opened
        await _sweep(context, store)
        if context.is_detected:
            return
        for cancel_many in (_cancel_concurrent_calls, _cancel_task_group):
            resident = set(asyncio.all_tasks())
            seconds = await _measure_seconds(context, store)
            await _verify_all(context, store, await cancel_many(context, store, seconds), resident)
        await _expect_released(context, url, server, connections=None)
        if server is not None:
            await _cancel_unacknowledged(context, server)
        cancelled_calls = await _cancel_close(context, store, stack)
    if context.backend != "memory":
        async with open_store(url) as again:
            await _verify_all(context, again, cancelled_calls, set(asyncio.all_tasks()))
    await _cancel_opens(context, url)


async def _new_scenarios(context: RunContext, store: FlowStore, count: int) -> list[Scenario]:
    """Random scenarios of the conformance suite, set up."""
    factories = list(factories_by_name(store.capabilities).values())
    scenarios = [
        new_scenario(context.rng, context.rng.choice(factories), store.capabilities) for _ in range(count)
    ]
    await _set_up(context, store, scenarios)
    return scenarios


async def _set_up(context: RunContext, store: FlowStore, scenarios: Sequence[Scenario]) -> None:
    async def one(scenario: Scenario) -> None:
        for call in scenario.setup:
            await invoke(store, call)

    await asyncio.gather(*(one(scenario) for scenario in scenarios))
    context.counts.operations += sum(len(scenario.setup) for scenario in scenarios)


async def _sweep(context: RunContext, store: FlowStore) -> None:
    """Cancel some calls at each of their awaits, one after another."""
    factories = factories_by_name(store.capabilities)
    names = context.rng.sample(sorted(factories), SWEEPS_PER_ROUND)
    if context.is_mutant:
        names[0] = "trigger_run"
    for name in names:

        async def make(count: int, name: str = name) -> Sequence[Scenario]:
            new = [new_scenario(context.rng, factories[name], store.capabilities) for _ in range(count)]
            await _set_up(context, store, new)
            return new

        [whole] = await make(1)
        usual = await profile(store, whole)
        resident = set(asyncio.all_tasks())
        cancelled_calls = []
        swept = sweep(
            store, make, usual, context.rng, moments=MOMENTS_PER_POINT, exact_times=False, limit=MAX_POINTS
        )
        try:
            async for cancelled_call in swept:
                cancelled_calls.append(cancelled_call)  # noqa: PERF401 - calls before a violation count
        except ContractViolation as violation:
            context.counts.count_wrong(str(violation))
        await _verify_all(context, store, cancelled_calls, resident)


async def _measure_seconds(context: RunContext, store: FlowStore) -> float:
    """The duration of the same number of calls without cancellation."""
    scenarios = await _new_scenarios(context, store, CONCURRENCY)
    started_at = time.monotonic()
    await asyncio.gather(*(invoke(store, scenario.call) for scenario in scenarios))
    context.counts.operations += CONCURRENCY
    return time.monotonic() - started_at


async def _cancel_concurrent_calls(
    context: RunContext, store: FlowStore, seconds: float
) -> list[CancelledCall]:
    """Run concurrent calls and end most of them by cancellation or timeout."""

    async def timed(scenario: Scenario, after: float) -> Any:
        async with asyncio.timeout(after):
            return await invoke(store, scenario.call)

    async def one(scenario: Scenario) -> CancelledCall:
        after, way = context.rng.random() * seconds, context.rng.choice(("cancel", "timeout", "wait", "none"))
        if way == "wait":
            return await cancel_at(
                store, scenario, CancelPoint(context.rng.randrange(1, 8)), exact_times=False
            )
        task = asyncio.ensure_future(timed(scenario, after if way == "timeout" else HANG_TIMEOUT))
        if way == "cancel":
            asyncio.get_running_loop().call_later(after, task.cancel)
        await asyncio.wait({task})
        return _classify(context, scenario, task, after)

    scenarios = await _new_scenarios(context, store, CONCURRENCY)
    return await asyncio.gather(*(one(scenario) for scenario in scenarios))


async def _cancel_task_group(context: RunContext, store: FlowStore, seconds: float) -> list[CancelledCall]:
    """Cancel a task group with all its pending calls."""
    scenarios = await _new_scenarios(context, store, CONCURRENCY)
    tasks: list[asyncio.Task[Any]] = []

    async def whole() -> None:
        async with asyncio.TaskGroup() as group:
            tasks.extend(group.create_task(invoke(store, scenario.call)) for scenario in scenarios)

    after = context.rng.random() * seconds
    task = asyncio.ensure_future(whole())
    await asyncio.sleep(0)
    asyncio.get_running_loop().call_later(after, task.cancel)
    await asyncio.wait({task})
    return [_classify(context, scenario, one, after) for scenario, one in zip(scenarios, tasks, strict=True)]


async def _cancel_unacknowledged(context: RunContext, server: Server) -> None:
    """Cancel claims whose messages are lost; resolution and compensation share two connections."""
    through = {"pgbouncer": "true", "pool_size": "2", "statement_timeout": "1", "acquire_timeout": "0.3"}
    run_id = new_run_id()
    cancelled: set[str] = set()
    async with (
        proxy_before_port(server.port) as proxy,
        open_store(server.url(schema="chaos")) as direct,
        open_store(server.url(port=proxy.port, schema="chaos", **through)) as store,
    ):
        await direct.start_run(run_id, "cancellations", run_id, "manual")
        for fault in (Fault.REPLY_LOST, Fault.REQUEST_LOST, Fault.BLACK_HOLE, Fault.REQUEST_LATE):
            proxy.arm(1, fault, match=MessageMatch.COMMIT, times=2)
            keys = [f"{fault.name} {number}" for number in range(CONCURRENCY)]
            calls = {key: asyncio.create_task(store.try_claim_step(run_id, key)) for key in keys}
            while not (proxy.has_injected or all(call.done() for call in calls.values())):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            for call in calls.values():
                call.cancel()
            await asyncio.wait(calls.values())
            cancelled.update(key for key, call in calls.items() if call.cancelled())
            proxy.heal()
        context.record_faults(len(cancelled))
        context.counts.add_detail("claims cancelled while their messages were lost", len(cancelled))

        async def kept() -> int:
            return len(cancelled & await direct.get_claimed_step_keys(run_id))

        # The time in which a lost statement may still take effect, and then be compensated.
        if await _stays_above(kept, 0, seconds=4 * SETTLE_SECONDS):
            context.counts.count_leak(
                f"{await kept()} cancelled claims remain after their messages were lost"
            )


async def _cancel_close(context: RunContext, store: FlowStore, stack: AsyncExitStack) -> list[CancelledCall]:
    """Close the store while calls are pending, and cancel the close and some of the calls."""
    scenarios = await _new_scenarios(context, store, CONCURRENCY)
    tasks = [asyncio.ensure_future(invoke(store, scenario.call)) for scenario in scenarios]
    for _ in range(context.rng.randrange(4)):
        await asyncio.sleep(0)
    ending = asyncio.ensure_future(stack.aclose())
    for task in (ending, *context.rng.sample(tasks, CONCURRENCY // 2)):
        asyncio.get_running_loop().call_later(context.rng.random() * 0.01, task.cancel)
    await asyncio.wait({ending, *tasks}, timeout=HANG_TIMEOUT)
    if not all(task.done() for task in (ending, *tasks)):
        context.counts.count_wrong("calls hung while their store was closing")
        for task in (ending, *tasks):
            task.cancel()
        await asyncio.wait({ending, *tasks}, timeout=HANG_TIMEOUT)
    if ending.cancelled():
        context.record_faults()
        context.counts.add_detail("closings cancelled")
    elif (error := ending.exception()) is not None:
        context.counts.count_wrong(f"a cancelled close raised {type(error).__name__}")
    return [_classify(context, scenario, task, 0.0) for scenario, task in zip(scenarios, tasks, strict=True)]


async def _cancel_opens(context: RunContext, url: str) -> None:
    """Cancel the opening of a store."""

    async def whole() -> None:
        async with open_store(url) as store:
            await store.ping()

    started_at = time.monotonic()
    await whole()
    seconds = time.monotonic() - started_at
    for _ in range(OPENS_PER_ROUND):
        task = asyncio.ensure_future(whole())
        asyncio.get_running_loop().call_later(context.rng.random() * seconds, task.cancel)
        await asyncio.wait({task}, timeout=HANG_TIMEOUT)
        if not task.done():
            context.counts.count_wrong(f"a cancelled opening hung for {HANG_TIMEOUT:.0f} s")
        elif task.cancelled():
            context.record_faults()
            context.counts.add_detail("openings cancelled")
        elif (error := task.exception()) is not None:
            context.counts.count_wrong(f"a cancelled opening raised {type(error).__name__}")


def _classify(
    context: RunContext, scenario: Scenario, task: asyncio.Task[Any], after: float
) -> CancelledCall:
    """Classify the end of a call."""
    outcome: Returned | Raised | None = None
    if not task.cancelled():
        error = task.exception()
        if error is None:
            outcome = Returned(comparable(task.result(), exact_times=False))
        elif isinstance(error, FlowStoreError):
            outcome = Raised(error_name(error))
        elif not isinstance(error, TimeoutError):
            context.counts.count_wrong(f"{scenario.call.method}, cancelled, raised {type(error).__name__}")
    return CancelledCall(
        scenario=scenario, point=CancelPoint(seconds=after), reached=outcome is None, outcome=outcome
    )


async def _verify_all(
    context: RunContext,
    store: FlowStore,
    cancelled_calls: Sequence[CancelledCall],
    resident: set[asyncio.Task[Any]],
) -> None:
    """Check that each call was atomic and that no task keeps running."""
    until = time.monotonic() + SETTLE_SECONDS
    while (left := asyncio.all_tasks() - resident) and time.monotonic() < until:
        await asyncio.wait(left, timeout=0.05)
    for task in left:
        context.counts.count_leak(f"a task keeps running after cancelled calls: {task.get_coro()!r:.200}")
    await asyncio.gather(
        *(_verify_call(context, store, cancelled_call) for cancelled_call in cancelled_calls)
    )


async def _verify_call(context: RunContext, store: FlowStore, cancelled_call: CancelledCall) -> None:
    scenario = cancelled_call.scenario
    if cancelled_call.outcome is None and (cancelled_call.point.wait != 0 or context.backend == "memory"):
        context.record_faults()
        context.counts.add_detail("calls cancelled")
    before = expected_state(scenario.setup)
    after = before.apply(scenario.call, exact_times=False)
    context.counts.operations += 2 * len(scenario.probes) + 1
    if isinstance(cancelled_call.outcome, Returned):
        if cancelled_call.outcome != after.outcome:
            context.counts.count_wrong(
                f"{cancelled_call.title} gave {describe_outcome(cancelled_call.outcome)}"
            )
        possible = [after]
    elif (scenario.must_compensate and cancelled_call.outcome is None) or cancelled_call.outcome == Raised(
        "StoreClosedError"
    ):
        possible = [before]
    else:
        possible = [before, after]
    partial_effect = await find_partial_effect(
        store, scenario.probes, scenario.call, before=before, possible=possible, exact_times=False
    )
    if partial_effect is None:
        return
    if possible == [after]:
        context.counts.count_lost(f"{cancelled_call.title} returned a result, and {partial_effect}")
    elif possible == [before] and scenario.must_compensate:
        context.counts.count_leak(f"{cancelled_call.title} was not compensated: {partial_effect}")
    else:
        context.counts.count_wrong(f"{cancelled_call.title} was applied in part: {partial_effect}")


async def _expect_released(
    context: RunContext, url: str, server: Server | None, connections: int | None
) -> None:
    """Check that the database has no open transaction, and at most ``connections`` connections if given."""
    if context.backend == "sqlite":
        if (what := await asyncio.to_thread(_find_lock, parse_url(url).path)) is not None:
            context.counts.count_leak(what)
        return
    if server is None:
        return

    async def transactions() -> int:
        return await _count(server, "state LIKE 'idle in transaction%'")

    async def others() -> int:
        return await _count(server, "true")

    if await _stays_above(transactions, 0):
        context.counts.count_leak("a transaction is still open on the server after its call was cancelled")
    if connections is not None and await _stays_above(others, connections):
        context.counts.count_leak("a connection is still open on the server after the store was closed")


async def _stays_above(
    count: Callable[[], Awaitable[int]], wanted: int, *, seconds: float = SETTLE_SECONDS
) -> bool:
    """Whether a count stays above ``wanted`` until the timeout."""
    until = time.monotonic() + seconds
    while await count() > wanted:
        if time.monotonic() > until:
            return True
        await asyncio.sleep(0.1)
    return False


async def _count(server: Server, which: str) -> int:
    return int(
        await server.psql(
            "SELECT count(*) FROM pg_stat_activity"
            f" WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND {which}"
        )
    )


def _find_lock(path: str) -> str | None:
    """Describe a lock that is still held on an SQLite file, or return None."""
    with closing(sqlite3.connect(path, timeout=SETTLE_SECONDS, isolation_level=None)) as database:
        try:
            database.execute("BEGIN IMMEDIATE")
            database.execute("ROLLBACK")
        except sqlite3.OperationalError:
            return "a write transaction is still open after its call was cancelled"
        # Busy while a reader holds an older snapshot.
        busy, _, _ = database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        return "a snapshot is still open after its call was cancelled" if busy else None


SCENARIO = FaultScenario(
    number=3,
    name="cancellations",
    fault="calls cancelled at every await and at random times: alone, in batches, in task groups, while the "
    "store opens and closes",
    unit="cancellations",
    planned=3_000,
    min_faults=60,
    backends=("memory", "sqlite", "postgresql"),
    pass_criterion="each call is atomic; no task, thread, connection or transaction leaks",
    mutant="trigger_run is two calls in sequence",
    minutes=10,
    run=run,
)
