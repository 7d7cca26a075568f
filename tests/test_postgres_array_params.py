"""The encoding of text columns of a batch on PostgreSQL, for any content."""

from __future__ import annotations

import asyncpg
import pytest

from flowstore_postgres.array_params import NULL, SEPARATOR, encode_rows

STATEMENT = (
    "SELECT step_key, value FROM unnest($3::uuid[], $4::text[], $5::text[]) AS a (run_id, step_key, value)"
)

TEXTS: tuple[tuple[str | None, ...], ...] = (
    ("a", "b", "c"),
    ("", "b", ""),
    ("a", None, "", "c"),
    (None, None),
    (None, "a"),
    ("",),
    (None,),
    (SEPARATOR,),
    (NULL,),
    (NULL, None),
    (f"{NULL}{NULL}", "b"),
    ("a", f"b{SEPARATOR}c"),
    (SEPARATOR, "", SEPARATOR),
    (f"\\{SEPARATOR}", "'", "{a,b}", "NULL", "\u00c4 \U0001f600"),
)


@pytest.mark.parametrize("values", TEXTS, ids=ascii)
async def test_a_text_column_round_trips(admin: asyncpg.Connection, values: tuple[str | None, ...]) -> None:
    rows = [(None, f"step {number}", value) for number, value in enumerate(values)]
    statement, columns = encode_rows(STATEMENT, rows)
    statement = statement.replace("$3", "$1").replace("$4", "$2").replace("$5", "$3")
    fetched = await admin.fetch(statement, *columns)
    assert [tuple(row) for row in fetched] == [row[1:] for row in rows]


def test_ordinary_texts_are_sent_as_one_text() -> None:
    statement, columns = encode_rows(STATEMENT, [(None, "a", "x"), (None, "b", None)])
    assert "text[]" not in statement
    assert columns == [None, f"a{SEPARATOR}b", f"x{SEPARATOR}{NULL}"]
    statement, columns = encode_rows(STATEMENT, [(None, "a", SEPARATOR), (None, "b", None)])
    assert statement == STATEMENT
    assert columns == [None, ("a", "b"), (SEPARATOR, None)]
