"""Declaring and finding checks."""

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
    """The technique of a check."""

    EXAMPLE = "example"
    MODEL = "model"
    RACE = "race"
    SNAPSHOT = "snapshot"
    CANCELLATION = "cancellation"
    CRASH = "crash"
    HOSTILE = "hostile"
    VOLUME = "volume"
    CAPABILITY = "capability"
    FAULT = "fault"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One check: its clauses, its needs, and the coroutine that runs it."""

    name: str
    clauses: tuple[str, ...]
    """The first is the clause that the check reports by default."""
    kind: Kind
    needs: frozenset[Capability]
    sentence: str
    """The promise that the check tests, in one sentence: its docstring."""
    run: Run
    isolated: bool = True
    """Whether the check needs a new namespace; otherwise it uses only new ids and can share a used one."""
    changes_process: bool = False
    """Whether the check changes settings or blocks the event loop of its process."""

    @property
    def tolerates_others(self) -> bool:
        """Whether other checks may run at the same time, in other namespaces."""
        return self.kind in (Kind.EXAMPLE, Kind.HOSTILE) and not self.changes_process

    @property
    def id(self) -> str:
        return f"{self.clauses[0]} {self.name}"


_checks: dict[str, Check] = {}

# One module per noun, in the order of the contract, then the modules that test several nouns together.
MODULES = (
    "arguments",
    "round_trip",
    "encodings",
    "missing_runs",
    "runs",
    "records",
    "steps",
    "step_outcomes",
    "retries",
    "recovery",
    "claims",
    "dispatches",
    "queues",
    "advances",
    "watching",
    "controls",
    "idempotency",
    "signals",
    "outputs",
    "events",
    "retention",
    "deletion",
    "queries",
    "indexed_queries",
    "cursors",
    "orders",
    "statistics",
    "dates",
    "leases",
    "lost_replies",
    "faults",
    "migrations",
    "outages",
    "concurrent_batches",
    "rival_ends",
    "volumes",
    "run_volumes",
    "large_texts",
    "counters",
    "capabilities",
    "event_loops",
    "model",
    "transitions",
    "derived_reads",
    "races",
    "processes",
    "snapshots",
    "queue_races",
    "cancellation",
    "cancelled_dispatches",
    "cancelled_rivals",
    "crash",
    "killed_calls",
    # Repeats examples of the other modules.
    "real_clock",
)


def check(
    *clauses: str,
    needs: Iterable[Capability] = (),
    kind: Kind = Kind.EXAMPLE,
    isolated: bool = True,
    changes_process: bool = False,
) -> Callable[[Run], Run]:
    """Declare a check of some clauses; a backend without the needed capabilities reports it as unsupported.

    The need of the first clause is added to ``needs``. The function's docstring is the check's sentence.
    A check with ``isolated=False`` may run in a namespace that other checks have used; one with
    ``changes_process=True`` never runs at the same time as another.
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
            isolated=isolated,
            changes_process=changes_process,
        )
        return run

    return register


def all_checks() -> tuple[Check, ...]:
    """Every check, in the order of the contract's clauses.

    Raises ConfigurationError without a working directory, because importing Hypothesis needs one.
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
