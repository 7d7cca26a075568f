"""Groups failed checks by their probable cause, so that a report shows each cause once."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from flowstore_conformance.clauses import CLAUSES
from flowstore_conformance.method_signatures import SignatureFinding
from flowstore_conformance.registry import Kind
from flowstore_conformance.results import CheckResult

SIMPLEST = (
    Kind.EXAMPLE,
    Kind.CAPABILITY,
    Kind.HOSTILE,
    Kind.MODEL,
    Kind.SNAPSHOT,
    Kind.VOLUME,
    Kind.RACE,
    Kind.CANCELLATION,
    Kind.CRASH,
    Kind.FAULT,
)
"""The kinds of checks, those with the simplest failures first."""


class CauseKind(IntEnum):
    """The kind of a cause, the most specific first."""

    SIGNATURE = 0
    EXCEPTION = 1
    HANG = 2
    VIOLATION = 3

    @property
    def word(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """A probable cause and the checks that it affects."""

    kind: CauseKind
    title: str
    results: tuple[CheckResult, ...]
    """The affected checks, the simplest first. Empty for a wrong method that no check called."""
    finding: SignatureFinding | None = None

    @property
    def lead(self) -> CheckResult | None:
        """The simplest failed check; None if the affected checks did not run."""
        return self.results[0] if self.results and self.results[0].failure is not None else None

    @property
    def others(self) -> tuple[CheckResult, ...]:
        """The other affected checks."""
        return self.results[1:] if self.lead is not None else self.results


def find_causes(
    results: Iterable[CheckResult], findings: Sequence[SignatureFinding] = ()
) -> tuple[Cause, ...]:
    """Group failures by cause: by kind, then by the number of affected checks.

    A cause is one wrong method, one class of exception at one line of the author's code, one hanging
    operation, or one clause with wrong results.
    """
    groups: dict[Hashable, list[CheckResult]] = {}
    for result in results:
        if (key := _key(result)) is not None:
            groups.setdefault(key, []).append(result)
    causes = [_cause_of(sorted(group, key=_simplicity)) for group in groups.values()]
    explained = {one.finding for one in causes}
    causes += [
        Cause(kind=CauseKind.SIGNATURE, title=one.title, results=(), finding=one)
        for one in findings
        if one.certain and one not in explained
    ]
    return tuple(sorted(causes, key=lambda one: (one.kind, -len(one.results), _first_clause(one))))


def _key(result: CheckResult) -> Hashable | None:
    if result.finding is not None:
        return result.finding
    failure = result.failure
    if failure is None:
        return None
    if failure.hung:
        return (CauseKind.HANG, failure.operation or failure.place)
    if failure.error is not None and (failure.place is not None or failure.clause == "CON-2"):
        return (CauseKind.EXCEPTION, failure.error, failure.place or failure.operation)
    return (CauseKind.VIOLATION, failure.clause)


def _simplicity(result: CheckResult) -> tuple[int, str]:
    if result.failure is not None and result.failure.hung:
        # In the order of the run: the first hang had the longest limit.
        return (0, "")
    return (SIMPLEST.index(result.check.kind), result.check.name)


def _first_clause(cause: Cause) -> int:
    order = list(CLAUSES)
    return order.index(cause.results[0].check.clauses[0]) if cause.results else len(order)


def _cause_of(results: list[CheckResult]) -> Cause:
    first = results[0]
    if first.finding is not None:
        kind, title = CauseKind.SIGNATURE, first.finding.title
        return Cause(kind=kind, title=title, results=tuple(results), finding=first.finding)
    failure = first.failure
    assert failure is not None
    if failure.hung:
        kind, title = CauseKind.HANG, f"{failure.operation or 'a check'} does not end"
    elif isinstance(key := _key(first), tuple) and key[0] is CauseKind.EXCEPTION:
        kind, title = CauseKind.EXCEPTION, f"{failure.error} is raised"
        if failure.operation is not None:
            title += f" by {failure.operation}"
    else:
        kind = CauseKind.VIOLATION
        title = f"{failure.clause} is broken: {CLAUSES[failure.clause].sentence}"
    if failure.place is not None and kind is not CauseKind.VIOLATION:
        title += f", at {failure.place}"
    return Cause(kind=kind, title=title, results=tuple(results))
