"""Calls, outcomes, operations and histories."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import Enum
from types import MappingProxyType
from typing import Any
from uuid import UUID

from flowstore_conformance.archives import archive_source
from flowstore_conformance.claim_tokens import ClaimToken, comparable_owner
from flowstore_core import (
    Capability,
    EndedStep,
    FlowRunDetail,
    FlowStoreError,
    RunArchive,
    RunPage,
    StepRequest,
    operations,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A method name and its keyword arguments."""

    method: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def operation(self) -> operations.Operation:
        """The row of the operation table."""
        return operations.OPERATIONS[self.method]

    def is_offered(self, capabilities: Collection[Capability]) -> bool:
        """Whether a store with these capabilities accepts the operation and the given keywords."""
        keywords = operations.KEYWORD_CAPABILITIES.get(self.method, {})
        defaults: tuple[Any, ...] = (None, 0, (), [])
        needs = {
            keywords[name]
            for name, value in self.arguments.items()
            if name in keywords and value not in defaults
        }
        return self.operation.is_offered(capabilities) and needs <= set(capabilities)

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
    """Infinite for an unknown outcome whose effect may still occur; or the time after which it may not."""
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


_OWNER_FIELDS = frozenset({"owner", "started_owner"})
"""The fields of records that may hold an owner that a store made, of which only the kind is compared."""


def comparable(value: Any, *, exact_times: bool = True) -> Any:
    """Convert a result to a hashable value for comparisons of two stores, or of a store and the model.

    All random owners of claims are equal.
    Mappings become tuples of pairs in key order, sequences become tuples, enums become strings. With
    ``exact_times=False``, for a store without a virtual clock, all datetimes are equal.
    """
    kind: type = type(value)
    if kind in _PLAIN_TYPES:
        return value
    if isinstance(value, datetime):
        return value if exact_times else "<time>"
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, FlowRunDetail) and not exact_times:
        # Ordered by their start times, which are not exact.
        value = dataclasses.replace(value, steps=tuple(sorted(value.steps, key=lambda one: one.step_key)))
    if (names := _field_names(kind)) is not None:
        fields = []
        for name in names:
            each = getattr(value, name)
            if name in _OWNER_FIELDS:
                each = comparable_owner(each)
            # Most fields are plain; this function runs on every result.
            if type(each) not in _PLAIN_TYPES:
                each = comparable(each, exact_times=exact_times)
            fields.append((name, each))
        return (kind.__name__, tuple(fields))
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
    if isinstance(value, FlowStoreError):
        # A result of advance_runs.
        return error_name(value)
    if isinstance(value, float):
        # Stores compute percentiles in floats, the model computes them exactly.
        return round(value, 3)
    return value


def error_name(error: FlowStoreError) -> str:
    return type(error).__name__


def literal(value: Any, names: Mapping[UUID, str] | None = None) -> str:
    """A value as Python source that uses only names imported by generated programs."""
    names = names or {}
    if isinstance(value, ClaimToken):
        return f"owners[{literal(value.run_id, names)}, {value.step_key!r}]"
    if isinstance(value, RunArchive):
        return archive_source(value, names)
    if isinstance(value, (StepRequest, EndedStep)):
        return _record(value, names)
    if isinstance(value, str) and (queue := split_queue(value)) is not None and queue[1] in names:
        return f"f'{queue[0]}/{{{names[queue[1]]}.hex}}'"
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


def split_queue(name: str) -> tuple[str, UUID] | None:
    """The parts of a queue name that a race has for itself: its first name, and an id of the race."""
    plain, _, own = name.rpartition("/")
    try:
        return (plain, UUID(hex=own)) if plain else None
    except ValueError:
        return None


def _record(value: StepRequest | EndedStep, names: Mapping[UUID, str]) -> str:
    given = [
        f"{each.name}={literal(getattr(value, each.name), names)}"
        for each in dataclasses.fields(value)
        if getattr(value, each.name) != each.default
    ]
    return f"{type(value).__name__}({', '.join(given)})"


def _timedelta(value: timedelta) -> str:
    # A float of seconds would lose microseconds of long durations.
    parts = {"days": value.days, "seconds": value.seconds, "microseconds": value.microseconds}
    return ", ".join(f"{name}={number}" for name, number in parts.items() if number) or "0"
