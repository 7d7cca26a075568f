"""Maps the driver's errors to the errors of flowstore (CON-2)."""

from __future__ import annotations

import re
import sqlite3

from flowstore_core import FlowStoreError, LimitExceededError, OutcomeUnknownError, StoreUnavailableError

# Another connection holds a lock or recovers the log.
_TRANSIENT = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL})

_LOCKED = "other connections kept it locked for longer than busy_timeout; try again, or raise busy_timeout"
_REASONS = {
    sqlite3.SQLITE_BUSY: _LOCKED,
    sqlite3.SQLITE_LOCKED: _LOCKED,
    sqlite3.SQLITE_PROTOCOL: _LOCKED,
    sqlite3.SQLITE_FULL: "the disk is full; make room, then try again",
    sqlite3.SQLITE_READONLY: "the file or its directory is read-only; change the permissions",
    sqlite3.SQLITE_PERM: "access is denied; check the permissions of the file and its directory",
    sqlite3.SQLITE_AUTH: "access is denied; check the permissions of the file and its directory",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened; check the permissions of the file and its directory",
    sqlite3.SQLITE_NOTADB: "its header is no longer that of an SQLite database; restore it from a backup",
    sqlite3.SQLITE_CORRUPT: "the file is damaged; restore it from a backup",
    sqlite3.SQLITE_IOERR: "the disk failed to read or write; see the log of the system",
    sqlite3.SQLITE_NOMEM: "memory ran out; try again",
    sqlite3.SQLITE_INTERRUPT: "the statement was interrupted; try again",
    sqlite3.SQLITE_NOLFS: "the file is too large for this system; move it to one with large files",
}

_SAFE_MESSAGE = re.compile(
    r"no such (table|column|index|function|module): [\w.]+"
    r"|(UNIQUE|NOT NULL|CHECK|FOREIGN KEY|PRIMARY KEY) constraint failed(: [\w., ]+)?"
)


def primary_code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; 0 for an error of Python's module."""
    code = getattr(error, "sqlite_errorcode", None)
    return code & 0xFF if isinstance(code, int) else 0


def is_transient(error: sqlite3.Error) -> bool:
    """Whether the statement had no effect and a retry may succeed."""
    return primary_code(error) in _TRANSIENT


def map_error(error: sqlite3.Error, path: str) -> FlowStoreError:
    """Map a driver error to the error for the caller. Raise it outside of the ``except`` block.

    Its text contains SQLite's result code, and SQLite's message only if that names just a table or a column.
    Other messages quote values or searches, so the driver's error is never chained.
    """
    code = primary_code(error)
    name = getattr(error, "sqlite_errorname", type(error).__name__)
    mapped: FlowStoreError
    if reason := _REASONS.get(code):
        mapped = StoreUnavailableError(f"{path} ({name}): {reason}")
    elif code == sqlite3.SQLITE_TOOBIG:
        mapped = LimitExceededError("sqlite", "rows of SQLITE_MAX_LENGTH bytes (SQLITE_TOOBIG)")
    elif code == 0 and isinstance(error, sqlite3.OperationalError):
        # Python's module could not decode a stored text.
        mapped = StoreUnavailableError(f"{path}: the file is damaged; restore it from a backup")
    else:
        detail = f" ({error})" if _SAFE_MESSAGE.fullmatch(str(error)) else ""
        mapped = FlowStoreError(
            f"{path}: unexpected {name}{detail} in the SQLite backend; nothing was changed. "
            "Either another program changed the schema or this is a bug; please report it"
        )
    if code:
        mapped.database_code = name
    return mapped


def map_commit_error(error: sqlite3.Error, path: str) -> FlowStoreError:
    """Like map_error, for a COMMIT: after a disk error the log may or may not contain the commit."""
    if primary_code(error) != sqlite3.SQLITE_IOERR:
        return map_error(error, path)
    mapped = OutcomeUnknownError(f"COMMIT on {path}")
    mapped.database_code = getattr(error, "sqlite_errorname", None)
    return mapped
