"""The fault scenarios of the scorecard, one module each."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from flowstore_chaos.scenario import FaultScenario


def load_scenarios() -> tuple[FaultScenario, ...]:
    """The SCENARIO of every module of this package, ordered by number."""
    found = [load_scenario(module.name) for module in iter_modules(__path__)]
    return tuple(sorted(found, key=lambda scenario: scenario.number))


def load_scenario(name: str) -> FaultScenario:
    """The SCENARIO of one module, by the scenario's name. The other modules are not imported."""
    scenario: FaultScenario = import_module(f"{__name__}.{name.replace('-', '_')}").SCENARIO
    return scenario
