"""Patching the SQL statements of one store, without changes to its modules."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Sequence
from typing import Any


class SqlPatch:
    """Regular expressions and their replacements, applied to a statement in order."""

    def __init__(self, *changes: tuple[str, str]) -> None:
        self._changes = [(re.compile(pattern), text) for pattern, text in changes]

    def __call__(self, statement: str) -> str:
        for pattern, text in self._changes:
            statement = pattern.sub(text, statement)
        return statement


class PatchedSqlite:
    """Mixin for a SqliteStore: ``patch_sql`` changes statements, and ``bind`` their parameters."""

    patch_sql: Callable[[str], str] = SqlPatch()

    def bind(self, statement: str, values: Any) -> Any:
        return values

    def begin(self) -> None:
        database: Any = self._database  # type: ignore[attr-defined]
        write, read = database.write, database.read
        database.write = lambda work, on_abandoned=None: write(
            lambda db, now: work(_PatchedConnection(db, self), now), on_abandoned
        )
        database.read = lambda work: read(lambda db: work(_PatchedConnection(db, self)))


class _PatchedConnection:
    """A connection that patches its statements."""

    def __init__(self, db: sqlite3.Connection, store: PatchedSqlite) -> None:
        self._db = db
        self._store = store

    def execute(self, statement: str, values: Sequence[Any] | dict[str, Any] = ()) -> sqlite3.Cursor:
        values = self._store.bind(statement, values)
        return self._db.execute(self._store.patch_sql(statement), values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)


class PatchedPostgres:
    """Mixin for a PostgresStore: ``patch_sql`` changes statements before the schema is inserted."""

    patch_sql: Callable[[str], str] = SqlPatch()

    def begin(self) -> None:
        pool: Any = self._database.pool  # type: ignore[attr-defined]
        whole = type(pool)
        patch_sql = type(self).patch_sql

        class PatchedPool(whole):  # type: ignore[misc,valid-type]
            def sql(self, statement: str) -> str:
                return str(super().sql(patch_sql(statement)))

        pool.__class__ = PatchedPool
