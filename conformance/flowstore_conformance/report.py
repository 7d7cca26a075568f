"""The report of a run: results of checks, combined into statuses of clauses and a level."""

from __future__ import annotations

import dataclasses
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from functools import cached_property

from flowstore_conformance.causes import Cause, find_causes
from flowstore_conformance.clauses import CLAUSES, Clause, Level
from flowstore_conformance.method_signatures import SignatureFinding
from flowstore_conformance.results import CheckResult, ClauseResult
from flowstore_conformance.status import Status
from flowstore_conformance.waivers import Waiver, WaiverResult, WaiverState
from flowstore_core import PROPERTIES, StoreLimits

CONTRACT_PAGE = "docs/contract.md"


@dataclass(frozen=True, kw_only=True)
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
    selected: tuple[str, ...] = ()
    """The selected clauses; empty for a full run. A partial run grants no level."""
    selected_checks: tuple[str, ...] = ()
    """The names of the selected checks or examples; empty if checks were not selected by name."""
    waivers: tuple[WaiverResult, ...] = ()
    findings: tuple[SignatureFinding, ...] = ()
    """Methods that core cannot call."""
    incomplete: str | None = None
    """Why the run ended early; None if it is complete."""
    check_timeout: float | None = None
    """The configured time limit of a check, in seconds."""
    variants: tuple[str, ...] = ()
    """The variants of the backend that checks may have run with; empty if it declares none."""
    left_behind: tuple[str, ...] = ()
    """Scratch namespaces that could not be dropped, redacted."""
    limits: StoreLimits = field(default_factory=StoreLimits)
    """The limits at which the store was checked (LIM-1)."""
    max_skew: timedelta | None = None
    """The store's accuracy of CLK-1; None without SHARED_CLOCK."""

    @cached_property
    def clauses(self) -> tuple[ClauseResult, ...]:
        """Every clause of the contract, in its order."""
        return tuple(self._clause(clause) for clause in CLAUSES.values())

    def _clause(self, clause: Clause) -> ClauseResult:
        own = tuple(one for one in self.results if clause.id in one.check.clauses or _names(one, clause.id))
        return ClauseResult(
            clause=clause,
            status=_fold(clause.id, own),
            assertions=sum(result.assertions for result in own),
            results=own,
        )

    @property
    def failures(self) -> tuple[CheckResult, ...]:
        """The failed checks, waived ones included."""
        return tuple(one for one in self.results if one.failure is not None)

    @cached_property
    def causes(self) -> tuple[Cause, ...]:
        """The probable causes of all failures and wrong methods."""
        findings = () if self.selected or self.incomplete else self.findings
        return find_causes(self.results, findings)

    @property
    def shown_clauses(self) -> tuple[ClauseResult, ...]:
        """The clauses to show: all, or in a partial run the selected and the broken ones."""
        if not self.selected:
            return self.clauses
        broken = (Status.FAIL, Status.WAIVED)
        return tuple(one for one in self.clauses if one.clause.id in self.selected or one.status in broken)

    @property
    def hidden_note(self) -> str | None:
        """A note on the clauses that are not shown; None if all are."""
        number = len(self.clauses) - len(self.shown_clauses)
        plural = "s were" if number != 1 else " was"
        return f"{number} other clause{plural} not selected" if number else None

    @property
    def problems(self) -> tuple[str, ...]:
        """Problems beside clauses that fail the run: expired or unnecessary waivers."""
        return tuple(one.problem for one in self.waivers if one.problem is not None)

    @property
    def counts(self) -> Mapping[Status, int]:
        """The number of shown clauses by status."""
        found = Counter(one.status for one in self.shown_clauses)
        return {status: found[status] for status in Status}

    @property
    def conforms(self) -> bool:
        """Whether all selected clauses were checked and passed, or are waived.

        False if a check failed, stayed inconclusive or could not run, if the run was interrupted, if a waiver
        has a problem, if nothing ran, and, in a full run, if a clause was not checked.
        """
        statuses = {one.status for one in self.results}
        bad = statuses & {Status.FAIL, Status.INCONCLUSIVE, Status.NOT_RUN}
        checked = bool(statuses & {Status.PASS, Status.WAIVED})
        whole = not self.incomplete and (bool(self.selected) or not self.unchecked)
        return not self.problems and not bad and checked and whole

    @property
    def unchecked(self) -> tuple[str, ...]:
        """The clauses without a check."""
        return tuple(one.clause.id for one in self.clauses if not one.results)

    @property
    def level(self) -> Level | None:
        """The highest level whose clauses, and those of all lower levels, ran and passed.

        None for a partial run, and for a run that does not conform.
        """
        granted = None
        if not self.selected and self.conforms:
            for level in Level:
                if self.lacking(level):
                    break
                granted = level
        return granted

    def required(self, level: Level) -> tuple[ClauseResult, ...]:
        """The clauses that a level adds to the one below."""
        return tuple(one for one in self.clauses if one.clause.level is level)

    def lacking(self, level: Level) -> tuple[ClauseResult, ...]:
        """The required clauses of a level that did not pass."""
        return tuple(
            one for one in self.required(level) if one.status is not Status.PASS and not self._is_fact(one)
        )

    def _is_fact(self, one: ClauseResult) -> bool:
        # A property, such as DURABLE, is no operation: the memory backend reaches level full without it.
        undeclared = one.clause.needs in PROPERTIES and one.clause.needs not in self.capabilities
        return undeclared and one.status is Status.UNSUPPORTED

    @property
    def verdict(self) -> str:
        """The verdict in one word."""
        if self.conforms:
            return "CONFORMS"
        if self._ids(Status.FAIL) or self.problems or self._wrong_methods:
            return "VIOLATES"
        return "INCOMPLETE" if self.incomplete else "UNDECIDED"

    @property
    def _wrong_methods(self) -> list[str]:
        return [one.finding.method for one in self.causes if one.finding is not None]

    @property
    def headline(self) -> str:
        """The verdict in one sentence."""
        headline = self._headline()
        if self.incomplete is None:
            return headline
        return f"{self.incomplete}; {headline}" if self.verdict == "VIOLATES" else self.incomplete

    def _headline(self) -> str:
        failed, open_ones = self._ids(Status.FAIL), self._ids(Status.INCONCLUSIVE)
        broken = f"{_count(failed, 'clause')} broken: {_list(failed)}" if failed else ""
        if wrong := self._wrong_methods:
            methods = f"core cannot call {_list(wrong)}"
            return f"{methods}; {broken}" if broken else methods
        if broken:
            return broken
        if self.problems:
            return f"{_count(self.problems, 'waiver')} expired or unnecessary"
        if open_ones:
            return f"{_count(open_ones, 'clause')} inconclusive, so not passed: {_list(open_ones)}"
        if not self.conforms and self.unchecked and not self.selected:
            return f"no check covers {_list(self.unchecked)}"
        if not self.conforms:
            return "no selected clause could be checked"
        if self.selected:
            if self.selected_checks:
                return f"{_list(self.selected_checks)} passed; a partial run grants no level"
            return f"{_list(self.selected)} kept; a partial run grants no level"
        waived = self._ids(Status.WAIVED)
        beside = f", {len(waived)} waived" if waived else ""
        if self.level is not None:
            reduced = self.limits.reduced()
            within = f", within {', '.join(reduced)}" if reduced else ""
            return f"level {self.level}{within}{beside}"
        lacking = [one.clause.id for one in self.lacking(Level.BASE)]
        return f"no level{beside}: level {Level.BASE} lacks {_list(lacking)}"

    def _ids(self, status: Status) -> list[str]:
        return [one.clause.id for one in self.clauses if one.status is status]

    def command(self, result: CheckResult) -> str:
        """The command that repeats a check with the same seed."""
        words = ["flowstore", "conformance", self.url, "--profile", self.profile]
        words += ["--clause", result.check.clauses[0]]
        if self.selected_checks:
            words += ["--check", result.check.name]
        words += ["--seed", str(self.seed)]
        if self.check_timeout is not None:
            words += ["--check-timeout", f"{self.check_timeout:g}"]
        if result.variant is not None:
            words += ["--variant", result.variant]
        return shlex.join(words)


def apply_waivers(report: Report, waivers: Sequence[Waiver], *, today: date | None = None) -> Report:
    """Mark the waived failures of a report and add the state of each waiver."""
    now = today or datetime.now(UTC).date()
    valid = {one.clause: one for one in waivers if one.expires >= now}
    results = []
    for result in report.results:
        waiver = valid.get(result.failure.clause) if result.failure is not None else None
        if waiver is not None and result.status is Status.FAIL:
            reason = f"{waiver.reason} ({waiver.link}; until {waiver.expires})"
            result = dataclasses.replace(result, status=Status.WAIVED, reason=reason)
        results.append(result)
    waived = dataclasses.replace(report, results=tuple(results))
    statuses = {one.clause.id: {each.status for each in one.results} for one in waived.clauses}
    folded = {one.clause.id: one.status for one in waived.clauses}
    states = []
    for waiver in waivers:
        clause = waiver.clause
        if waiver.expires < now:
            state = WaiverState.EXPIRED
        elif folded[clause] is Status.WAIVED:
            state = WaiverState.USED
        elif not statuses[clause]:
            state = WaiverState.NOT_SELECTED
        elif folded[clause] in (Status.PASS, Status.UNSUPPORTED):
            state = WaiverState.NOT_NEEDED
        else:
            state = WaiverState.UNDECIDED
        states.append(WaiverResult(waiver=waiver, state=state))
    return dataclasses.replace(waived, waivers=tuple(states))


def anchor(clause: str) -> str:
    """The link to a clause in the contract."""
    return f"{CONTRACT_PAGE}#{clause.lower()}"


def _count(things: object, noun: str) -> str:
    number = len(things)  # type: ignore[arg-type]
    return f"{number} {noun}{'s are' if number != 1 else ' is'}"


def _list(ids: object) -> str:
    found = list(ids)  # type: ignore[call-overload]
    shown = ", ".join(found[:6])
    return shown if len(found) <= 6 else f"{shown} and {len(found) - 6} more"


def _names(result: CheckResult, clause: str) -> bool:
    return result.failure is not None and result.failure.clause == clause


def _fold(clause: str, results: tuple[CheckResult, ...]) -> Status:
    """The status of a clause: the worst of its checks. A failure counts only for the clause it names."""
    found = set()
    for result in results:
        if result.failure is None or _names(result, clause):
            found.add(result.status)
        else:
            # A failed check of several clauses names the broken one; the status of the others is unknown.
            found.add(Status.NOT_RUN)
    for status in (Status.FAIL, Status.WAIVED, Status.INCONCLUSIVE, Status.NOT_RUN, Status.PASS):
        if status in found:
            return status
    return Status.UNSUPPORTED if found else Status.NOT_RUN
