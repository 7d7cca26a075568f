"""The conformance suite never changes the data of the store given by its URL."""

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
from tests.security.leaks import detect_leaks_in_loop, exercise

# The checks of these clauses delete rows, open many stores and change schema versions.
CLAUSES = ("RET-1", "RET-4", "CON-6")


@pytest.fixture
async def production(postgresql_url: str) -> AsyncIterator[str]:
    """A database with a run in its default schema."""
    name = f"production_{uuid4().hex}"
    server = await asyncpg.connect(postgresql_url)
    url = postgresql_url.replace("/postgres?", f"/{name}?")
    try:
        await server.execute(f"CREATE DATABASE {name}")
        async with open_store(url) as store, detect_leaks_in_loop() as detector:
            await exercise(store, detector)
        yield url
    finally:
        await server.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await server.close()


async def _contents(url: str) -> dict[str, list[str]]:
    """Return the objects outside the system schemas, and every row of their tables."""
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
        contents = {"objects": [repr(tuple(row)) for row in tables]}
        for name, kind, _ in tables:
            if kind == b"r":
                rows = await server.fetch(f"SELECT t::text FROM {name} t ORDER BY 1")
                contents[name] = [row[0] for row in rows]
        return contents
    finally:
        await server.close()


async def test_production_data_in_postgresql_is_untouched(production: str) -> None:
    before = await _contents(production)
    assert before["flowstore.runs"]
    report = await run_suite(production, profile="quick", clauses=CLAUSES)
    assert report.results
    assert await _contents(production) == before


async def test_options_in_a_file_do_not_select_production(
    production: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scratch namespace's URL contains every connection option, so options in a file do not apply."""
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
    """A working directory with a store of the default URL that contains a run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FLOWSTORE_URL", raising=False)

    async def fill() -> None:
        async with open_store() as store, detect_leaks_in_loop() as detector:
            await exercise(store, detector)

    asyncio.run(fill())
    assert (tmp_path / "flowstore.db").exists()
    return tmp_path


def test_the_file_of_the_default_url_is_untouched(default: Path) -> None:
    before = _files(default)
    command = ["conformance", "sqlite:///flowstore.db", "--profile", "quick"]
    for clause in ("RET-1", "RET-4"):
        assert main([*command, "--clause", clause]) == 0
    assert _files(default) == before
    assert {name for name in os.listdir(default) if "scratch" in name} == set()


@pytest.mark.parametrize("given", ["environment", "option"])
def test_pytest_leaves_the_store_of_the_environment_untouched(given: str, default: Path) -> None:
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


def test_pytest_without_a_url_checks_nothing(default: Path) -> None:
    """The default URL is not used."""
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
