"""CON-4: calls cancelled at every suspension point are atomic, compensated and leak nothing."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
from collections.abc import Awaitable, Callable, Sequence
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
from flowstore_conformance.checks.fixtures import start, thread_count
from flowstore_conformance.context import CheckContext, ContractViolation, Inconclusive, Profile
from flowstore_conformance.history import Call, Raised, Returned
from flowstore_conformance.model import State
from flowstore_conformance.registry import Kind, check
from flowstore_conformance.state_probe import (
    ModelState,
    describe_outcome,
    difference,
    find_partial_effect,
    invoke,
    observe_until,
    outcome_of,
    probe_calls,
    sample_probes,
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

MAX_CONCURRENT_CHECKS = 16
"""How many cancelled calls are checked at once; of more, some get no connection in time on a slow machine."""


async def _set_up(store: FlowStore, scenario: Scenario) -> None:
    for call in scenario.setup:
        await invoke(store, call)


async def _wait_for_tasks(before: set[asyncio.Task[object]]) -> None:
    """Wait until the tasks that cancelled calls left behind have ended, at most for a time limit."""
    deadline = asyncio.get_running_loop().time() + state_probe.SETTLE_SECONDS
    while (left := asyncio.all_tasks() - before) and asyncio.get_running_loop().time() < deadline:
        await asyncio.wait(left, timeout=0.1)


def _expected_state(context: CheckContext, calls: Sequence[Call]) -> ModelState:
    """The model's state after some calls."""
    state = ModelState(context.clock or (lambda: datetime.now(UTC)), State())
    for call in calls:
        state = state.apply(call, exact_times=context.exact_times)
    return state


async def _check_atomicity(context: CheckContext, store: FlowStore, cancelled_call: CancelledCall) -> None:
    """Check that the call took full effect or none, and that a repeated call behaves accordingly."""
    scenario, exact_times = cancelled_call.scenario, context.exact_times
    before = _expected_state(context, scenario.setup)
    after = before.apply(scenario.call, exact_times=exact_times)
    probes = probes_again = scenario.probes
    if context.profile is Profile.QUICK:
        probes = sample_probes(probes, (before, after), context.random)
        probes_again = sample_probes(probes, (before, after), context.random, count=0)
    if cancelled_call.outcome is not None:
        assert after.outcome is not None
        context.expect_that(
            cancelled_call.outcome == after.outcome or isinstance(cancelled_call.outcome, Raised),
            f"{cancelled_call.title}: expected {describe_outcome(after.outcome)}, "
            f"got {describe_outcome(cancelled_call.outcome)}",
        )
    if isinstance(cancelled_call.outcome, Returned):
        possible = [after]
    elif scenario.must_compensate:
        possible = [before]
        if scenario.compensation:
            released = after
            for call in scenario.compensation:
                released = released.apply(call, exact_times=exact_times)
            possible.append(released)
    else:
        possible = [before, after]
    compensates = scenario.must_compensate and not isinstance(cancelled_call.outcome, Returned)
    partial = await find_partial_effect(
        store,
        probes,
        scenario.call,
        before=before,
        possible=possible,
        exact_times=exact_times,
        compensates=compensates,
        probes_again=probes_again,
    )
    context.assertions += 1
    if partial is not None:
        what = "was not released" if compensates else "took partial effect"
        raise ContractViolation(f"{cancelled_call.title} {what}: {partial}", program=program(cancelled_call))


async def _cancel_everywhere(
    context: CheckContext, factories: Sequence[ScenarioFactory], moments: int
) -> None:
    """Cancel the call of each scenario at every suspension point and at random times, each on its own run."""
    *_, other = await context.workers(2)
    # Together, because a store may need seconds to end its work for a cancelled call.
    together = context.profile.of(16, 2, 1)
    for first in range(0, len(factories), together):
        await _cancel_together(context, other, factories[first : first + together], moments)


async def _cancel_together(
    context: CheckContext, other: FlowStore, factories: Sequence[ScenarioFactory], moments: int
) -> None:
    def maker(factory: ScenarioFactory) -> Callable[[int], Awaitable[Sequence[Scenario]]]:
        async def make(count: int) -> Sequence[Scenario]:
            scenarios = [new_scenario(context, factory) for _ in range(count)]
            await asyncio.gather(*(_set_up(context.store, scenario) for scenario in scenarios))
            return scenarios

        return make

    # All profiles first: a cancelled call may occupy a connection for a while, which delays later calls.
    profiles = []
    for factory in factories:
        [whole] = await maker(factory)(1)
        profiles.append((factory, whole, await profile(context.store, whole)))
    before: set[asyncio.Task[object]] = set(asyncio.all_tasks())
    cancelled: list[CancelledCall] = []
    for factory, whole, usual in profiles:
        swept = sweep(
            context.store,
            maker(factory),
            usual,
            context.random,
            # A claim is won at one instant, possibly in a server or thread: try more random times.
            moments=(context.profile.of(3, 8, 8) if whole.must_compensate else 1) * moments,
            exact_times=context.exact_times,
            limit=context.profile.of(9 if whole.must_compensate else 3, 60, 200),
        )
        cancelled += [cancelled_call async for cancelled_call in swept]
    # A store that makes one write after another has made the cancelled ones when it answers a later one.
    await start(context)
    await _wait_for_tasks(before)
    # Check every second call through another store: an effect must be visible to all stores.
    checked = zip(cancelled, itertools.cycle((context.store, other)))
    while some := list(itertools.islice(checked, MAX_CONCURRENT_CHECKS)):
        await asyncio.gather(*(_check_atomicity(context, store, one) for one, store in some))


@check("CON-4", kind=Kind.CANCELLATION, alone=True)
async def a_cancelled_write_is_atomic(context: CheckContext) -> None:
    """A write cancelled at any point takes full effect or none, and can be repeated."""
    factories = dict(available(context.capabilities))
    if context.profile is Profile.QUICK:
        for name in context.random.sample(sorted(factories), len(factories) * 5 // 6):
            if not new_scenario(context, factories[name]).must_compensate:
                del factories[name]
    await _cancel_everywhere(context, list(factories.values()), context.profile.of(1, 2, 40))


@check("CON-4", kind=Kind.CANCELLATION, rotation="cancelled claims")
async def a_cancelled_claim_is_released_before_the_store_closes(context: CheckContext) -> None:
    """A cancelled ownerless claim, dispatch or claim of next steps is released; aclose waits for that."""
    rounds = context.profile.of(2, 5, 20)
    factories = {
        name: factory
        for name, factory in available(context.capabilities).items()
        if new_scenario(context, factory).must_compensate
    }
    whole = new_scenario(context, factories["dispatch"])
    await _set_up(context.store, whole)
    usual = await profile(context.store, whole)
    for _ in range(rounds):
        closing = await context.open()
        scenarios = [new_scenario(context, factory) for factory in factories.values() for _ in range(4)]
        await asyncio.gather(*(_set_up(closing, scenario) for scenario in scenarios))
        # Concurrent, so that some calls are cancelled while they wait for a connection or the writer.
        points = [_random_point(context, usual, len(scenarios)) for _ in scenarios]
        cancelled = await asyncio.gather(
            *(
                cancel_at(closing, scenario, point, exact_times=context.exact_times)
                for scenario, point in zip(scenarios, points, strict=True)
            )
        )
        await closing.aclose()
        await asyncio.gather(
            *(_check_atomicity(context, context.store, cancelled_call) for cancelled_call in cancelled)
        )


def _random_point(context: CheckContext, usual: CallProfile, crowd: int) -> CancelPoint:
    """A random cancellation point of a call that competes with other calls."""
    if context.random.random() < 0.5:
        return CancelPoint(context.random.randrange(usual.waits + 2))
    return CancelPoint(
        seconds=usual.seconds * context.random.random() * (1 + crowd * context.random.random())
    )


@check("CON-4", kind=Kind.CANCELLATION, rotation="cancelled calls")
async def cancelled_reads_leave_the_store_usable(context: CheckContext) -> None:
    """A read cancelled at any point raises nothing else, changes nothing and leaves the store usable."""
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
        ("get_queues", {}),
    ):
        if OPERATIONS[method].is_offered(context.capabilities):
            reads.append(Call(method=method, arguments=arguments))
    for read in reads:
        scenario = Scenario(run_id=run_id, setup=(), call=read, must_compensate=False, probes=())

        async def make(count: int, scenario: Scenario = scenario) -> Sequence[Scenario]:
            return [scenario] * count

        wanted = await outcome_of(context.store, read, exact_times=context.exact_times)
        usual = await profile(context.store, scenario)
        moments = context.profile.of(1, 3, 20)
        async for cancelled_call in sweep(
            context.store, make, usual, context.random, moments=moments, exact_times=context.exact_times
        ):
            if cancelled_call.outcome not in (None, wanted):
                assert cancelled_call.outcome is not None
                raise ContractViolation(
                    f"{cancelled_call.title}: expected {describe_outcome(wanted)}, "
                    f"got {describe_outcome(cancelled_call.outcome)}"
                )
            context.assertions += 1
        context.expect_that(
            await outcome_of(context.store, read, exact_times=context.exact_times) == wanted,
            f"the result of {read.method} changed after cancelled calls of it",
        )


def _descriptors() -> int:
    """The number of open files and sockets of this process; 0 if the system does not report it."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 0


@check("CON-4", kind=Kind.CANCELLATION, alone=True, rotation="cancelled calls")
async def cancelled_calls_leak_no_resources(context: CheckContext) -> None:
    """After many cancelled calls and aclose no task, thread or connection is left."""
    factories = list(available(context.capabilities).values())
    count = min(context.profile.of(6, 100, 100), len(factories))
    factories = context.random.sample(factories, count)

    async def cancel_many(store: FlowStore) -> Sequence[CancelledCall]:
        """Cancel every call at its first suspension, at a later one, and before it begins."""
        # A store whose calls never suspend can be cancelled only before they begin, at the last point.
        points = [CancelPoint(1), CancelPoint(context.random.randrange(2, 6)), CancelPoint(0)]
        cancelled = [(new_scenario(context, factory), point) for point in points for factory in factories]
        await asyncio.gather(*(_set_up(store, scenario) for scenario, _ in cancelled))
        return await asyncio.gather(
            *(
                cancel_at(store, scenario, point, exact_times=context.exact_times)
                for scenario, point in cancelled
            )
        )

    # The first use may load modules and caches that stay; they are no leak.
    store = await context.open()
    await cancel_many(store)
    await store.aclose()
    gc.collect()
    tasks, threads, descriptors = set(asyncio.all_tasks()), thread_count(), _descriptors()
    store = await context.open()
    await _set_up(store, new_scenario(context, SCENARIOS["claim_step"]))
    # An open store may have background tasks.
    resident = set(asyncio.all_tasks())
    cancelled: list[CancelledCall] = []
    for _ in range(context.profile.of(1, 2, 10)):
        cancelled += await cancel_many(store)
    if all(cancelled_call.outcome is not None for cancelled_call in cancelled):
        raise Inconclusive("every call had finished before it could be cancelled")
    await _wait_for_tasks(resident)
    await asyncio.gather(
        *(_check_atomicity(context, store, cancelled_call) for cancelled_call in cancelled[: len(factories)])
    )
    opened = len(asyncio.all_tasks() - tasks)
    growing = context.profile.of(20, 40, 200)
    for _ in range(growing):
        await cancel_at(
            store,
            new_scenario(context, SCENARIOS["start_run"]),
            CancelPoint(1),
            exact_times=context.exact_times,
        )
    await _wait_for_tasks(resident)
    grown = len(asyncio.all_tasks() - tasks) - opened
    context.expect_that(
        grown < growing / 2,
        f"tasks left by {growing} cancelled calls: expected fewer than {growing // 2}, got {grown}",
    )
    await store.aclose()
    deadline = asyncio.get_running_loop().time() + state_probe.SETTLE_SECONDS
    while True:
        gc.collect()
        left = [task for task in asyncio.all_tasks() - tasks if not task.done()]
        more = (thread_count() - threads, _descriptors() - descriptors)
        if not left and max(more) <= 0:
            break
        if asyncio.get_running_loop().time() > deadline:
            break
        await asyncio.sleep(0.01)
    context.expect_that(
        not left, f"tasks left after aclose: expected none, got {len(left)}, the first: {left[:1]}"
    )
    context.expect_that(more[0] <= 0, f"threads left after aclose: expected none, got {more[0]}")
    context.expect_that(
        more[1] <= 0, f"files and sockets left open after aclose: expected none, got {more[1]}"
    )


@check("CON-4", kind=Kind.CANCELLATION, alone=True, rotation="cancelled calls")
async def a_cancelled_cleanup_deletes_whole_runs(context: CheckContext) -> None:
    """A cleanup cancelled at any point leaves each run unchanged or deletes it whole."""
    cleanup = Call(method="cleanup", arguments={"cutoff": datetime(2099, 1, 1, tzinfo=UTC)})
    factory = available(context.capabilities)["retry_step"]

    # Use the setup of this scenario: a failed run with every kind of state.
    async def make() -> Sequence[Scenario]:
        scenarios = [replace(new_scenario(context, factory), call=cleanup) for _ in range(3)]
        await asyncio.gather(*(_set_up(context.store, scenario) for scenario in scenarios))
        return scenarios

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
        scenarios = await make()
        before: set[asyncio.Task[object]] = set(asyncio.all_tasks())
        cancelled_call = await cancel_at(context.store, scenarios[0], point, exact_times=context.exact_times)
        await _wait_for_tasks(before)
        for scenario in scenarios:
            gone, kept = _expected_state(context, ()), _expected_state(context, scenario.setup)
            wanted = [one.observe(scenario.probes, exact_times=context.exact_times) for one in (gone, kept)]
            seen = await observe_until(
                context.store, scenario.probes, wanted, exact_times=context.exact_times
            )
            context.assertions += 1
            if seen not in wanted:
                partial = difference(scenario.probes, seen, wanted)
                raise ContractViolation(
                    f"{cancelled_call.title} deleted part of a run: {partial}",
                    program=program(cancelled_call),
                )
