"""What two violations must have in common to be the same violation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from flowstore_conformance.diffing import differences
from flowstore_conformance.history import Call, Outcome, Raised, Returned
from flowstore_core import RunStatus, SignalDeliveryStatus, StallReason, StepStatus

_STATES = frozenset(
    member.value for kind in (RunStatus, StepStatus, SignalDeliveryStatus, StallReason) for member in kind
)
"""Texts that say what happened. Other texts, such as keys and payloads, differ from program to program."""


@dataclass(frozen=True, slots=True)
class WrongAnswer:
    """An answer that breaks the contract, without the values that differ from program to program."""

    method: str
    place: tuple[str, ...]
    """The fields that lead to the wrong value; empty where the answer as a whole is wrong."""
    expected: str
    actual: str


@dataclass(frozen=True, slots=True)
class Signature:
    """A broken clause and the answers that break it."""

    clause: str
    wrong: frozenset[WrongAnswer]

    def covers(self, other: Signature) -> bool:
        """Whether the other violation is this one: the same clause, and no other wrong answer."""
        return self.clause == other.clause and bool(other.wrong) and other.wrong <= self.wrong


def wrong_answers(call: Call, expected: Outcome | None, actual: Outcome) -> Iterator[WrongAnswer]:
    """The ways in which an answer is wrong; ``expected`` is None for an error that is never right."""
    if isinstance(expected, Returned) and isinstance(actual, Returned):
        for path, wanted, got in differences(expected.value, actual.value):
            place = tuple(part for part in path if part.startswith("."))
            yield WrongAnswer(call.method, place, _kind(wanted), _kind(got))
    else:
        yield WrongAnswer(call.method, (), _kind(expected), _kind(actual))


def _kind(value: Any) -> str:
    """A value without what is peculiar to one program."""
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
