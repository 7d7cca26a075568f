"""The lines of the scorecard: one module for one kind of fault."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from flowstore_chaos.line import Line


def load_lines() -> tuple[Line, ...]:
    """Every line, by its number: a module of this package that has a LINE."""
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    found: list[Line] = [module.LINE for module in modules if hasattr(module, "LINE")]
    return tuple(sorted(found, key=lambda line: line.number))
