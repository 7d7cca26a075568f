"""Mutants: built-in backends with one realistic bug each, which the conformance suite must find.

A mutant is a class that is mixed into the store of a built-in backend; ``plugin.py`` serves it under the
scheme ``mutant-<name>``. Each mutant names the clause that it breaks, and
``tests/test_conformance_mutants.py`` requires that a check of that clause finds the bug.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

MutantClass = TypeVar("MutantClass", bound=type)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A built-in backend with one bug."""

    name: str
    base: str
    """The modified built-in backend: memory, sqlite or postgresql."""
    clause: str
    """The clause that the bug breaks."""
    concurrent: bool
    """Whether only concurrent calls reveal the bug."""
    description: str
    more_clauses: tuple[str, ...]
    """Further clauses whose checks can report ``clause``."""
    build: Callable[[Any], Any]
    """Adds the bug to an open store of the base."""


_mutants: dict[str, Mutant] = {}

MODULES = (
    "claimed_starts",
    "claims",
    "clocks",
    "controls",
    "derived_reads",
    "faults",
    "keys",
    "limits",
    "lost_messages",
    "mailbox",
    "queries",
    "queues",
    "races",
    "records",
    "retention",
    "retries",
    "runs",
    "signals",
    "steps",
    "tags",
    "times",
    "transfer",
    "volumes",
    "watching",
)


def mutant(
    base: str, clause: str, *, concurrent: bool = False, more_clauses: tuple[str, ...] = ()
) -> Callable[[MutantClass], MutantClass]:
    """Register a class as a mutant; it is mixed into the base's store, so super() calls the correct code."""

    def register(cls: MutantClass) -> MutantClass:
        name = re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()
        if name in _mutants:
            raise ValueError(f"two mutants are named {name}")
        _mutants[name] = Mutant(
            name=name,
            base=base,
            clause=clause,
            concurrent=concurrent,
            more_clauses=more_clauses,
            description=" ".join((cls.__doc__ or "").split()),
            build=lambda store: _mix_in(cls, store),
        )
        return cls

    return register


def _mix_in(mutant: type, store: Any) -> Any:
    """Mix a class into one object; other stores stay unchanged."""
    store.__class__ = type(mutant.__name__, (mutant, type(store)), {})
    begin = getattr(store, "begin", None)
    if begin is not None:
        begin()
    return store


def all_mutants() -> dict[str, Mutant]:
    """Every mutant by name."""
    for module in MODULES:
        import_module(f"tests.mutants.{module}")
    return dict(sorted(_mutants.items()))
