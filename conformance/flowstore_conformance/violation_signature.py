"""Signatures of violations; shrinking keeps the signature of the original violation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from flowstore_conformance.diffing import differences
from flowstore_conformance.history import Call, Outcome, Raised, Returned
from flowstore_core import NotSupportedError, RunStatus, SignalDeliveryStatus, StallReason, StepStatus

_STATES = frozenset(
    member.value for kind in (RunStatus, StepStatus, SignalDeliveryStatus, StallReason) for member in kind
)
"""Strings that name states. Other strings, such as keys and payloads, differ between sequences of calls."""


@dataclass(frozen=True, slots=True)
class WrongAnswer:
    """A wrong result of a call, without values that differ between sequences of calls."""

    method: str
    place: tuple[str, ...]
    """The path of fields to the wrong value; empty if the whole result is wrong."""
    expected: str
    actual: str


@dataclass(frozen=True, slots=True)
class Signature:
    """A broken clause and the wrong results."""

    clause: str
    wrong: frozenset[WrongAnswer]

    def covers(self, other: Signature) -> bool:
        """Whether the other violation has the same clause and no additional wrong results."""
        return self.clause == other.clause and bool(other.wrong) and other.wrong <= self.wrong

    @property
    def shows_missing_method(self) -> bool:
        """Whether the store lacks a method that a call needs. Fewer calls would explain no more."""
        return any(one.actual == NotSupportedError.__name__ for one in self.wrong)


def wrong_answers(call: Call, expected: Outcome | None, actual: Outcome) -> Iterator[WrongAnswer]:
    """The differences from the expected result, which is None for an error outside the contract."""
    if isinstance(expected, Returned) and isinstance(actual, Returned):
        for path, wanted, got in differences(expected.value, actual.value):
            place = tuple(part for part in path if part.startswith("."))
            yield WrongAnswer(call.method, place, _kind(wanted), _kind(got))
    else:
        yield WrongAnswer(call.method, (), _kind(expected), _kind(actual))


def _kind(value: Any) -> str:
    """The kind of a value, without details of one sequence of calls."""
    match value:
        case Raised():
            return value.error
        case Returned():
            return _kind(value.value)
        case None | bool():
            return repr(value)
        case str():
            return value if value in _STATES else "str"
        case (str() as name, tuple()):
            return name
    return type(value).__name__
