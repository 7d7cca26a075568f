"""Histories of clients on the same few runs: how they are drawn, and how they are judged."""

from __future__ import annotations

import random
from dataclasses import replace
from uuid import UUID

from flowstore_conformance.context import VirtualClock
from flowstore_conformance.differential import expected_outcome
from flowstore_conformance.execution import is_foreign
from flowstore_conformance.history import UNKNOWN, Call, History, Operation
from flowstore_conformance.linearizability import Answer, Verdict, check_history
from flowstore_conformance.model import Model
from flowstore_conformance.operations import STRATEGIES, draw_call
from flowstore_conformance.races import Race
from flowstore_conformance.state_probe import describe_outcome, probe_calls
from flowstore_conformance.strategies import RandomChoices, Universe

from flowstore_chaos.tally import Tally
from flowstore_core import Capability
from flowstore_core.operations import OPERATIONS

CLIENTS = 8
CALLS = (2, 3, 4, 5)
MOST_STEPS = 6
"""So many calls come before the clients, at most."""
BUDGET = 2_000_000


def draw_race(rng: random.Random, clock: VirtualClock) -> Race:
    """Clients that make any calls on the same few runs and keys."""
    chooser = RandomChoices(rng)
    model = Model(clock)
    runs = [UUID(int=1), UUID(int=2)]
    keys = ["a"] if rng.random() < 0.5 else ["a", "b"]
    flow = UUID(int=100)
    universe = Universe(model=model, runs=runs, flows=[flow], keys=keys)
    weights = {
        # Writes above all: reads are looked for in the end.
        name: one.weight * rng.choice((0, 1, 1, 2)) * (3 if OPERATIONS[name].writes else 1)
        for name, one in STRATEGIES.items()
        if not OPERATIONS[name].spans_runs
    }

    def draw() -> Call:
        [method] = rng.choices(list(weights), list(weights.values()))
        return draw_call(chooser, universe, method)

    first = draw_call(chooser, universe, "start_run")
    setup = [Call(method="start_run", arguments={**first.arguments, "run_id": runs[0]})]
    expected_outcome(model, setup[0])
    for _ in range(rng.randint(0, MOST_STEPS)):
        call = draw()
        if call.operation.writes:
            setup.append(call)
            expected_outcome(model, call)
    clients = tuple(tuple(draw() for _ in range(rng.choice(CALLS))) for _ in range(CLIENTS))
    final = [call for run_id in runs for call in probe_calls(run_id, tuple(Capability))]
    race = Race(setup=tuple(setup), clients=clients, final=tuple(final))
    return race.scheduled(rng).on_fresh_ids(rng)


def judge(tally: Tally, history: History, refused: int) -> None:
    """Search an order of the calls that explains every answer; ``refused`` calls did not happen."""
    operations = history.operations
    tally.operations += len(operations)
    tally.add("calls refused", refused)
    tally.add("outcomes unknown", sum(one.outcome is UNKNOWN for one in operations))
    for one in operations:
        if is_foreign(one.outcome):
            tally.mistrust(
                f"{one.call.method} gave {describe_outcome(one.outcome)}, which is not the contract's"
            )
            return
    verdict = check_history(History.of([_as_known(one) for one in operations]), budget=BUDGET)
    most = tally.details.get("most states tried for one", 0)
    tally.details["most states tried for one"] = max(int(most), verdict.states)
    if verdict.answer is Answer.VIOLATION:
        tally.mistrust(f"no order of the calls explains their answers: {_stuck(verdict)}")
    elif verdict.answer is Answer.UNDECIDED:
        tally.mistrust(f"a history of {len(operations)} calls could not be decided")


def _as_known(one: Operation) -> Operation:
    """What is known of an operation by its answer: an annotation is best effort, and never fails (CLM-7)."""
    if one.call.method != "annotate_dispatch":
        return one
    return replace(one, outcome=UNKNOWN, returned=float("inf"))


def _stuck(verdict: Verdict) -> str:
    """Where the search ended."""
    parts = [
        f"{one.call.method} gave {describe_outcome(one.outcome)}, where {describe_outcome(right)} is right"
        for one, right in zip(verdict.unplaced, verdict.expected, strict=False)
    ]
    return "; ".join(parts[:2])
