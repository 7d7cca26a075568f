"""Results of checks: a failure, the result of one check, and the results of one clause."""

from __future__ import annotations

from dataclasses import dataclass

from flowstore_conformance.checks.registry import Check
from flowstore_conformance.clauses import Clause
from flowstore_conformance.history import History
from flowstore_conformance.linearizability import Verdict
from flowstore_conformance.method_signatures import SignatureFinding
from flowstore_conformance.status import Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A broken promise, with what a person needs to see and repeat it."""

    clause: str
    message: str
    program: str | None = None
    """A runnable program that shows it; it takes the URL of a store as its argument."""
    program_file: str | None = None
    """Where the program was written, if it was."""
    right_answer: str | None = None
    """What the same program prints on the memory backend."""
    history: History | None = None
    verdict: Verdict | None = None
    traceback: str | None = None
    """Of an exception that should not have come, without passwords."""
    reproductions: int = 1
    """How often it struck,"""
    repetitions: int = 1
    """of how many runs of the check with the same seed."""
    operation: str | None = None
    """The operation that hung or that raised the exception."""
    place: str | None = None
    """The line of the author's code where it hung or raised."""
    error: str | None = None
    """The class of the exception."""
    hung: bool = False
    """Whether a call did not end."""

    @property
    def trace_title(self) -> str:
        """What the traceback shows."""
        return "where it hangs" if self.hung else "where it came from"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """What became of one check."""

    check: Check
    status: Status
    assertions: int
    seconds: float
    seed: int
    """Of the whole run: the one that repeats it."""
    failure: Failure | None = None
    reason: str | None = None
    """Why it is inconclusive, unsupported, waived or did not run."""
    finding: SignatureFinding | None = None
    """The wrong method that kept it from running."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClauseResult:
    """A clause with the checks that look at it."""

    clause: Clause
    status: Status
    assertions: int
    """How often its checks put a promise to the test."""
    results: tuple[CheckResult, ...]

    @property
    def reason(self) -> str | None:
        """Why it has its status, where a check gives a reason; one that is named after the clause first."""
        given = [one for one in self.results if one.status is self.status and one.reason]
        given.sort(key=lambda one: one.check.clauses[0] != self.clause.id)
        if given:
            return given[0].reason
        if self.status is Status.NOT_RUN:
            stopped = {one.failure.clause: None for one in self.results if one.failure is not None}
            return f"cut short: checks of it stopped at {', '.join(stopped)}" if stopped else None
        return None
