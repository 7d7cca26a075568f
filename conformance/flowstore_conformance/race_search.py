"""The search for races that no order of their calls explains, and the shrinking of such races."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import zip_longest

from flowstore_conformance.call_validity import is_correctly_rejected
from flowstore_conformance.claim_histories import by_run
from flowstore_conformance.context import CheckContext, ContractViolation, Inconclusive, Profile
from flowstore_conformance.execution import is_foreign
from flowstore_conformance.history import Call, History, Operation, Raised
from flowstore_conformance.linearizability import DEFAULT_BUDGET, Answer, Verdict, check_history
from flowstore_conformance.race_families import RaceBuilder, RaceFamily
from flowstore_conformance.races import AFTER, BEFORE, Race, RaceRun, Runner, Topology
from flowstore_conformance.repro_script import ReproPhase, answer_text, concurrent_script
from flowstore_conformance.state_probe import describe_outcome
from flowstore_conformance.violation_signature import Signature, wrong_answers

SHRINK_SECONDS = 6.0
MAX_REPRODUCTION_RUNS = 24
"""How often a smaller race runs before it counts as too small to show the violation."""
MIN_OVERLAP = 0.2
"""The share of planned races in which calls must overlap for a check to be conclusive."""
MAX_OVERLAP_SECONDS = 15.0
"""Seconds after which a search with too few overlaps gives up."""
MAX_UNAVAILABLE_SHARE = 0.05
"""The share of unavailable calls above which a search is inconclusive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The work of one search."""

    rounds: int
    races: int
    """Races per round."""
    seconds: float
    """Seconds after which no new round begins if enough races overlapped."""


@dataclass(slots=True)
class Tally:
    """What the races of a search exercised."""

    races: int = 0
    overlapped: int = 0
    """Decided races in which calls overlapped."""
    undecided: int = 0
    calls: int = 0
    unavailable: int = 0
    overlaps: Counter[frozenset[str]] = field(default_factory=Counter)
    """Number of overlaps of two writing operations in decided races, by the names of the operations."""

    def add(self, run: RaceRun) -> None:
        self.races += 1
        self.overlapped += bool(run.overlaps)
        self.overlaps.update(_names(run))
        self.calls += len(run.history.operations) + run.unavailable
        self.unavailable += run.unavailable

    def is_unavailable(self) -> bool:
        """Whether the store refused too many calls as unavailable."""
        return self.unavailable > MAX_UNAVAILABLE_SHARE * self.calls

    def exclude(self, run: RaceRun) -> None:
        """Exclude a race that could not be decided."""
        self.undecided += 1
        self.overlapped -= bool(run.overlaps)
        self.overlaps.subtract(_names(run))


def _names(run: RaceRun) -> list[frozenset[str]]:
    return [
        frozenset((one.call.method, other.call.method))
        for one, other in run.overlaps
        if one.call.operation.writes and other.call.operation.writes
    ]


async def search(context: CheckContext, family: RaceFamily, runner: Runner, budget: Budget) -> Tally:
    """Run drawn races of a family. Raises ContractViolation with the smallest race that shows one.

    Raises Inconclusive if calls overlapped in too few races, or if too many calls were unavailable; if that
    happens again in a retry, it is a violation.
    """
    tally, begun, rounds_run = Tally(), time.monotonic(), 0
    # A round of an exclusive family is a single race, so there are more rounds.
    limit = budget.rounds * (2 if family.exclusive else 1)
    count = 1 if family.exclusive else budget.races

    def enough() -> bool:
        overlapped = tally.overlapped >= MIN_OVERLAP * min(tally.races, limit * count)
        return overlapped and not tally.is_unavailable()

    while True:
        for run in await runner.run(draw_races(context, family.draw, count)):
            tally.add(run)
            context.assertions += 1
            try:
                verdict = judge(context, run)
            except Inconclusive:
                tally.exclude(run)
                continue
            if verdict is not None:
                raise await _explain(context, family, runner, run, verdict)
        rounds_run += 1
        seconds = time.monotonic() - begun
        if enough():
            if rounds_run >= limit or (seconds > budget.seconds and rounds_run >= 3):
                return tally
        elif rounds_run >= limit and (
            tally.is_unavailable() or seconds > MAX_OVERLAP_SECONDS * context.timeout_factor
        ):
            break
    if tally.is_unavailable():
        refused = f"the store was unavailable to {tally.unavailable} of {tally.calls} concurrent calls"
        if context.timeout_factor == 1.0:
            raise Inconclusive(refused)
        # A busy machine or server does not explain a second search with the same result.
        raise ContractViolation(
            f"{refused}, also in an earlier attempt; it must retry calls that certainly had no effect",
            clause="CON-2",
        )
    undecided = f"; {tally.undecided} were too large to decide" if tally.undecided else ""
    raise Inconclusive(f"calls overlapped in only {tally.overlapped} of {tally.races} races{undecided}")


def draw_races(context: CheckContext, draw: Callable[[RaceBuilder], Race], count: int) -> list[Race]:
    """Draw the races of a round, with calls that the backend offers, on ids that no other race uses."""
    now = datetime.now(UTC) if context.clock is None else context.clock.now
    races = []
    for _ in range(count):
        drawing = RaceBuilder(
            generator=context.random,
            capabilities=context.capabilities,
            now=now,
            virtual=context.clock is not None,
            reads_all=context.profile is Profile.THOROUGH,
        )
        race = _without_unsupported_calls(draw(drawing), context).scheduled(context.random)
        races.append(race.on_fresh_ids(context.random))
    return races


def _without_unsupported_calls(race: Race, context: CheckContext) -> Race:
    """The race without calls that the backend does not offer."""

    def keep(calls: tuple[Call, ...]) -> tuple[Call, ...]:
        return tuple(call for call in calls if call.is_offered(context.capabilities))

    return replace(
        race,
        setup=keep(race.setup),
        clients=tuple(map(keep, race.clients)),
        final=keep(race.final),
    )


def judge(context: CheckContext, run: RaceRun, budget: int = DEFAULT_BUDGET) -> Verdict | None:
    """Return the verdict on a race that breaks the contract; None if the race conforms.

    Correctly rejected calls with invalid arguments are excluded, because they changed nothing (INP). Raises
    Inconclusive if ten times the budget is not enough.
    """
    operations = [one for one in run.history.operations if not is_correctly_rejected(one.call, one.outcome)]
    history = by_run(History.of(operations))
    foreign = [one for one in operations if is_foreign(one.outcome)]
    if foreign:
        return Verdict(answer=Answer.VIOLATION, states=0, unplaced=tuple(foreign))
    verdict = check_history(history, exact_times=context.exact_times, budget=budget)
    if verdict.answer is Answer.UNDECIDED:
        verdict = check_history(history, exact_times=context.exact_times, budget=10 * budget)
    if verdict.answer is Answer.UNDECIDED:
        raise Inconclusive(f"no verdict on a race of {len(operations)} calls within {budget} states")
    return verdict if verdict.answer is Answer.VIOLATION else None


# Reports


async def _explain(
    context: CheckContext, family: RaceFamily, runner: Runner, run: RaceRun, verdict: Verdict
) -> ContractViolation:
    found = _Reproduced(run=run, verdict=verdict, reproductions=1, repetitions=1)
    if not signature_of(family, verdict).shows_missing_method:
        found = await _RaceShrinker(context, family, runner, found).run()
    return _violation(context, family, runner.topology, found)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reproduced:
    run: RaceRun
    verdict: Verdict
    reproductions: int
    repetitions: int


def _violation(
    context: CheckContext, family: RaceFamily, topology: Topology, found: _Reproduced
) -> ContractViolation:
    run, verdict = found.run, found.verdict
    clause, cause = broken_clause(family, verdict), None
    message = family.explain(run.history) or describe_misfits(verdict)
    foreign = [one.outcome for one in verdict.unplaced if is_foreign(one.outcome)]
    if foreign and isinstance(foreign[0], Raised):
        cause = foreign[0].exception
        method = next(one.call.method for one in verdict.unplaced if one.outcome == foreign[0])
        message = f"in a race, {method} raised {foreign[0].error}, which is not an error of the contract"
    message = (
        f"{message} (seen in {found.reproductions} of {found.repetitions} runs of this race, {topology})"
    )
    violation = ContractViolation(
        message,
        clause=clause,
        program=_program(context, run, topology, f"{clause}: {message}"),
        history=by_run(run.history),
        verdict=verdict,
    )
    violation.__cause__ = cause
    return violation


def broken_clause(family: RaceFamily, verdict: Verdict) -> str:
    """The clause that the wrong outcomes of a race of this family break."""
    if any(is_foreign(one.outcome) for one in verdict.unplaced):
        return "CON-2"
    return family.clause_of(verdict) or family.clauses[0]


def signature_of(family: RaceFamily, verdict: Verdict) -> Signature:
    """The broken clause and the outcomes that no order explains."""
    wrong = {
        answer
        for one, right in zip_longest(verdict.unplaced, verdict.expected)
        for answer in wrong_answers(one.call, right, one.outcome)
    }
    return Signature(broken_clause(family, verdict), frozenset(wrong))


def describe_misfits(verdict: Verdict) -> str:
    """Describe where the search for an order ended."""
    parts = [
        f"{one.call.method} of {client_of(one)} returned {describe_outcome(one.outcome)} "
        f"instead of {describe_outcome(right)}"
        for one, right in zip(verdict.unplaced, verdict.expected, strict=False)
    ]
    done = ", ".join(f"{one.call.method} of {client_of(one)}" for one in verdict.prefix[-4:])
    after = f"after {done}, " if done else ""
    return f"no order of these calls explains their answers: {after}{'; and '.join(parts[:3])}"


def client_of(one: Operation) -> str:
    """The client of an operation in words."""
    return {BEFORE: "the setup", AFTER: "the final reads"}.get(one.client, f"client {one.client}")


def _brief(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


def _program(context: CheckContext, run: RaceRun, topology: Topology, title: str) -> str:
    race = run.race
    answers = "\n".join(
        f"    {client_of(one)}: {one.call.method}: {_brief(answer_text(one.outcome))}"
        for one in run.history.operations
    )
    start = run.history.operations[0].now if run.history.operations else datetime.now(UTC)
    phases = [
        ReproPhase(timedelta(0), [race.setup]),
        ReproPhase(race.clock_advance, race.clients),
        ReproPhase(timedelta(0), [race.final]),
    ]
    title = (
        f"{title}\n\nObserved outcomes, in the order in which the calls began; no order of the calls "
        f"explains them:\n\n{answers}"
    )
    if topology.processes:
        title += (
            f"\n\nThe race ran {topology}. This program opens as many stores in one process,\n"
            "where the violation may be rare or absent; the command in the report uses processes."
        )
    clock = context.clock is not None
    return concurrent_script(title, start, phases, race.ids, clock=clock, stores=topology.stores)


# Shrinking


class _RaceShrinker:
    """Runs smaller races repeatedly and keeps the smallest that shows the same violation."""

    def __init__(self, context: CheckContext, family: RaceFamily, runner: Runner, found: _Reproduced) -> None:
        self._context = context
        self._family = family
        self._runner = runner
        self._best = found
        # Compared with the original race: step by step, the search could drift to another violation.
        self._signature = signature_of(family, found.verdict)
        self._explained = family.explain(found.run.history) is not None
        self._deadline = time.monotonic() + SHRINK_SECONDS
        self._generator = random.Random(f"{context.seed}/smaller")

    async def run(self) -> _Reproduced:
        smaller = True
        while smaller:
            smaller = False
            for race in smaller_races(self._best.run.race):
                if time.monotonic() > self._deadline:
                    return self._best
                found = await self._try(race)
                if found is not None:
                    self._best, smaller = found, True
                    break
        return self._best

    async def _try(self, race: Race) -> _Reproduced | None:
        """Run a race repeatedly; return the last run that shows the same violation."""
        reproductions, repetitions, last = 0, 0, None
        size = 1 if self._family.exclusive else 8
        while repetitions < MAX_REPRODUCTION_RUNS and (last is None or repetitions < 8):
            races = [race.on_fresh_ids(self._generator) for _ in range(size)]
            runs = await self._runner.run([self._shifted_to_now(each) for each in races])
            for run in runs:
                repetitions += 1
                try:
                    verdict = judge(self._context, run, 20_000)
                except Inconclusive:
                    continue
                if verdict is not None and self._shows_same_violation(run, verdict):
                    reproductions += 1
                    if last is None or self._family.explain(run.history):
                        # Prefers a run with an explanation in words.
                        last = (run, verdict)
        if last is None:
            return None
        return _Reproduced(run=last[0], verdict=last[1], reproductions=reproductions, repetitions=repetitions)

    def _shows_same_violation(self, run: RaceRun, verdict: Verdict) -> bool:
        # If the original race has an explanation in words, the smaller one must have one too.
        explained = not self._explained or self._family.explain(run.history) is not None
        return explained and self._signature.covers(signature_of(self._family, verdict))

    def _shifted_to_now(self, race: Race) -> Race:
        """The race shifted to the current time: its timestamps keep their distance from the clock."""
        if self._context.clock is None:
            return race
        elapsed = self._context.clock.now - self._best.run.history.operations[0].now

        def shift(call: Call) -> Call:
            arguments = {
                name: value + elapsed if isinstance(value, datetime) else value
                for name, value in call.arguments.items()
            }
            return replace(call, arguments=arguments)

        return race.changed(shift)


def smaller_races(race: Race) -> Iterator[Race]:
    """Races with one client or call fewer, or without a schedule. Calls stay unchanged."""
    if len(race.clients) > 2:
        for client in range(len(race.clients)):
            yield race.without_client(client)
    for client, calls in enumerate(race.clients):
        for number in range(len(calls)):
            if len(calls) > 1:
                yield race.without_call(client, number)
    for number in reversed(range(1, len(race.setup))):
        yield replace(race, setup=_without(race.setup, number))
    for number in range(len(race.final)):
        if len(race.final) > 1:
            yield replace(race, final=_without(race.final, number))
    if race.order:
        yield replace(race, order=(), yields=())


def _without(items: tuple[Call, ...], index: int) -> tuple[Call, ...]:
    return (*items[:index], *items[index + 1 :])
