"""A statement that writes any number of calls of one operation; see batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Row = tuple[Any, ...]
"""One call's columns, as its statement gets them: run_id and step_key first."""


def read_nothing(rows: Sequence[Row], found: Any) -> Sequence[None]:
    """The answers of an operation that has none."""
    return [None] * len(rows)


def read_done(column: str) -> Callable[[Sequence[Row], Any], Sequence[bool]]:
    """Whether each row was written: ``every`` one, or those whose numbers a column holds."""

    def read(rows: Sequence[Row], found: Any) -> Sequence[bool]:
        if found["every"]:
            return [True] * len(rows)
        done = set(found[column] or ())
        return [n in done for n in range(1, len(rows) + 1)]

    return read


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Batched:
    """A statement for any number of calls of one operation.

    ``statement`` gets the not-after time ($1), the virtual now or NULL ($2), and from $3 on an array
    for each column of the rows, run_id and step_key first; it must have no effect once the first is
    over, and answers one row for all calls, with ``in_time``.
    """

    operation: str
    statement: str
    read: Callable[[Sequence[Row], Any], Sequence[Any]] = read_nothing
    """Turns the statement's row into the answers to the rows, in their order."""
    alone: str | None = None
    """A plainer statement for a call that goes alone: the columns as they are, from $3 on. Where it gives
    a row, ``found`` turns that into the answer; where it gives none, it did nothing."""
    find: str | None = None
    """A SELECT of the key and the token, to find what a call has written whose acknowledgement was lost.
    None where saying it again gives the true answer by itself."""
    found: Callable[[Any], Any] = lambda row: None
    """Turns what find found into the answer."""
    to_result: Callable[[Row, Any], Any] | None = None
    """See flowstore_core.batching.Batcher.operation; as share and weigh."""
    token: int = 2
    """The column of the token."""
    coalesce: Callable[[Row, Any, Row], Any] | None = None
    """See flowstore_core.batching.Batcher.operation."""
    size_of: Callable[[Row], int] | None = None
    """As share; for rows that carry texts, of which a message can hold a gigabyte."""
