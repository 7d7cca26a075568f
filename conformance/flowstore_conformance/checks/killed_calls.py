"""Processes killed in the middle of a write: the write is whole or absent, and whatever it locked is free.

A cancelled call can still run its cleanup code; a killed process cannot. So a check of cancellation does not
find a lock that is released in a ``finally``, or two transactions behind ``asyncio.shield``.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from flowstore_conformance import kill_target
from flowstore_conformance.child_processes import start_module
from flowstore_conformance.claim_histories import by_run
from flowstore_conformance.context import CheckContext, ContractViolation, Inconclusive
from flowstore_conformance.execution import execute, is_unavailable
from flowstore_conformance.history import UNKNOWN, Call, History, Operation, Outcome
from flowstore_conformance.phrasing import call_words
from flowstore_conformance.race_search import describe_misfits, judge
from flowstore_conformance.races import AFTER, BEFORE, Race, RaceRun
from flowstore_conformance.registry import Kind, check
from flowstore_conformance.watchdog import Hang, Hung, describe_task
from flowstore_conformance.wire import pack, read_line, unpack_outcome, write_line
from flowstore_conformance.write_scenarios import Scenario, available, new_scenario
from flowstore_core import Capability, FlowStore

START_SECONDS = 60.0
"""Seconds in which a process must start and open the store, beside the limit of a call."""
RIVAL_SECONDS = 0.05
"""How long rivals run beside a call that stands still, before its process is killed."""
MAX_MOMENT_SECONDS = 0.003
"""The latest moment after the start of a call at which its process is stopped, if it is not stopped at an
await."""
MAX_AWAITS = 12
"""The number of awaits at which calls are stopped; a call with fewer awaits is killed after its end."""
KILLED, WAITING, RIVAL = 0, 1, 2
"""The clients of the calls whose process is killed, and the first of those that go on."""


class KillTarget:
    """A process that makes one call after another, each in a fork that is killed."""

    def __init__(self, process: asyncio.subprocess.Process, context: CheckContext) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._stdin = process.stdin
        self._stdout = process.stdout
        self._context = context
        self._pid: int | None = None

    async def open(self, call: Call, pause: int | None) -> None:
        """Open the store in a new fork, for one call."""
        clock = self._context.clock
        order = {
            "call": [call.method, pack(call.arguments)],
            "now": None if clock is None else pack(clock.now),
            "pause": pause,
            "limit": self._context.call_seconds,
        }
        self._stdin.write(write_line(order))
        answer = await self.reply()
        if "refused" in answer:
            message = f"a process could not open the store after another one was killed: {answer['refused']}"
            raise ContractViolation(message, clause="CON-6")
        self._pid = answer["pid"]

    def begin(self) -> None:
        """Begin the call."""
        self._stdin.write(b"\n")

    async def reply(self) -> dict[str, Any]:
        try:
            async with asyncio.timeout(START_SECONDS + self._context.call_seconds):
                line = await self._stdout.readline()
        except TimeoutError:
            raise Inconclusive("a process did not answer") from None
        if not line:
            raise Inconclusive("a process died; the reason is on stderr")
        answer = read_line(line)
        if "hung" in answer:
            raise Hung(Hang.from_json(answer["hung"]))
        return answer

    def stop(self) -> None:
        """Stop all threads of the fork where they are."""
        assert self._pid is not None
        os.kill(self._pid, signal.SIGSTOP)

    async def kill(self) -> Outcome:
        """Kill the fork and return the outcome of its call, which is unknown if it did not end before."""
        if self._pid is not None:
            os.kill(self._pid, signal.SIGKILL)
            self._pid = None
        outcome: Outcome = UNKNOWN
        while "gone" not in (answer := await self.reply()):
            if "ended" in answer:
                outcome = unpack_outcome(answer["ended"])
        return outcome

    async def end(self) -> None:
        if self._pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
        self._process.kill()
        await self._process.wait()


@asynccontextmanager
async def _target(context: CheckContext) -> AsyncIterator[KillTarget]:
    process = await start_module(kill_target.__name__, context.url)
    target = KillTarget(process, context)
    try:
        await target.reply()
        yield target
    finally:
        await target.end()


@dataclass(frozen=True, slots=True)
class KillPoint:
    """Where a call is when its process is killed."""

    pause: int | None
    """The number of the await at which it stands still; None for a random moment."""
    waiting: bool
    """Whether a second process is killed first, while it makes the same call."""

    def __str__(self) -> str:
        where = "at a random moment" if self.pause is None else f"at await {self.pause}"
        return f"{where}{', after a process that made the same call,' if self.waiting else ''}"


@dataclass(slots=True)
class _Tally:
    kills: int = 0
    in_call: int = 0
    """Number of kills before the call had returned."""
    while_rivals_waited: int = 0


@check("CON-1", "CON-2", needs={Capability.MULTI_PROCESS}, kind=Kind.CRASH, rotation="processes")
async def a_killed_call_is_atomic_and_blocks_nobody(context: CheckContext) -> None:
    """A write whose process is killed is whole or absent, and every other caller still gets an answer."""
    of, generator = context.profile.of, context.random
    scenarios = available(context.capabilities)
    names = generator.sample(
        sorted(scenarios), min(of(2, len(scenarios) // 2, len(scenarios)), len(scenarios))
    )
    tally = _Tally()
    stores = await context.workers(2)
    async with AsyncExitStack() as stack:
        # The profile quick kills no waiting process, because starting another one takes as long as ten kills.
        count = of(1, 2, 2)
        targets = [await stack.enter_async_context(_target(context)) for _ in range(count)]
        for name in names:
            for point in _points(generator, of(2, 3, MAX_AWAITS), waiting=count > 1):
                scenario = new_scenario(context, scenarios[name])
                await _kill_in_call(context, stores, scenario, point, targets, tally)
    if not tally.in_call:
        raise Inconclusive(f"all {tally.kills} calls returned before their process was killed")
    context.notes.append(
        f"{tally.kills} calls were killed, {tally.in_call} of them before they returned, "
        f"{tally.while_rivals_waited} while a rival waited"
    )


def _points(generator: random.Random, count: int, *, waiting: bool) -> list[KillPoint]:
    """A random moment, and some awaits.

    Calls of a document store have few awaits. Those of a pool of SQL connections hold no lock before the
    fourth: they take a connection, begin, and read.
    """
    pauses = [generator.choice((1, 2, 3)), generator.choice((4, 5, 6, 7, 8))]
    generator.shuffle(pauses)
    more = generator.sample(sorted({*range(1, MAX_AWAITS + 1)} - {*pauses}), max(count - 3, 0))
    pauses = [None, *pauses, *more][:count]
    return [KillPoint(pause, waiting=waiting and generator.random() < 0.6) for pause in pauses]


async def _kill_in_call(
    context: CheckContext,
    stores: Sequence[FlowStore],
    scenario: Scenario,
    point: KillPoint,
    targets: Sequence[KillTarget],
    tally: _Tally,
) -> None:
    """Kill a process in the scenario's call while rivals call on the same run, and judge all results."""
    store, other = stores[0], stores[-1]
    target, second = targets[0], targets[-1]
    done = [await _call(context, store, BEFORE, call) for call in scenario.setup]
    # Both are open before the first stops, because opening may wait for what it holds.
    await target.open(scenario.call, point.pause)
    if point.waiting:
        await second.open(scenario.call, None)
    killed = [(KILLED, target, time.monotonic())]
    target.begin()
    if point.pause is None:
        # More often early: calls of a local store end soon.
        await asyncio.sleep(context.random.random() ** 3 * MAX_MOMENT_SECONDS)
        target.stop()
    else:
        # Either it stands still, or the call has ended.
        first = await target.reply()
        ended = unpack_outcome(first["ended"]) if "ended" in first else UNKNOWN
    if point.waiting:
        killed.insert(0, (WAITING, second, time.monotonic()))
        second.begin()
    rivals = [
        asyncio.ensure_future(_call(context, one, RIVAL + number, call))
        for number, (one, call) in enumerate([(store, scenario.call), (other, _cancel(scenario))])
    ]
    try:
        _, waiting = await asyncio.wait(rivals, timeout=RIVAL_SECONDS)
        for client, dying, since in killed:
            outcome = await dying.kill()
            if client == KILLED and point.pause is not None and outcome is UNKNOWN:
                outcome = ended
            tally.in_call += client == KILLED and outcome is UNKNOWN
            done.append(_operation(context, client, scenario.call, since, outcome))
        tally.kills += 1
        tally.while_rivals_waited += bool(waiting)
        done += [await _within_limit(context, scenario, point, rival) for rival in rivals]
        for calls in (scenario.probes, (scenario.call,), scenario.probes):
            last = [
                asyncio.ensure_future(_available(context, other, scenario, point, call)) for call in calls
            ]
            rivals += last
            done += [await _within_limit(context, scenario, point, one) for one in last]
    finally:
        for task in rivals:
            task.cancel()
        await asyncio.gather(*rivals, return_exceptions=True)
    history = History.of([one for one in done if not is_unavailable(one.outcome)])
    race = Race(setup=scenario.setup, clients=((scenario.call,),), final=scenario.probes)
    verdict = judge(context, RaceRun(race=race, history=history, overlaps=(), unavailable=0))
    context.assertions += 1
    if verdict is not None:
        message = (
            f"{call_words(scenario.call)}, whose process was killed {point}, is neither whole nor "
            f"absent, or a rival's result is wrong: {describe_misfits(verdict)}. Write all effects of a call "
            "in one transaction"
        )
        raise ContractViolation(message, history=by_run(history), verdict=verdict)


def _cancel(scenario: Scenario) -> Call:
    return Call(method="request_cancel", arguments={"run_id": scenario.run_id, "reason": "rival"})


async def _call(context: CheckContext, store: FlowStore, client: int, call: Call) -> Operation:
    invoked = time.monotonic()
    outcome = await execute(store, call, exact_times=context.exact_times)
    return _operation(context, client, call, invoked, outcome)


def _operation(context: CheckContext, client: int, call: Call, invoked: float, outcome: Outcome) -> Operation:
    return Operation(
        client=client,
        call=call,
        invoked=invoked,
        returned=float("inf") if outcome is UNKNOWN else time.monotonic(),
        outcome=outcome,
        now=datetime.now(UTC) if context.clock is None else context.clock.now,
    )


async def _available(
    context: CheckContext, store: FlowStore, scenario: Scenario, point: KillPoint, call: Call
) -> Operation:
    """Make a call, again while the store refuses it as unavailable, for as long as a call may take."""
    deadline = time.monotonic() + context.call_seconds / 2
    while is_unavailable((made := await _call(context, store, AFTER, call)).outcome):
        if time.monotonic() > deadline:
            message = (
                f"{call.method} is unavailable since a process was killed {point} in {scenario.call.method}: "
                "what the dead process held must become free"
            )
            raise ContractViolation(message, clause="CON-2")
        await asyncio.sleep(0.05)
    return made


async def _within_limit(
    context: CheckContext, scenario: Scenario, point: KillPoint, task: asyncio.Task[Operation]
) -> Operation:
    # Ends before the watchdog would report the call without its cause.
    limit = 0.8 * context.call_seconds
    await asyncio.wait({task}, timeout=limit)
    if not task.done():
        hang = describe_task(task, limit)
        cause = f"after a process was killed {point} in {scenario.call.method} of the same run"
        message = f"{cause}, {hang.message}. What the dead process held must become free"
        raise Hung(replace(hang, message=message))
    return await task
