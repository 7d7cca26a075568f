"""Cancelling a call at every point where it can be: each time it waits, and at moments while it waits.

A cancellation reaches a coroutine where it waits, and nowhere else. So the points of a call are counted:
0 is before it began, 1 the first time that it waits for something, and so on until it ends, and a sweep
cancels one call after the other at each of them. What a store does elsewhere, in a thread, a task of its own
or a server, goes on while the call waits; there moments are drawn.
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
"""Where a call waits more often than that, the rest is left to the moments that are drawn."""


@dataclass(frozen=True, slots=True)
class CancelPoint:
    """Where a call is cancelled: the n-th time that it waits, or so many seconds after it began."""

    wait: int | None = None
    seconds: float = 0.0

    def __str__(self) -> str:
        if self.wait is None:
            return f"cancelled {self.seconds * 1e3:.2f} ms after it began,"
        return (
            f"cancelled the {self.wait}. time that it waited," if self.wait else "cancelled before it began,"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelledCall:
    """What became of a call that was cancelled."""

    scenario: Scenario
    point: CancelPoint
    reached: bool
    """Whether the call was still under way at the point."""
    outcome: Outcome | None
    """What it answered all the same; None if it was cancelled."""

    @property
    def title(self) -> str:
        return f"{self.scenario.call.method}, {self.point}"


class _CountingAwaitable:
    """An awaitable that says each time when what it runs has begun to wait."""

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
            except BaseException as error:  # noqa: BLE001 - goes where it belongs
                thrown = error
                step = lambda: inner.throw(thrown)  # noqa: B023, E731
            else:
                step = lambda: next(inner)  # noqa: E731


async def _run(made: Awaitable[object], waits: Callable[[int], None]) -> object:
    return await _CountingAwaitable(made, waits)


async def cancel_at(
    store: FlowStore, scenario: Scenario, point: CancelPoint, *, exact_times: bool
) -> CancelledCall:
    """Make the scene's call and cancel it at a point."""
    loop = asyncio.get_running_loop()
    reached = point.wait == 0

    def waits(number: int) -> None:
        nonlocal reached
        if number == point.wait:
            reached = True
            # In the next turn of the loop, when the task waits; not in the midst of its step.
            loop.call_soon(task.cancel)

    made = invoke(store, scenario.call)
    task = asyncio.ensure_future(_run(made, waits))
    if point.wait == 0:
        task.cancel()
    elif point.wait is None:
        until = time.monotonic() + point.seconds
        # Turns, because a sleep ends far later than these calls do.
        while not task.done() and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(0)
        reached = not task.done()
        task.cancel()
    # Not awaited itself, so that a cancellation of the check is not taken for the call's.
    await asyncio.wait({task})
    # One that never began would be warned about.
    made.close()
    outcome: Outcome | None = None
    if not task.cancelled():
        error = task.exception()
        if error is None:
            outcome = Returned(comparable(task.result(), exact_times=exact_times))
        elif isinstance(error, FlowStoreError):
            outcome = Raised(error_name(error))
        else:
            message = f"{scenario.call.method}, {point} let {type(error).__name__} surface"
            raise ContractViolation(message, clause="CON-2") from error
    return CancelledCall(scenario=scenario, point=point, reached=reached, outcome=outcome)


@dataclass(frozen=True, slots=True)
class CallProfile:
    """What a call takes that nobody cancels: how often it waits, and how long."""

    waits: int
    seconds: float


async def profile(store: FlowStore, scenario: Scenario) -> CallProfile:
    """Make the scene's call and see what it takes."""
    waited = 0

    def waits(number: int) -> None:
        nonlocal waited
        waited = number

    begun = time.monotonic()
    await _run(invoke(store, scenario.call), waits)
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
    """Cancel a call at every point, one after the other, until it ends before; then at drawn moments.

    ``make`` makes scenes ready, each for one call. ``most`` limits the points, for calls that wait more
    often; they then lie spread over all, the first and the last included.
    """
    many = baseline.waits + 1 > limit
    points = _spread(baseline.waits, limit, generator) if many else list(range(baseline.waits + 2))
    drawn = [
        CancelPoint(seconds=baseline.seconds * 1.2 * (n + generator.random()) / moments)
        for n in range(moments)
    ]
    last = None
    scenes = await make(len(points) + len(drawn))
    for scenario, point in zip(scenes, [*map(CancelPoint, points), *drawn], strict=True):
        made = await cancel_at(store, scenario, point, exact_times=exact_times)
        if point.wait is not None:
            last = made
        yield made
    # It may wait more often this time, because it waits for others, or connects anew.
    following = baseline.waits + 2
    while last is not None and last.reached and not many and following < limit:
        [scenario] = await make(1)
        last = await cancel_at(store, scenario, CancelPoint(following), exact_times=exact_times)
        following += 1
        yield last


def _spread(waits: int, limit: int, generator: random.Random) -> list[int]:
    """So many of the points from 0 to the last: both, and one drawn in each of as many equal stretches."""
    stretch = (waits - 1) / (limit - 2)
    inner = [1 + int(stretch * (number + generator.random())) for number in range(limit - 2)]
    return [0, *inner, waits]


def program(made: CancelledCall) -> str:
    """A file that cancels the call in the same way and prints what it left."""
    scenario, point = made.scenario, made.point
    return _PROGRAM.format(
        title=made.title,
        setup="".join(f"        await {call.source()}\n" for call in scenario.setup),
        method=scenario.call.method,
        call=scenario.call.source(),
        wait=point.wait,
        seconds=f"{point.seconds:.6f}",
        looks="\n".join(
            f'        print("{call.method}:", await {call.source()})' for call in scenario.probes
        ),
    )


_PROGRAM = '''"""{title} as it was seen.

Its argument is the URL of a store that holds nothing, such as sqlite:////tmp/empty.db
"""

import asyncio
import sys
import time
from datetime import datetime, timedelta
from uuid import UUID

from flowstore_core import open_store

WAIT = {wait}  # The time that the call waits at which it is cancelled; None for the moment below.
SECONDS = {seconds}  # After its beginning.


class Counted:
    """Cancels a task when what it runs waits for that time."""

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
        await asyncio.sleep(1)  # What was under way may come to its end.
{looks}


asyncio.run(main(sys.argv[1]))
'''
