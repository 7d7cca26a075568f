"""CON-1 to CON-4 with ``--faults``: concurrent programs of every write while requests are disturbed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from uuid import UUID

from flowstore_conformance.checks.fixtures import start
from flowstore_conformance.context import CheckContext, ContractViolation, Inconclusive, Unsupported
from flowstore_conformance.disturbed_races import DisturbedRunner, judge
from flowstore_conformance.disturbers import (
    Disturber,
    any_disturbers,
    disturbing,
    hook_disturbers,
    network_disturbers,
)
from flowstore_conformance.race_families import RaceBuilder
from flowstore_conformance.race_families.pairs import CLEANUP, draw_disturbed, writing_operations
from flowstore_conformance.race_search import draw_races
from flowstore_conformance.races import Race
from flowstore_conformance.registry import Kind, check
from flowstore_core import Capability, ConfigurationError, FlowStore, StoreUnavailableError, open_store

RACES = 6
"""Races that run at the same time."""
MAX_PASSES = 12
"""How often every operation races until each kind of fault has happened."""
MAX_UNDECIDED = 0.1
"""The share of races without a verdict above which a check is inconclusive."""
CALLS_AT_ONCE = 12
MAX_CALL_SECONDS = 0.05
"""The longest time after which a call is cancelled."""
COMPENSATION_SECONDS = 60.0
POLL_SECONDS = 0.05

Disturbers = Callable[[CheckContext], AbstractAsyncContextManager[Sequence[Disturber]]]


@asynccontextmanager
async def _disturbed(
    context: CheckContext, make: Disturbers
) -> AsyncIterator[tuple[Sequence[Disturber], Sequence[FlowStore]]]:
    """Open a store behind each disturber. Raises Unsupported if no fault can be injected."""
    async with AsyncExitStack() as stack:
        try:
            disturbers = await stack.enter_async_context(make(context))
            stores = [
                await stack.enter_async_context(open_store(one.url, clock=context.clock))
                for one in disturbers
            ]
        except ConfigurationError as error:
            raise Unsupported(f"no fault can be injected: {error}") from error
        yield disturbers, stores


@check("CON-3", "CON-1", "CON-2", needs=[Capability.VIRTUAL_CLOCK], kind=Kind.FAULT, only_with_faults=True)
async def every_write_survives_a_disturbed_network(context: CheckContext) -> None:
    """While connections break and hang, every write happens once or not at all, as it returned."""
    await _run_programs(context, network_disturbers)


@check("CON-3", "CON-1", "CON-2", needs=[Capability.VIRTUAL_CLOCK], kind=Kind.FAULT, only_with_faults=True)
async def every_write_survives_faults_of_the_injector(context: CheckContext) -> None:
    """While requests are lost, late or refused, every write happens once or not at all, as it returned."""
    await _run_programs(context, hook_disturbers)


async def _run_programs(context: CheckContext, make: Disturbers) -> None:
    begun, of = time.monotonic(), context.profile.of
    for _ in range(of(1, 4, 40)):
        # A cleanup acts on all runs of its namespace.
        async with context.new_namespace() as alone, _disturbed(alone, make) as (disturbers, stores):
            await _race(alone, DisturbedRunner(alone, disturbers, stores), [CLEANUP])
    async with _disturbed(context, make) as (disturbers, stores):
        runner = DisturbedRunner(context, disturbers, stores)
        names = [name for name in writing_operations(context.capabilities) if name != CLEANUP]
        missing = set(disturbers[0].kinds)
        passes, until = 0, begun + of(10, 60, 600)
        while True:
            context.random.shuffle(names)
            for first in range(0, len(names), RACES):
                await _race(context, runner, names[first : first + RACES])
            missing -= runner.tally.faults.keys()
            passes += 1
            if time.monotonic() > until and (not missing or passes >= MAX_PASSES):
                break
    tally = runner.tally
    if missing:
        raise Inconclusive(f"{tally.races} races met no fault of this kind: {'; '.join(sorted(missing))}")
    if tally.undecided > MAX_UNDECIDED * tally.races:
        raise Inconclusive(f"{tally.undecided} of {tally.races} races were too large to decide")
    if not tally.outcomes["answered"]:
        raise Inconclusive("no call of a disturbed store returned")
    calls = ", ".join(f"{number} {kind}" for kind, number in tally.outcomes.most_common())
    context.notes.append(
        f"{len(names)} writing operations in {tally.races} races with {tally.faults.total()} faults: {calls}"
    )


async def _race(context: CheckContext, runner: DisturbedRunner, names: Sequence[str]) -> None:
    """Race each of some operations beside others. Raises ContractViolation for the first wrong history."""
    left = iter(names)

    def draw(builder: RaceBuilder) -> Race:
        return draw_disturbed(builder, next(left))

    for run in await runner.run(draw_races(context, draw, len(names))):
        context.assertions += 1
        try:
            violation = judge(context, run)
        except Inconclusive:
            runner.tally.undecided += 1
            continue
        if violation is not None:
            raise violation


@check("CON-4", "CON-3", kind=Kind.FAULT, only_with_faults=True)
async def cancelled_claims_are_released_after_faults(context: CheckContext) -> None:
    """A claim or dispatch whose caller is cancelled during faults is released once the store works again."""
    async with _disturbed(context, any_disturbers) as (disturbers, stores):
        cancelled: list[tuple[UUID, str]] = []
        for _ in range(context.profile.of(2, 10, 100)):
            runs = [await start(context) for _ in range(CALLS_AT_ONCE)]
            async with disturbing(disturbers):
                calls = [
                    _cancel(context, stores[number % len(stores)], run_id)
                    for number, run_id in enumerate(runs)
                ]
                cancelled += [found for some in await asyncio.gather(*calls) for found in some]
            for disturber in disturbers:
                await disturber.release()
        if not cancelled:
            raise Inconclusive("every call returned before it was cancelled")
        await _expect_released(context, cancelled)


async def _cancel(context: CheckContext, store: FlowStore, run_id: UUID) -> list[tuple[UUID, str]]:
    """Cancel a claim and a dispatch of a run. Returns the run and the name of each that was cancelled."""
    calls = {
        "claim": asyncio.ensure_future(store.try_claim_step(run_id, "a")),
        "dispatch": asyncio.ensure_future(store.try_record_dispatch(run_id, "b")),
    }
    await asyncio.wait(calls.values(), timeout=context.random.uniform(0.0, MAX_CALL_SECONDS))
    cancelled = [name for name, call in calls.items() if call.cancel()]
    outcomes = await asyncio.gather(*calls.values(), return_exceptions=True)
    for outcome in outcomes:
        expected = (asyncio.CancelledError, StoreUnavailableError)
        if isinstance(outcome, BaseException) and not isinstance(outcome, expected):
            raise outcome
    ends = dict(zip(calls, outcomes, strict=True))
    return [(run_id, name) for name in cancelled if isinstance(ends[name], asyncio.CancelledError)]


async def _expect_released(context: CheckContext, cancelled: Sequence[tuple[UUID, str]]) -> None:
    until = time.monotonic() + COMPENSATION_SECONDS * context.timeout_factor
    for run_id, name in cancelled:
        context.assertions += 1
        method = "try_claim_step" if name == "claim" else "try_record_dispatch"
        read = context.store.get_step_claims if name == "claim" else context.store.get_dispatches
        while await read(run_id):
            if time.monotonic() > until:
                raise ContractViolation(
                    f"a {name} won by {method}, which was cancelled during faults, is still there "
                    f"{COMPENSATION_SECONDS:g} s after the last fault: repeat the release until it succeeds"
                )
            await asyncio.sleep(POLL_SECONDS)
