"""The fault scenarios of the scorecard, one module each."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from flowstore_chaos.scenario import FaultScenario


def load_scenarios() -> tuple[FaultScenario, ...]:
    """The SCENARIO of every module of this package, ordered by number."""
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    found: list[FaultScenario] = [module.SCENARIO for module in modules if hasattr(module, "SCENARIO")]
    return tuple(sorted(found, key=lambda scenario: scenario.number))
