"""Writes about to be made, each where calls have led to, drawn or from a list; and what may come of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from uuid import UUID

from flowstore_conformance.context import VirtualClock
from flowstore_conformance.execution import is_foreign, is_unavailable
from flowstore_conformance.history import UNKNOWN, Call, Outcome
from flowstore_conformance.model import Model, State
from flowstore_conformance.operations import STRATEGIES, draw_call, draw_clock_advance
from flowstore_conformance.state_probe import (
    ModelState,
    describe_outcome,
    difference,
    observe_until,
    outcome_of,
    probe_calls,
)
from flowstore_conformance.strategies import FLOWS, IDEMPOTENCY_KEYS, RandomChoices, Universe
from flowstore_conformance.write_scenarios import SCENARIOS

from flowstore_chaos.scenes import new_scene
from flowstore_chaos.tally import Tally
from flowstore_core import Capability, FlowStore
from flowstore_core.operations import OPERATIONS

LONGEST = 9
"""So many calls lead to a drawn situation, at most."""
EVERYTHING = frozenset(Capability)


def writes() -> list[str]:
    """Every writing method of the Protocol."""
    return [name for name in STRATEGIES if OPERATIONS[name].writes]


class Origin(StrEnum):
    """How a situation comes about."""

    LISTED = "listed"
    """The conformance suite's own: the call changes as much as it can."""
    DRAWN = "drawn"
    """Any that a few drawn calls lead to; the call may as well change nothing, or be refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """A call that is going to be made, the state that it will find, and what shows the state."""

    call: Call
    before: ModelState
    probes: tuple[Call, ...]


class Stage:
    """Makes situations, by a store that no fault reaches and on a virtual clock."""

    def __init__(self, store: FlowStore, clock: VirtualClock, rng: random.Random) -> None:
        self.store = store
        self._clock = clock
        self._rng = rng
        self._listed: dict[str, list[str]] = {}
        for name, setting in SCENARIOS.items():
            method = setting(UUID(int=1), UUID(int=2))[1].method
            self._listed.setdefault(method, []).append(name)

    async def prepare(self, method: str, origin: Origin) -> Situation:
        """A situation for a call of the method, on runs of its own."""
        if origin is Origin.LISTED and method in self._listed:
            return await self._prepare_listed(method)
        return await self._prepare_drawn(method)

    async def _prepare_listed(self, method: str) -> Situation:
        setting = SCENARIOS[self._rng.choice(self._listed[method])]
        scenario = new_scene(self._rng, setting, EVERYTHING)
        state = ModelState(self._clock, State())
        for call in scenario.setup:
            state = await self._make(state, call)
        return Situation(call=scenario.call, before=state, probes=scenario.probes)

    async def _prepare_drawn(self, method: str) -> Situation:
        rng, chooser = self._rng, RandomChoices(self._rng)
        if OPERATIONS[method].spans_runs:
            # It acts on all runs: those of earlier situations go first.
            await self.store.cleanup(self._clock() + timedelta(days=1))
        runs = sorted(UUID(int=rng.getrandbits(127)) for _ in range(2))
        flows = [UUID(int=rng.getrandbits(127)) for _ in FLOWS]
        state = ModelState(self._clock, State())

        def world() -> Universe:
            model = Model(self._clock, state.state)
            return Universe(model=model, runs=runs, flows=flows, keys=("a", "b"))

        others = [name for name in writes() if not OPERATIONS[name].spans_runs]
        weights = [STRATEGIES[name].weight for name in others]
        state = await self._make(state, draw_call(chooser, world(), "start_run"))
        for _ in range(rng.randint(0, LONGEST)):
            if rng.random() < 0.15:
                self._clock.advance(draw_clock_advance(chooser, world()))
            [name] = rng.choices(others, weights)
            state = await self._make(state, draw_call(chooser, world(), name))
        keys = [(flow, trigger, key) for flow in flows for trigger in "tT" for key in IDEMPOTENCY_KEYS]
        probes = [call for run in runs for call in probe_calls(run, EVERYTHING)]
        probes += probe_calls(runs[0], (), keys=keys)[-len(keys) :]
        return Situation(call=draw_call(chooser, world(), method), before=state, probes=tuple(probes))

    async def _make(self, state: ModelState, call: Call) -> ModelState:
        after = state.apply(call, exact_times=True)
        outcome = await outcome_of(self.store, call, exact_times=True)
        if outcome != after.outcome:
            raise RuntimeError(f"without any fault {call.source()} gave {describe_outcome(outcome)}")
        return after


async def judge(
    tally: Tally, situation: Situation, outcome: Outcome, store: FlowStore, *, reachable: bool
) -> None:
    """Hold the outcome of the call, and all that the store shows afterwards, against the model.

    ``reachable`` says that the store could be asked at any time, so that its answer must be exact.
    """
    call, before = situation.call, situation.before
    after = before.apply(call, exact_times=True)
    told = f"{call.method} gave {describe_outcome(outcome)}"
    if is_foreign(outcome):
        tally.mistrust(f"{told}, which is none of the contract's errors")
        return
    if (outcome is UNKNOWN or is_unavailable(outcome)) and reachable:
        tally.mistrust(f"{told}, where the store could be asked")
    possible: Sequence[ModelState] = [after]
    if outcome is UNKNOWN or (call.method == "annotate_dispatch" and not reachable):
        # The latter is best effort, and never says that it failed (CLM-7).
        possible = [before, after]
    elif is_unavailable(outcome):
        possible = [before]
    elif outcome != after.outcome and after.outcome is not None:
        tally.mistrust(f"{told}, where {describe_outcome(after.outcome)} is right")
    wanted = [one.observe(situation.probes, exact_times=True) for one in possible]
    seen = await observe_until(store, situation.probes, wanted, exact_times=True)
    if seen in wanted:
        return
    what = f"{told}, and then {difference(situation.probes, seen, wanted)}"
    if seen == before.observe(situation.probes, exact_times=True):
        tally.lose(what)
    elif seen == after.apply(call, exact_times=True).observe(situation.probes, exact_times=True):
        tally.repeat(what)
    else:
        tally.mistrust(what)
