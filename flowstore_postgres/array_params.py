"""Encoding of the rows of a batch as parameters: a text column as one text where its values allow it.

asyncpg spends much of a batch's time on the elements of arrays: 0.3 microseconds on each text, to check
whether it is an array itself. One text costs almost nothing, and the server splits it as fast as it reads
an array.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from flowstore_postgres.batch_statement import Row

SEPARATOR = "\x1f"
"""Separates the values."""
NULL = "\x1e"
"""Stands for NULL. A batch whose values contain either character is sent as arrays."""
_TEXTS = re.compile(r"\$(\d+)::text\[\]")
_FIRST_COLUMN = 3
"""The parameter of the first column."""


def encode_rows(statement: str, rows: Sequence[Row]) -> tuple[str, list[Any]]:
    """As encode_columns, for the columns of these rows."""
    return encode_columns(statement, zip(*rows, strict=True))


def encode_columns(statement: str, values: Iterable[tuple[Any, ...]]) -> tuple[str, list[Any]]:
    """The form of a statement to send for the values of these columns, and its parameters from $3 on."""
    columns: list[Any] = [_array(column) for column in values]
    encoded = list(columns)
    for number in _text_columns(statement):
        column = columns[number]
        if column is not None:
            encoded[number] = text = join_texts(column)
            if text is None:
                return statement, columns
    return _with_joined_texts(statement), encoded


def _array(values: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The values, or None if all are None: unnest pads a missing array with NULLs."""
    missing = not values or (values[0] is None and values.count(None) == len(values))
    return None if missing else values


def join_texts(values: tuple[str | None, ...]) -> str | None:
    """The values as one text; None where the server could not split it unambiguously."""
    nulls = values.count(None)
    text = SEPARATOR.join(values if not nulls else [NULL if one is None else one for one in values])  # type: ignore[arg-type]
    # string_to_array splits an empty text into no values instead of one empty value.
    if text and text.count(SEPARATOR) == len(values) - 1 and text.count(NULL) == nulls:
        return text
    return None


@cache
def _text_columns(statement: str) -> tuple[int, ...]:
    return tuple(sorted({int(number) - _FIRST_COLUMN for number in _TEXTS.findall(statement)}))


@cache
def _with_joined_texts(statement: str) -> str:
    separator, null = (f"chr({ord(one)})" for one in (SEPARATOR, NULL))
    return _TEXTS.sub(rf"string_to_array($\1, {separator}, {null})", statement)
