"""What a line of the scorecard is."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from flowstore_chaos.trial import Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One kind of fault, on one or several backends; each backend has a row of its own."""

    number: int
    name: str
    """Its module's name with hyphens: how the command line knows it."""
    fault: str
    """What is done to the store, in a few words."""
    unit: str
    """What ``planned`` counts, in the plural: lost replies, kills, rounds."""
    planned: int
    """How many at scale 1."""
    least: int = 1
    """No scale makes it fewer."""
    backends: tuple[str, ...]
    passes_when: str
    broken: str
    """What the broken variant does wrong, by which the line goes red."""
    minutes: float
    """A row that takes longer at scale 1 is ended, and is red; never less than two minutes."""
    run: Callable[[Trial], Coroutine[Any, Any, None]]
    """Injects ``trial.planned`` faults and counts in ``trial.tally``; counts only what really landed."""

    def planned_at(self, scale: float) -> int:
        return max(self.least, round(self.planned * scale))

    def seconds_at(self, scale: float) -> float:
        return 60 * max(2.0, self.minutes * scale)
