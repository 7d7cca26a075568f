"""How a mutant changes what its base says to the database: in one store, never in the module."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Sequence
from typing import Any


class Cut:
    """Replacements in SQL: a regular expression and what stands in its place."""

    def __init__(self, *changes: tuple[str, str]) -> None:
        self._changes = [(re.compile(pattern), text) for pattern, text in changes]

    def __call__(self, statement: str) -> str:
        for pattern, text in self._changes:
            statement = pattern.sub(text, statement)
        return statement


class SqliteSurgery:
    """Laid over a SqliteStore: statements go through ``cut``, and the values for them through ``bind``."""

    cut: Callable[[str], str] = Cut()

    def bind(self, statement: str, values: Any) -> Any:
        return values

    async def write(self, work: Any, give_back: Any = None) -> Any:
        return await super().write(  # type: ignore[misc]
            lambda db, now: work(_Patient(db, self), now), give_back
        )

    async def read(self, work: Any) -> Any:
        return await super().read(lambda db: work(_Patient(db, self)))  # type: ignore[misc]


class _Patient:
    """A connection whose statements are changed on the way."""

    def __init__(self, db: sqlite3.Connection, surgeon: SqliteSurgery) -> None:
        self._db = db
        self._surgeon = surgeon

    def execute(self, statement: str, values: Sequence[Any] | dict[str, Any] = ()) -> sqlite3.Cursor:
        values = self._surgeon.bind(statement, values)
        return self._db.execute(self._surgeon.cut(statement), values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)


class PostgresSurgery:
    """Laid over a PostgresStore: every statement goes through ``cut`` before the schema's name is put in."""

    cut: Callable[[str], str] = Cut()

    def begin(self) -> None:
        pool: Any = self._database.pool  # type: ignore[attr-defined]
        whole = type(pool)
        cut = type(self).cut

        class Operated(whole):  # type: ignore[misc,valid-type]
            def sql(self, statement: str) -> str:
                return str(super().sql(cut(statement)))

        pool.__class__ = Operated
