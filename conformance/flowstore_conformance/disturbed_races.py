"""Races on stores whose requests are disturbed at random moments, and the judgement of their histories.

A race has four phases: setup calls on an undisturbed store; concurrent calls on disturbed stores; reads on
these stores once they work again, and the delivery of requests that were held back; the last calls, on the
undisturbed store. Its history has to be linearizable, where

- a call that raised StoreUnavailableError has not happened;
- a call that raised OutcomeUnknownError has happened or not, and not after a later result of its store
  (CON-3);
- a cleanup that raised may have deleted some of its runs (RET-3), a renew_step_claims that raised may have
  renewed some of its claims (CLM-6), and an advance_runs some of its steps (QUE-4);
- annotate_dispatch is best effort and may not have happened (CLM-7);
- claim_next_steps may pass over steps that a broken connection still locks (QUE-2).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from flowstore_conformance.call_validity import is_correctly_rejected
from flowstore_conformance.claim_histories import by_run
from flowstore_conformance.context import CheckContext, ContractViolation, Inconclusive
from flowstore_conformance.disturbers import Disturber, Injected, disturbing
from flowstore_conformance.execution import execute, is_foreign, is_unavailable
from flowstore_conformance.history import UNKNOWN, Call, History, Operation, Raised, Returned
from flowstore_conformance.linearizability import Answer, Verdict, check_history
from flowstore_conformance.race_families.pairs import CLEANUP
from flowstore_conformance.race_search import client_of, describe_misfits
from flowstore_conformance.races import AFTER, BEFORE, Race
from flowstore_conformance.state_probe import describe_outcome
from flowstore_core import FlowStore

BUDGET = 50_000
"""Placements that the search for an order may try."""
RECOVERY_SECONDS = 30.0
"""How long a store may be unavailable after the faults have ended."""
RECOVERY_PAUSE = 0.05
MAX_NAMED_FAULTS = 4


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
        calls.append(
            await self._call_all([_Client(race, AFTER, None, each.final) for race, each in numbered])
        )
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
    cause = _explain(context, calls)
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
        case "renew_step_claims" | "advance_runs" if not answered:
            # Each claim and each step is decided alone (CLM-6, QUE-4).
            argument = "claims" if call.method == "renew_step_claims" else "steps"
            return [
                replace(unsure, call=replace(call, arguments={**call.arguments, argument: [one_of_them]}))
                for one_of_them in call.arguments[argument]
            ]
        case "cleanup" if not answered:
            # It may have deleted some of the runs (RET-3).
            return [unsure]
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


def _explain(context: CheckContext, calls: Sequence[DisturbedCall]) -> _Cause:
    """The call without whose result or effect, or all reads without which the history is linearizable."""

    def explains(changed: Sequence[Operation]) -> bool:
        return _check(context, History.of(changed)).answer is Answer.LINEARIZABLE

    judged = [(one, _judged(one, calls)) for one in calls]
    disturbed = [one for one in calls if one.store is not None]
    reads = [one for one in disturbed if not one.operation.call.operation.writes]
    for read in reads:
        if explains([each for one, own in judged if one is not read for each in own]):
            return _Cause("CON-1", f"{_who(read)} returned a state that was over", read)
    for one in disturbed:
        if one in reads:
            continue
        operation = one.operation
        late = replace(operation, outcome=UNKNOWN, returned=math.inf)
        others = [each for other, own in judged if other is not one for each in own]
        if explains([*others, late]):
            effect = (
                "took effect although it raised StoreUnavailableError"
                if is_unavailable(operation.outcome)
                else "took effect after a later result of its store"
                if operation.outcome is UNKNOWN
                else f"returned {describe_outcome(operation.outcome)}, which was not its effect"
            )
            return _Cause("CON-3", f"{_who(one)} {effect}", one)
        if _kind_of(operation) == "answered" and explains([*others, operation, late]):
            return _Cause("CON-3", f"{_who(one)} took effect twice: as it returned, and once more", one)
    if explains([each for one, own in judged if one not in reads for each in own]):
        return _Cause("CON-1", "several reads returned states that were over")
    return _Cause("CON-3", "the results of calls during faults contradict each other")


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
    return one.store == fault.store and operation.invoked <= fault.until and fault.since <= operation.returned
