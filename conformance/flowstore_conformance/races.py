"""Races: a few clients on a few keys. All calls are drawn before the race runs; its history is judged after.

A race has three phases: setup calls by one client, concurrent calls by all clients, and final reads by one
client. Each call is recorded with its times. One round runs several races on distinct ids, so that a store
handles many keys in many orders concurrently.

**Overlap.** Two calls overlap if each began before the other ended, by the harness's clock. Operations of a
store may never suspend, as in the memory backend; then two calls cannot overlap within a process. The harness
measures this: for every call it records whether another task ran meanwhile. If no call of two clients of one
process suspended, their first calls count as overlapping, because they waited at the barrier together; only
their order can vary, and the harness draws the order.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import combinations
from typing import Any, Protocol
from uuid import UUID

from flowstore_conformance.archives import ids_in, with_changed_values, with_queues
from flowstore_conformance.context import VirtualClock
from flowstore_conformance.execution import YieldDetector, begin, finish, is_unavailable
from flowstore_conformance.history import UNKNOWN, Call, History, Operation, split_queue
from flowstore_core import FlowStore, RunArchive

BEFORE, AFTER = -1, -2
"""The clients of the setup and of the final reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Race:
    """A race as drawn."""

    setup: tuple[Call, ...]
    clients: tuple[tuple[Call, ...], ...]
    final: tuple[Call, ...]
    clock_advance: timedelta = timedelta(0)
    """How far the clock advances between setup and race."""
    order: tuple[int, ...] = ()
    """The order in which clients start, if one event loop runs them all."""
    yields: tuple[tuple[int, ...], ...] = ()
    """How often each client yields to the event loop before each of its calls."""

    @property
    def ids(self) -> tuple[UUID, ...]:
        """Every id in a call, in order."""
        calls = [*self.setup, *(call for client in self.clients for call in client), *self.final]
        values = [value for call in calls for value in call.arguments.values()]
        ids = [each for value in values for each in ids_in(value)]
        return tuple(dict.fromkeys(ids))

    def on_fresh_ids(self, generator: random.Random) -> Race:
        """The race on unused ids, which sort like the original ids, and on queues of its own."""
        fresh = sorted(UUID(int=generator.getrandbits(127)) for _ in self.ids)
        names = dict(zip(sorted(self.ids), fresh, strict=True))
        return self.changed(lambda call: _renamed(call, names))

    def changed(self, change: Callable[[Call], Call]) -> Race:
        return replace(
            self,
            setup=tuple(map(change, self.setup)),
            clients=tuple(tuple(map(change, client)) for client in self.clients),
            final=tuple(map(change, self.final)),
        )

    def without_client(self, client: int) -> Race:
        """The race without one client; the rest of a schedule stays."""
        order = tuple(each - (each > client) for each in self.order if each != client)
        yields = self.yields[:client] + self.yields[client + 1 :]
        clients = self.clients[:client] + self.clients[client + 1 :]
        return replace(self, clients=clients, order=order, yields=yields)

    def without_call(self, client: int, number: int) -> Race:
        """The race without one call of a client. The yields before it move to the following call."""
        calls = list(self.clients[client])
        del calls[number]
        clients = (*self.clients[:client], tuple(calls), *self.clients[client + 1 :])
        if not self.yields:
            return replace(self, clients=clients)
        detector = list(self.yields[client])
        given = detector.pop(number)
        if number < len(detector):
            detector[number] += given
        yields = (*self.yields[:client], tuple(detector), *self.yields[client + 1 :])
        return replace(self, clients=clients, yields=yields)

    def scheduled(self, generator: random.Random) -> Race:
        """The race with a drawn schedule. In a third of them all clients start in one iteration of the event
        loop, so that a store that batches has their calls in one batch.
        """
        order = list(range(len(self.clients)))
        generator.shuffle(order)
        pauses = generator.choice(((0,), (0, 0, 1, 2), (0, 0, 1, 2)))
        yields = tuple(tuple(generator.choice(pauses) for _ in client) for client in self.clients)
        return replace(self, order=tuple(order), yields=yields)


def _renamed(call: Call, names: dict[UUID, UUID]) -> Call:
    suffix = min(names.values(), default=UUID(int=0)).hex

    def rename(argument: str, value: Any) -> Any:
        if argument == "steps":
            return [
                replace(each, run_id=names[each.run_id], dispatch=rename("dispatch", each.dispatch))
                for each in value
            ]
        if isinstance(value, UUID):
            return names[value]
        if isinstance(value, RunArchive):
            own = with_queues(value, lambda queue: _own_queue(queue, suffix))
            return with_changed_values(own, lambda each: names.get(each, each))
        if argument == "queue" and value is not None:
            return _own_queue(value, suffix)
        if argument == "queues":
            return [_own_queue(queue, suffix) for queue in value]
        if argument == "dispatch":
            return tuple(replace(each, queue=_own_queue(each.queue, suffix)) for each in value)
        return value

    return replace(call, arguments={name: rename(name, value) for name, value in call.arguments.items()})


def _own_queue(queue: str, suffix: str) -> str:
    """The name of a queue that only this race uses."""
    split = split_queue(queue)
    return f"{queue if split is None else split[0]}/{suffix}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientTask:
    """The calls of one client of one race in one phase."""

    race: int
    client: int
    calls: tuple[Call, ...]
    yields: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientResult:
    """The recorded operations of a client task."""

    race: int
    operations: tuple[Operation, ...]
    suspended: bool
    """Whether another task ran during any of its calls."""
    unavailable: int
    """Number of calls refused as unavailable; they are not part of the history."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RaceRun:
    """A race with its history."""

    race: Race
    history: History
    overlaps: Sequence[tuple[Operation, Operation]]
    """The overlapping pairs of calls of different clients; see the module docstring."""
    unavailable: int


@dataclass(frozen=True, slots=True)
class Topology:
    """How the clients of a race are distributed over stores and processes."""

    stores: int
    """Number of stores; clients are assigned round-robin."""
    processes: bool = False
    """Whether each store has its own process."""

    def __str__(self) -> str:
        if self.processes:
            return f"in {self.stores} processes with a store each"
        return "on one store" if self.stores == 1 else f"on {self.stores} stores of one process"


class Runner(Protocol):
    """Runs races over tasks, stores or processes."""

    @property
    def topology(self) -> Topology:
        """The distribution of the clients."""
        ...

    async def run(self, races: Sequence[Race]) -> list[RaceRun]:
        """Run one round: races with the same clock advance, concurrently."""
        ...


async def run_task(
    store: FlowStore, client_task: ClientTask, now: datetime, exact_times: bool, go: asyncio.Event
) -> ClientResult:
    """Make the calls of a client task sequentially, once the event is set."""
    operations: list[Operation] = []
    suspended, unavailable = False, 0
    await go.wait()
    for number, call in enumerate(client_task.calls):
        for _ in range(client_task.yields[number] if client_task.yields else 0):
            await asyncio.sleep(0)
        begun = begin(store, call)
        detector = YieldDetector()
        invoked = time.monotonic()
        outcome = await finish(begun, exact_times=exact_times)
        returned = time.monotonic()
        suspended |= detector.stop()
        if is_unavailable(outcome):
            unavailable += 1
            continue
        operations.append(
            Operation(
                client=client_task.client,
                call=call,
                invoked=invoked,
                returned=returned if outcome is not UNKNOWN else float("inf"),
                outcome=outcome,
                now=now,
            )
        )
    return ClientResult(
        race=client_task.race, operations=tuple(operations), suspended=suspended, unavailable=unavailable
    )


async def run_tasks(
    assignments: Sequence[tuple[FlowStore, ClientTask]],
    now: datetime,
    exact_times: bool,
    start: Callable[[], Awaitable[None]] | None = None,
) -> list[ClientResult]:
    """Run client tasks concurrently; ``start`` is awaited when all of them wait at the barrier."""
    go = asyncio.Event()
    tasks = [
        asyncio.ensure_future(run_task(store, client_task, now, exact_times, go))
        for store, client_task in assignments
    ]
    try:
        # The tasks begin to wait in list order, and an event wakes its waiters in that order.
        await asyncio.sleep(0)
        if start is not None:
            await start()
        go.set()
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class StoreRunner:
    """Runs races over one or more stores of this process, opened on one URL."""

    def __init__(self, stores: Sequence[FlowStore], clock: VirtualClock | None) -> None:
        self._stores = stores
        self._clock = clock
        self.topology = Topology(len(stores))

    async def run(self, races: Sequence[Race]) -> list[RaceRun]:
        done: list[list[ClientResult]] = []
        for phase in phases_of(races):
            if self._clock is not None:
                self._clock.advance(phase.clock_advance)
            now = self._clock.now if self._clock is not None else datetime.now(UTC)
            assignments = [
                (self._stores[client_task.client % len(self._stores)], client_task)
                for client_task in phase.client_tasks
            ]
            done.append(await run_tasks(assignments, now, self._clock is not None))
        return assemble(races, done, one_loop=True)


@dataclass(frozen=True, slots=True)
class Phase:
    """The client tasks that all races of a round run concurrently."""

    clock_advance: timedelta
    client_tasks: Sequence[ClientTask]


def phases_of(races: Sequence[Race]) -> list[Phase]:
    """The phases of a round: setup, race and final reads."""
    racing = []
    for number, race in enumerate(races):
        for client in race.order or range(len(race.clients)):
            yields = race.yields[client] if race.yields else ()
            racing.append(ClientTask(race=number, client=client, calls=race.clients[client], yields=yields))
    return [
        Phase(
            timedelta(0), [ClientTask(race=n, client=BEFORE, calls=one.setup) for n, one in enumerate(races)]
        ),
        Phase(races[0].clock_advance, racing),
        Phase(
            timedelta(0), [ClientTask(race=n, client=AFTER, calls=one.final) for n, one in enumerate(races)]
        ),
    ]


def assemble(
    races: Sequence[Race], done: Sequence[Sequence[ClientResult]], *, one_loop: bool
) -> list[RaceRun]:
    """Assemble the histories of the races from the client results of each phase.

    ``one_loop`` means that all tasks ran in one event loop, where calls that never suspend cannot overlap.
    """
    runs = []
    for number, race in enumerate(races):
        own = [one for phase in done for one in phase if one.race == number]
        racing = [one for one in done[1] if one.race == number]
        history = History.of([operation for one in own for operation in one.operations])
        runs.append(
            RaceRun(
                race=race,
                history=history,
                overlaps=_overlaps(racing, one_loop=one_loop),
                unavailable=sum(one.unavailable for one in own),
            )
        )
    return runs


def _overlaps(racing: Sequence[ClientResult], *, one_loop: bool) -> list[tuple[Operation, Operation]]:
    """The overlapping pairs of racing operations."""
    by_time = History.of([operation for one in racing for operation in one.operations]).overlaps()
    first_calls = [one.operations[0] for one in racing if one_loop and one.operations and not one.suspended]
    return [*by_time, *combinations(first_calls, 2)]
