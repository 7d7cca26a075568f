"""Schema names are quoted in every statement, and names that quoting cannot protect are refused."""

from __future__ import annotations

import random
import string
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

import asyncpg
import pytest

from flowstore_core import ConfigurationError, open_store
from flowstore_core.open import resolve_store
from flowstore_postgres.settings import read_settings
from tests.security.leaks import detect_leaks_in_loop, exercise

# Tests share a server, so each test adds a random prefix.
NAMES = [
    'a"b',
    'a";DROP SCHEMA public;--',
    "a'b",
    "a';DROP SCHEMA public;--",
    "MixedCase",
    "two words",
    "a.b",
    "a;b",
    "a--b",
    "/*a",
    "*/a",
    "{schema}",
    "{latest}",
    "{0}",
    "%s",
    "\\",
    "E'\\x41'",
    "äöü",
    "\N{SNOWMAN}" * 17,
    "'::regclass",
    "x" * 51,
    "select",
    "?schema=other&x#y",
]
REFUSED = [
    "",
    "x" * 64,
    "\N{SNOWMAN}" * 22,
    "a\0b",
    "a\nb",
    "a\rb",
    "a\x1bb",
    "a\u2028b",
    "a\ud800",
    "$$",
    "a$fold$; DROP SCHEMA public; --",
    "a$name$",
    "pg_catalog",
    "pg_mine",
    "information_schema",
]


async def _server(url: str) -> asyncpg.Connection:
    return await asyncpg.connect(url)


@asynccontextmanager
async def _drop_schema_at_exit(server: asyncpg.Connection, schema: str) -> AsyncIterator[None]:
    try:
        yield
    finally:
        quoted = await server.fetchval("SELECT quote_ident($1)", schema)
        await server.execute(f"DROP SCHEMA IF EXISTS {quoted} CASCADE")


@pytest.mark.parametrize("name", NAMES)
async def test_a_schema_of_any_name_holds_the_whole_store(name: str, postgresql_url: str) -> None:
    """Migrations, triggers, every operation, cleanup and the command line's scripts."""
    schema = f"{uuid4().hex[:8]}{name}"
    server = await _server(postgresql_url)
    try:
        async with _drop_schema_at_exit(server, schema), detect_leaks_in_loop() as detector:
            async with open_store(postgresql_url, schema=schema) as store:
                await exercise(store, detector, rounds=1)
                assert not [error for error in detector.errors if "SQLSTATE" in str(error)]
            tables = await server.fetch(
                "SELECT relname FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace "
                "WHERE nspname = $1 AND relkind = 'r'",
                schema,
            )
            assert {"runs", "steps", "schema_version", "run_texts"} <= {row[0] for row in tables}
            _, backend, config = resolve_store(postgresql_url, schema=schema)
            newest = backend.migrations(config)[-1][0]  # type: ignore[attr-defined]
            assert await backend.schema_version(config) == newest  # type: ignore[attr-defined]
            assert await backend.migrate(config)  # type: ignore[attr-defined]
            assert "index" in (await backend.describe(config))["search"]  # type: ignore[attr-defined]
            # The migration script for administrators creates the same schema.
            script = "".join(one[2] for one in backend.migrations(config))  # type: ignore[attr-defined]
            quoted = await server.fetchval("SELECT quote_ident($1)", schema)
            await server.execute(f"DROP SCHEMA {quoted} CASCADE")
            await server.execute(script)
            async with open_store(postgresql_url, schema=schema, migrate=False) as store:
                await exercise(store, detector, rounds=1)
    finally:
        await server.close()


@pytest.mark.parametrize("name", REFUSED)
async def test_an_invalid_name_is_refused_before_connecting(name: str) -> None:
    with pytest.raises(ConfigurationError, match="option schema"):
        # No server listens on this port.
        async with open_store("postgresql://me@127.0.0.1:1/x", schema=name):
            pytest.fail("open_store succeeded")


def test_random_names_are_quoted_or_refused() -> None:
    rng = random.Random(5)
    letters = string.printable + "äß\N{SNOWMAN}\ud800\0\u2028" + "$\"'{}" * 5
    for _ in range(5000):
        name = "".join(rng.choices(letters, k=rng.randint(1, 40)))
        _, _, config = resolve_store("postgresql://", schema=name)
        try:
            settings = read_settings(config)
        except ConfigurationError:
            continue
        quoted = settings.quoted_schema
        assert quoted[0] == quoted[-1] == '"'
        assert quoted[1:-1].replace('""', "").count('"') == 0
        assert not set(name) & set("$\0\n")


async def test_functions_in_other_schemas_do_not_replace_built_in_ones(postgresql_url: str) -> None:
    """Another role may create a function in schema public whose signature matches a call more closely."""
    database = f"shared_{uuid4().hex}"
    server = await _server(postgresql_url)
    try:
        await server.execute(f"CREATE DATABASE {database}")
        connection = await asyncpg.connect(postgresql_url, database=database)
        await connection.execute(
            "CREATE FUNCTION public.hashtextextended(text, integer) RETURNS bigint LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'captured'; END $$"
        )
        with pytest.raises(asyncpg.RaiseError, match="captured"):
            await connection.fetchval("SELECT hashtextextended('x' || $1, 0)", "y")
        await connection.close()
        url = postgresql_url.replace("/postgres?", f"/{database}?")
        async with open_store(url) as store, detect_leaks_in_loop() as detector:
            await exercise(store, detector)
            assert not [error for error in detector.errors if "SQLSTATE" in str(error)]
    finally:
        await server.execute(f"DROP DATABASE {database} WITH (FORCE)")
        await server.close()
