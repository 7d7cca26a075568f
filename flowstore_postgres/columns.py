"""How the rows of a batch travel: a column of texts as one text, wherever its elements allow it.

asyncpg spends a good part of a batch's time on the elements of arrays, 0.3 microseconds on each text: it
asks of each whether it is an array itself. One text costs it next to nothing, and the server takes as
long to make the elements of it as to read an array.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from flowstore_postgres.batched import Row

SEPARATOR = "\x1f"
NULL = "\x1e"
"""Between the elements, and in place of one that is NULL. A batch in which either occurs goes as arrays."""
_TEXTS = re.compile(r"\$(\d+)::text\[\]")
_FIRST = 3
"""The parameter of the first column."""


def pack(statement: str, rows: Sequence[Row]) -> tuple[str, list[Any]]:
    """The form of a batched statement to send for these rows, and its columns."""
    columns: list[Any] = [_array(values) for values in zip(*rows, strict=True)]
    packed = list(columns)
    for number in _text_columns(statement):
        values = columns[number]
        if values is not None:
            packed[number] = text = _join(values)
            if text is None:
                return statement, columns
    return _with_texts(statement), packed


def _array(values: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """An array, or nothing where nothing is in it: unnest fills that up with NULLs."""
    return None if values[0] is None and values.count(None) == len(values) else values


def _join(values: tuple[str | None, ...]) -> str | None:
    """The elements as one text; None where they cannot be told apart in it."""
    nulls = values.count(None)
    text = SEPARATOR.join(values if not nulls else [NULL if one is None else one for one in values])  # type: ignore[arg-type]
    # An empty text would be no element rather than an empty one.
    if text and text.count(SEPARATOR) == len(values) - 1 and text.count(NULL) == nulls:
        return text
    return None


@cache
def _text_columns(statement: str) -> tuple[int, ...]:
    return tuple(sorted({int(number) - _FIRST for number in _TEXTS.findall(statement)}))


@cache
def _with_texts(statement: str) -> str:
    separator, null = (f"chr({ord(one)})" for one in (SEPARATOR, NULL))
    return _TEXTS.sub(rf"string_to_array($\1, {separator}, {null})", statement)
