"""Fails statements as a full disk does, for the conformance suite (WriteFailable)."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flowstore_sqlite.connection import connection_classes
from flowstore_sqlite.url import database_path

NEEDS_NO_ROOM = ("BEGIN", "SELECT", "PRAGMA", "ROLLBACK")


class StatementFailureInjector:
    """Counts the statements of connections that need room on the disk, and fails them from one on."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._left: int | None = None
        """Number of statements that still succeed; None if none fails."""
        self._has_failed = False

    def fail(self, *, skip: int = 0) -> None:
        self._left, self._has_failed = skip, False

    def stop(self) -> bool:
        self._left = None
        return self._has_failed

    def check(self, statement: str) -> None:
        """Raise SQLITE_FULL if the statement must fail."""
        if self._left is None or statement.lstrip().startswith(NEEDS_NO_ROOM):
            return
        if self._left > 0:
            self._left -= 1
            return
        self._has_failed = True
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode, error.sqlite_errorname = sqlite3.SQLITE_FULL, "SQLITE_FULL"
        raise error


@contextmanager
def fail_statements(url: str) -> Iterator[StatementFailureInjector]:
    """Make an injector for the stores that open the file of this URL in the context."""
    path, injector = database_path(url), StatementFailureInjector(url)

    class FailingConnection(sqlite3.Connection):
        def execute(self, statement: str, *parameters: Any) -> sqlite3.Cursor:
            injector.check(statement)
            return super().execute(statement, *parameters)

        def executemany(self, statement: str, *parameters: Any) -> sqlite3.Cursor:
            injector.check(statement)
            return super().executemany(statement, *parameters)

    connection_classes[path] = FailingConnection
    try:
        yield injector
    finally:
        del connection_classes[path]
