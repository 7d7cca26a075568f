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
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

from flowstore_conformance.agreement import expected_outcome, is_read
from flowstore_conformance.bench import VirtualClock
from flowstore_conformance.calls import METHODS, SPANNING, draw_call
from flowstore_conformance.drawing import RandomChooser, World
from flowstore_conformance.execution import is_foreign
from flowstore_conformance.history import UNKNOWN, Call, History, Operation
from flowstore_conformance.linearizability import Answer, Verdict, check_history
from flowstore_conformance.model import Model
from flowstore_conformance.observation import answer, what_to_ask
from flowstore_conformance.racing import Done, Job, Phase, Race, Run, assemble, do_jobs, phases_of

from flowstore_chaos.line import Line
from flowstore_chaos.lines.replies_lost import RepeatsBlindly
from flowstore_chaos.proxy import Aim, Fault, Proxy, proxy_before_port
from flowstore_chaos.server import Server
from flowstore_chaos.trial import Trial
from flowstore_core import Capability, FlowStore, open_store

CLIENTS = 8
STORES = 2
"""Of one history, each shared by half of its clients."""
AT_ONCE = 8
"""Histories, each with stores and a proxy of its own; a kill of the server strikes all."""
CALLS = (2, 3, 4, 5)
MOST_STEPS = 6
"""So many calls come before the clients, at most."""
BUDGET = 2_000_000
OPTIONS = {"pool_size": 3, "statement_timeout": 1.0, "acquire_timeout": 10.0, "retry_timeout": 15.0}
DOWN_SECONDS = (0.0, 0.3)
EVERYTHING = frozenset(Capability)


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
    jobs = [(places[job.race].stores[job.client % STORES], job) for job in middle.jobs]
    striking: list[asyncio.Task[None]] = []

    async def strike() -> None:
        striking.append(asyncio.ensure_future(fault.strike(trial, server, places)))

    done.append(await do_jobs(jobs, clock.now, True, strike))
    for task in striking:
        await task
    struck = [place.proxy.landed.total() + place.proxy.broken_in_flight for place in places]
    for place in places:
        place.proxy.heal()
        await place.proxy.settle()
    done.append(await _alone(direct, end, clock))
    for history, landed in zip(assemble(races, done, one_loop=True), struck, strict=True):
        _judge(trial, history)
        if landed:
            trial.landed()
            trial.tally.add(f"histories with {fault.name}")
            trial.tally.add(f"calls struck by {fault.name}", landed)


async def _alone(direct: FlowStore, phase: Phase, clock: VirtualClock) -> list[Done]:
    """What comes before the clients, or after them, each race's calls one after the other."""
    jobs: list[tuple[FlowStore, Job]] = [(direct, job) for job in phase.jobs]
    return await do_jobs(jobs, clock.now, True)


async def _lose_replies(trial: Trial, server: Server, places: Sequence[_Place]) -> None:
    for place in places:
        times = place.rng.randint(1, 6)
        place.proxy.arm(place.rng.randint(1, 6), Fault.REPLY_LOST, aim=Aim.COMMIT, times=times)


async def _lose_requests(trial: Trial, server: Server, places: Sequence[_Place]) -> None:
    faults = [Fault.REQUEST_LOST, Fault.REQUEST_LATE, Fault.RESET, Fault.BLACK_HOLE]
    for place in places:
        fault, times = place.rng.choice(faults), place.rng.randint(1, 4)
        place.proxy.arm(place.rng.randint(1, 12), fault, times=times)


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


def draw_race(rng: random.Random, clock: VirtualClock) -> Race:
    """Clients that make any calls on the same few runs and keys."""
    chooser = RandomChooser(rng)
    model = Model(clock)
    runs = [UUID(int=1), UUID(int=2)]
    keys = ["a"] if rng.random() < 0.5 else ["a", "b"]
    flow = UUID(int=100)
    world = World(model=model, runs=runs, flows=[flow], keys=keys)
    weights = {
        # Writes above all: reads are looked for in the end.
        name: one.weight * rng.choice((0, 1, 1, 2)) * (1 if is_read(Call(method=name)) else 3)
        for name, one in METHODS.items()
        if name not in SPANNING
    }

    def draw() -> Call:
        [method] = rng.choices(list(weights), list(weights.values()))
        return draw_call(chooser, world, method)

    first = draw_call(chooser, world, "start_run")
    setup = [Call(method="start_run", arguments={**first.arguments, "run_id": runs[0]})]
    expected_outcome(model, setup[0])
    for _ in range(rng.randint(0, MOST_STEPS)):
        call = draw()
        if not is_read(call):
            setup.append(call)
            expected_outcome(model, call)
    clients = tuple(tuple(draw() for _ in range(rng.choice(CALLS))) for _ in range(CLIENTS))
    final = [call for run_id in runs for call in what_to_ask(run_id, EVERYTHING)]
    race = Race(setup=tuple(setup), clients=clients, final=tuple(final))
    return race.scheduled(rng).on_fresh_ids(rng)


def _judge(trial: Trial, history: Run) -> None:
    operations = history.history.operations
    trial.tally.operations += len(operations)
    trial.tally.add("calls refused", history.unavailable)
    trial.tally.add("outcomes unknown", sum(one.outcome is UNKNOWN for one in operations))
    for one in operations:
        if is_foreign(one.outcome):
            trial.tally.mistrust(f"{one.call.method} gave {answer(one.outcome)}, which is not the contract's")
            return
    verdict = check_history(History.of([_as_known(one) for one in operations]), budget=BUDGET)
    most = trial.tally.details.get("most states tried for one", 0)
    trial.tally.details["most states tried for one"] = max(int(most), verdict.states)
    if verdict.answer is Answer.VIOLATION:
        trial.tally.mistrust(f"no order of the calls explains their answers: {_stuck(verdict)}")
    elif verdict.answer is Answer.UNDECIDED:
        trial.tally.mistrust(f"a history of {len(operations)} calls could not be decided")


def _as_known(one: Operation) -> Operation:
    """What is known of an operation by its answer: an annotation is best effort, and never fails (CLM-7)."""
    if one.call.method != "annotate_dispatch":
        return one
    return replace(one, outcome=UNKNOWN, returned=float("inf"))


def _stuck(verdict: Verdict) -> str:
    """Where the search ended."""
    parts = [
        f"{one.call.method} gave {answer(one.outcome)}, where {answer(right)} is right"
        for one, right in zip(verdict.unplaced, verdict.expected, strict=False)
    ]
    return "; ".join(parts[:2])


LINE = Line(
    number=7,
    name="histories",
    fault=f"{CLIENTS} clients on the same runs while replies and requests are lost and the server is killed",
    unit="histories struck",
    planned=500,
    least=24,
    backends=("postgresql",),
    passes_when="an order of the calls explains every answer; none is left undecided",
    broken="the store repeats a call of unknown outcome and believes what it is told then",
    minutes=10,
    run=run,
)
