"""What clients asked and what they were told: calls, outcomes, operations and histories."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import Enum
from types import MappingProxyType
from typing import Any
from uuid import UUID

from flowstore_core import FlowRunDetail, FlowStoreError, operations


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One operation with all its arguments by keyword, before it is made."""

    method: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def operation(self) -> operations.Operation:
        """The row of the operation table."""
        return operations.OPERATIONS[self.method]

    def source(self, names: Mapping[UUID, str] | None = None) -> str:
        """The call as a line of Python, for a program that a person can run.

        ``names`` are expressions that stand for ids.
        """
        given = ", ".join(f"{name}={literal(value, names)}" for name, value in self.arguments.items())
        return f"store.{self.method}({given})"


class Unknown(Enum):
    """The outcome of a call nobody heard the answer of: killed, cancelled, or OutcomeUnknownError."""

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
    """What came, where it is none of the contract's errors."""


Outcome = Returned | Raised | Unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """A call as it happened. Times are seconds of one monotonic clock of the harness."""

    client: int
    call: Call
    invoked: float
    returned: float
    """Infinite for an outcome that is unknown: it may still happen."""
    outcome: Outcome
    now: datetime
    """The virtual clock's time, which stands still while calls are under way."""


@dataclass(frozen=True, slots=True)
class History:
    """All operations of a race, by the time they were invoked."""

    operations: tuple[Operation, ...]

    @staticmethod
    def of(operations: Sequence[Operation]) -> History:
        return History(tuple(sorted(operations, key=lambda one: one.invoked)))

    def overlaps(self) -> int:
        """How many pairs of operations of different clients were under way at the same time."""
        pairs = 0
        for index, one in enumerate(self.operations):
            for other in self.operations[index + 1 :]:
                if other.invoked >= one.returned:
                    break
                pairs += other.client != one.client
        return pairs


def comparable(value: Any, *, exact_times: bool = True) -> Any:
    """An answer as a hashable value that two stores, or a store and the model, can be compared by.

    Mappings become tuples of pairs in key order, sequences tuples, enums their text. With
    ``times=False``, for a store on its own clock, a datetime only says that it is there.
    """
    if isinstance(value, datetime):
        return value if exact_times else "<time>"
    if isinstance(value, FlowRunDetail) and not exact_times:
        # Ordered by the time they started at, which is not known then.
        value = dataclasses.replace(value, steps=tuple(sorted(value.steps, key=lambda one: one.step_key)))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = tuple(
            (each.name, comparable(getattr(value, each.name), exact_times=exact_times))
            for each in dataclasses.fields(value)
        )
        return (type(value).__name__, fields)
    if isinstance(value, Mapping):
        return tuple(sorted((key, comparable(each, exact_times=exact_times)) for key, each in value.items()))
    if isinstance(value, (frozenset, set)):
        return frozenset(comparable(each, exact_times=exact_times) for each in value)
    if isinstance(value, (list, tuple)):
        return tuple(comparable(each, exact_times=exact_times) for each in value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float):
        # Percentiles are computed in floats by stores and exactly by the model.
        return round(value, 3)
    return value


def error_name(error: FlowStoreError) -> str:
    return type(error).__name__


def literal(value: Any, names: Mapping[UUID, str] | None = None) -> str:
    """A value as Python source that needs only the names a generated program imports."""
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
    # Never as a float of seconds: a microsecond would be lost in a long one.
    parts = {"days": value.days, "seconds": value.seconds, "microseconds": value.microseconds}
    return ", ".join(f"{name}={number}" for name, number in parts.items() if number) or "0"
