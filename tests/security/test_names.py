"""Names of schemas: quoted everywhere, and checked where quoting is not enough."""

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
from tests.security.watch import exercise, watching_loop

# Each gets a few letters of its own in front, because tests share a server.
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
async def _dropped_at_the_end(server: asyncpg.Connection, schema: str) -> AsyncIterator[None]:
    try:
        yield
    finally:
        quoted = await server.fetchval("SELECT quote_ident($1)", schema)
        await server.execute(f"DROP SCHEMA IF EXISTS {quoted} CASCADE")


@pytest.mark.parametrize("name", NAMES)
async def test_that_a_schema_of_any_name_holds_the_whole_store(name: str, postgresql_url: str) -> None:
    """Migrations, triggers, every operation, cleanup and the command line's scripts."""
    own = f"{uuid4().hex[:8]}{name}"
    server = await _server(postgresql_url)
    try:
        async with _dropped_at_the_end(server, own), watching_loop() as watch:
            async with open_store(postgresql_url, schema=own) as store:
                await exercise(store, watch, rounds=1)
                assert not [error for error in watch.errors if "SQLSTATE" in str(error)]
            tables = await server.fetch(
                "SELECT relname FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace "
                "WHERE nspname = $1 AND relkind = 'r'",
                own,
            )
            assert {"runs", "steps", "schema_version", "run_texts"} <= {row[0] for row in tables}
            _, backend, config = resolve_store(postgresql_url, schema=own)
            newest = backend.migrations(config)[-1][0]  # type: ignore[attr-defined]
            assert await backend.schema_version(config) == newest  # type: ignore[attr-defined]
            assert await backend.migrate(config)  # type: ignore[attr-defined]
            assert "index" in (await backend.describe(config))["search"]  # type: ignore[attr-defined]
            # The script that an administrator would run by hand makes the same schema.
            script = "".join(one[2] for one in backend.migrations(config))  # type: ignore[attr-defined]
            quoted = await server.fetchval("SELECT quote_ident($1)", own)
            await server.execute(f"DROP SCHEMA {quoted} CASCADE")
            await server.execute(script)
            async with open_store(postgresql_url, schema=own, migrate=False) as store:
                await exercise(store, watch, rounds=1)
    finally:
        await server.close()


@pytest.mark.parametrize("name", REFUSED)
async def test_that_other_names_are_refused_before_anything_is_sent(name: str) -> None:
    with pytest.raises(ConfigurationError, match="option schema"):
        # Nobody listens there.
        async with open_store("postgresql://me@127.0.0.1:1/x", schema=name):
            pytest.fail("it opened")


def test_that_random_names_are_quoted_or_refused() -> None:
    drawn = random.Random(5)
    letters = string.printable + "äß\N{SNOWMAN}\ud800\0\u2028" + "$\"'{}" * 5
    for _ in range(5000):
        name = "".join(drawn.choices(letters, k=drawn.randint(1, 40)))
        _, _, config = resolve_store("postgresql://", schema=name)
        try:
            settings = read_settings(config)
        except ConfigurationError:
            continue
        quoted = settings.quoted_schema
        assert quoted[0] == quoted[-1] == '"'
        assert quoted[1:-1].replace('""', "").count('"') == 0
        assert not set(name) & set("$\0\n")


async def test_that_objects_of_other_schemas_cannot_replace_those_of_the_server(postgresql_url: str) -> None:
    """In schema public others may be able to make a function whose signature matches our call better."""
    database = f"shared_{uuid4().hex}"
    server = await _server(postgresql_url)
    try:
        await server.execute(f"CREATE DATABASE {database}")
        inside = await asyncpg.connect(postgresql_url, database=database)
        await inside.execute(
            "CREATE FUNCTION public.hashtextextended(text, integer) RETURNS bigint LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'captured'; END $$"
        )
        with pytest.raises(asyncpg.RaiseError, match="captured"):
            await inside.fetchval("SELECT hashtextextended('x' || $1, 0)", "y")
        await inside.close()
        url = postgresql_url.replace("/postgres?", f"/{database}?")
        async with open_store(url) as store, watching_loop() as watch:
            await exercise(store, watch)
            assert not [error for error in watch.errors if "SQLSTATE" in str(error)]
    finally:
        await server.execute(f"DROP DATABASE {database} WITH (FORCE)")
        await server.close()
