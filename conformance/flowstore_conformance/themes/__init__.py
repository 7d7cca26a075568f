"""What races are about: for each theme, how a race is drawn and what may be said of it in plain words.

Every race of a theme contends for one run, or one idempotency key, and mostly for one step of it. Programs
are drawn whole before they run, so no call depends on an answer.
"""

from __future__ import annotations

from flowstore_conformance.themes import claims, everything, runs, signals, steps
from flowstore_conformance.themes.theme import Drawing, Theme

THEMES: tuple[Theme, ...] = (
    *claims.THEMES,
    *steps.THEMES,
    *runs.THEMES,
    *signals.THEMES,
    *everything.THEMES,
)

__all__ = ["THEMES", "Drawing", "Theme"]
