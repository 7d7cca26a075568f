"""The lines of the scorecard: one module for one kind of fault."""

from __future__ import annotations

from importlib import import_module

from flowstore_chaos.line import Line

_MODULES = (
    "claim_races",
    "worker_kills",
)


def load_lines() -> tuple[Line, ...]:
    """Every line, by its number."""
    found: list[Line] = [import_module(f"{__name__}.{name}").LINE for name in _MODULES]
    return tuple(sorted(found, key=lambda line: line.number))
