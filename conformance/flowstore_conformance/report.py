"""What a run of the suite found: results of checks, folded into verdicts of clauses and a level."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from flowstore_conformance.checks.registry import Check
from flowstore_conformance.clauses import CLAUSES, Clause, Level
from flowstore_conformance.history import History
from flowstore_conformance.linearizability import Verdict

SCHEMA_VERSION = 1
"""Of the JSON report."""


class Status(StrEnum):
    """What became of a check, or of a clause."""

    PASS = "PASS"
    FAIL = "FAIL"
    UNSUPPORTED = "UNSUPPORTED"
    """The backend does not declare the capability, and refuses it as it must."""
    WAIVED = "WAIVED"
    INCONCLUSIVE = "INCONCLUSIVE"
    NOT_RUN = "NOT RUN"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A broken promise, with what a person needs to see and repeat it."""

    clause: str
    message: str
    program: str | None = None
    """A runnable program that shows it."""
    right_answer: str | None = None
    """What the same program prints on the memory backend."""
    history: History | None = None
    verdict: Verdict | None = None
    struck: int = 1
    """How often it struck,"""
    tried: int = 1
    """of how many tries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """What became of one check."""

    check: Check
    status: Status
    exercised: int
    seconds: float
    seed: int
    failure: Failure | None = None
    reason: str | None = None
    """Why it is inconclusive, unsupported, waived or did not run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClauseResult:
    """A clause with the checks that look at it."""

    clause: Clause
    status: Status
    exercised: int
    results: tuple[CheckResult, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One run of the suite against one backend."""

    backend: str
    url: str
    """Redacted."""
    capabilities: tuple[str, ...]
    profile: str
    seed: int
    started_at: datetime
    seconds: float
    results: tuple[CheckResult, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    selected: bool = False
    """Only some clauses were asked for, so no level is granted."""
    problems: tuple[str, ...] = ()
    """What makes the run fail beside failed clauses: an expired waiver, or one that is not needed."""

    @property
    def clauses(self) -> tuple[ClauseResult, ...]:
        """Every clause of the contract, in its order."""
        return tuple(self._clause(clause) for clause in CLAUSES.values())

    def _clause(self, clause: Clause) -> ClauseResult:
        own = tuple(result for result in self.results if clause.id in result.check.clauses)
        return ClauseResult(
            clause=clause,
            status=_fold(clause.id, own),
            exercised=sum(result.exercised for result in own),
            results=own,
        )

    @property
    def conforms(self) -> bool:
        """No clause fails, nothing stayed inconclusive, and no waiver is out of order."""
        bad = {Status.FAIL, Status.INCONCLUSIVE}
        return not self.problems and not any(result.status in bad for result in self.results)

    @property
    def level(self) -> Level | None:
        """The highest level of which every clause ran and passed; None for a partial run."""
        if self.selected or self.problems:
            return None
        granted = None
        for level in Level:
            required = [one for one in self.clauses if one.clause.level is level]
            if any(one.status is not Status.PASS for one in required if not _is_fact(one)):
                break
            granted = level
        return granted


def _is_fact(one: ClauseResult) -> bool:
    """DURABLE is a fact about a backend, not an operation: memory is full without it."""
    return one.clause.id == "CON-5" and one.status is Status.UNSUPPORTED


def _fold(clause: str, results: tuple[CheckResult, ...]) -> Status:
    """The status of a clause: the worst of its checks; a failure counts where its own clause is."""
    found = set()
    for result in results:
        if result.status is Status.FAIL and result.failure is not None:
            # A check of several clauses that fails names the one it broke; of the rest nothing is known.
            named = result.failure.clause
            found.add(Status.FAIL if named == clause else Status.NOT_RUN)
        else:
            found.add(result.status)
    for status in (Status.FAIL, Status.WAIVED, Status.INCONCLUSIVE, Status.PASS, Status.NOT_RUN):
        if status in found:
            if status is Status.PASS and Status.NOT_RUN in found:
                return Status.NOT_RUN
            return status
    return Status.UNSUPPORTED if found else Status.NOT_RUN
