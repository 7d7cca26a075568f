"""One connection on a thread of its own, and running whole transactions there."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import sqlite3
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar, cast

import aiosqlite

from flowstore_core import ConfigurationError, FlowStoreError, StoreClosedError, StoreUnavailableError
from flowstore_core.instrumentation import NO_OBSERVERS, Observers
from flowstore_core.shielding import run_to_completion
from flowstore_sqlite.errors import is_transient, map_error
from flowstore_sqlite.file_access import Access, find_access, is_same_path, sqlite_uri
from flowstore_sqlite.open_files import OpenFiles

T = TypeVar("T")

DRIVER_BUSY_TIMEOUT = 0.02
"""How long SQLite itself waits for a lock; further waiting is done outside of the thread."""
CLOSE_TIMEOUT = 5.0

_log = logging.getLogger("flowstore_sqlite")


class _RedactedResult(Generic[T]):
    """What came of some work; like the work itself it shows nothing of it.

    aiosqlite's logger writes at DEBUG what it calls and what that raises, and asyncio in debug mode
    what it hands on: without these two, rows and parameters would stand in the log.
    """

    __slots__ = ("_error", "_value")

    def __init__(self, value: T | None, error: Exception | None) -> None:
        self._value = value
        self._error = error

    def result(self) -> T:
        if self._error is not None:
            raise self._error
        return cast(T, self._value)

    def __repr__(self) -> str:
        return "<done>"


class _RedactedWork(Generic[T]):
    """Work without its parameters in sight."""

    __slots__ = ("_work",)

    def __init__(self, work: Callable[[sqlite3.Connection], T]) -> None:
        self._work = work

    def __call__(self, db: sqlite3.Connection) -> _RedactedResult[T]:
        try:
            return _RedactedResult(self._work(db), None)
        except Exception as error:  # noqa: BLE001 - not swallowed: result() raises it
            return _RedactedResult(None, error)

    def __repr__(self) -> str:
        return "<work>"


class Connection(aiosqlite.Connection):
    """An aiosqlite connection that runs callables: a whole transaction is one trip to its thread.

    A transaction of several awaits would stay open half-way when its caller is cancelled.

    One that ``only_reads`` can neither empty nor delete the log when it closes.
    """

    files: OpenFiles
    """Of the store, from ``open`` on."""

    def __init__(self, path: str, observers: Observers = NO_OBSERVERS, *, read_only: bool = False) -> None:
        self.path = path
        self._read_only = read_only
        self._observers = observers
        self._pid = os.getpid()
        self._is_closing = False
        super().__init__(self._connect_file, iter_chunk_size=64)
        # Closing is guaranteed, but bounded: a thread stuck in a dead file system must not keep the
        # interpreter from exiting. Before aiosqlite 0.22 the connection was the thread.
        self._worker = cast(threading.Thread, getattr(self, "_thread", self))
        self._worker.daemon = True

    def _connect_file(self) -> sqlite3.Connection:
        access = self.files.access
        if self._read_only and access is Access.WRITE:
            access = Access.READ
        return sqlite3.connect(
            sqlite_uri(self.path, access),
            uri=True,
            timeout=DRIVER_BUSY_TIMEOUT,
            isolation_level=None,
            cached_statements=256,
        )

    async def open(self, files: OpenFiles | None = None) -> None:
        """Open it, or leave nothing behind. Raises StoreUnavailableError.

        Without ``files`` it gets whatever access this process has.
        """
        self.files = OpenFiles(self.path, find_access(self.path)) if files is None else files

        async def opening() -> None:
            await self

        try:
            # To the end, because a connection that opens after its caller has gone is never closed.
            await run_to_completion(opening())
            if await self.run_in_thread(self._opened_expected_path):
                return
            failure: FlowStoreError = ConfigurationError(
                f"{self.path} became a symbolic link while it was opened; links are never followed"
            )
        except sqlite3.Error as error:
            failure = map_error(error, self.path)
        except RuntimeError:
            failure = StoreUnavailableError("no thread could be started")
        raise failure

    def _opened_expected_path(self, db: sqlite3.Connection) -> bool:
        # Reads no page of the file, so nothing has happened to it yet.
        return is_same_path(db.execute("PRAGMA database_list").fetchone()[2], self.path)

    # Not named run, which until aiosqlite 0.22 is the thread's own method.
    async def run_in_thread(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run a callable on the connection's thread. It goes on when the caller is cancelled."""
        if self._is_closing:
            raise StoreClosedError
        done: _RedactedResult[T] = await cast(Any, self)._execute(_RedactedWork(work), self._conn)
        return done.result()

    async def run_with_busy_retry(self, work: Callable[[sqlite3.Connection], T], seconds: float) -> T:
        """As run_work, again and again while the database is locked, at most that long.

        ``work`` must have changed nothing when it fails so. Afterwards the files are verified. Raises
        StoreUnavailableError.
        """

        def verified(db: sqlite3.Connection) -> T:
            result = work(db)
            self.files.verify()
            return result

        deadline = asyncio.get_running_loop().time() + seconds
        wait = backoff()
        while True:
            try:
                return await self.run_in_thread(verified)
            except sqlite3.Error as error:
                failure = error
            if not is_transient(failure) or asyncio.get_running_loop().time() >= deadline:
                # Tells more than any error that follows from a missing file.
                self.files.verify()
                raise map_error(failure, self.path)
            pause = next(wait)
            if self._observers:
                self._observers.retried("read", getattr(failure, "sqlite_errorname", ""), pause)
            await asyncio.sleep(pause)

    async def cancel_work(self) -> None:
        """Interrupt the statement that runs, and wait until the thread is free."""
        free = asyncio.create_task(self.run_in_thread(lambda db: None))
        while not free.done():
            # Again and again: an interrupt that comes before the statement has begun is lost.
            self.interrupt_now()
            await asyncio.wait({free}, timeout=0.01)

    def interrupt_now(self) -> None:
        """Abort the statement that runs, if any; from any thread."""
        if self._connection is not None:
            self._connection.interrupt()

    async def close(self) -> None:
        """Close it behind what is still running there; bounded, and also when cancelled meanwhile."""
        self._is_closing = True
        if self._pid != os.getpid():
            # After a fork there is no thread that could close it, and the file's locks are the parent's.
            return
        await run_to_completion(self._close_bounded())

    async def _close_bounded(self) -> None:
        closing = asyncio.create_task(self._close_and_join())
        done, _ = await asyncio.wait({closing}, timeout=CLOSE_TIMEOUT)
        if not done:
            _log.warning(
                "a connection to %s did not close within %.0f s",
                self.path,
                CLOSE_TIMEOUT,
                extra={"flowstore.wait_seconds": CLOSE_TIMEOUT},
            )
        elif not closing.cancelled() and (error := closing.exception()) is not None:
            kind = type(error).__name__
            _log.warning(
                "a connection to %s closed with %s", self.path, kind, extra={"flowstore.error_type": kind}
            )

    async def _close_and_join(self) -> None:
        await super().close()
        # The thread answers just before it ends; nobody should find it still there afterwards.
        for delay in backoff():
            if not self._worker.is_alive():
                break
            await asyncio.sleep(delay)


def read_transaction(work: Callable[[sqlite3.Connection], T], db: sqlite3.Connection) -> T:
    """Run work whose every statement reads the same state of the database."""
    db.execute("BEGIN")
    try:
        return work(db)
    finally:
        # Nothing to undo, and it never fails for want of a lock.
        if db.in_transaction:
            db.execute("ROLLBACK")


def write_transaction(work: Callable[[sqlite3.Connection], T], db: sqlite3.Connection) -> T:
    """Run work in a transaction of its own, under the write lock: whole or not at all."""
    db.execute("BEGIN IMMEDIATE")
    try:
        result = work(db)
        db.execute("COMMIT")
        return result
    finally:
        # Some errors have rolled back already.
        if db.in_transaction:
            db.execute("ROLLBACK")


def backoff() -> Iterator[float]:
    """Seconds to wait between tries: jittered, and short even after long, because who asks seldom starves."""
    longest = 0.002
    while True:
        yield random.uniform(longest / 4, longest)
        longest = min(longest * 1.5, 0.025)
