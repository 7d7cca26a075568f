"""Prepared writes in listed or random states, and verification of their effects."""

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
from flowstore_conformance.strategies import (
    FLOWS,
    IDEMPOTENCY_KEYS,
    TAG_KEYS,
    TAG_VALUES,
    RandomChoices,
    Universe,
)
from flowstore_conformance.write_scenarios import SCENARIOS

from flowstore_chaos.counts import Counts
from flowstore_chaos.scenarios_from_suite import new_scenario
from flowstore_core import Capability, FlowStore
from flowstore_core.operations import OPERATIONS

MAX_SETUP_CALLS = 9
"""Maximum number of calls before a random write."""
ALL_CAPABILITIES = frozenset(Capability)


def writes() -> list[str]:
    """Every writing method of the Protocol, except claim_next_steps.

    A store chooses the owners of its claims, so the model cannot predict the calls that follow; the scenario
    claim-replies-lost verifies them by their owners.
    """
    return [name for name in STRATEGIES if OPERATIONS[name].writes and name != "claim_next_steps"]


class Source(StrEnum):
    """The source of a prepared write."""

    LISTED = "listed"
    """A write scenario of the conformance suite, in which the call has its full effect."""
    DRAWN = "drawn"
    """Random calls before a random call, which may have no effect or raise an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedWrite:
    """A call, the state before it, and the probes that observe the state."""

    call: Call
    before: ModelState
    probes: tuple[Call, ...]


class Preparer:
    """Prepares writes with a store free of faults and a virtual clock."""

    def __init__(self, store: FlowStore, clock: VirtualClock, rng: random.Random) -> None:
        self.store = store
        self._clock = clock
        self._rng = rng
        self._listed: dict[str, list[str]] = {}
        for name, factory in SCENARIOS.items():
            method = factory(UUID(int=1), UUID(int=2))[1].method
            self._listed.setdefault(method, []).append(name)

    async def prepare(self, method: str, source: Source) -> PreparedWrite:
        """Prepare a call of the method on new runs."""
        if source is Source.LISTED and method in self._listed:
            return await self._prepare_listed(method)
        return await self._prepare_drawn(method)

    async def _prepare_listed(self, method: str) -> PreparedWrite:
        factory = SCENARIOS[self._rng.choice(self._listed[method])]
        scenario = new_scenario(self._rng, factory, ALL_CAPABILITIES)
        state = ModelState(self._clock, State())
        for call in scenario.setup:
            state = await self._execute(state, call)
        return PreparedWrite(call=scenario.call, before=state, probes=scenario.probes)

    async def _prepare_drawn(self, method: str) -> PreparedWrite:
        rng, choices = self._rng, RandomChoices(self._rng)
        if OPERATIONS[method].spans_runs:
            # The call acts on all runs, so delete earlier ones.
            await self.store.cleanup(self._clock() + timedelta(days=1))
        runs = sorted(UUID(int=rng.getrandbits(127)) for _ in range(2))
        flows = [UUID(int=rng.getrandbits(127)) for _ in FLOWS]
        state = ModelState(self._clock, State())

        def universe() -> Universe:
            model = Model(self._clock, state.state)
            return Universe(model=model, runs=runs, flows=flows, keys=("a", "b"))

        others = [name for name in writes() if not OPERATIONS[name].spans_runs]
        weights = [STRATEGIES[name].weight for name in others]
        state = await self._execute(state, draw_call(choices, universe(), "start_run"))
        for _ in range(rng.randint(0, MAX_SETUP_CALLS)):
            if rng.random() < 0.15:
                self._clock.advance(draw_clock_advance(choices, universe()))
            [name] = rng.choices(others, weights)
            state = await self._execute(state, draw_call(choices, universe(), name))
        keys = [(flow, trigger, key) for flow in flows for trigger in "tT" for key in IDEMPOTENCY_KEYS]
        probes = [call for run in runs for call in probe_calls(run, ALL_CAPABILITIES)]
        probes += probe_calls(runs[0], (), keys=keys)[-len(keys) :]
        tags = [{key: value} for key in TAG_KEYS for value in TAG_VALUES]
        probes += [
            Call(method="get_runs", arguments={"flow_id": flow, "tags": tag})
            for flow in flows
            for tag in tags
        ]
        return PreparedWrite(call=draw_call(choices, universe(), method), before=state, probes=tuple(probes))

    async def _execute(self, state: ModelState, call: Call) -> ModelState:
        after = state.apply(call, exact_times=True)
        outcome = await outcome_of(self.store, call, exact_times=True)
        if outcome != after.outcome:
            raise RuntimeError(f"without a fault {call.source()} gave {describe_outcome(outcome)}")
        return after


async def verify(
    counts: Counts, prepared: PreparedWrite, outcome: Outcome, store: FlowStore, *, reachable: bool
) -> None:
    """Compare the outcome of the call and the store's final state with the model.

    ``reachable``: the store was available all the time, so the result must be exact.
    """
    call, before = prepared.call, prepared.before
    after = before.apply(call, exact_times=True)
    description = f"{call.method} gave {describe_outcome(outcome)}"
    if is_foreign(outcome):
        counts.count_wrong(f"{description}, which is not an error of the contract")
        return
    if (outcome is UNKNOWN or is_unavailable(outcome)) and reachable:
        counts.count_wrong(f"{description}, although the store was available")
    possible: Sequence[ModelState] = [after]
    if outcome is UNKNOWN or (call.method == "annotate_dispatch" and not reachable):
        # annotate_dispatch is best effort and reports no failure (CLM-7).
        possible = [before, after]
    elif is_unavailable(outcome):
        possible = [before]
    elif outcome != after.outcome and after.outcome is not None:
        counts.count_wrong(f"{description}, not {describe_outcome(after.outcome)}")
    wanted = [one.observe(prepared.probes, exact_times=True) for one in possible]
    seen = await observe_until(store, prepared.probes, wanted, exact_times=True)
    if seen in wanted:
        return
    what = f"{description}, and then {difference(prepared.probes, seen, wanted)}"
    if seen == before.observe(prepared.probes, exact_times=True):
        counts.count_lost(what)
    elif seen == after.apply(call, exact_times=True).observe(prepared.probes, exact_times=True):
        counts.count_duplicate(what)
    else:
        counts.count_wrong(what)
