"""Tags: the index of runs by tag, its cost, and its upkeep beside older versions and direct SQL."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from itertools import product
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from flowstore_core import FlowStore, RunStatus, new_run_id, open_store
from flowstore_core.open import resolve_store
from flowstore_core.plugins import find_backend
from flowstore_postgres import pages as postgres_pages
from flowstore_postgres.sql_placeholders import fill_in
from flowstore_sqlite import pages as sqlite_pages

FLOW = UUID(int=1)
TAKE = 10


@pytest.fixture(params=["sqlite", "postgresql"])
async def url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'x.db'}"
    else:
        base = request.getfixturevalue("postgresql_url")
        async with find_backend("postgresql")[1].scratch(base) as fresh:
            yield fresh


async def _connect(url: str) -> asyncpg.Connection:
    _, _, config = resolve_store(url)
    options = config.parts.options
    return await asyncpg.connect(
        host=options["host"],
        user="postgres",
        database="postgres",
        server_settings={"search_path": options["schema"]},
    )


async def _execute(url: str, *statements: str) -> list[Any]:
    """Execute statements on a connection of their own; the rows of the last one."""
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as db, db:
            return [db.execute(statement).fetchall() for statement in statements][-1]
    admin = await _connect(url)
    try:
        return [[tuple(row) for row in await admin.fetch(statement)] for statement in statements][-1]
    finally:
        await admin.close()


async def _found(store: FlowStore, **tags: str) -> list[UUID]:
    page = await store.get_runs_page(tags=tags, take=1000)
    assert page.total_count == len(page.runs)
    assert page.runs == tuple(await store.get_runs(tags=tags, take=1000))
    return [run.run_id for run in page.runs]


def _literal(url: str, run_id: UUID) -> str:
    return f"x'{run_id.hex}'" if url.startswith("sqlite") else f"'{run_id}'"


async def _index(url: str) -> set[tuple[str, str, str]]:
    rows = await _execute(url, "SELECT tag_key, tag_value, status FROM run_tags")
    return {tuple(row) for row in rows}  # type: ignore[misc]


# Beside older versions


async def test_a_store_of_the_version_before_is_migrated_in_place(url: str) -> None:
    _, backend, config = resolve_store(url)
    async with open_store(url) as store:
        runs = [new_run_id() for _ in range(3)]
        for run_id in runs:
            await store.start_run(FLOW, "flow", run_id, "manual")
        await store.complete_run(runs[0], RunStatus.FAILED)
    [version] = [number for number, name, _ in backend.migrations(config) if name == "tags"]  # type: ignore[attr-defined]
    await backend.revert_schema(url, version - 1)  # type: ignore[attr-defined]
    async with open_store(url) as store:
        assert await _found(store) == runs[::-1]
        assert {run.tags for run in await store.get_runs()} == {()}
        assert await _found(store, env="live") == []
        for run_id in runs[:2]:
            await store.set_tags(run_id, {"env": "live"})
        assert await _found(store, env="live") == runs[1::-1]
        page = await store.get_runs_page(status=RunStatus.FAILED, tags={"env": "live"})
        assert [run.run_id for run in page.runs] == runs[:1]


async def test_an_older_version_keeps_the_index_right(url: str) -> None:
    """Code from before the migration knows neither the column nor the table."""
    is_sqlite = url.startswith("sqlite")
    async with open_store(url) as store:
        run_id, other = new_run_id(), new_run_id()
        for one in (run_id, other):
            await store.start_run(FLOW, "flow", one, "manual", tags={"env": "live"})
        of_run = f"WHERE run_id = {_literal(url, run_id)}"
        time = "1" if is_sqlite else "now()"
        await _execute(url, f"UPDATE runs SET status = 'Failed', completed_at = {time} {of_run}")
        page = await store.get_runs_page(status="Failed", tags={"env": "live"})
        assert ([run.run_id for run in page.runs], page.total_count) == ([run_id], 1)
        assert await _index(url) == {("env", "live", "Failed"), ("env", "live", "Running")}
        await _execute(url, f"DELETE FROM runs {of_run}")
        assert await _found(store, env="live") == [other]
        assert await _index(url) == {("env", "live", "Running")}
        values = f"{_literal(url, run_id)}, {_literal(url, FLOW)}, 'flow', 'Running', 'manual'"
        token = "" if is_sqlite else ", start_token"
        await _execute(
            url,
            f"INSERT INTO runs (run_id, flow_id, flow_name, status, trigger_key, started_at{token}) "
            f"VALUES ({values}, {time}{'' if is_sqlite else ', gen_random_uuid()'})",
        )
        assert await _found(store, env="live") == [other]
        again = await store.get_run(run_id)
        assert again is not None
        assert again.tags == ()


# Direct SQL


async def test_postgresql_fills_the_index_for_every_way_to_write_runs(postgresql_url: str) -> None:
    async with (
        find_backend("postgresql")[1].scratch(postgresql_url) as url,
        open_store(url) as store,
    ):
        await _execute(
            url,
            """
            INSERT INTO runs (run_id, flow_id, flow_name, status, trigger_key, started_at, start_token, tags)
            SELECT gen_random_uuid(), gen_random_uuid(), 'f', 'Running', 't', now(), gen_random_uuid(),
                   jsonb_build_object('env', 'live', 'n', n::text)
            FROM generate_series(1, 50) n
            """,
        )
        assert len(await _found(store, env="live")) == 50
        assert len(await _found(store, env="live", n="7")) == 1
        await _execute(url, """UPDATE runs SET tags = '{"env": "test"}' WHERE tags ->> 'n' < '2'""")
        assert len(await _found(store, env="test")) == 11
        assert len(await _found(store, env="live")) == 39
        await _execute(url, "UPDATE runs SET tags = NULL WHERE tags ->> 'env' = 'test'")
        assert await _found(store, env="test") == []
        # A dump with only data has the rows of the index too.
        rows = await _execute(url, "SELECT count(*) FROM run_tags")
        await _execute(url, "INSERT INTO run_tags SELECT * FROM run_tags")
        assert await _execute(url, "SELECT count(*) FROM run_tags") == rows == [(78,)]
        await _execute(url, "TRUNCATE runs")
        assert await _index(url) == set()


# Cost


async def _add_runs(url: str, count: int) -> None:
    """Add runs with a tag, a tenth of them with a second one, and as many without tags."""
    if url.startswith("sqlite"):
        statements = (
            f"""
            INSERT INTO runs (run_id, flow_id, flow_name, status, trigger_key, started_at, completed_at, tags)
            WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {2 * count})
            SELECT randomblob(16), zeroblob(16), 'f', 'Succeeded', 't', n, n,
                CASE WHEN n % 2 THEN '{{"env": "live", "tenth": "' || (n % 20 = 1) || '"}}' END FROM numbers
            """,
            "DELETE FROM run_tags",
            """
            INSERT INTO run_tags SELECT run_id, key, value, flow_id, status, started_at
            FROM runs, json_each(tags) WHERE tags IS NOT NULL
            """,
        )
        await _execute(url, *statements)
        return
    await _execute(
        url,
        f"""
        INSERT INTO runs (run_id, flow_id, flow_name, status, trigger_key, started_at, completed_at,
                          start_token, tags)
        SELECT gen_random_uuid(), gen_random_uuid(), 'f', 'Succeeded', 't', now() + n * interval '1 s', now(),
               gen_random_uuid(), CASE WHEN n % 2 = 1 THEN
                   jsonb_build_object('env', 'live', 'tenth', (n % 20 = 1)::int::text) END
        FROM generate_series(1, {2 * count}) n
        """,
        # As autovacuum does after so many changes.
        "VACUUM ANALYZE runs",
        "VACUUM ANALYZE run_tags",
    )


async def _work_of_page(url: str, tags: dict[str, str], status: RunStatus | None) -> int:
    """The work of one page: rows that PostgreSQL reads, or instructions of SQLite."""
    rarest = tuple(sorted(tags.items(), reverse=True))
    if url.startswith("sqlite"):
        return _instructions(url.removeprefix("sqlite:///"), tags, status)
    statement = postgres_pages._Statement(None, status, None, 0, TAKE, rarest)
    admin = await _connect(url)
    try:
        schema = await admin.fetchval("SELECT quote_ident(current_schema())")
        explained = "EXPLAIN (ANALYZE, FORMAT JSON) " + fill_in(
            statement.text(postgres_pages.GET_RUNS), schema
        )
        [plan] = json.loads(await admin.fetchval(explained, *statement.arguments))
        return _count_rows(plan["Plan"])
    finally:
        await admin.close()


def _count_rows(plan: dict[str, Any]) -> int:
    """The rows that all nodes of a plan read, those that a filter removes included."""
    rows = plan["Actual Rows"] + sum(value for key, value in plan.items() if key.startswith("Rows Removed"))
    return int(rows * plan["Actual Loops"]) + sum(_count_rows(child) for child in plan.get("Plans", ()))


def _instructions(path: str, tags: dict[str, str], status: RunStatus | None) -> int:
    instructions = 0

    def count() -> int:
        nonlocal instructions
        instructions += 1
        return 0

    with closing(sqlite3.connect(path)) as db:
        db.set_progress_handler(count, 1)
        found = sqlite_pages._PageFilter(None, status, None, 0, TAKE, tags).runs(db)
    assert len(found) == TAKE
    return instructions


async def test_the_cost_of_a_page_does_not_depend_on_the_number_of_runs(url: str) -> None:
    frequent, rare = {"env": "live"}, {"tenth": "1"}
    cases = list(product((frequent, rare, {**frequent, **rare}), (None, RunStatus.SUCCEEDED)))
    work: list[list[int]] = []
    async with open_store(url) as store:
        # With 1,000 runs of each tag, the number up to which SQLite counts them to begin with the rarest.
        for added, total in ((10_000, 10_000), (30_000, 40_000)):
            await _add_runs(url, added)
            for tags, status in cases:
                page = await store.get_runs_page(status=status, tags=tags, take=TAKE)
                assert page.total_count == total // (10 if "tenth" in tags else 1)
            work.append([await _work_of_page(url, tags, status) for tags, status in cases])
    for case, few, many in zip(cases, *work, strict=True):
        assert many <= 1.5 * few, case
