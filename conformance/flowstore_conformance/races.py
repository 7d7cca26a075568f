"""Races: a few clients on a few keys, drawn whole before they begin, then run and judged.

A race is a setup by one client, the programs of its clients at the same time, and a look at the end by one
client again, each call recorded with its times. Several races on ids of their own run in one volley, so
that a store meets many keys in many orders at once.

**What counts as overlap.** Two calls overlap when each began before the other ended, by the harness's
clock. A store may have operations that never suspend, as the memory backend does: a call then runs from
its beginning to its end before anything else gets a turn, and no two can ever overlap within a process.
That is measured, not believed: the harness notices for every call whether another task got a turn meanwhile.
Only where that never happened, in the whole race, are calls counted as overlapping when they waited at the
barrier together, because the order in which they run is then all that can vary, and the harness drew it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Protocol
from uuid import UUID

from flowstore_conformance.context import VirtualClock
from flowstore_conformance.execution import YieldDetector, begin, finish, is_unavailable
from flowstore_conformance.history import UNKNOWN, Call, History, Operation
from flowstore_core import FlowStore

BEFORE, AFTER = -1, -2
"""The client of the setup, and the one that looks at the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Race:
    """One race as it was drawn."""

    setup: tuple[Call, ...]
    clients: tuple[tuple[Call, ...], ...]
    final: tuple[Call, ...]
    clock_advance: timedelta = timedelta(0)
    """How far the clock moves between setup and race."""
    order: tuple[int, ...] = ()
    """In which order the clients are let go, where one event loop decides it."""
    yields: tuple[tuple[int, ...], ...] = ()
    """How often each client gives others a turn before each of its calls."""

    @property
    def ids(self) -> tuple[UUID, ...]:
        """Every id that a call names, in order."""
        calls = [*self.setup, *(call for client in self.clients for call in client), *self.final]
        values = [value for call in calls for value in call.arguments.values()]
        return tuple(dict.fromkeys(value for value in values if isinstance(value, UUID)))

    def on_fresh_ids(self, generator: random.Random) -> Race:
        """The same race where nobody was before. The ids keep their order."""
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
        """The same race and schedule, as far as there is one, without a client."""
        order = tuple(each - (each > client) for each in self.order if each != client)
        yields = self.yields[:client] + self.yields[client + 1 :]
        clients = self.clients[:client] + self.clients[client + 1 :]
        return replace(self, clients=clients, order=order, yields=yields)

    def without_call(self, client: int, number: int) -> Race:
        """Likewise, without a call of a client. Its turns go to the call that follows."""
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
        """With a schedule drawn."""
        order = list(range(len(self.clients)))
        generator.shuffle(order)
        yields = tuple(tuple(generator.choice((0, 0, 1, 2)) for _ in client) for client in self.clients)
        return replace(self, order=tuple(order), yields=yields)


def _renamed(call: Call, names: dict[UUID, UUID]) -> Call:
    arguments = {
        name: names[value] if isinstance(value, UUID) else value for name, value in call.arguments.items()
    }
    return replace(call, arguments=arguments)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientTask:
    """What one client of one race does in one phase."""

    race: int
    client: int
    calls: tuple[Call, ...]
    yields: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientResult:
    """What came of a job."""

    race: int
    operations: tuple[Operation, ...]
    suspended: bool
    """Whether any of its calls gave another task a turn."""
    unavailable: int
    """How many calls the store said it did not do; they are no part of the history."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RaceRun:
    """A race that was run."""

    race: Race
    history: History
    overlapping: int
    """Pairs of calls of different clients; see the module's docstring."""
    unavailable: int


@dataclass(frozen=True, slots=True)
class Topology:
    """Where the clients of a race are, so that a person can be told and a program can do likewise."""

    stores: int
    """How many there are; clients share them in turn."""
    processes: bool = False
    """Whether each is in a process of its own."""

    def __str__(self) -> str:
        if self.processes:
            return f"in {self.stores} processes with a store each"
        return "on one store" if self.stores == 1 else f"on {self.stores} stores of one process"


class Runner(Protocol):
    """Runs races; over tasks, stores or processes."""

    @property
    def topology(self) -> Topology:
        """Where the clients were."""
        ...

    async def run(self, races: Sequence[Race]) -> list[RaceRun]:
        """Run a volley: races with the same jump, all at the same time."""
        ...


async def run_task(
    store: FlowStore, client_task: ClientTask, now: datetime, exact_times: bool, go: asyncio.Event
) -> ClientResult:
    """Make the calls of a job, one after the other, once the event is set."""
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
    """Do jobs at the same time; ``start`` is awaited when all stand at the barrier."""
    go = asyncio.Event()
    tasks = [
        asyncio.ensure_future(run_task(store, client_task, now, exact_times, go))
        for store, client_task in assignments
    ]
    try:
        # They begin to wait in the order of the list, and an event wakes its waiters in that order.
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
    """Runs races over stores of this process; one of them, or several that were opened on one URL."""

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
    """What all races of a volley do at the same time."""

    clock_advance: timedelta
    client_tasks: Sequence[ClientTask]


def phases_of(races: Sequence[Race]) -> list[Phase]:
    """Setup, race and final look of a volley."""
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
    """The histories of the races from what came of their jobs, phase by phase.

    ``one_loop`` says that all ran in one event loop, where calls that never suspend cannot overlap.
    """
    runs = []
    for number, race in enumerate(races):
        own = [one for phase in done for one in phase if one.race == number]
        racing = [one for one in done[1] if one.race == number]
        history = History.of([operation for one in own for operation in one.operations])
        middle = History.of([operation for one in racing for operation in one.operations])
        atomic = one_loop and not any(one.suspended for one in racing)
        runs.append(
            RaceRun(
                race=race,
                history=history,
                overlapping=_pairs(racing) if atomic else middle.overlaps(),
                unavailable=sum(one.unavailable for one in own),
            )
        )
    return runs


def _pairs(racing: Sequence[ClientResult]) -> int:
    """Pairs of clients that stood at the barrier together."""
    clients = sum(1 for one in racing if one.operations)
    return clients * (clients - 1) // 2
