"""Write scenarios of the conformance suite on new runs, and their expected states from the model."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from uuid import UUID

from flowstore_conformance.history import Call
from flowstore_conformance.model import State
from flowstore_conformance.state_probe import ModelState, Snapshot
from flowstore_conformance.write_scenarios import Scenario, ScenarioFactory, available, probes_of

from flowstore_core import Capability

CLAIMS_OF_QUEUES = frozenset({"claim_queued", "claim_again"})


def new_scenario(
    rng: random.Random, factory: ScenarioFactory, capabilities: Collection[Capability]
) -> Scenario:
    """The factory's scenario on a new run."""
    run_id, flow_id = UUID(int=rng.getrandbits(128)), UUID(int=rng.getrandbits(128))
    setup, call = factory(run_id, flow_id)
    ownerless = call.method == "try_claim_step" and call.arguments.get("owner") is None
    return Scenario(
        run_id=run_id,
        setup=tuple(setup),
        call=call,
        must_compensate=ownerless or call.method == "try_record_dispatch",
        probes=probes_of(run_id, flow_id, capabilities),
    )


def factories_by_name(capabilities: Collection[Capability]) -> dict[str, ScenarioFactory]:
    """The scenarios of the suite that a store with these capabilities can run, except claims of queues.

    Compensating a cancelled claim_next_steps leaves a state of its own, which the suite checks. The scenarios
    queue-worker-kills and claim-replies-lost attack its claims.
    """
    return {name: one for name, one in available(capabilities).items() if name not in CLAIMS_OF_QUEUES}


def draw_scenarios(
    seed: str, count: int, capabilities: Collection[Capability] = tuple(Capability)
) -> list[Scenario]:
    """``count`` scenarios, round robin over all factories; deterministic for a seed."""
    rng = random.Random(seed)
    factories = list(factories_by_name(capabilities).values())
    found: list[Scenario] = []
    while len(found) < count:
        rng.shuffle(factories)
        found += [new_scenario(rng, factory, capabilities) for factory in factories[: count - len(found)]]
    return found


def expected_state(calls: Sequence[Call]) -> ModelState:
    """The model's state after these calls."""
    state = ModelState(lambda: datetime.now(UTC), State())
    for call in calls:
        state = state.apply(call, exact_times=False)
    return state


class ScenarioTrace:
    """A scenario's calls in order, and the expected snapshot after each of them."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.calls = (*scenario.setup, scenario.call)
        self._snapshots: list[Snapshot] = []

    def snapshot_after(self, done: int) -> Snapshot:
        """The expected snapshot after the first ``done`` calls."""
        if not self._snapshots:
            state = expected_state(())
            self._snapshots.append(state.observe(self.scenario.probes, exact_times=False))
            for call in self.calls:
                state = state.apply(call, exact_times=False)
                self._snapshots.append(state.observe(self.scenario.probes, exact_times=False))
        return self._snapshots[done]

    def is_earlier_snapshot(self, seen: Snapshot, done: int) -> bool:
        """Whether the snapshot was expected before the first ``done`` calls had completed."""
        return any(self.snapshot_after(number) == seen for number in range(done))
