"""A statement that writes any number of calls of one operation; see batch_writer.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Row = tuple[Any, ...]
"""The columns of one call: run_id and step_key first."""


def decode_none(rows: Sequence[Row], found: Any) -> Sequence[None]:
    """The results of an operation that returns nothing."""
    return [None] * len(rows)


def decode_flags(column: str) -> Callable[[Sequence[Row], Any], Sequence[bool]]:
    """Decoder for whether each row was written: ``every`` one, or the row numbers in a column."""

    def decode(rows: Sequence[Row], found: Any) -> Sequence[bool]:
        if found["every"]:
            return [True] * len(rows)
        written = set(found[column] or ())
        return [n in written for n in range(1, len(rows) + 1)]

    return decode


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class BatchStatement:
    """The SQL of one batched operation, and the decoders of its results.

    ``batch_sql`` gets the deadline ($1), the virtual now or NULL ($2), and from $3 on an array for each
    column of the rows, run_id and step_key first. It must have no effect after the deadline, and returns one
    row for all calls, with column ``before_deadline``.
    """

    operation: str
    batch_sql: str
    decode_batch: Callable[[Sequence[Row], Any], Sequence[Any]] = decode_none
    """Maps the row of ``batch_sql`` to the results of the calls, in their order."""
    single_sql: str | None = None
    """A simpler statement for a single call, with its columns as scalars from $3 on. It returns a row for
    ``decode_probe``; if it returns none, it had no effect and ``batch_sql`` is executed."""
    probe_sql: str | None = None
    """A SELECT by key and token that finds the effect of a call whose acknowledgement was lost. None where
    a second execution returns the correct result."""
    decode_probe: Callable[[Any], Any] = lambda row: None
    """Maps a row of ``probe_sql`` or ``single_sql`` to the result of the call."""
    to_result: Callable[[Row, Any], Any] | None = None
    """``decode`` of flowstore_core.batching.Batcher.operation."""
    token_column: int = 2
    """The index of the token in the row."""
    coalesce: Callable[[Row, Any, Row], Any] | None = None
    """See flowstore_core.batching.Batcher.operation."""
    size_of: Callable[[Row], int] | None = None
    """See flowstore_core.batching.Batcher.operation; for rows with texts, which may be large."""
