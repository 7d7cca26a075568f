"""A linearizability checker: search for an order of a history's operations that explains every outcome.

The algorithm of Wing and Gong with Lowe's memoization of visited states: operations are placed one by one,
each before every operation that was invoked after it returned, and the model decides whether the outcome
fits. An operation with an unknown outcome may be placed anywhere after its invocation, or left out. It may
also have an end, after which it takes no effect: then it is not placed after an operation that began later.

Linearizability is local, so a history is split into parts that share no run and no idempotency key and each
part is searched alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from flowstore_conformance.history import (
    UNKNOWN,
    History,
    Operation,
    Outcome,
    Raised,
    Returned,
    comparable,
    error_name,
)
from flowstore_conformance.model import Model, State
from flowstore_core import FlowStoreError, RunArchive

DEFAULT_BUDGET = 200_000


class Answer(StrEnum):
    LINEARIZABLE = "linearizable"
    VIOLATION = "violation"
    UNDECIDED = "undecided"
    """The budget ran out. Never counts as a pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The result for a history and, for a violation, the evidence."""

    answer: Answer
    states: int
    """Number of placements tried."""
    prefix: tuple[Operation, ...] = ()
    """The longest legal order found; the complete order if the history is linearizable."""
    unplaced: tuple[Operation, ...] = ()
    """The operations that may follow the prefix by time; none of their outcomes fits."""
    expected: tuple[Outcome, ...] = ()
    """For each unplaced operation, the outcome that the model gives after the prefix."""


def check_history(
    history: History,
    *,
    start: State | None = None,
    exact_times: bool = True,
    budget: int = DEFAULT_BUDGET,
) -> Verdict:
    """Check each independent part of a history, starting from the state ``start``."""
    states = 0
    order: list[Operation] = []
    for part in independent_parts(history.operations):
        verdict = _Search(part, start or State(), exact_times=exact_times, budget=budget - states).run()
        states += verdict.states
        if verdict.answer is not Answer.LINEARIZABLE:
            return verdict
        order.extend(verdict.prefix)
    return Verdict(answer=Answer.LINEARIZABLE, states=states, prefix=tuple(order))


def independent_parts(operations: Sequence[Operation]) -> list[tuple[Operation, ...]]:
    """Group operations so that no two groups touch the same run or idempotency key."""
    parts: list[tuple[set[object], list[Operation]]] = []
    for operation in operations:
        touched = set(_objects(operation))
        together = [part for part in parts if part[0] & touched or not touched or None in part[0]]
        for part in together:
            parts.remove(part)
            touched |= part[0]
        joined = [one for part in together for one in part[1]]
        parts.append((touched or {None}, [*joined, operation]))
    return [tuple(sorted(part[1], key=lambda one: one.invoked)) for part in parts]


def _objects(operation: Operation) -> Iterable[object]:
    """The objects that an operation acts on; empty means all objects."""
    arguments = operation.call.arguments
    if "run_id" in arguments:
        yield arguments["run_id"]
    if "archive" in arguments:
        archive: RunArchive = arguments["archive"]
        yield archive.run_id
        for one in archive.idempotency_keys:
            yield one.flow_id, one.trigger_key, one.idempotency_key
    if arguments.get("idempotency_key") is not None and operation.call.method != "configure_run":
        yield arguments["flow_id"], arguments["trigger_key"], arguments["idempotency_key"]
        # A key may refer to any run that was ever registered under it.
        return


class _Search:
    """The search over one part. Operations are numbered; sets of operations are bit masks."""

    def __init__(
        self, operations: Sequence[Operation], start: State, *, exact_times: bool, budget: int
    ) -> None:
        self._operations = operations
        self._times = exact_times
        self._budget = budget
        self._start = start
        self._tried = 0
        self._seen: set[tuple[int, object]] = set()
        self._required = sum(1 << i for i, one in enumerate(operations) if one.outcome is not UNKNOWN)
        # An operation may be placed only after all operations that returned before its invocation.
        self._before = [
            sum(1 << j for j, other in enumerate(operations) if other.returned < one.invoked)
            for one in operations
        ]
        # An operation with an unknown outcome may not follow operations that began after its end.
        self._too_late = {
            i: sum(1 << j for j, other in enumerate(operations) if other.invoked > one.returned)
            for i, one in enumerate(operations)
            if one.outcome is UNKNOWN and math.isfinite(one.returned)
        }
        # Operations that returned early are tried first: they have the fewest possible positions.
        self._order = sorted(range(len(operations)), key=lambda index: operations[index].returned)
        self._best: tuple[tuple[int, ...], State] = ((), start)

    def run(self) -> Verdict:
        # An explicit stack, because histories may exceed Python's recursion limit.
        stack: list[tuple[int, State, tuple[int, ...]]] = [(0, self._start, ())]
        while stack:
            placed, state, order = stack.pop()
            following = self._follow(placed, state, order)
            if following is None:
                return self._verdict(Answer.UNDECIDED, self._best[0])
            if isinstance(following, Verdict):
                return following
            stack += reversed(following)
        return self._violation()

    def _follow(
        self, placed: int, state: State, order: tuple[int, ...]
    ) -> list[tuple[int, State, tuple[int, ...]]] | Verdict | None:
        """The unvisited successors of a node, or the verdict if it is final; None if the budget ran out."""
        placed_inert = True
        while placed_inert:
            if placed & self._required == self._required:
                return self._verdict(Answer.LINEARIZABLE, order)
            placed_inert = False
            changing: list[tuple[int, State]] = []
            for index in self._order:
                if placed & 1 << index or self._before[index] & ~placed & self._required:
                    continue
                if placed & self._too_late.get(index, 0):
                    continue
                if self._tried >= self._budget:
                    return None
                self._tried += 1
                wanted = self._operations[index].outcome
                outcome, after = self._apply(state, self._operations[index])
                if wanted is not UNKNOWN and wanted != outcome:
                    continue
                if _is_inert(self._operations[index]) and not self._ends_others(placed, index):
                    # It fits and changes nothing, so any order that places it later also works with it at
                    # this position. No alternative needs to be tried.
                    placed, order, placed_inert = placed | 1 << index, (*order, index), True
                else:
                    changing.append((index, after))
        if len(order) > len(self._best[0]):
            self._best = (order, state)
        following = []
        for index, after in changing:
            memo = (placed | 1 << index, after.frozen())
            if memo not in self._seen:
                self._seen.add(memo)
                following.append((placed | 1 << index, after, (*order, index)))
        return following

    def _ends_others(self, placed: int, index: int) -> bool:
        """Whether an operation that is not placed yet could not be placed after this one."""
        return any(
            not placed & 1 << other and too_late & 1 << index for other, too_late in self._too_late.items()
        )

    def _apply(self, state: State, operation: Operation) -> tuple[Outcome, State]:
        return apply_call(state, operation, exact_times=self._times)

    def _verdict(self, answer: Answer, order: tuple[int, ...]) -> Verdict:
        prefix = tuple(self._operations[index] for index in order)
        return Verdict(answer=answer, states=self._tried, prefix=prefix)

    def _violation(self) -> Verdict:
        order, state = self._best
        placed = sum(1 << index for index in order)
        next_ones = [
            one
            for index, one in enumerate(self._operations)
            if not placed & 1 << index
            and one.outcome is not UNKNOWN
            and not self._before[index] & ~placed & self._required
        ]
        return Verdict(
            answer=Answer.VIOLATION,
            states=self._tried,
            prefix=tuple(self._operations[index] for index in order),
            unplaced=tuple(next_ones),
            expected=tuple(self._apply(state, one)[0] for one in next_ones),
        )


def _is_inert(operation: Operation) -> bool:
    """Whether the outcome shows that nothing changed: a read, an error, False, or no claim."""
    outcome = operation.outcome
    if outcome is UNKNOWN:
        return False
    return (
        isinstance(outcome, Raised)
        or outcome in (Returned(False), Returned(()))
        or not operation.call.operation.writes
    )


def apply_call(state: State, operation: Operation, *, exact_times: bool = True) -> tuple[Outcome, State]:
    """The model's outcome of a call in a state, and the state after it. Does not change the given state."""
    call = operation.call
    after = _copy_for(state, operation) if call.operation.writes else state
    clock: Callable[[], datetime] = lambda: operation.now  # noqa: E731 - a name for the type
    method = getattr(Model(clock, after), call.method)
    try:
        value: Any = method(**call.arguments)
    except FlowStoreError as error:
        return Raised(error_name(error)), after
    return Returned(comparable(value, exact_times=exact_times)), after


def _copy_for(state: State, operation: Operation) -> State:
    """A copy of the state in which the call may change the runs that it names; other runs are shared.

    A call that names no run may change every run.
    """
    arguments = operation.call.arguments
    if "run_id" not in arguments:
        return state.copy()
    after = State(dict(state.runs), dict(state.keys))
    named = {arguments.get("run_id")}
    if arguments.get("idempotency_key") is not None:
        scope = (arguments.get("flow_id"), arguments.get("trigger_key"), arguments["idempotency_key"])
        named |= {winner[0] for key, winner in state.keys.items() if key == scope}
    for run_id in after.runs.keys() & named:
        after.runs[run_id] = after.runs[run_id].copy()
    return after
