"""Declaring and finding checks."""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from importlib import import_module
from importlib.util import find_spec
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
    """Whether the check needs an empty namespace; otherwise it uses only new ids and can share a used one."""
    alone: bool = False
    """Whether no other check may run in its process at the same time: the check changes or measures it."""
    rotation: str | None = None
    """A name that similar checks share. In the profile quick the seed selects one of them."""

    only_with_faults: bool = False
    """Whether the check belongs to the part that ``--faults`` adds."""

    @property
    def breaks_namespace(self) -> bool:
        """Whether the check may leave its namespace in a state in which emptying it does not make it new."""
        return self.kind in (Kind.FAULT, Kind.CRASH, Kind.CAPABILITY)

    @property
    def id(self) -> str:
        return f"{self.clauses[0]} {self.name}"


_checks: dict[str, Check] = {}

# One module per noun, in the order of the contract, then the modules that test several nouns together.
MODULES = (
    "arguments",
    "round_trip",
    "limits",
    "clocks",
    "encodings",
    "missing_runs",
    "runs",
    "tags",
    "records",
    "steps",
    "step_outcomes",
    "retries",
    "recovery",
    "claims",
    "claimed_starts",
    "dispatches",
    "queues",
    "advances",
    "watching",
    "controls",
    "idempotency",
    "signals",
    "mailbox",
    "outputs",
    "events",
    "retention",
    "deletion",
    "transfer",
    "queries",
    "indexed_queries",
    "cursors",
    "orders",
    "statistics",
    "dates",
    "leases",
    "lost_replies",
    "faults",
    "disturbed",
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
    alone: bool = False,
    rotation: str | None = None,
    only_with_faults: bool = False,
) -> Callable[[Run], Run]:
    """Declare a check of some clauses; a backend without the needed capabilities reports it as unsupported.

    The need of the first clause is added to ``needs``. The function's docstring is the check's sentence.
    A check with ``isolated=False`` may run in a namespace that other checks have used; one with
    ``alone=True`` never runs at the same time as another of its process. The profile quick runs one check of
    each ``rotation``. One with ``only_with_faults=True`` runs only if faults are asked for.
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
            alone=alone,
            rotation=rotation,
            only_with_faults=only_with_faults,
        )
        return run

    return register


def all_checks() -> tuple[Check, ...]:
    """Every check, in the order of the contract's clauses.

    Raises ConfigurationError without a working directory, because Hypothesis needs one.
    """
    try:
        os.getcwd()
    except OSError:
        raise ConfigurationError(
            "the working directory no longer exists or may not be read, and the conformance suite needs one; "
            "change to another directory"
        ) from None
    if find_spec("hypothesis") is None:
        # The check that needs it imports it when it runs, because that takes long.
        raise ModuleNotFoundError("No module named 'hypothesis'", name="hypothesis")
    for module in MODULES:
        import_module(f"flowstore_conformance.checks.{module}")
    order = {clause: number for number, clause in enumerate(CLAUSES)}
    return tuple(sorted(_checks.values(), key=lambda one: (order[one.clauses[0]], one.name)))


def rotate(
    checks: Sequence[Check], seed: int, capabilities: Collection[Capability], *, faults: bool = False
) -> list[Check]:
    """The checks of a run of the profile quick: one check of each rotation, and all without one.

    A check that needs more than the ``capabilities`` is chosen only if all of its rotation do. If faults are
    asked for, all checks of faults.
    """
    if faults:
        checks = [replace(one, rotation=None) if one.kind is Kind.FAULT else one for one in checks]
    chosen: dict[str, Check] = {}
    for name in {one.rotation for one in checks} - {None}:
        similar = [one for one in checks if one.rotation == name]
        similar = [one for one in similar if one.needs <= frozenset(capabilities)] or similar
        chosen[str(name)] = random.Random(f"{seed}/{name}").choice(similar)
    return [one for one in checks if one.rotation is None or chosen[one.rotation] is one]
