"""How a check is declared and found."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from typing import TYPE_CHECKING

from flowstore_conformance.clauses import CLAUSES
from flowstore_core import Capability, ConfigurationError

if TYPE_CHECKING:
    from flowstore_conformance.context import CheckContext

Run = Callable[["CheckContext"], Awaitable[None]]


class Kind(StrEnum):
    """How a check looks at a promise."""

    EXAMPLE = "example"
    MODEL = "model"
    RACE = "race"
    SNAPSHOT = "snapshot"
    CANCELLATION = "cancellation"
    CRASH = "crash"
    HOSTILE = "hostile"
    CAPABILITY = "capability"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One check: what it proves, what it needs, and the coroutine that runs it."""

    name: str
    clauses: tuple[str, ...]
    """The first is the clause that it is named after."""
    kind: Kind
    needs: frozenset[Capability]
    sentence: str
    """What it looks at, in a sentence: the docstring."""
    run: Run
    shares: bool = False
    """Works on ids of its own alone, so that a namespace will do in which other checks were before."""

    @property
    def id(self) -> str:
        return f"{self.clauses[0]} {self.name}"


_checks: dict[str, Check] = {}

# One module per noun, in the order of the contract, then those that look at many nouns at once.
MODULES = (
    "arguments",
    "round_trip",
    "missing_runs",
    "runs",
    "records",
    "steps",
    "step_outcomes",
    "retries",
    "recovery",
    "claims",
    "dispatches",
    "controls",
    "idempotency",
    "signals",
    "outputs",
    "events",
    "retention",
    "queries",
    "cursors",
    "statistics",
    "elapsed_time",
    "lost_replies",
    "concurrent_batches",
    "capabilities",
    "event_loops",
    "model",
    "races",
    "processes",
    "snapshots",
    "cancellation",
    "crash",
)


def check(
    *clauses: str, needs: Iterable[Capability] = (), kind: Kind = Kind.EXAMPLE, shares: bool = False
) -> Callable[[Run], Run]:
    """Declare a check of some clauses; it is skipped as unsupported where a capability is missing.

    What the named clauses need by themselves is added. The function's docstring says what it proves.
    A check that ``shares`` may be run where others were before.
    """
    for clause in clauses:
        if clause not in CLAUSES:
            raise ValueError(f"there is no clause {clause}")

    def register(run: Run) -> Run:
        name = run.__name__
        if name in _checks:
            raise ValueError(f"two checks are named {name}")
        own = {CLAUSES[clauses[0]].needs} - {None}
        sentence = " ".join((run.__doc__ or "").split())
        if not sentence:
            raise ValueError(f"check {name} has no docstring")
        _checks[name] = Check(
            name=name,
            clauses=clauses,
            kind=kind,
            needs=frozenset(needs) | frozenset(each for each in own if each is not None),
            sentence=sentence,
            run=run,
            shares=shares,
        )
        return run

    return register


def all_checks() -> tuple[Check, ...]:
    """Every check, in the order of the contract's clauses.

    Raises ConfigurationError without a working directory, which Hypothesis needs as soon as it is imported.
    """
    try:
        os.getcwd()
    except OSError:
        raise ConfigurationError(
            "the working directory no longer exists or may not be read, and the conformance suite needs one; "
            "change to another directory"
        ) from None
    for module in MODULES:
        import_module(f"flowstore_conformance.checks.{module}")
    order = {clause: number for number, clause in enumerate(CLAUSES)}
    return tuple(sorted(_checks.values(), key=lambda one: (order[one.clauses[0]], one.name)))
