"""The parts of a race family: the builder of its races, and explanations of violations found by counting."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from flowstore_conformance.history import Call, History, Returned
from flowstore_conformance.linearizability import Verdict
from flowstore_conformance.races import BEFORE, Race
from flowstore_core import Capability

CallMaker = Callable[[int], Call]
"""Makes the call of a client, given its number."""

LEASE = timedelta(seconds=30)
FLOW = UUID(int=100)
RUN = UUID(int=1)


@dataclass(slots=True)
class RaceBuilder:
    """Draws the calls of a race."""

    generator: random.Random
    capabilities: Collection[Capability]
    now: datetime
    virtual: bool = True
    """Whether the clock stands still during the race, so that concurrent writes have the same timestamp."""
    reads_all: bool = True
    """Whether the last phase of a race of pairs makes every read of a run; otherwise they take turns."""
    run: UUID = RUN
    count: int = 0
    """Number of clients."""

    def __post_init__(self) -> None:
        self.count = self.generator.choice((2, 3, 3, 4, 4, 4, 6, 8))

    def one_of(self, *options: Any) -> Any:
        return self.generator.choice(options)

    def on(self, method: str, **arguments: Any) -> Call:
        return Call(method=method, arguments={"run_id": self.run, **arguments})

    def step(self, method: str, **arguments: Any) -> Call:
        return self.on(method, **{"step_key": "a", **arguments})

    def start_run(self, run_id: UUID | None = None) -> Call:
        given = {"flow_id": FLOW, "flow_name": "races", "run_id": run_id or self.run, "trigger_key": "t"}
        return Call(method="start_run", arguments=given)

    def lists_by_tag(self) -> tuple[Call, ...]:
        """The list of the runs of the race with a tag; none for a store without TAGS."""
        arguments = {"flow_id": FLOW, "tags": {"env": "test"}}
        return (Call(method="get_runs", arguments=arguments),) if self.has(Capability.TAGS) else ()

    def has(self, capability: Capability) -> bool:
        return capability in self.capabilities

    def clients(self, *makers: CallMaker, first: CallMaker | None = None) -> tuple[tuple[Call, ...], ...]:
        """Draw the calls of each client from the makers; ``first`` makes each client's first call."""
        longest = 3 if self.count <= 3 else 2 if self.count <= 4 else 1
        programs = []
        for client in range(self.count):
            length = self.generator.randint(1, longest)
            calls = [self.generator.choice(makers)(client) for _ in range(length)]
            programs.append(tuple([first(client), *calls[1:]] if first is not None else calls))
        return tuple(programs)

    def final_reads(self, *more: Call, run_id: UUID | None = None) -> tuple[Call, ...]:
        """Reads of all state of a run, for the last phase of a race; then ``more`` calls."""
        names = ["get_run_detail", "get_run_control", "get_step_claims", "get_dispatches"]
        # Without a virtual clock the creation order of waiters is unknown.
        listed = self.has(Capability.WAITERS) and self.virtual
        names += ["get_waiters"] if listed else []
        names += ["get_buffered_signals"] if self.has(Capability.MAILBOX) else []
        names += ["get_outputs"] if self.has(Capability.OUTPUTS) else []
        names += ["get_run_events"] if self.has(Capability.EVENTS) else []
        of_run = {"run_id": run_id or self.run}
        reads = [Call(method=name, arguments=of_run) for name in names]
        if not listed:
            keys = ("a", "b", "c")
            reads += [Call(method="get_waiter", arguments={**of_run, "step_key": key}) for key in keys]
        return (*reads, *more)


def no_explanation(history: History) -> str | None:
    """For families whose violations cannot be found by counting."""
    return None


def no_clause(verdict: Verdict) -> str | None:
    """For families whose violations always break their first clause."""
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class RaceFamily:
    """A kind of race."""

    name: str
    clauses: tuple[str, ...]
    sentence: str
    draw: Callable[[RaceBuilder], Race]
    needs: frozenset[Capability] = frozenset()
    exclusive: bool = False
    """Whether a race runs alone, because one of its calls spans all runs."""
    explain: Callable[[History], str | None] = no_explanation
    """Explains a violation in words, if counting shows it."""
    clause_of: Callable[[Verdict], str | None] = no_clause
    """Returns the broken clause, if it is not the first."""


def winners(method: str, undone_by: Sequence[str]) -> Callable[[History], str | None]:
    """Explain a race with several winners, unless a call of ``undone_by`` allows more than one."""

    def explain(history: History) -> str | None:
        racing = [one for one in history.operations if one.client >= 0]
        if any(one.call.method in undone_by for one in racing):
            return None
        won = [one for one in racing if one.call.method == method and one.outcome == Returned(True)]
        names = list(
            dict.fromkeys(str(one.call.arguments.get("owner") or f"client {one.client}") for one in won)
        )
        if len(won) < 2 or (len(names) < 2 and won[0].call.arguments.get("owner")):
            return None
        counted = f"{len(won)} of {len(racing)} calls won a race that one call can win"
        return f"{counted}: {method} was True for {_list(names)}"

    return explain


def duplicate_attempt_numbers(history: History) -> str | None:
    """Explain an attempt number that two calls received."""
    given: dict[Any, list[str]] = {}
    for one in history.operations:
        if one.call.method == "record_step_start" and isinstance(one.outcome, Returned):
            if one.call.arguments.get("owner") is not None:
                continue  # A repeated start under one claim returns the same number.
            client = "the setup" if one.client == BEFORE else f"client {one.client}"
            given.setdefault((one.call.arguments["step_key"], one.outcome.value), []).append(client)
    for (key, number), clients in given.items():
        if len(clients) > 1:
            return f"attempt {number} of step {key!r} was returned to {_list(clients)}"
    return None


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else "".join(names)


def stuck_on_reads(clause: str) -> Callable[[Verdict], str | None]:
    """Return the clause if only outcomes of reads are unexplained."""

    def clause_of(verdict: Verdict) -> str | None:
        reads = all(not one.call.operation.writes for one in verdict.unplaced)
        return clause if verdict.unplaced and reads else None

    return clause_of


def family(
    name: str,
    clauses: str,
    sentence: str,
    draw: Callable[[RaceBuilder], Race],
    *needs: Capability,
    exclusive: bool = False,
    explain: Callable[[History], str | None] = no_explanation,
    clause_of: Callable[[Verdict], str | None] = no_clause,
) -> RaceFamily:
    """Make a race family; ``clauses`` are ids separated by spaces."""
    return RaceFamily(
        name=name,
        clauses=tuple(clauses.split()),
        sentence=sentence,
        draw=draw,
        needs=frozenset(needs),
        exclusive=exclusive,
        explain=explain,
        clause_of=clause_of,
    )
