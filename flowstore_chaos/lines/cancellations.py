"""Cancelled calls, at each place where they wait and at drawn microseconds: whole or not at all (CON-4)."""

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
from flowstore_conformance.write_scenarios import Scenario, available

from flowstore_chaos.leaks import Holdings
from flowstore_chaos.line import Line
from flowstore_chaos.proxy import Aim, Fault, proxy_before_port
from flowstore_chaos.scenes import expected, new_scene
from flowstore_chaos.server import Server
from flowstore_chaos.trial import Trial
from flowstore_core import FlowStore, FlowStoreError, TriggerResult, new_run_id, open_store
from flowstore_core.urls import parse_url

POINTS = 24
"""At most so many of the places where one call waits, in one sweep."""
MOMENTS = 4
SWEPT = 4
"""Calls that are swept in each round."""
AT_ONCE = 24
OPENINGS = 6
PATIENCE_SECONDS = 5.0
HUNG_SECONDS = 30.0


class InTwo:
    """A store that triggers a run by two calls, one after the other."""

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


async def run(trial: Trial) -> None:
    async with _place(trial) as (url, server):
        with capture_callback_errors() as surfaced:
            while not (trial.done or _found_out(trial)):
                before = Holdings.now()
                try:
                    async with asyncio.timeout(HUNG_SECONDS * 4):
                        await _round(trial, url, server)
                except TimeoutError:
                    trial.tally.mistrust(f"a round of cancelled calls hung for {HUNG_SECONDS * 4:.0f} s")
                    return
                for what in before.leaked():
                    # The event loop keeps the threads of its own executor until it ends.
                    if not what.startswith("thread asyncio_"):
                        trial.tally.leak(what)
                await _expect_released(trial, url, server, connections=0)
        for error in surfaced:
            trial.tally.mistrust(f"a callback let {type(error).__name__} reach the event loop")


def _found_out(trial: Trial) -> bool:
    # Looking at more of it takes long, as each thing that is wrong must stay so to be believed.
    return trial.broken and not trial.tally.clean


@asynccontextmanager
async def _place(trial: Trial) -> AsyncIterator[tuple[str, Server | None]]:
    if trial.backend == "postgresql":
        async with trial.server() as server:
            yield server.url(schema="chaos"), server
    else:
        async with trial.store_url() as url:
            yield url, None


async def _round(trial: Trial, url: str, server: Server | None) -> None:
    async with AsyncExitStack() as stack:
        opened = await stack.enter_async_context(open_store(url))
        store: Any = InTwo(opened) if trial.broken else opened
        await _sweep(trial, store)
        if _found_out(trial):
            return
        for many in (_storm, _group):
            resident = set(asyncio.all_tasks())
            seconds = await _seconds(trial, store)
            await _judge(trial, store, await many(trial, store, seconds), resident)
        await _expect_released(trial, url, server, connections=None)
        if server is not None:
            await _unacknowledged(trial, server)
        cuts = await _closing(trial, store, stack)
    if trial.backend != "memory":
        async with open_store(url) as again:
            await _judge(trial, again, cuts, set(asyncio.all_tasks()))
    await _openings(trial, url)


async def _scenes(trial: Trial, store: FlowStore, count: int) -> list[Scenario]:
    """Scenes of all kinds, made ready."""
    settings = list(available(store.capabilities).values())
    scenes = [new_scene(trial.rng, trial.rng.choice(settings), store.capabilities) for _ in range(count)]
    await _set_up(trial, store, scenes)
    return scenes


async def _set_up(trial: Trial, store: FlowStore, scenes: Sequence[Scenario]) -> None:
    async def one(scenario: Scenario) -> None:
        for call in scenario.setup:
            await invoke(store, call)

    await asyncio.gather(*(one(scenario) for scenario in scenes))
    trial.tally.operations += sum(len(scenario.setup) for scenario in scenes)


async def _sweep(trial: Trial, store: FlowStore) -> None:
    """Cancel some kinds of call wherever they wait, one after the other."""
    settings = available(store.capabilities)
    names = trial.rng.sample(sorted(settings), SWEPT)
    if trial.broken:
        names[0] = "trigger_run"
    for name in names:

        async def make(count: int, name: str = name) -> Sequence[Scenario]:
            made = [new_scene(trial.rng, settings[name], store.capabilities) for _ in range(count)]
            await _set_up(trial, store, made)
            return made

        [whole] = await make(1)
        usual = await profile(store, whole)
        resident = set(asyncio.all_tasks())
        cuts = []
        swept = sweep(store, make, usual, trial.rng, moments=MOMENTS, exact_times=False, limit=POINTS)
        try:
            async for made in swept:
                cuts.append(made)  # noqa: PERF401 - what came before a violation counts
        except ContractViolation as violation:
            trial.tally.mistrust(str(violation))
        await _judge(trial, store, cuts, resident)


async def _seconds(trial: Trial, store: FlowStore) -> float:
    """How long as many calls take that nobody cancels."""
    scenes = await _scenes(trial, store, AT_ONCE)
    began = time.monotonic()
    await asyncio.gather(*(invoke(store, scenario.call) for scenario in scenes))
    trial.tally.operations += AT_ONCE
    return time.monotonic() - began


async def _storm(trial: Trial, store: FlowStore, seconds: float) -> list[CancelledCall]:
    """Many calls at once, most of them cancelled, or ended by a time-out, while their neighbours go on."""

    async def timed(scenario: Scenario, after: float) -> Any:
        async with asyncio.timeout(after):
            return await invoke(store, scenario.call)

    async def one(scenario: Scenario) -> CancelledCall:
        after, way = trial.rng.random() * seconds, trial.rng.choice(("cancel", "timeout", "wait", "none"))
        if way == "wait":
            return await cancel_at(store, scenario, CancelPoint(trial.rng.randrange(1, 8)), exact_times=False)
        task = asyncio.ensure_future(timed(scenario, after if way == "timeout" else HUNG_SECONDS))
        if way == "cancel":
            asyncio.get_running_loop().call_later(after, task.cancel)
        await asyncio.wait({task})
        return _seen(trial, scenario, task, after)

    scenes = await _scenes(trial, store, AT_ONCE)
    return await asyncio.gather(*(one(scenario) for scenario in scenes))


async def _group(trial: Trial, store: FlowStore, seconds: float) -> list[CancelledCall]:
    """A whole task group cancelled at once, with all the calls that it has under way."""
    scenes = await _scenes(trial, store, AT_ONCE)
    tasks: list[asyncio.Task[Any]] = []

    async def whole() -> None:
        async with asyncio.TaskGroup() as group:
            tasks.extend(group.create_task(invoke(store, scenario.call)) for scenario in scenes)

    after = trial.rng.random() * seconds
    task = asyncio.ensure_future(whole())
    await asyncio.sleep(0)
    asyncio.get_running_loop().call_later(after, task.cancel)
    await asyncio.wait({task})
    return [_seen(trial, scenario, one, after) for scenario, one in zip(scenes, tasks, strict=True)]


async def _unacknowledged(trial: Trial, server: Server) -> None:
    """Cancel claims whose messages are lost, where resolving them and undoing them share two connections."""
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
            proxy.arm(1, fault, aim=Aim.COMMIT, exact_times=2)
            keys = [f"{fault.name} {number}" for number in range(AT_ONCE)]
            calls = {key: asyncio.create_task(store.try_claim_step(run_id, key)) for key in keys}
            while not (proxy.struck or all(call.done() for call in calls.values())):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            for call in calls.values():
                call.cancel()
            await asyncio.wait(calls.values())
            cancelled.update(key for key, call in calls.items() if call.cancelled())
            proxy.heal()
        trial.landed(len(cancelled))
        trial.tally.add("claims cancelled while their messages were lost", len(cancelled))

        async def kept() -> int:
            return len(cancelled & await direct.get_claimed_step_keys(run_id))

        # As long as a lost statement may take effect, and a moment for what follows that.
        if await _stays_above(kept, 0, seconds=4 * PATIENCE_SECONDS):
            trial.tally.leak(f"{await kept()} cancelled claims are kept after their messages were lost")


async def _closing(trial: Trial, store: FlowStore, stack: AsyncExitStack) -> list[CancelledCall]:
    """Close the store while calls are under way, and cancel the closing, and some of the calls."""
    scenes = await _scenes(trial, store, AT_ONCE)
    tasks = [asyncio.ensure_future(invoke(store, scenario.call)) for scenario in scenes]
    for _ in range(trial.rng.randrange(4)):
        await asyncio.sleep(0)
    ending = asyncio.ensure_future(stack.aclose())
    for task in (ending, *trial.rng.sample(tasks, AT_ONCE // 2)):
        asyncio.get_running_loop().call_later(trial.rng.random() * 0.01, task.cancel)
    await asyncio.wait({ending, *tasks}, timeout=HUNG_SECONDS)
    if not all(task.done() for task in (ending, *tasks)):
        trial.tally.mistrust("calls hung while their store was being closed")
        for task in (ending, *tasks):
            task.cancel()
        await asyncio.wait({ending, *tasks}, timeout=HUNG_SECONDS)
    if ending.cancelled():
        trial.landed()
        trial.tally.add("closings cancelled")
    elif (error := ending.exception()) is not None:
        trial.tally.mistrust(f"closing, cancelled, let {type(error).__name__} out")
    return [_seen(trial, scenario, task, 0.0) for scenario, task in zip(scenes, tasks, strict=True)]


async def _openings(trial: Trial, url: str) -> None:
    """Cancel the opening of a store."""

    async def whole() -> None:
        async with open_store(url) as store:
            await store.ping()

    began = time.monotonic()
    await whole()
    seconds = time.monotonic() - began
    for _ in range(OPENINGS):
        task = asyncio.ensure_future(whole())
        asyncio.get_running_loop().call_later(trial.rng.random() * seconds, task.cancel)
        await asyncio.wait({task}, timeout=HUNG_SECONDS)
        if not task.done():
            trial.tally.mistrust(f"opening, cancelled, hung for {HUNG_SECONDS:.0f} s")
        elif task.cancelled():
            trial.landed()
            trial.tally.add("openings cancelled")
        elif (error := task.exception()) is not None:
            trial.tally.mistrust(f"opening, cancelled, let {type(error).__name__} out")


def _seen(trial: Trial, scenario: Scenario, task: asyncio.Task[Any], after: float) -> CancelledCall:
    """What became of a call of a storm."""
    outcome: Returned | Raised | None = None
    if not task.cancelled():
        error = task.exception()
        if error is None:
            outcome = Returned(comparable(task.result(), exact_times=False))
        elif isinstance(error, FlowStoreError):
            outcome = Raised(error_name(error))
        elif not isinstance(error, TimeoutError):
            trial.tally.mistrust(f"{scenario.call.method}, cancelled, let {type(error).__name__} out")
    return CancelledCall(
        scenario=scenario, point=CancelPoint(seconds=after), reached=outcome is None, outcome=outcome
    )


async def _judge(
    trial: Trial, store: FlowStore, cuts: Sequence[CancelledCall], resident: set[asyncio.Task[Any]]
) -> None:
    """Each call happened whole or not at all, and nothing runs on."""
    until = time.monotonic() + PATIENCE_SECONDS
    while (left := asyncio.all_tasks() - resident) and time.monotonic() < until:
        await asyncio.wait(left, timeout=0.05)
    for task in left:
        trial.tally.leak(f"a task runs on after cancelled calls: {task.get_coro()!r:.200}")
    await asyncio.gather(*(_examine(trial, store, made) for made in cuts))


async def _examine(trial: Trial, store: FlowStore, made: CancelledCall) -> None:
    scenario = made.scenario
    if made.outcome is None and (made.point.wait != 0 or trial.backend == "memory"):
        trial.landed()
        trial.tally.add("calls cancelled")
    before = expected(scenario.setup)
    after = before.apply(scenario.call, exact_times=False)
    trial.tally.operations += 2 * len(scenario.probes) + 1
    if isinstance(made.outcome, Returned):
        if made.outcome != after.outcome:
            trial.tally.mistrust(f"{made.title} gave {describe_outcome(made.outcome)}")
        possible = [after]
    elif (scenario.must_compensate and made.outcome is None) or made.outcome == Raised("StoreClosedError"):
        possible = [before]
    else:
        possible = [before, after]
    half = await find_partial_effect(
        store, scenario.probes, scenario.call, before=before, possible=possible, exact_times=False
    )
    if half is None:
        return
    if possible == [after]:
        trial.tally.lose(f"{made.title} was answered, and {half}")
    elif possible == [before] and scenario.must_compensate:
        trial.tally.leak(f"{made.title} left what it had won: {half}")
    else:
        trial.tally.mistrust(f"{made.title} was neither whole nor undone: {half}")


async def _expect_released(trial: Trial, url: str, server: Server | None, connections: int | None) -> None:
    """No transaction is open on the other side, and, if said, only so many connections are."""
    if trial.backend == "sqlite":
        if (what := await asyncio.to_thread(_held, parse_url(url).path)) is not None:
            trial.tally.leak(what)
        return
    if server is None:
        return

    async def transactions() -> int:
        return await _count(server, "state LIKE 'idle in transaction%'")

    async def others() -> int:
        return await _count(server, "true")

    if await _stays_above(transactions, 0):
        trial.tally.leak("a transaction stays open on the server after its call was cancelled")
    if connections is not None and await _stays_above(others, connections):
        trial.tally.leak("a connection stays open on the server after the store was closed")


async def _stays_above(
    count: Callable[[], Awaitable[int]], wanted: int, *, seconds: float = PATIENCE_SECONDS
) -> bool:
    """Whether a count does not come down to the wanted one in time."""
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


def _held(path: str) -> str | None:
    """What another connection may not do on an SQLite file because somebody holds a lock on it."""
    with closing(sqlite3.connect(path, timeout=PATIENCE_SECONDS, isolation_level=None)) as database:
        try:
            database.execute("BEGIN IMMEDIATE")
            database.execute("ROLLBACK")
        except sqlite3.OperationalError:
            return "a write transaction stays open after its call was cancelled"
        # It is refused while anybody reads an older state.
        busy, _, _ = database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        return "a snapshot stays open after its call was cancelled" if busy else None


LINE = Line(
    number=3,
    name="cancellations",
    fault="calls cancelled wherever they wait and at drawn microseconds: alone, in batches, in task groups, "
    "while the store opens and closes",
    unit="cancellations",
    planned=3_000,
    least=60,
    backends=("memory", "sqlite", "postgresql"),
    passes_when="each call happened whole or not at all; no task, thread, connection or transaction is left",
    broken="trigger_run is two calls, one after the other",
    minutes=10,
    run=run,
)
