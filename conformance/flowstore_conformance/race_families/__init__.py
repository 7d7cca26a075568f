"""Race families: how the races of each family are drawn, and how their violations are explained.

All clients of a race contend for one run or one idempotency key, and mostly for one step. All calls are drawn
before the race runs, so no call depends on the outcome of another.
"""

from __future__ import annotations

from flowstore_conformance.race_families import (
    claims,
    cleanups,
    pairs,
    queues,
    runs,
    signals,
    steps,
    transfers,
)
from flowstore_conformance.race_families.family import RaceBuilder, RaceFamily

PAIR_FAMILIES: tuple[RaceFamily, ...] = pairs.RACE_FAMILIES
"""The families that race every pair of writing operations."""

RACE_FAMILIES: tuple[RaceFamily, ...] = (
    *claims.RACE_FAMILIES,
    *steps.RACE_FAMILIES,
    *runs.RACE_FAMILIES,
    *signals.RACE_FAMILIES,
    *queues.RACE_FAMILIES,
    *cleanups.RACE_FAMILIES,
    *transfers.RACE_FAMILIES,
    *PAIR_FAMILIES,
)

__all__ = ["PAIR_FAMILIES", "RACE_FAMILIES", "RaceBuilder", "RaceFamily"]
