"""Results of checks: a failure, the result of one check, and the results of one clause."""

from __future__ import annotations

from dataclasses import dataclass

from flowstore_conformance.clauses import Clause
from flowstore_conformance.history import History
from flowstore_conformance.linearizability import Verdict
from flowstore_conformance.method_signatures import SignatureFinding
from flowstore_conformance.registry import Check
from flowstore_conformance.status import Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A violation of the contract, with the evidence and the means to repeat it."""

    clause: str
    message: str
    program: str | None = None
    """A runnable program that reproduces it; takes the URL of a store as its argument."""
    program_file: str | None = None
    """The path of the program, if it was written."""
    right_answer: str | None = None
    """The output of the same program on the memory backend."""
    history: History | None = None
    verdict: Verdict | None = None
    traceback: str | None = None
    """The traceback of an unexpected exception, without passwords."""
    reproductions: int = 1
    """Number of failed runs,"""
    repetitions: int = 1
    """of this number of runs of the check with the same seed."""
    operation: str | None = None
    """The operation that hung or that raised the exception."""
    place: str | None = None
    """The line of the author's code that hung or raised."""
    error: str | None = None
    """The class of the exception."""
    hung: bool = False
    """Whether a call did not end."""

    @property
    def trace_title(self) -> str:
        """The title of the traceback."""
        return "where it hangs" if self.hung else "traceback"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """The result of one check."""

    check: Check
    status: Status
    assertions: int
    seconds: float
    seed: int
    """The seed of the whole run, which repeats it."""
    failure: Failure | None = None
    reason: str | None = None
    """Why the check is inconclusive, unsupported, waived or not run."""
    variant: str | None = None
    """The backend's variant that the check ran with; None if the backend declares none."""
    notes: tuple[str, ...] = ()
    """What a passed check measured."""
    finding: SignatureFinding | None = None
    """The method that prevented the check from running."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClauseResult:
    """A clause with the results of its checks."""

    clause: Clause
    status: Status
    assertions: int
    """Number of assertions in its checks."""
    results: tuple[CheckResult, ...]

    @property
    def gap(self) -> str | None:
        """The reason why a part of a clause that passed is UNSUPPORTED; None if no part is."""
        if self.status is not Status.PASS:
            return None
        return next((one.reason for one in self.results if one.status is Status.UNSUPPORTED), None)

    @property
    def reason(self) -> str | None:
        """The reason for the status, if a check gives one; preferably a check named after the clause."""
        given = [one for one in self.results if one.status is self.status and one.reason]
        given.sort(key=lambda one: one.check.clauses[0] != self.clause.id)
        if given:
            return given[0].reason
        if self.status is Status.NOT_RUN:
            stopped = {one.failure.clause: None for one in self.results if one.failure is not None}
            return f"not completed: its checks failed at {', '.join(stopped)}" if stopped else None
        return None
