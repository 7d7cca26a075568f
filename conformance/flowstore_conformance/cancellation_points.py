"""Cancel a call at every possible point: at each await, and at random times during its awaits.

A coroutine can be cancelled only while it awaits. The points of a call are therefore numbered: 0 is before
its start, 1 is its first await, and so on. A sweep cancels one call at each point. Work of a store in a
thread, another task or a server continues while the call awaits, so the sweep also cancels at random times.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from flowstore_conformance.context import ContractViolation
from flowstore_conformance.history import Outcome, Raised, Returned, comparable, error_name
from flowstore_conformance.state_probe import invoke
from flowstore_conformance.write_scenarios import Scenario
from flowstore_core import FlowStore, FlowStoreError

MAX_POINTS = 200
"""Maximum number of cancel points; for a call with more awaits the points are sampled."""


@dataclass(frozen=True, slots=True)
class CancelPoint:
    """A point of cancellation: the n-th await of a call, or a number of seconds after its start."""

    wait: int | None = None
    seconds: float = 0.0

    def __str__(self) -> str:
        if self.wait is None:
            return f"cancelled {self.seconds * 1e3:.2f} ms after its start,"
        return f"cancelled at await {self.wait}," if self.wait else "cancelled before its start,"


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelledCall:
    """The result of cancelling a call."""

    scenario: Scenario
    point: CancelPoint
    reached: bool
    """Whether the call was still in progress at the point."""
    outcome: Outcome | None
    """The outcome, if the call ended before the cancellation; None if it was cancelled."""

    @property
    def title(self) -> str:
        return f"{self.scenario.call.method}, {self.point}"


class _CountingAwaitable:
    """An awaitable that reports each await of the wrapped call."""

    def __init__(self, made: Awaitable[object], waits: Callable[[int], None]) -> None:
        self._made = made
        self._waits = waits

    def __await__(self) -> Generator[Any, Any, object]:
        inner = self._made.__await__()
        step: Callable[[], Any] = lambda: next(inner)  # noqa: E731
        number = 0
        while True:
            try:
                awaited = step()
            except StopIteration as end:
                return end.value
            number += 1
            self._waits(number)
            try:
                yield awaited
            except BaseException as error:  # noqa: BLE001 - thrown into the wrapped call
                thrown = error
                step = lambda: inner.throw(thrown)  # noqa: B023, E731
            else:
                step = lambda: next(inner)  # noqa: E731


async def count_awaits(made: Awaitable[object], waits: Callable[[int], None]) -> object:
    """Await a call, and report the number of each of its awaits."""
    return await _CountingAwaitable(made, waits)


async def cancel_at(
    store: FlowStore, scenario: Scenario, point: CancelPoint, *, exact_times: bool
) -> CancelledCall:
    """Make the scenario's call and cancel it at a point."""
    loop = asyncio.get_running_loop()
    reached = point.wait == 0

    def waits(number: int) -> None:
        nonlocal reached
        if number == point.wait:
            reached = True
            # In the next iteration of the loop, when the task awaits.
            loop.call_soon(task.cancel)

    made = invoke(store, scenario.call)
    task = asyncio.ensure_future(count_awaits(made, waits))
    if point.wait == 0:
        task.cancel()
    elif point.wait is None:
        until = time.monotonic() + point.seconds
        # Yields instead of sleeping, because a sleep takes longer than these calls.
        while not task.done() and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(0)
        reached = not task.done()
        task.cancel()
    # asyncio.wait keeps a cancellation of the check apart from one of the call.
    await asyncio.wait({task})
    # Avoids the warning about a coroutine that never started.
    made.close()
    outcome: Outcome | None = None
    if not task.cancelled():
        error = task.exception()
        if error is None:
            outcome = Returned(comparable(task.result(), exact_times=exact_times))
        elif isinstance(error, FlowStoreError):
            outcome = Raised(error_name(error))
        else:
            message = f"{scenario.call.method}, {point} raised {type(error).__name__}"
            raise ContractViolation(message, clause="CON-2") from error
    return CancelledCall(scenario=scenario, point=point, reached=reached, outcome=outcome)


@dataclass(frozen=True, slots=True)
class CallProfile:
    """The number of awaits and the duration of an uncancelled call."""

    waits: int
    seconds: float


async def profile(store: FlowStore, scenario: Scenario) -> CallProfile:
    """Make the scenario's call and measure its profile."""
    waited = 0

    def waits(number: int) -> None:
        nonlocal waited
        waited = number

    begun = time.monotonic()
    await count_awaits(invoke(store, scenario.call), waits)
    return CallProfile(waited, time.monotonic() - begun)


async def sweep(
    store: FlowStore,
    make: Callable[[int], Awaitable[Sequence[Scenario]]],
    baseline: CallProfile,
    generator: random.Random,
    *,
    moments: int,
    exact_times: bool,
    limit: int = MAX_POINTS,
) -> AsyncIterator[CancelledCall]:
    """Cancel a call at every point, until it ends before the point; then at random times.

    ``make`` prepares scenarios, one for each call. ``limit`` is the maximum number of points; for a call with
    more awaits they are spread evenly, including the first and the last.
    """
    many = baseline.waits + 1 > limit
    points = _spread(baseline.waits, limit, generator) if many else list(range(baseline.waits + 2))
    drawn = [
        CancelPoint(seconds=baseline.seconds * 1.2 * (n + generator.random()) / moments)
        for n in range(moments)
    ]
    last = None
    scenarios = await make(len(points) + len(drawn))
    for scenario, point in zip(scenarios, [*map(CancelPoint, points), *drawn], strict=True):
        made = await cancel_at(store, scenario, point, exact_times=exact_times)
        if point.wait is not None:
            last = made
        yield made
    # The call may await more often than in the baseline, for example to reconnect.
    following = baseline.waits + 2
    while last is not None and last.reached and not many and following < limit:
        [scenario] = await make(1)
        last = await cancel_at(store, scenario, CancelPoint(following), exact_times=exact_times)
        following += 1
        yield last


def _spread(waits: int, limit: int, generator: random.Random) -> list[int]:
    """Sample points: the first, the last, and one random point in each of ``limit - 2`` equal ranges."""
    stretch = (waits - 1) / (limit - 2)
    inner = [1 + int(stretch * (number + generator.random())) for number in range(limit - 2)]
    return [0, *inner, waits]


def program(made: CancelledCall) -> str:
    """A program that cancels the call in the same way and prints the resulting state."""
    scenario, point = made.scenario, made.point
    return _PROGRAM.format(
        title=made.title,
        setup="".join(f"        await {call.source()}\n" for call in scenario.setup),
        method=scenario.call.method,
        call=scenario.call.source(),
        wait=point.wait,
        seconds=f"{point.seconds:.6f}",
        reads="\n".join(
            f'        print("{call.method}:", await {call.source()})' for call in scenario.probes
        ),
    )


_PROGRAM = '''"""Reproduces {title} as in the report.

Its argument is the URL of an empty store, such as sqlite:////tmp/empty.db
"""

import asyncio
import sys
import time
from datetime import datetime, timedelta
from uuid import UUID

from flowstore_core import open_store

WAIT = {wait}  # The number of the await to cancel at; None to cancel after SECONDS.
SECONDS = {seconds}  # After the start of the call.


class Counted:
    """Cancels its task at the await with the number WAIT."""

    def __init__(self, call):
        self.call = call

    def __await__(self):
        inner, send, given, number = self.call.__await__(), "send", None, 0
        while True:
            try:
                awaited = getattr(inner, send)(given)
            except StopIteration as end:
                return end.value
            number += 1
            if number == WAIT:
                asyncio.get_running_loop().call_soon(asyncio.current_task().cancel)
            try:
                send, given = "send", (yield awaited)
            except BaseException as error:
                send, given = "throw", error


async def cancelled(call):
    async def run():
        return await Counted(call)

    task = asyncio.create_task(run())
    if WAIT is None:
        until = time.monotonic() + SECONDS
        while not task.done() and time.monotonic() < until:
            await asyncio.sleep(0)
    if not WAIT:
        task.cancel()
    await asyncio.wait({{task}})
    call.close()
    if task.cancelled():
        return "cancelled"
    error = task.exception()
    return task.result() if error is None else f"raises {{type(error).__name__}}"


async def main(url):
    async with open_store(url) as store:
{setup}        print("{method}:", await cancelled({call}))
        await asyncio.sleep(1)  # Let work in flight finish.
{reads}


asyncio.run(main(sys.argv[1]))
'''
