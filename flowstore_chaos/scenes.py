"""Runs that a few calls make, each call acknowledged in turn; what they must look like is the model's."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from uuid import UUID

from flowstore_conformance.history import Call
from flowstore_conformance.model import State
from flowstore_conformance.state_probe import ModelState, Snapshot, probe_calls
from flowstore_conformance.write_scenarios import Scenario, ScenarioFactory, available

from flowstore_core import Capability


def new_scene(rng: random.Random, setting: ScenarioFactory, capabilities: Collection[Capability]) -> Scenario:
    """The setting on a run of its own."""
    run_id, flow_id = UUID(int=rng.getrandbits(128)), UUID(int=rng.getrandbits(128))
    setup, call = setting(run_id, flow_id)
    ownerless = call.method == "try_claim_step" and call.arguments.get("owner") is None
    return Scenario(
        run_id=run_id,
        setup=tuple(setup),
        call=call,
        must_compensate=ownerless or call.method == "try_record_dispatch",
        probes=probe_calls(run_id, capabilities, step_keys=("a", "b"), keys=[(flow_id, "manual", "K")]),
    )


def draw_scenes(
    seed: str, count: int, capabilities: Collection[Capability] = tuple(Capability)
) -> list[Scenario]:
    """So many, of all settings in turn; the same for the same seed."""
    rng = random.Random(seed)
    settings = list(available(capabilities).values())
    found: list[Scenario] = []
    while len(found) < count:
        rng.shuffle(settings)
        found += [new_scene(rng, setting, capabilities) for setting in settings[: count - len(found)]]
    return found


def expected(calls: Sequence[Call]) -> ModelState:
    """The model after these calls."""
    state = ModelState(lambda: datetime.now(UTC), State())
    for call in calls:
        state = state.apply(call, exact_times=False)
    return state


class CallProfile:
    """A scene's calls in order, and the sight of its run after each of them."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.calls = (*scenario.setup, scenario.call)
        self._sights: list[Snapshot] = []

    def sight(self, done: int) -> Snapshot:
        """What is seen once so many of the calls have happened."""
        if not self._sights:
            state = expected(())
            self._sights.append(state.observe(self.scenario.probes, exact_times=False))
            for call in self.calls:
                state = state.apply(call, exact_times=False)
                self._sights.append(state.observe(self.scenario.probes, exact_times=False))
        return self._sights[done]

    def earlier(self, seen: Snapshot, done: int) -> bool:
        """Whether this was to be seen before so many of the calls had happened."""
        return any(self.sight(number) == seen for number in range(done))
