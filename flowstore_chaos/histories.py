"""Generation and verification of histories of concurrent clients on a few runs."""

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

from flowstore_chaos.counts import Counts
from flowstore_core import Capability
from flowstore_core.operations import OPERATIONS

CLIENTS = 8
CALLS = (2, 3, 4, 5)
MAX_SETUP_CALLS = 6
"""Maximum number of calls before the clients start."""
SEARCH_BUDGET = 2_000_000


def draw_race(rng: random.Random, clock: VirtualClock) -> Race:
    """Clients with random calls on the same few runs and keys."""
    chooser = RandomChoices(rng)
    model = Model(clock)
    runs = [UUID(int=1), UUID(int=2)]
    keys = ["a"] if rng.random() < 0.5 else ["a", "b"]
    flow = UUID(int=100)
    world = Universe(model=model, runs=runs, flows=[flow], keys=keys)
    weights = {
        # Mostly writes: the final reads observe the state.
        name: one.weight * rng.choice((0, 1, 1, 2)) * (3 if OPERATIONS[name].writes else 1)
        for name, one in STRATEGIES.items()
        if not OPERATIONS[name].spans_runs
    }

    def draw() -> Call:
        [method] = rng.choices(list(weights), list(weights.values()))
        return draw_call(chooser, world, method)

    first = draw_call(chooser, world, "start_run")
    setup = [Call(method="start_run", arguments={**first.arguments, "run_id": runs[0]})]
    expected_outcome(model, setup[0])
    for _ in range(rng.randint(0, MAX_SETUP_CALLS)):
        call = draw()
        if call.operation.writes:
            setup.append(call)
            expected_outcome(model, call)
    clients = tuple(tuple(draw() for _ in range(rng.choice(CALLS))) for _ in range(CLIENTS))
    final = [call for run_id in runs for call in probe_calls(run_id, tuple(Capability))]
    race = Race(setup=tuple(setup), clients=clients, final=tuple(final))
    return race.scheduled(rng).on_fresh_ids(rng)


def verify_history(counts: Counts, history: History, refused: int) -> None:
    """Search for an order of the calls that explains every result. ``refused`` calls had no effect."""
    operations = history.operations
    counts.operations += len(operations)
    counts.add_detail("calls refused", refused)
    counts.add_detail("outcomes unknown", sum(one.outcome is UNKNOWN for one in operations))
    for one in operations:
        if is_foreign(one.outcome):
            counts.count_wrong(
                f"{one.call.method} raised {describe_outcome(one.outcome)}, which is no error of the contract"
            )
            return
    verdict = check_history(
        History.of([_with_unknown_annotation(one) for one in operations]), budget=SEARCH_BUDGET
    )
    limit = counts.details.get("maximum states searched", 0)
    counts.details["maximum states searched"] = max(int(limit), verdict.states)
    if verdict.answer is Answer.VIOLATION:
        counts.count_wrong(f"no order of the calls explains their results: {_describe_conflict(verdict)}")
    elif verdict.answer is Answer.UNDECIDED:
        counts.count_wrong(f"a history of {len(operations)} calls could not be decided")


def _with_unknown_annotation(one: Operation) -> Operation:
    """Treat an annotation as of unknown outcome: it is best effort and never fails (CLM-7)."""
    if one.call.method != "annotate_dispatch":
        return one
    return replace(one, outcome=UNKNOWN, returned=float("inf"))


def _describe_conflict(verdict: Verdict) -> str:
    """The calls at which the search ended."""
    parts = [
        f"{one.call.method} gave {describe_outcome(one.outcome)}, where {describe_outcome(right)} is right"
        for one, right in zip(verdict.unplaced, verdict.expected, strict=False)
    ]
    return "; ".join(parts[:2])
