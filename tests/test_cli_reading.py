"""Commands that read do not change a store: they create no file or schema, and do not migrate."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import UUID, uuid4

import asyncpg
import pytest

from flowstore_cli.main import main
from flowstore_core import open_store
from flowstore_core.backend import Migratable
from flowstore_core.open import resolve_store

RUN = str(UUID(int=1))
# Every command that works on an existing store without starting work.
COMMANDS = (
    ["runs", "list"],
    ["runs", "show", RUN],
    ["runs", "retry", RUN, "step"],
    ["runs", "cancel", RUN],
    ["runs", "delete", RUN, "--yes"],
    ["runs", "tag", RUN, "env=live"],
    ["stats"],
    ["timeseries"],
    ["signal", "deliver", RUN, "go"],
    ["cleanup", "--older-than", "30d"],
    ["cleanup", "--older-than", "30d", "--dry-run"],
    ["ping"],
)

Execute = Callable[..., list[Any]]


def _backend(url: str) -> tuple[Migratable, Any]:
    _, backend, config = resolve_store(url)
    assert isinstance(backend, Migratable)
    return backend, config


def _first_migration(url: str) -> str:
    backend, config = _backend(url)
    return next(sql for number, _, sql in backend.migrations(config) if number == 1)


def _latest(url: str) -> int:
    backend, config = _backend(url)
    return max(number for number, _, _ in backend.migrations(config))


def _version(url: str) -> int:
    backend, config = _backend(url)
    return asyncio.run(backend.schema_version(config))


@pytest.fixture
def sqlite_database(tmp_path: Path) -> tuple[str, Callable[[], object]]:
    """The URL of a SQLite file with the first version of the schema, and a function that reads its state."""
    path = tmp_path / "flows.db"
    url = f"sqlite:///{path}"
    with sqlite3.connect(path) as connection:
        connection.executescript(_first_migration(url))
    connection.close()

    def state() -> object:
        with sqlite3.connect(path) as connection:
            rows = connection.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()
        connection.close()
        return rows

    return url, state


def _query(url: str, *statements: str) -> list[Any]:
    async def run() -> list[Any]:
        connection = await asyncpg.connect(url)
        try:
            for statement in statements[:-1]:
                await connection.execute(statement)
            return [tuple(row) for row in await connection.fetch(statements[-1])]
        finally:
            await connection.close()

    return asyncio.run(run())


def _objects(url: str, schema: str) -> list[Any]:
    return _query(
        url,
        "SELECT relname::text, relkind::text FROM pg_class "
        f"WHERE relnamespace = to_regnamespace('{schema}') ORDER BY 1",
    )


@pytest.fixture
def postgresql_database(fresh: str, postgresql_url: str) -> tuple[str, Callable[[], object]]:
    """The URL of a PostgreSQL schema in its first version, and a function that reads its state."""
    schema = parse_qs(urlsplit(fresh).query)["schema"][0]
    _query(postgresql_url, _first_migration(fresh), "SELECT 1")
    return fresh, lambda: _objects(postgresql_url, schema)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_an_older_schema_is_not_changed(
    kind: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    url, state = request.getfixturevalue(f"{kind}_database")
    before = state()
    assert _version(url) == 1 < _latest(url)
    for command in COMMANDS:
        code = main([*command, "--url", url])
        output = capsys.readouterr()
        assert (code, output.out) == (2, ""), command
        assert f" has version 1, this flowstore supports {_latest(url)}" in output.err, command
        assert "; bring it up to date with: flowstore migrate up --url " in output.err, command
        assert state() == before, command
    assert main(["doctor", "--url", url]) == 1
    assert "flowstore migrate up --url " in capsys.readouterr().out
    assert main(["doctor", "--url", url, "--fix", "--yes"]) == 1
    assert main(["migrate", "status", "--url", url]) == 1
    assert main(["migrate", "sql", "--url", url]) == 0
    clause = ["--clause", "RUN-1", "--profile", "quick"]
    assert main(["conformance", url, *clause]) == 0
    assert state() == before
    assert main(["migrate", "up", "--url", url]) == 0
    assert main(["stats", "--url", url]) == 0


def test_no_schema_is_created_in_an_empty_database(
    fresh: str, postgresql_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    schema = parse_qs(urlsplit(fresh).query)["schema"][0]
    for command in (*COMMANDS, ["doctor"]):
        assert main([*command, "--url", fresh]) == 2
        assert "there is no flowstore schema at postgresql:" in capsys.readouterr().err
    assert _objects(postgresql_url, schema) == []


def test_a_replay_obeys_migrate_false_in_the_url(
    sqlite_database: tuple[str, Callable[[], object]], capsys: pytest.CaptureFixture[str]
) -> None:
    url, state = sqlite_database
    before = state()
    for arguments in (["--url", f"{url}?migrate=false"], ["--url", url, "--no-migrate"]):
        assert main(["replay", *arguments]) == 2
        assert "schema version 1" in capsys.readouterr().err
    assert state() == before


def test_a_replay_reports_that_it_migrated(
    sqlite_database: tuple[str, Callable[[], object]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, _ = sqlite_database
    arguments = ["replay", "--speed", "5000", "--workers", "1", "--json"]
    latest = _latest(url)
    assert main([*arguments, "--url", url]) == 0
    assert f"migrated the schema of {url} (file {tmp_path}/flows.db) from version 1 to {latest}\n" in (
        capsys.readouterr().err
    )
    assert main([*arguments, "--url", url]) == 0
    assert "schema" not in capsys.readouterr().err
    new = f"sqlite:///{tmp_path}/new.db"
    assert main([*arguments, "--url", new]) == 0
    assert f"created the schema of {new} (file {tmp_path}/new.db), version {latest}\n" in (
        capsys.readouterr().err
    )
    assert main(["runs", "list", "--url", new]) == 0


def test_a_read_only_role_can_run_the_commands_that_read(fresh: str, postgresql_url: str) -> None:
    schema = parse_qs(urlsplit(fresh).query)["schema"][0]
    role = f"reader_{uuid4().hex[:12]}"

    async def fill() -> str:
        async with open_store(fresh) as store:
            return str((await store.trigger_run(uuid4(), "flow", uuid4(), "manual")).run.run_id)

    run_id = asyncio.run(fill())
    _query(
        postgresql_url,
        f"CREATE ROLE {role} LOGIN",
        f"GRANT USAGE ON SCHEMA {schema} TO {role}",
        f"GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO {role}",
        "SELECT 1",
    )
    try:
        url = fresh.replace("user=postgres", f"user={role}")
        for command in (
            ["runs", "list"],
            ["runs", "list", "--search", "flow"],
            ["runs", "show", run_id],
            ["stats"],
            ["timeseries"],
            ["cleanup", "--older-than", "30d", "--dry-run"],
            ["ping"],
            ["migrate", "status"],
        ):
            assert main([*command, "--url", url]) == 0, command
        # The doctor may warn, but can examine the store.
        assert main(["doctor", "--url", url]) in (0, 1)
    finally:
        _query(postgresql_url, f"DROP OWNED BY {role}", f"DROP ROLE {role}", "SELECT 1")
