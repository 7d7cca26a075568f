"""A fault scenario of the scorecard."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from flowstore_chaos.context import RunContext


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultScenario:
    """One kind of fault on one or several backends; each backend has a row in the scorecard."""

    number: int
    name: str
    """The module's name with hyphens, used on the command line."""
    fault: str
    """A short description of the fault."""
    unit: str
    """The unit of ``planned``, in the plural: lost replies, kills, rounds."""
    planned: int
    """Number of faults at scale 1."""
    min_faults: int = 1
    """Minimum number of faults, at any scale."""
    backends: tuple[str, ...]
    pass_criterion: str
    mutant: str
    """The defect of the mutant, on which the scenario must fail."""
    minutes: float
    """Time limit of a row at scale 1; at least four minutes at any scale."""
    run: Callable[[RunContext], Coroutine[Any, Any, None]]
    """Injects ``context.planned`` faults and counts those that took effect in ``context.counts``."""

    def planned_at(self, scale: float) -> int:
        return max(self.min_faults, round(self.planned * scale))

    def seconds_at(self, scale: float) -> float:
        return 60 * max(4.0, self.minutes * scale)
