"""Calls that are cancelled at every step: whole or undone, given back, and nothing left behind (CON-4)."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from uuid import UUID

from flowstore_conformance import state_probe
from flowstore_conformance.cancellation_points import (
    CallProfile,
    CancelledCall,
    CancelPoint,
    cancel_at,
    profile,
    program,
    sweep,
)
from flowstore_conformance.checks.registry import Kind, check
from flowstore_conformance.context import CheckContext, ContractViolation, Inconclusive
from flowstore_conformance.history import Call, Raised, Returned
from flowstore_conformance.model import State
from flowstore_conformance.state_probe import (
    ModelState,
    describe_outcome,
    difference,
    find_partial_effect,
    invoke,
    observe_until,
    outcome_of,
    probe_calls,
)
from flowstore_conformance.write_scenarios import (
    LEASE,
    LONG_AGO,
    SCENARIOS,
    Scenario,
    ScenarioFactory,
    available,
    new_scenario,
)
from flowstore_core import FlowStore
from flowstore_core.operations import OPERATIONS


async def _set_up(store: FlowStore, scenario: Scenario) -> None:
    for call in scenario.setup:
        await invoke(store, call)


async def _settle(before: set[asyncio.Task[object]]) -> None:
    """Let what cancelled calls have left under way come to its end, bounded."""
    deadline = asyncio.get_running_loop().time() + state_probe.SETTLE_SECONDS
    while (left := asyncio.all_tasks() - before) and asyncio.get_running_loop().time() < deadline:
        await asyncio.wait(left, timeout=0.1)


def _expected(context: CheckContext, calls: Sequence[Call]) -> ModelState:
    """The model's state after some calls."""
    state = ModelState(context.clock or (lambda: datetime.now(UTC)), State())
    for call in calls:
        state = state.apply(call, exact_times=context.exact_times)
    return state


async def _examine(context: CheckContext, store: FlowStore, made: CancelledCall) -> None:
    """Whole or not at all; then the same call again must be answered as that state demands."""
    scenario, exact_times = made.scenario, context.exact_times
    before = _expected(context, scenario.setup)
    after = before.apply(scenario.call, exact_times=exact_times)
    if made.outcome is not None:
        assert after.outcome is not None
        context.expect_that(
            made.outcome == after.outcome or isinstance(made.outcome, Raised),
            f"{made.title} returned {describe_outcome(made.outcome)} "
            f"instead of {describe_outcome(after.outcome)}",
        )
    if isinstance(made.outcome, Returned):
        possible = [after]
    elif scenario.must_compensate:
        possible = [before]
    else:
        possible = [before, after]
    half = await find_partial_effect(
        store, scenario.probes, scenario.call, before=before, possible=possible, exact_times=exact_times
    )
    context.assertions += 1
    if half is not None:
        what = "left what it had won" if possible == [before] else "was neither whole nor undone"
        raise ContractViolation(f"{made.title} {what}: {half}", program=program(made))


async def _cut_everywhere(context: CheckContext, settings: dict[str, ScenarioFactory], moments: int) -> None:
    """Cancel the call of each setting at every point, and at so many moments, each on a run of its own."""
    *_, other = await context.workers(2)
    for setting in settings.values():

        async def make(count: int, setting: ScenarioFactory = setting) -> Sequence[Scenario]:
            scenes = [new_scenario(context, setting) for _ in range(count)]
            await asyncio.gather(*(_set_up(context.store, scenario) for scenario in scenes))
            return scenes

        [whole] = await make(1)
        usual = await profile(context.store, whole)
        before: set[asyncio.Task[object]] = set(asyncio.all_tasks())
        swept = sweep(
            context.store,
            make,
            usual,
            context.random,
            # What was won and must be given back is won at one moment, in a server or thread perhaps.
            moments=(4 if whole.must_compensate else 1) * moments,
            exact_times=context.exact_times,
            limit=context.profile.of(24, 60, 200),
        )
        cuts = [made async for made in swept]
        await _settle(before)
        # Every other one is looked at by a further store: what happened, happened for all.
        await asyncio.gather(
            *(
                _examine(context, other if number % 2 else context.store, made)
                for number, made in enumerate(cuts)
            )
        )


@check("CON-4", kind=Kind.CANCELLATION)
async def a_cancelled_write_happened_or_did_not(context: CheckContext) -> None:
    """Each writing call, cancelled at each step, has happened whole or not at all, and can be said again."""
    await _cut_everywhere(context, available(context.capabilities), context.profile.of(2, 5, 40))


@check("CON-4", kind=Kind.CANCELLATION)
async def a_cancelled_win_is_given_back_before_the_store_closes(context: CheckContext) -> None:
    """An ownerless claim or a dispatch that was won and cancelled is given back; closing waits for that."""
    rounds = context.profile.of(3, 5, 20)
    settings = {
        name: setting
        for name, setting in available(context.capabilities).items()
        if name in ("claim_without_owner", "dispatch")
    }
    whole = new_scenario(context, settings["dispatch"])
    await _set_up(context.store, whole)
    usual = await profile(context.store, whole)
    for _ in range(rounds):
        closing = await context.open()
        scenes = [new_scenario(context, setting) for setting in settings.values() for _ in range(10)]
        await asyncio.gather(*(_set_up(closing, scenario) for scenario in scenes))
        # All at once: some are cancelled while they wait for a connection or for the writer.
        points = [_some_point(context, usual, len(scenes)) for _ in scenes]
        cuts = await asyncio.gather(
            *(
                cancel_at(closing, scenario, point, exact_times=context.exact_times)
                for scenario, point in zip(scenes, points, strict=True)
            )
        )
        await closing.aclose()
        await asyncio.gather(*(_examine(context, context.store, made) for made in cuts))


def _some_point(context: CheckContext, usual: CallProfile, crowd: int) -> CancelPoint:
    """A point of a call among so many at the same time, so that each takes longer than alone."""
    if context.random.random() < 0.5:
        return CancelPoint(context.random.randrange(usual.waits + 2))
    return CancelPoint(
        seconds=usual.seconds * context.random.random() * (1 + crowd * context.random.random())
    )


@check("CON-4", kind=Kind.CANCELLATION)
async def cancelled_reads_leave_the_store_usable(context: CheckContext) -> None:
    """Reads, cancelled at each step, let out nothing, change nothing and leave the store usable."""
    setup, retry = SCENARIOS["retry_step"](UUID(int=context.random.getrandbits(128)), UUID(int=7))
    run_id = retry.arguments["run_id"]
    for call in setup:
        await invoke(context.store, call)
    reads = [
        *probe_calls(run_id, context.capabilities, step_keys=("a",), keys=[(UUID(int=7), "manual", "K")]),
        Call(method="get_runs"),
        Call(method="get_active_runs"),
        Call(method="get_derived_runs", arguments={"source_run_id": run_id}),
    ]
    window = {"granularity": "hour", "since": LONG_AGO, "until": LONG_AGO + 5 * LEASE}
    for method, arguments in (
        ("get_runs_page", {"search": "orders"}),
        ("get_statistics", {}),
        ("get_run_timeseries", window),
        ("get_stalled_steps", {}),
        ("get_runs_to_stop", {}),
    ):
        if OPERATIONS[method].is_offered(context.capabilities):
            reads.append(Call(method=method, arguments=arguments))
    for read in reads:
        scenario = Scenario(run_id=run_id, setup=(), call=read, must_compensate=False, probes=())

        async def make(count: int, scenario: Scenario = scenario) -> Sequence[Scenario]:
            return [scenario] * count

        right = await outcome_of(context.store, read, exact_times=context.exact_times)
        usual = await profile(context.store, scenario)
        moments = context.profile.of(1, 3, 20)
        async for made in sweep(
            context.store, make, usual, context.random, moments=moments, exact_times=context.exact_times
        ):
            if made.outcome not in (None, right):
                assert made.outcome is not None
                outcomes = f"{describe_outcome(made.outcome)} instead of {describe_outcome(right)}"
                message = f"{made.title} returned {outcomes}"
                raise ContractViolation(message)
            context.assertions += 1
        context.expect_that(
            await outcome_of(context.store, read, exact_times=context.exact_times) == right,
            f"{read.method} answers otherwise after calls of it were cancelled",
        )


def _threads() -> int:
    # The event loop keeps the threads of its own executor until it ends.
    return sum(not thread.name.startswith("asyncio_") for thread in threading.enumerate())


def _descriptors() -> int:
    """How many files and sockets the process has open; 0 where the system does not tell."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 0


@check("CON-4", kind=Kind.CANCELLATION)
async def cancelled_calls_leave_nothing_behind(context: CheckContext) -> None:
    """After a storm of cancelled calls, and closing, no task, thread or connection is left."""
    settings = list(available(context.capabilities).values())

    async def storm(store: FlowStore) -> Sequence[CancelledCall]:
        """Every call several times: cancelled where it first waits, later, and before it began."""
        # The last is the only one at which a store can be cancelled that answers at once.
        points = [CancelPoint(1), CancelPoint(context.random.randrange(2, 6)), CancelPoint(0)]
        cuts = [(new_scenario(context, setting), point) for point in points for setting in settings]
        await asyncio.gather(*(_set_up(store, scenario) for scenario, _ in cuts))
        return await asyncio.gather(
            *(cancel_at(store, scenario, point, exact_times=context.exact_times) for scenario, point in cuts)
        )

    # The first time may load what is kept for ever; that is no leak.
    store = await context.open()
    await storm(store)
    await store.aclose()
    gc.collect()
    tasks, threads, descriptors = set(asyncio.all_tasks()), _threads(), _descriptors()
    store = await context.open()
    await _set_up(store, new_scenario(context, SCENARIOS["claim_step"]))
    # A store may keep tasks of its own for as long as it is open.
    resident = set(asyncio.all_tasks())
    cuts: list[CancelledCall] = []
    for _ in range(context.profile.of(1, 2, 10)):
        cuts += await storm(store)
    if all(made.outcome is not None for made in cuts):
        raise Inconclusive("no call was still under way when it was cancelled")
    await _settle(resident)
    await asyncio.gather(*(_examine(context, store, made) for made in cuts[: len(settings)]))
    opened = len(asyncio.all_tasks() - tasks)
    growing = context.profile.of(20, 40, 200)
    for _ in range(growing):
        await cancel_at(
            store,
            new_scenario(context, SCENARIOS["start_run"]),
            CancelPoint(1),
            exact_times=context.exact_times,
        )
    await _settle(resident)
    grown = len(asyncio.all_tasks() - tasks) - opened
    context.expect_that(grown < growing / 2, f"{growing} cancelled calls left {grown} tasks that do not end")
    await store.aclose()
    deadline = asyncio.get_running_loop().time() + state_probe.SETTLE_SECONDS
    while True:
        gc.collect()
        left = [task for task in asyncio.all_tasks() - tasks if not task.done()]
        more = (_threads() - threads, _descriptors() - descriptors)
        if not left and max(more) <= 0:
            break
        if asyncio.get_running_loop().time() > deadline:
            break
        await asyncio.sleep(0.01)
    context.expect_that(
        not left, f"{len(left)} tasks run on after the store was closed, the first: {left[:1]}"
    )
    context.expect_that(more[0] <= 0, f"{more[0]} more threads run after the store was closed than before")
    context.expect_that(
        more[1] <= 0, f"{more[1]} more files or sockets are open after the store was closed than before"
    )


@check("CON-4", kind=Kind.CANCELLATION)
async def a_cancelled_cleanup_deleted_whole_runs(context: CheckContext) -> None:
    """A cleanup, cancelled at each step, leaves each run as it was or deletes it with all it had."""
    cleanup = Call(method="cleanup", arguments={"cutoff": datetime(2099, 1, 1, tzinfo=UTC)})
    setting = available(context.capabilities)["retry_step"]

    # Of the setting only the setup is wanted: a run that failed, with something in every place.
    async def make() -> Sequence[Scenario]:
        scenes = [replace(new_scenario(context, setting), call=cleanup) for _ in range(3)]
        await asyncio.gather(*(_set_up(context.store, scenario) for scenario in scenes))
        return scenes

    usual = await profile(context.store, (await make())[0])
    most = context.profile.of(5, 12, 60)
    points = [CancelPoint(number) for number in range(usual.waits + 2)]
    if len(points) > most:
        points = [points[0], points[-2], *context.random.sample(points[1:-2], most - 2)]
    points += [
        CancelPoint(seconds=usual.seconds * context.random.random())
        for _ in range(context.profile.of(1, 3, 20))
    ]
    for point in points:
        scenes = await make()
        before: set[asyncio.Task[object]] = set(asyncio.all_tasks())
        made = await cancel_at(context.store, scenes[0], point, exact_times=context.exact_times)
        await _settle(before)
        for scenario in scenes:
            gone, kept = _expected(context, ()), _expected(context, scenario.setup)
            wanted = [one.observe(scenario.probes, exact_times=context.exact_times) for one in (gone, kept)]
            seen = await observe_until(
                context.store, scenario.probes, wanted, exact_times=context.exact_times
            )
            context.assertions += 1
            if seen not in wanted:
                raise ContractViolation(
                    f"{made.title} deleted half a run: {difference(scenario.probes, seen, wanted)}",
                    program=program(made),
                )
