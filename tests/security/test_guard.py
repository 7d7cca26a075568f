"""The conformance suite never touches what the store that it is pointed at holds."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import asyncpg
import pytest
from flowstore_conformance.suite import run_suite

from flowstore_cli.main import main
from flowstore_core import open_store
from tests.security.watch import exercise, watching_loop

# Those that delete, open many stores, and meet newer schemas; the others work in the same places.
CLAUSES = ("RET-1", "RET-4", "CON-6")


@pytest.fixture
async def production(postgresql_url: str) -> AsyncIterator[str]:
    """A database whose default schema holds runs: what nobody ever wants to lose."""
    name = f"production_{uuid4().hex}"
    server = await asyncpg.connect(postgresql_url)
    url = postgresql_url.replace("/postgres?", f"/{name}?")
    try:
        await server.execute(f"CREATE DATABASE {name}")
        async with open_store(url) as store, watching_loop() as watch:
            await exercise(store, watch)
        yield url
    finally:
        await server.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await server.close()


async def _contents(url: str) -> dict[str, list[str]]:
    """Every row of every table that is not the server's own, and which objects there are."""
    query = parse_qs(urlsplit(url).query)
    server = await asyncpg.connect(
        host=query["host"][0], user="postgres", database=urlsplit(url).path.removeprefix("/")
    )
    try:
        tables = await server.fetch(
            "SELECT quote_ident(nspname) || '.' || quote_ident(relname), relkind, c.oid FROM pg_class c "
            "JOIN pg_namespace n ON n.oid = relnamespace "
            "WHERE nspname NOT LIKE 'pg\\_%' AND nspname <> 'information_schema' ORDER BY 1"
        )
        found = {"objects": [repr(tuple(row)) for row in tables]}
        for name, kind, _ in tables:
            if kind == b"r":
                rows = await server.fetch(f"SELECT t::text FROM {name} t ORDER BY 1")
                found[name] = [row[0] for row in rows]
        return found
    finally:
        await server.close()


async def test_that_production_data_in_postgresql_is_untouched(production: str) -> None:
    before = await _contents(production)
    assert len(before["flowstore.runs"]) == 1
    report = await run_suite(production, profile="quick", clauses=CLAUSES)
    assert report.results
    assert await _contents(production) == before


async def test_that_options_in_a_file_do_not_lead_to_production(
    production: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scratch namespace's URL says all that says where it is, so a file's options do not move it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flowstore.toml").write_text('schema = "flowstore"\ndbname = "nowhere"\nuser = "nobody"\n')
    before = await _contents(production)
    report = await run_suite(production, profile="quick", clauses=["RET-1"])
    assert {result.status.value for result in report.results} == {"PASS"}
    assert await _contents(production) == before


def _files(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("*.db*")}


@pytest.fixture
def default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The store of the default URL, with runs in it, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FLOWSTORE_URL", raising=False)

    async def fill() -> None:
        async with open_store() as store, watching_loop() as watch:
            await exercise(store, watch)

    asyncio.run(fill())
    assert (tmp_path / "flowstore.db").exists()
    return tmp_path


def test_that_the_file_of_the_default_url_is_untouched(default: Path) -> None:
    before = _files(default)
    command = ["conformance", "sqlite:///flowstore.db", "--profile", "quick"]
    for clause in ("RET-1", "RET-4"):
        assert main([*command, "--clause", clause]) == 0
    assert _files(default) == before
    assert {name for name in os.listdir(default) if "scratch" in name} == set()


@pytest.mark.parametrize("given", ["environment", "option"])
def test_that_pytest_leaves_the_store_of_the_environment_untouched(given: str, default: Path) -> None:
    before = _files(default)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "flowstore_conformance.pytest_plugin"]
    command += ["--pyargs", "flowstore_conformance", "--flowstore-profile=quick"]
    command += ["--flowstore-clause=RET-1", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    if given == "environment":
        environment["FLOWSTORE_URL"] = "sqlite:///flowstore.db"
    else:
        environment["FLOWSTORE_URL"] = "postgresql://nobody@127.0.0.1:1/nowhere"
        command.append("--flowstore-url=sqlite:///flowstore.db")
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-2000:]
    assert "passed" in ran.stdout
    assert _files(default) == before


def test_that_without_a_url_pytest_checks_nothing(default: Path) -> None:
    """Not even the default URL is taken for granted."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "flowstore_conformance.pytest_plugin"]
    command += ["--pyargs", "flowstore_conformance", "-p", "no:cacheprovider"]
    ran = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode != 0
    assert "needs to know which store to check" in ran.stdout + ran.stderr
