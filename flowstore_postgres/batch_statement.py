"""A statement that writes any number of calls of one operation; see batch_writer.py.

A call whose acknowledgement was lost is found in one of two ways. A call that opens or closes an attempt
stores a token in the attempt, which is kept with its run. The effect of any other call may be replaced by a
later call, and a token in the same row with it, so its statement stores a note in table ``commits``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Row = tuple[Any, ...]
"""The columns of one call: run_id and step_key first."""


def with_note(batch_sql: str, written: str | None = None) -> str:
    """A ``batch_sql`` that also stores a note, from two more parameters at its end.

    ``written`` has the columns run_id and step_key of the rows that the statement writes. Without it every
    row counts as written.
    """
    head, result = batch_sql.rsplit("\n)\nSELECT before_deadline", 1)
    run_ids = step_keys = "NULL"
    if written is not None:
        # NULL if all rows were written, as usual.
        some = f"CASE WHEN (SELECT count(*) FROM {written}) < cardinality($3::uuid[]) THEN ARRAY"
        run_ids, step_keys = (f"{some}(SELECT {name} FROM {written}) END" for name in ("run_id", "step_key"))
    note = _note(batch_sql, "guard WHERE before_deadline", run_ids, step_keys)
    return f"{head}\n), noted AS ({note})\nSELECT before_deadline{result}"


def with_single_note(single_sql: str) -> str:
    """As ``with_note``, for a ``single_sql``, which stores no note if it returns no row."""
    note = _note(single_sql, "written", "NULL", "NULL")
    return f"WITH written AS ({single_sql}), noted AS ({note})\nSELECT * FROM written"


def _note(sql: str, source: str, run_ids: str, step_keys: str) -> str:
    last = max(int(number) for number in re.findall(r"\$(\d+)", sql))
    return f"""
    INSERT INTO {{schema}}.commits (connection, token, run_ids, step_keys)
    SELECT ${last + 1}, ${last + 2}, {run_ids}, {step_keys} FROM {source}
    ON CONFLICT (connection) DO UPDATE SET token = excluded.token, run_ids = excluded.run_ids,
        step_keys = excluded.step_keys, noted_at = clock_timestamp()
"""


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
    """A SELECT by key and token that finds the effect of a call whose acknowledgement was lost. None if
    ``batch_sql`` and ``single_sql`` store a note."""
    decode_probe: Callable[[Any], Any] = lambda row: None
    """Maps a row of ``probe_sql`` or ``single_sql``, or the note, to the result of a written call."""
    to_result: Callable[[Row, Any], Any] | None = None
    """``decode`` of flowstore_core.batching.Batcher.operation."""
    token_column: int = 2
    """The index of the token in the row."""
    coalesce: Callable[[Row, Any, Row], Any] | None = None
    """See flowstore_core.batching.Batcher.operation."""
    size_of: Callable[[Row], int] | None = None
    """See flowstore_core.batching.Batcher.operation; for rows with texts, which may be large."""
