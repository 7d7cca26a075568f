"""Refuses statements like a full disk, for the conformance suite (RequestRefusable)."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flowstore_sqlite.connection import connection_classes
from flowstore_sqlite.url import database_path

NEEDS_NO_ROOM = ("BEGIN", "SELECT", "PRAGMA", "ROLLBACK")


class StatementRefuser:
    """Counts the statements of connections that need room on the disk, and refuses them from one on."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._accepted: int | None = None
        """Number of statements to accept before refusing all others; None if none is refused."""
        self._has_refused = False

    def refuse(self, *, skip: int = 0) -> None:
        self._accepted, self._has_refused = skip, False

    def accept(self) -> bool:
        self._accepted = None
        return self._has_refused

    def check(self, statement: str) -> None:
        """Raise SQLITE_FULL if the statement is refused."""
        if self._accepted is None or statement.lstrip().startswith(NEEDS_NO_ROOM):
            return
        if self._accepted > 0:
            self._accepted -= 1
            return
        self._has_refused = True
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode, error.sqlite_errorname = sqlite3.SQLITE_FULL, "SQLITE_FULL"
        raise error


@contextmanager
def refuse_statements(url: str) -> Iterator[StatementRefuser]:
    """A refuser for the stores that open the file of this URL in the context."""
    path, refuser = database_path(url), StatementRefuser(url)

    class RefusingConnection(sqlite3.Connection):
        def execute(self, statement: str, *parameters: Any) -> sqlite3.Cursor:
            refuser.check(statement)
            return super().execute(statement, *parameters)

        def executemany(self, statement: str, *parameters: Any) -> sqlite3.Cursor:
            refuser.check(statement)
            return super().executemany(statement, *parameters)

    connection_classes[path] = RefusingConnection
    try:
        yield refuser
    finally:
        del connection_classes[path]
