"""Race families: how the races of each family are drawn, and how their violations are explained.

All clients of a race contend for one run or one idempotency key, and mostly for one step. All calls are drawn
before the race runs, so no call depends on the outcome of another.
"""

from __future__ import annotations

from flowstore_conformance.race_families import claims, mixed, runs, signals, steps
from flowstore_conformance.race_families.family import RaceBuilder, RaceFamily

RACE_FAMILIES: tuple[RaceFamily, ...] = (
    *claims.RACE_FAMILIES,
    *steps.RACE_FAMILIES,
    *runs.RACE_FAMILIES,
    *signals.RACE_FAMILIES,
    *mixed.RACE_FAMILIES,
)

__all__ = ["RACE_FAMILIES", "RaceBuilder", "RaceFamily"]
