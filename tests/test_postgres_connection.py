"""A connection: the built-in types that a process reads once, and the notes of commits."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from flowstore_postgres import connection as connection_module
from flowstore_postgres.connection import NOTES_PER_ROW, Connection, Notes

BUILT_IN = "SELECT ARRAY[$1::uuid] AS ids, ARRAY(SELECT ROW(1, 'a'::text)) AS rows"
OTHER_BUILT_IN = "SELECT ARRAY[true] AS flags, ARRAY[1::bigint] AS counts"
OWN_TYPE = "SELECT ARRAY['small'::pg_temp.size] AS sizes"


@pytest.fixture(autouse=True)
def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the types that other tests of this process have read."""
    monkeypatch.setattr(connection_module, "_built_in_types", {})


@asynccontextmanager
async def connected(url: str, **options: Any) -> AsyncIterator[tuple[Connection, list[str]]]:
    """A new connection, and the queries that it sends, among them those of asyncpg itself."""
    connection = await asyncpg.connect(url, connection_class=Connection, **options)
    queries: list[str] = []
    connection.add_query_logger(lambda query: queries.append(query.query))
    try:
        yield connection, queries
    finally:
        await connection.close()


def introspections(queries: list[str]) -> int:
    return sum("typeinfo_tree" in query for query in queries)


# Without the cache of statements, as behind PgBouncer, asyncpg sends unnamed statements.
@pytest.mark.parametrize("options", [{}, {"statement_cache_size": 0}], ids=["named", "unnamed"])
async def test_built_in_types_are_read_once(postgresql_url: str, options: dict[str, Any]) -> None:
    found = []
    for _ in range(3):
        async with connected(postgresql_url, **options) as (connection, queries):
            for run_id in (uuid4(), uuid4()):
                row = await connection.fetchrow(BUILT_IN, run_id)
                assert row["ids"] == [run_id]
                assert [tuple(one) for one in row["rows"]] == [(1, "a")]
            assert tuple(await connection.fetchrow(OTHER_BUILT_IN)) == ([True], [1])
            found.append(introspections(queries))
    assert found == [1, 0, 0]


async def test_other_types_are_read_for_each_connection(postgresql_url: str) -> None:
    # The second type has the name of the first and another OID.
    for _ in range(2):
        async with connected(postgresql_url) as (connection, queries):
            await connection.execute("CREATE TYPE pg_temp.size AS ENUM ('small')")
            assert (await connection.fetchrow(OWN_TYPE))["sizes"] == ["small"]
            assert introspections(queries) == 1


def test_a_row_of_notes_is_used_a_limited_number_of_times() -> None:
    notes = [Notes() for _ in range(2)]
    used = [one.next() for one in notes for _ in range(2 * NOTES_PER_ROW)]
    assert len(set(used)) == len(used)
    assert set(Counter(row for row, _ in used).values()) == {NOTES_PER_ROW}
