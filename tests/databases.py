"""Direct access to the databases of SQLite and PostgreSQL stores, and the work of their plans."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from datetime import datetime
from typing import Any

import asyncpg

from flowstore_core.open import resolve_store
from flowstore_sqlite.codecs import to_us


async def execute(url: str, *statements: str) -> None:
    """Execute statements on another connection."""
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as db, db:
            for statement in statements:
                db.execute(statement)
        return
    admin = await connect(url)
    try:
        for statement in statements:
            await admin.execute(statement)
    finally:
        await admin.close()


async def connect(url: str) -> asyncpg.Connection:
    """Another connection to a PostgreSQL store's server, with its schema in the search_path."""
    _, _, config = resolve_store(url)
    options = config.parts.options
    return await asyncpg.connect(
        host=options["host"],
        user="postgres",
        database="postgres",
        server_settings={"search_path": options["schema"]},
    )


def count_rows(plan: dict[str, Any]) -> int:
    """The rows that all nodes of a plan read, those that a filter removes included."""
    rows = plan["Actual Rows"] + sum(value for key, value in plan.items() if key.startswith("Rows Removed"))
    return int(rows * plan["Actual Loops"]) + sum(count_rows(child) for child in plan.get("Plans", ()))


def count_instructions(url: str, statement: str, arguments: dict[str, Any]) -> int:
    """The instructions that SQLite executes for a query."""
    instructions = 0

    def count() -> int:
        nonlocal instructions
        instructions += 1
        return 0

    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as db:
        db.set_progress_handler(count, 1)
        db.execute(statement, arguments).fetchall()
    return instructions


async def add_rows(url: str, *, sqlite: str, postgresql: str, **values: int | datetime) -> None:
    """Run a script for SQLite with named values, or a statement for PostgreSQL with the values in order."""
    if url.startswith("sqlite"):
        named = {
            name: to_us(value) if isinstance(value, datetime) else value for name, value in values.items()
        }
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as db, db:
            for statement in sqlite.split(";"):
                db.execute(statement, named)
        return
    admin = await connect(url)
    try:
        await admin.execute(postgresql, *values.values())
    finally:
        await admin.close()
