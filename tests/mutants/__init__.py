"""Broken backends: each is a built-in one with a single realistic bug, for the suite to find.

Every mutant is a class that is laid over the store which a built-in backend has opened; ``plugin.py``
serves it under the scheme ``broken-<name>``. The bug is named by the clause that it breaks, and
``tests/test_conformance_mutants.py`` demands that the suite finds it by a check of that very clause.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

Mutant = TypeVar("Mutant", bound=type)


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """One broken backend."""

    name: str
    base: str
    """The built-in backend that it is made of: memory, sqlite or postgresql."""
    clause: str
    """The clause that names the bug."""
    concurrent: bool
    """Whether only calls that are under way at the same time reveal it."""
    description: str
    look_at: tuple[str, ...]
    """Further clauses whose checks may name ``clause`` as the one that is broken."""
    build: Callable[[Any], Any]
    """Gives the store that the base has opened its bug."""


_mutants: dict[str, Broken] = {}

MODULES = (
    "claims",
    "controls",
    "faults",
    "keys",
    "queries",
    "records",
    "retention",
    "retries",
    "runs",
    "signals",
    "steps",
)


def broken(
    base: str, clause: str, *, concurrent: bool = False, look_at: tuple[str, ...] = ()
) -> Callable[[Mutant], Mutant]:
    """Register a class as a broken backend; it is laid over the base's store, so super() is the right way."""

    def register(mutant: Mutant) -> Mutant:
        name = re.sub(r"(?<!^)(?=[A-Z])", "-", mutant.__name__).lower()
        if name in _mutants:
            raise ValueError(f"two mutants are named {name}")
        _mutants[name] = Broken(
            name=name,
            base=base,
            clause=clause,
            concurrent=concurrent,
            look_at=look_at,
            description=" ".join((mutant.__doc__ or "").split()),
            build=lambda store: _graft(mutant, store),
        )
        return mutant

    return register


def _graft(mutant: type, store: Any) -> Any:
    """Lay a class over one object; nobody else's store changes."""
    store.__class__ = type(mutant.__name__, (mutant, type(store)), {})
    begin = getattr(store, "begin", None)
    if begin is not None:
        begin()
    return store


def all_mutants() -> dict[str, Broken]:
    """Every broken backend by name."""
    for module in MODULES:
        import_module(f"tests.mutants.{module}")
    return dict(sorted(_mutants.items()))
