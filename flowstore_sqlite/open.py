"""Opens a store: the file, its journal mode, its schema and its connections."""

from __future__ import annotations

import logging
import sqlite3
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from flowstore_core import ConfigurationError, SchemaVersionError, StoreConfig, StoreUnavailableError
from flowstore_sqlite.codecs import to_us
from flowstore_sqlite.connection import Connection, read_transaction
from flowstore_sqlite.database import Database
from flowstore_sqlite.file_access import Access, create_file, file_exists, find_access
from flowstore_sqlite.open_files import OpenFiles
from flowstore_sqlite.schema_migrations import (
    MINIMUM_SQLITE,
    apply_migrations,
    is_current,
    known_version,
    read_version,
)
from flowstore_sqlite.store import NonDurableSqliteStore, SqliteStore
from flowstore_sqlite.url import database_path
from flowstore_sqlite.watching import CommitWatcher

_log = logging.getLogger("flowstore_sqlite")

# Settings of a connection; none of them is stored in the file.
CONNECTION_PRAGMAS = (
    # Another program that can write to the file must not run code through its schema.
    "PRAGMA trusted_schema = OFF",
    "PRAGMA cache_size = -16000",
    # A checkpoint truncates the log to this size, so that it shrinks again after a burst of writes.
    "PRAGMA journal_size_limit = 67108864",
)
ENABLE_WAL = "PRAGMA journal_mode = WAL"
JOURNAL_MODE = "PRAGMA journal_mode"
SYNCHRONOUS_PRAGMAS = {
    # On macOS a plain fsync does not flush the disk's cache; on other systems fullfsync has no effect.
    "FULL": ("PRAGMA synchronous = FULL", "PRAGMA fullfsync = ON", "PRAGMA checkpoint_fullfsync = ON"),
    "NORMAL": ("PRAGMA synchronous = NORMAL",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of a store; SqliteBackend documents them."""

    synchronous: str
    busy_timeout: float
    readers: int

    @classmethod
    def read(cls, config: StoreConfig) -> Options:
        return cls(
            synchronous=config.choice("synchronous", "FULL", ("FULL", "NORMAL")),
            busy_timeout=config.seconds("busy_timeout", 30, 0, 3600),
            readers=config.integer("readers", 2, 1, 16),
        )


class StoreContext:
    """The context manager of a store.

    A class, because an event loop that shuts down closes all open async generators concurrently, not the
    outer one before the inner one.
    """

    def __init__(self, config: StoreConfig) -> None:
        self._config = config
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> SqliteStore:
        path = database_path(self._config.url)
        options = Options.read(self._config)
        # On any failure, cancellation included, the stack closes the connections opened so far.
        async with AsyncExitStack() as stack:
            writer = Connection(path)
            stack.push_async_callback(writer.close)
            await open_writer(writer, self._config, options)
            readers = []
            for _ in range(options.readers):
                reader = Connection(path, self._config.observers, read_only=True)
                stack.push_async_callback(reader.close)
                await reader.open(writer.files)
                await reader.run_with_busy_retry(partial(_apply_pragmas, ()), options.busy_timeout)
                # A connection holds a lock on the file from its first read on; Database._close relies on it.
                await reader.run_with_busy_retry(
                    partial(read_transaction, read_version), options.busy_timeout
                )
                readers.append(reader)
            database = Database(
                writer,
                readers,
                clock=self._config.clock,
                busy_timeout=options.busy_timeout,
                observers=self._config.observers,
            )
            stack.push_async_callback(database.aclose)
            commits = CommitWatcher(path)
            stack.push_async_callback(commits.aclose)
            self._stack = stack.pop_all()
        kind = SqliteStore if options.synchronous == "FULL" else NonDurableSqliteStore
        return kind(database, commits)

    async def __aexit__(self, *exception: object) -> None:
        await self._stack.aclose()


async def open_writer(writer: Connection, config: StoreConfig, options: Options) -> int:
    """Open the writer, migrate the schema if needed, and return the schema version.

    With ``config.migrate`` it creates a missing file; without it changes nothing.
    Raises ConfigurationError, SchemaVersionError, StoreUnavailableError.
    """
    _check_sqlite()
    if config.migrate:
        create_file(writer.path)
        access = Access.WRITE
        if find_access(writer.path) is not access:
            raise StoreUnavailableError(
                f"{writer.path} cannot be written: this process may not write to the file or its directory; "
                "change the permissions, or open it with migrate=False to read it"
            )
    elif file_exists(writer.path):
        access = find_access(writer.path)
    else:
        raise SchemaVersionError(0, known_version(), "open it once with migrate=True")
    files = OpenFiles(writer.path, access)
    await writer.open(files)
    timeout = options.busy_timeout
    check = partial(is_current, migrate=config.migrate)
    current = await writer.run_with_busy_retry(partial(read_transaction, check), timeout)
    await writer.run_with_busy_retry(
        partial(_apply_pragmas, SYNCHRONOUS_PRAGMAS[options.synchronous]), timeout
    )
    if not files.is_read_only:
        # After the schema check, so that a file with a wrong schema stays untouched.
        await writer.run_with_busy_retry(_enable_wal, timeout)
    await writer.run_with_busy_retry(partial(read_transaction, partial(_record_wal, files)), timeout)
    if current:
        version, _ = await writer.run_with_busy_retry(partial(read_transaction, read_version), timeout)
        return version
    now = config.clock or _system_time
    return await writer.run_with_busy_retry(lambda db: apply_migrations(db, to_us(now())), timeout)


def _enable_wal(db: sqlite3.Connection) -> None:
    # Checked first, because setting it again needs a lock.
    if db.execute(JOURNAL_MODE).fetchone()[0] == "wal":
        return
    if db.execute(ENABLE_WAL).fetchone()[0] != "wal":
        raise StoreUnavailableError(
            "the write-ahead log cannot be used here; keep the file on a local disk, not on a network one"
        )


def _record_wal(files: OpenFiles, db: sqlite3.Connection) -> None:
    # SQLite opens the log at the first read.
    read_version(db)
    files.record_wal()


def _apply_pragmas(more: tuple[str, ...], db: sqlite3.Connection) -> None:
    for statement in (*CONNECTION_PRAGMAS, *more):
        db.execute(statement).fetchall()


def _system_time() -> datetime:
    return datetime.now(UTC)


def has_wal_reset_bug() -> bool:
    """Whether this SQLite has the WAL-reset bug, which can damage a file written by several connections."""
    return (3, 7, 0) <= sqlite3.sqlite_version_info < (3, 51, 3)


def _check_sqlite() -> None:
    version = sqlite3.sqlite_version_info
    if version < MINIMUM_SQLITE:
        needed = ".".join(map(str, MINIMUM_SQLITE))
        raise ConfigurationError(
            f"this Python is linked with SQLite {sqlite3.sqlite_version}, but {needed} or newer is needed"
        )
    if has_wal_reset_bug():
        _log.debug(
            "SQLite %s has a rare bug that can damage a database in WAL mode when two connections write and "
            "checkpoint at the same moment; it is fixed in 3.51.3, so upgrade when you can",
            sqlite3.sqlite_version,
            extra={"flowstore.sqlite_version": sqlite3.sqlite_version},
        )
