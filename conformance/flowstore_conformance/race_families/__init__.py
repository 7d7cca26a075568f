"""What races are about: for each theme, how a race is drawn and what may be said of it in plain words.

Every race of a theme contends for one run, or one idempotency key, and mostly for one step of it. Programs
are drawn whole before they run, so no call depends on an answer.
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
