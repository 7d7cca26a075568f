"""Races on stores whose requests are disturbed at random moments, and the judgement of their histories.

A race has four phases: setup calls on an undisturbed store; concurrent calls on disturbed stores; reads on
these stores once they work again, and the delivery of requests that were held back; the last calls, on the
undisturbed store. Its history has to be linearizable, where

- a call that raised StoreUnavailableError has not happened;
- a call that raised OutcomeUnknownError has happened or not, but not after a later result of its store (CON-3);
- annotate_dispatch is best effort and may not have happened (CLM-7);
- claim_next_steps may pass over steps that a broken connection still locks (QUE-2).
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Protocol

from flowstore_conformance.call_validity import is_correctly_rejected
from flowstore_conformance.claim_histories import by_run
from flowstore_conformance.context import CheckContext, ContractViolation, Inconclusive, Unsupported
from flowstore_conformance.execution import execute, is_foreign, is_unavailable
from flowstore_conformance.history import UNKNOWN, Call, History, Operation, Raised, Returned
from flowstore_conformance.linearizability import Answer, Verdict, check_history
from flowstore_conformance.network_faults import NetworkInjector, disturbed_network
from flowstore_conformance.proxy import FaultyNetwork, NetworkFault
from flowstore_conformance.race_families.pairs import CLEANUP
from flowstore_conformance.race_search import client_of, describe_misfits, draw_races
from flowstore_conformance.races import AFTER, BEFORE, Race
from flowstore_conformance.state_probe import describe_outcome
from flowstore_core import ConfigurationError, FlowStore
from flowstore_core.backend import FaultInjectable, FaultInjector

STORES = 2
"""The number of disturbed stores; each has faults of its own."""
BUDGET = 50_000
"""Placements that the search for an order may try."""
RECOVERY_SECONDS = 30.0
"""How long a store may be unavailable after the faults have ended."""
RECOVERY_PAUSE = 0.05
MAX_SILENCE_SECONDS = 0.5
MAX_LATE_SECONDS = 0.3
MAX_HOOK_SECONDS = 0.1
"""How long a fault of a backend's own injector stays armed."""
MAX_NAMED_FAULTS = 4
NO_HOOK = "the backend does not implement FaultInjectable, so it has no points of its own"


@dataclass(frozen=True, slots=True)
class Injected:
    """A fault that happened between the store ``store`` and its database."""

    store: int
    fault: str
    since: float
    until: float
    where: str = ""


class Disturber(Protocol):
    """Disturbs the requests of one store."""

    url: str
    injected: list[Injected]

    @property
    def kinds(self) -> Sequence[str]:
        """Descriptions of the faults that it injects."""
        ...

    async def disturb(self) -> None:
        """Inject faults at random moments until cancelled."""
        ...

    def heal(self) -> None:
        """Inject nothing more. Requests that are held stay so."""
        ...

    async def release(self) -> None:
        """Deliver the held requests."""
        ...


class _FaultDeck:
    """All kinds of faults in a random order, again and again."""

    def __init__(self, kinds: Sequence[Any], generator: random.Random) -> None:
        self._kinds = kinds
        self._generator = generator
        self._left: list[Any] = []

    def draw(self) -> Any:
        self._left = self._left or self._generator.sample(self._kinds, len(self._kinds))
        return self._left.pop()

    def skip(self) -> int:
        """The number of requests before the next fault; faults also follow each other closely."""
        return self._generator.choice((self._generator.randrange(3), self._generator.randrange(3, 25)))


class NetworkDisturber:
    """Injects the faults of the network."""

    def __init__(self, store: int, network: FaultyNetwork, url: str, generator: random.Random) -> None:
        self.url = url
        self.injected: list[Injected] = []
        self._store = store
        self._network = network
        self._generator = generator
        self._deck = _FaultDeck(list(NetworkFault), generator)

    @property
    def kinds(self) -> Sequence[str]:
        return [fault.value for fault in NetworkFault]

    async def disturb(self) -> None:
        while True:
            fault, number = self._deck.draw(), len(self._network.injections)
            self._network.arm(fault, skip=self._deck.skip(), at_byte=self._generator.randrange(1, 1000))
            await self._network.injected.wait()
            one = self._network.injections[number]
            where = f"request {one.request} to {one.address[0]}:{one.address[1]}"
            self.injected.append(Injected(self._store, fault.value, one.moment, one.moment, where))
            if fault is NetworkFault.BLACK_HOLE:
                await asyncio.sleep(self._generator.uniform(0.02, MAX_SILENCE_SECONDS))
                self._network.heal()
            if fault is NetworkFault.HOLD_REQUEST and self._generator.random() < 0.5:
                await asyncio.sleep(self._generator.uniform(0.0, MAX_LATE_SECONDS))
                await self._network.release()

    def heal(self) -> None:
        self._network.disarm()
        self._network.heal()

    async def release(self) -> None:
        await self._network.release()


class HookDisturber:
    """Injects the faults of a backend's own injector."""

    _KINDS = ("the reply was lost", "the request was delayed", "the request was refused once")

    def __init__(self, store: int, injector: FaultInjector, generator: random.Random) -> None:
        self.url: str = injector.url
        self.injected: list[Injected] = []
        self._store = store
        self._injector = injector
        self._generator = generator
        self._deck = _FaultDeck(range(len(self._KINDS)), generator)

    @property
    def kinds(self) -> Sequence[str]:
        return self._KINDS

    async def disturb(self) -> None:
        arm = (self._injector.lose_reply, self._injector.hold_request, self._injector.refuse_request)
        while True:
            number, since = self._deck.draw(), time.monotonic()
            arm[number](skip=self._deck.skip())
            try:
                await asyncio.sleep(self._generator.uniform(0.0, MAX_HOOK_SECONDS))
            finally:
                if self._injector.disarm():
                    one = Injected(self._store, self._KINDS[number], since, time.monotonic())
                    self.injected.append(one)

    def heal(self) -> None:
        """``disturb`` disarms when it is cancelled."""

    async def release(self) -> None:
        await self._injector.release_request()


@asynccontextmanager
async def network_disturbers(context: CheckContext) -> AsyncIterator[Sequence[Disturber]]:
    """Disturb the network before each of STORES stores. Raises ConfigurationError if that is impossible."""
    async with AsyncExitStack() as stack:
        disturbers = []
        for number in range(STORES):
            network, url = await stack.enter_async_context(disturbed_network(context.url))
            generator = random.Random(context.random.getrandbits(64))
            disturbers.append(NetworkDisturber(number, network, url, generator))
        yield disturbers


@asynccontextmanager
async def hook_disturbers(context: CheckContext) -> AsyncIterator[Sequence[Disturber]]:
    """Disturb the requests of STORES stores by the backend's own injector.

    Raises Unsupported if it has none, and ConfigurationError if that cannot work with the URL.
    """
    if not isinstance(context.backend, FaultInjectable):
        raise Unsupported(NO_HOOK)
    async with AsyncExitStack() as stack:
        disturbers = []
        for number in range(STORES):
            injector = await stack.enter_async_context(context.backend.inject_faults(context.url))
            if isinstance(injector, NetworkInjector):
                raise Unsupported(NO_HOOK)
            generator = random.Random(context.random.getrandbits(64))
            disturbers.append(HookDisturber(number, injector, generator))
        yield disturbers


@asynccontextmanager
async def any_disturbers(context: CheckContext) -> AsyncIterator[Sequence[Disturber]]:
    """Disturb the network or, if there is none, use the backend's own injector."""
    async with AsyncExitStack() as stack:
        try:
            disturbers = await stack.enter_async_context(network_disturbers(context))
        except ConfigurationError:
            disturbers = await stack.enter_async_context(hook_disturbers(context))
        yield disturbers


@asynccontextmanager
async def disturbing(disturbers: Sequence[Disturber]) -> AsyncIterator[None]:
    """Inject faults while the body runs; afterwards the stores can be reached again."""
    tasks = [asyncio.ensure_future(one.disturb()) for one in disturbers]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        for disturber in disturbers:
            disturber.heal()
    for end in ends:
        if end is not None and not isinstance(end, asyncio.CancelledError):
            raise end


@dataclass(frozen=True, slots=True)
class DisturbedCall:
    """A call with its outcome. An unknown outcome has the time at which the call raised."""

    store: int | None
    """The number of the disturbed store that was called; None: the undisturbed one."""
    operation: Operation


@dataclass(frozen=True, slots=True, kw_only=True)
class DisturbedRun:
    """A race with all its calls, also those that raised StoreUnavailableError."""

    race: Race
    begun: float
    calls: tuple[DisturbedCall, ...]
    injected: tuple[Injected, ...]


@dataclass(slots=True)
class DisturbedTally:
    """What some races exercised."""

    races: int = 0
    undecided: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class _Client:
    """The calls that a client makes, one after another."""

    race: int
    client: int
    store: int | None
    calls: Sequence[Call]
    yields: Sequence[int] = ()


class DisturbedRunner:
    """Runs races on one undisturbed store and on some disturbed ones."""

    def __init__(
        self, context: CheckContext, disturbers: Sequence[Disturber], stores: Sequence[FlowStore]
    ) -> None:
        self._context = context
        self._disturbers = disturbers
        self._stores = stores
        self.tally = DisturbedTally()

    async def run(self, races: Sequence[Race]) -> Sequence[DisturbedRun]:
        """Run one round: races with the same clock advance, concurrently."""
        numbered = list(enumerate(races))
        numbers = [len(one.injected) for one in self._disturbers]
        calls = [await self._call_all([_Client(race, BEFORE, None, each.setup) for race, each in numbered])]
        if self._context.clock is not None:
            self._context.clock.advance(races[0].clock_advance)
        begun = time.monotonic()
        calls.append(await self._race(races))
        # The first final read is that of the whole run.
        reads = [
            _Client(race, AFTER, store, each.final[:1])
            for race, each in numbered
            for store in range(len(self._stores))
        ]
        calls.append(await self._call_all(reads, until_recovered=True))
        for disturber in self._disturbers:
            await disturber.release()
        calls.append(await self._call_all([_Client(race, AFTER, None, each.final) for race, each in numbered]))
        injected = tuple(
            fault
            for one, number in zip(self._disturbers, numbers, strict=True)
            for fault in one.injected[number:]
        )
        self.tally.races += len(races)
        self.tally.faults.update(one.fault for one in injected)
        return [
            DisturbedRun(
                race=each,
                begun=begun,
                calls=tuple(one for phase in calls for one in phase.get(race, ())),
                injected=injected,
            )
            for race, each in numbered
        ]

    async def _race(self, races: Sequence[Race]) -> dict[int, list[DisturbedCall]]:
        clients = []
        for race, each in enumerate(races):
            for client in each.order or range(len(each.clients)):
                yields = each.yields[client] if each.yields else ()
                store = client % len(self._stores)
                clients.append(_Client(race, client, store, each.clients[client], yields))
        async with disturbing(self._disturbers):
            made = await self._call_all(clients)
        for calls in made.values():
            self.tally.outcomes.update(_kind_of(one.operation) for one in calls)
        return made

    async def _call_all(
        self, clients: Sequence[_Client], *, until_recovered: bool = False
    ) -> dict[int, list[DisturbedCall]]:
        """Make the calls of clients concurrently, and return them by race."""
        running = [asyncio.ensure_future(self._call(one, until_recovered)) for one in clients]
        try:
            made = await asyncio.gather(*running)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        by_race: dict[int, list[DisturbedCall]] = {}
        for one, calls in zip(clients, made, strict=True):
            by_race.setdefault(one.race, []).extend(calls)
        return by_race

    async def _call(self, client: _Client, until_recovered: bool) -> list[DisturbedCall]:
        context = self._context
        store = context.store if client.store is None else self._stores[client.store]
        now = context.clock.now if context.clock is not None else datetime.now(UTC)
        until = time.monotonic() + RECOVERY_SECONDS * context.timeout_factor
        calls = []
        for number, call in enumerate(client.calls):
            for _ in range(client.yields[number] if client.yields else 0):
                await asyncio.sleep(0)
            while True:
                invoked = time.monotonic()
                outcome = await execute(store, call, exact_times=context.exact_times)
                returned = time.monotonic()
                if not until_recovered or not is_unavailable(outcome):
                    break
                if returned > until:
                    raise ContractViolation(
                        f"{call.method} still raises StoreUnavailableError {RECOVERY_SECONDS:g} s after the "
                        "last fault: replace broken connections, and retry what had no effect",
                        clause="CON-2",
                    )
                await asyncio.sleep(RECOVERY_PAUSE)
            operation = Operation(
                client=client.client, call=call, invoked=invoked, returned=returned, outcome=outcome, now=now
            )
            calls.append(DisturbedCall(client.store, operation))
        return calls


def _kind_of(operation: Operation) -> str:
    if operation.outcome is UNKNOWN:
        return "unknown"
    return "unavailable" if is_unavailable(operation.outcome) else "answered"


# Judgement


def judge(context: CheckContext, run: DisturbedRun) -> ContractViolation | None:
    """The violation of a race; None if it conforms. Raises Inconclusive for one that cannot be decided."""
    foreign = [one for one in run.calls if is_foreign(one.operation.outcome)]
    if foreign:
        return _foreign_violation(run, foreign[0])
    calls = [one for one in run.calls if not is_correctly_rejected(one.operation.call, one.operation.outcome)]
    runs = {one.operation.call.arguments.get("run_id") for one in calls} - {None}
    unsure = [one for one in calls if _kind_of(one.operation) != "answered"]
    if len(runs) > 1 and any(one.operation.call.method == CLEANUP for one in unsure):
        raise Inconclusive("a cleanup of several runs is atomic for each of them only")
    history = _history(calls)
    verdict = _check(context, history)
    if verdict.answer is Answer.UNDECIDED:
        raise Inconclusive(f"no verdict on a disturbed race of {len(calls)} calls within {BUDGET} states")
    if verdict.answer is Answer.LINEARIZABLE:
        return None
    cause = _explain(context, calls, verdict)
    message = f"{cause.sentence}: {describe_misfits(verdict)}. {_describe_faults(run, cause.call)}"
    return ContractViolation(message, clause=cause.clause, history=by_run(history), verdict=verdict)


def _check(context: CheckContext, history: History) -> Verdict:
    return check_history(by_run(history), exact_times=context.exact_times, budget=BUDGET)


def _history(calls: Sequence[DisturbedCall]) -> History:
    """The history of the calls that happened or may have happened."""
    return History.of([each for one in calls for each in _judged(one, calls)])


def _judged(one: DisturbedCall, calls: Sequence[DisturbedCall]) -> Sequence[Operation]:
    """The operations by which a call is judged; see the module docstring."""
    operation = one.operation
    call, outcome = operation.call, operation.outcome
    unsure = replace(operation, outcome=UNKNOWN, returned=_end_of_effect(one, calls))
    answered = _kind_of(operation) == "answered"
    match call.method:
        case "annotate_dispatch":
            return [operation if one.store is None else unsure]
        case "renew_step_claims" if not answered:
            # Each claim is decided alone (CLM-6).
            return [
                replace(unsure, call=replace(call, arguments={**call.arguments, "claims": [claim]}))
                for claim in call.arguments["claims"]
            ]
        case "claim_next_steps" if isinstance(outcome, Returned):
            full = replace(call, arguments={**call.arguments, "limit": len(outcome.value)})
            return [replace(operation, call=full)] if outcome.value else []
    if outcome is UNKNOWN:
        return [unsure]
    return [operation] if answered else []


def _end_of_effect(one: DisturbedCall, calls: Sequence[DisturbedCall]) -> float:
    """The time after which a call of unknown outcome has no effect: that of a later result of its store."""
    return min(
        (
            other.operation.returned
            for other in calls
            if other.store == one.store
            and other.operation.invoked > one.operation.returned
            and _kind_of(other.operation) == "answered"
            and other.operation.call.method != "annotate_dispatch"
        ),
        default=math.inf,
    )


@dataclass(frozen=True, slots=True)
class _Cause:
    clause: str
    sentence: str
    call: DisturbedCall | None = None
    """The call that had a wrong effect or result, if it was found."""


def _explain(context: CheckContext, calls: Sequence[DisturbedCall], verdict: Verdict) -> _Cause:
    """The change of one call, or of all reads, that makes the history linearizable."""

    def explains(changed: Sequence[Operation]) -> bool:
        return _check(context, History.of(changed)).answer is Answer.LINEARIZABLE

    judged = [(one, _judged(one, calls)) for one in calls]
    disturbed = [one for one in calls if one.store is not None]
    reads = [one for one in disturbed if not one.operation.call.operation.writes]
    if explains([each for one, own in judged if one not in reads for each in own]):
        wrong = next((one for one in reads if one.operation in verdict.unplaced), reads[0])
        return _Cause("CON-1", f"{_who(wrong)} returned a state that was over", wrong)
    for one in disturbed:
        if one in reads:
            continue
        operation = one.operation
        late = replace(operation, outcome=UNKNOWN, returned=math.inf)
        others = [each for other, own in judged if other is not one for each in own]
        if explains([*others, late]):
            wrong = (
                "took effect although it raised StoreUnavailableError"
                if is_unavailable(operation.outcome)
                else "took effect after a later result of its store"
                if operation.outcome is UNKNOWN
                else f"returned {describe_outcome(operation.outcome)}, which was not its effect"
            )
            return _Cause("CON-3", f"{_who(one)} {wrong}", one)
        if _kind_of(operation) == "answered" and explains([*others, operation, late]):
            return _Cause("CON-3", f"{_who(one)} took effect twice: as it returned, and once more", one)
    for one in disturbed:
        if one not in reads and explains(
            [each for other, own in judged if other is not one and other not in reads for each in own]
        ):
            return _Cause("CON-1", f"{_who(one)} and reads were answered from a state that was over", one)
    return _Cause("CON-3", "the results of calls beside faults contradict each other")


def _who(one: DisturbedCall) -> str:
    return f"{one.operation.call.method} of {client_of(one.operation)}"


# Reports


def _foreign_violation(run: DisturbedRun, one: DisturbedCall) -> ContractViolation:
    outcome = one.operation.outcome
    assert isinstance(outcome, Raised)
    violation = ContractViolation(
        f"{_who(one)} raised {outcome.error}, which is not an error of the contract. "
        f"{_describe_faults(run, one)}",
        clause="CON-2",
    )
    violation.__cause__ = outcome.exception
    return violation


def _describe_faults(run: DisturbedRun, blamed: DisturbedCall | None) -> str:
    """The faults during a call, or during the calls of a race, and their times since its begin."""
    calls = [one for one in run.calls if one.store is not None and blamed in (None, one)]
    found = [fault for fault in run.injected if any(_met(one, fault) for one in calls)]
    if not found:
        return "No fault happened during the call itself"
    parts = []
    for fault in sorted(found, key=lambda one: one.since)[:MAX_NAMED_FAULTS]:
        where = f" ({fault.where})" if fault.where else ""
        parts.append(f"after {max(0.0, fault.since - run.begun) * 1000:.0f} ms {fault.fault}{where}")
    more = f"; and {len(found) - len(parts)} more" if len(found) > len(parts) else ""
    whose = "its calls" if blamed is None else "the call"
    return f"Faults during {whose}: {'; '.join(parts)}{more}"


def _met(one: DisturbedCall, fault: Injected) -> bool:
    operation = one.operation
    return (
        one.store == fault.store
        and operation.invoked <= fault.until
        and fault.since <= operation.returned
    )
