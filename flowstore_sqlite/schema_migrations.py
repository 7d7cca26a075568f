"""Schema versions: reading, checking and applying the numbered files of ``migrations``."""

from __future__ import annotations

import logging
import re
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.resources import files

from flowstore_core import ConfigurationError, SchemaVersionError
from flowstore_sqlite.connection import write_transaction
from flowstore_sqlite.errors import primary_code
from flowstore_sqlite.search import enable_search

_log = logging.getLogger("flowstore_sqlite")

MINIMUM_SQLITE = (3, 37, 0)
"""The first version with STRICT tables."""

HAS_SCHEMA_TABLE = "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = 'flowstore_schema'"
HAS_ANY_TABLE = "SELECT 1 FROM sqlite_schema LIMIT 1"
READ_VERSION = "SELECT COALESCE(MAX(version), 0), COALESCE(MAX(works_from), 0) FROM flowstore_schema"
CREATE_SCHEMA_TABLE = """
CREATE TABLE IF NOT EXISTS flowstore_schema (
    version    INTEGER NOT NULL PRIMARY KEY,
    name       TEXT NOT NULL,
    works_from INTEGER NOT NULL, -- the oldest known_version() of code that can use it
    applied_at INTEGER NOT NULL
) STRICT
"""
DELETE_VERSION = "DELETE FROM flowstore_schema WHERE version = ?"
INSERT_VERSION = "INSERT INTO flowstore_schema (version, name, works_from, applied_at) VALUES (?, ?, ?, ?)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """One numbered .sql file."""

    version: int
    name: str
    works_from: int
    """The oldest ``known_version()`` of code that can use the schema after this migration."""
    sql: str


@lru_cache(maxsize=1)
def load_migrations() -> tuple[Migration, ...]:
    """All migrations in order. The first line of each file is ``-- works_from: N``."""
    found = []
    for file in files("flowstore_sqlite").joinpath("migrations").iterdir():
        if (named := re.fullmatch(r"(\d{4})_(\w+)\.sql", file.name)) is None:
            continue
        text = file.read_text(encoding="utf-8")
        if (head := re.match(r"-- works_from: (\d+)\n", text)) is None:
            raise ConfigurationError(f"migration {file.name} does not begin with -- works_from: N")
        found.append(
            Migration(version=int(named[1]), name=named[2], works_from=int(head[1]), sql=text),
        )
    return tuple(sorted(found, key=lambda migration: migration.version))


def known_version() -> int:
    """The schema version of this code."""
    return load_migrations()[-1].version


def read_version(db: sqlite3.Connection) -> tuple[int, int]:
    """The version of a database and its ``works_from``; (0, 0) without a schema.

    Raises ConfigurationError for a file that is not a database.
    """
    try:
        has_schema = db.execute(HAS_SCHEMA_TABLE).fetchone() is not None
    except sqlite3.DatabaseError as error:
        if primary_code(error) != sqlite3.SQLITE_NOTADB:
            raise
        is_database = False
    else:
        is_database = True
    if not is_database:
        path = db.execute("PRAGMA database_list").fetchone()[2]
        raise ConfigurationError(
            f"{path} is not an SQLite database; name another file in the URL, or restore a backup"
        )
    if not has_schema:
        return 0, 0
    version, works_from = db.execute(READ_VERSION).fetchone()
    return version, works_from


def is_current(db: sqlite3.Connection, migrate: bool) -> bool:
    """Whether this code can use the database as it is; False if it must be migrated first.

    Raises SchemaVersionError, and ConfigurationError for a database of another program.
    """
    version, works_from = read_version(db)
    needed = known_version()
    if works_from > needed:
        raise SchemaVersionError(version, needed, "upgrade flowstore")
    if version >= needed:
        return True
    if not migrate:
        raise SchemaVersionError(version, needed, "open it once with migrate=True")
    if version == 0 and db.execute(HAS_ANY_TABLE).fetchone() is not None:
        raise ConfigurationError(
            "the file is another program's SQLite database; name another file in the URL"
        )
    return False


def apply_migrations(db: sqlite3.Connection, now: int) -> int:
    """Apply all missing migrations in one transaction and return the schema version."""
    return write_transaction(partial(_apply_missing, now=now), db)


def _apply_missing(db: sqlite3.Connection, *, now: int) -> int:
    # Checked again under the lock: another process may have migrated since.
    if not is_current(db, migrate=True):
        db.execute(CREATE_SCHEMA_TABLE)
        version, _ = read_version(db)
        for migration in load_migrations():
            if migration.version <= version:
                continue
            for statement in _statements(migration.sql):
                db.execute(statement)
            row = (migration.version, migration.name, migration.works_from, now)
            db.execute(INSERT_VERSION, row)
            _log.info(
                "applied migration %04d %s",
                migration.version,
                migration.name,
                extra={"flowstore.schema_version": migration.version},
            )
        enable_search(db)
    version, _ = read_version(db)
    return version


def _statements(text: str) -> Iterator[str]:
    # executescript would commit the enclosing transaction.
    statement = ""
    for line in text.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
