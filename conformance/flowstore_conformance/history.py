"""Calls, outcomes, operations and histories."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import Enum
from types import MappingProxyType
from typing import Any
from uuid import UUID

from flowstore_core import FlowRunDetail, FlowStoreError, RunPage, operations


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A method name and its keyword arguments."""

    method: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def operation(self) -> operations.Operation:
        """The row of the operation table."""
        return operations.OPERATIONS[self.method]

    def source(self, names: Mapping[UUID, str] | None = None, *, store: str = "store") -> str:
        """The call as a Python expression on a store. ``names`` maps ids to expressions."""
        given = ", ".join(f"{name}={literal(value, names)}" for name, value in self.arguments.items())
        return f"{store}.{self.method}({given})"


class Unknown(Enum):
    """The outcome of a call without an answer: killed, cancelled, or OutcomeUnknownError."""

    UNKNOWN = "unknown"


UNKNOWN = Unknown.UNKNOWN


@dataclass(frozen=True, slots=True)
class Returned:
    """A call that returned; ``value`` is comparable (see comparable)."""

    value: Any


@dataclass(frozen=True, slots=True)
class Raised:
    """A call that raised; equal if the class has the same name."""

    error: str
    exception: Exception | None = field(default=None, compare=False, repr=False)
    """The exception, if it is not an error of the contract."""


Outcome = Returned | Raised | Unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """A call with its outcome. Times are seconds of the harness's monotonic clock."""

    client: int
    call: Call
    invoked: float
    returned: float
    """Infinite for an unknown outcome, whose effect may still occur."""
    outcome: Outcome
    now: datetime
    """The time of the virtual clock, which stands still during calls."""


@dataclass(frozen=True, slots=True)
class History:
    """All operations of a race, ordered by invocation."""

    operations: tuple[Operation, ...]

    @staticmethod
    def of(operations: Sequence[Operation]) -> History:
        return History(tuple(sorted(operations, key=lambda one: one.invoked)))

    def overlaps(self) -> list[tuple[Operation, Operation]]:
        """The overlapping pairs of operations of different clients."""
        pairs = []
        for index, one in enumerate(self.operations):
            for other in self.operations[index + 1 :]:
                if other.invoked >= one.returned:
                    break
                if other.client != one.client:
                    pairs.append((one, other))
        return pairs


_PLAIN_TYPES = frozenset({bool, int, str, UUID, type(None)})
"""The types of most values, which are comparable as they are; subclasses such as enums are not."""


@functools.cache
def _field_names(kind: type) -> tuple[str, ...] | None:
    """The names of a dataclass's fields; None for another class."""
    if not dataclasses.is_dataclass(kind):
        return None
    return tuple(each.name for each in dataclasses.fields(kind))


def comparable(value: Any, *, exact_times: bool = True) -> Any:
    """Convert a result to a hashable value for comparisons of two stores, or of a store and the model.

    Mappings become tuples of pairs in key order, sequences become tuples, enums become strings. With
    ``exact_times=False``, for a store without a virtual clock, all datetimes are equal.
    """
    kind: type = type(value)
    if kind in _PLAIN_TYPES:
        return value
    if isinstance(value, datetime):
        return value if exact_times else "<time>"
    if isinstance(value, FlowRunDetail) and not exact_times:
        # Ordered by their start times, which are not exact.
        value = dataclasses.replace(value, steps=tuple(sorted(value.steps, key=lambda one: one.step_key)))
    if (names := _field_names(kind)) is not None:
        fields = tuple((name, comparable(getattr(value, name), exact_times=exact_times)) for name in names)
        return (kind.__name__, fields)
    if isinstance(value, RunPage):
        return (
            "RunPage",
            tuple((n, comparable(v, exact_times=exact_times)) for n, v in value._asdict().items()),
        )
    if isinstance(value, Mapping):
        return tuple(sorted((key, comparable(each, exact_times=exact_times)) for key, each in value.items()))
    if isinstance(value, (frozenset, set)):
        return frozenset(comparable(each, exact_times=exact_times) for each in value)
    if isinstance(value, (list, tuple)):
        return tuple(comparable(each, exact_times=exact_times) for each in value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float):
        # Stores compute percentiles in floats, the model computes them exactly.
        return round(value, 3)
    return value


def error_name(error: FlowStoreError) -> str:
    return type(error).__name__


def literal(value: Any, names: Mapping[UUID, str] | None = None) -> str:
    """A value as Python source that uses only names imported by generated programs."""
    names = names or {}
    if isinstance(value, UUID):
        if value in names:
            return names[value]
        return f"UUID(int={value.int})" if value.int < 1 << 40 else f"UUID({str(value)!r})"
    if isinstance(value, datetime):
        return f"datetime.fromisoformat({value.isoformat()!r})"
    if isinstance(value, timedelta):
        return f"timedelta({_timedelta(value)})"
    if isinstance(value, Enum):
        return repr(value.value)
    if isinstance(value, (dict, MappingProxyType)):
        pairs = (f"{literal(k, names)}: {literal(v, names)}" for k, v in sorted(value.items()))
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, (frozenset, set)):
        return "[" + ", ".join(sorted(literal(each, names) for each in value)) + "]"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(literal(each, names) for each in value) + "]"
    return repr(value)


def _timedelta(value: timedelta) -> str:
    # A float of seconds would lose microseconds of long durations.
    parts = {"days": value.days, "seconds": value.seconds, "microseconds": value.microseconds}
    return ", ".join(f"{name}={number}" for name, number in parts.items() if number) or "0"
