"""A connection with a dedicated thread that runs whole transactions."""

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
"""Seconds that SQLite waits for a lock inside a statement; longer waits do not block the thread."""
CLOSE_TIMEOUT = 5.0

connection_classes: dict[str, type[sqlite3.Connection]] = {}
"""The classes of connections by the path of their database; fault injection replaces them."""

_log = logging.getLogger("flowstore_sqlite")


class _RedactedResult(Generic[T]):
    """The result of a callable, with a ``repr`` that shows no data.

    At DEBUG level aiosqlite logs the callables that it runs and the exceptions that they raise, and asyncio
    in debug mode logs results. Without this class and _RedactedWork, logs would contain rows and parameters.
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
    """A callable with a ``repr`` that hides its parameters. Calling it raises nothing."""

    __slots__ = ("_work",)

    def __init__(self, work: Callable[[sqlite3.Connection], T]) -> None:
        self._work = work

    def __call__(self, db: sqlite3.Connection) -> _RedactedResult[T]:
        try:
            return _RedactedResult(self._work(db), None)
        except Exception as error:  # noqa: BLE001 - result() raises it
            return _RedactedResult(None, error)

    def __repr__(self) -> str:
        return "<work>"


class Connection(aiosqlite.Connection):
    """An aiosqlite connection that runs callables, each a whole transaction in one trip to the thread.

    A transaction of several awaits would stay open when its caller is cancelled in the middle.

    A ``read_only`` connection neither checkpoints nor deletes the write-ahead log when it closes.
    """

    files: OpenFiles
    """The files of the store. Set by ``open``."""

    def __init__(self, path: str, observers: Observers = NO_OBSERVERS, *, read_only: bool = False) -> None:
        self.path = path
        self._read_only = read_only
        self._observers = observers
        self._pid = os.getpid()
        self._is_closing = False
        super().__init__(self._connect_file, iter_chunk_size=64)
        # A daemon, because a thread stuck in a dead file system must not keep the interpreter from exiting.
        # Before aiosqlite 0.22 the connection was the thread.
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
            factory=connection_classes.get(self.path, sqlite3.Connection),
            cached_statements=256,
        )

    async def open(self, files: OpenFiles | None = None) -> None:
        """Open the connection. The caller must close it, also after an error.

        Without ``files`` it opens with the access that this process has. Raises ConfigurationError,
        StoreUnavailableError.
        """
        self.files = OpenFiles(self.path, find_access(self.path)) if files is None else files

        async def opening() -> None:
            await self

        try:
            # A connection that opens after its caller was cancelled would never be closed.
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
        # Reads no page, so a file behind a symbolic link stays untouched.
        return is_same_path(db.execute("PRAGMA database_list").fetchone()[2], self.path)

    # Not named run: before aiosqlite 0.22 that is the method of the thread.
    async def run_in_thread(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run a callable on the connection's thread. It continues when the caller is cancelled."""
        if self._is_closing:
            raise StoreClosedError
        done: _RedactedResult[T] = await cast(Any, self)._execute(_RedactedWork(work), self._conn)
        return done.result()

    async def run_with_busy_retry(self, work: Callable[[sqlite3.Connection], T], seconds: float) -> T:
        """Like run_in_thread, with retries for at most ``seconds`` while the database is locked.

        ``work`` must have no effect when it fails with a lock error. The files are verified after it. Raises
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
                # A missing file explains more than the error that follows from it.
                self.files.verify()
                raise map_error(failure, self.path)
            pause = next(wait)
            if self._observers:
                self._observers.retried("read", getattr(failure, "sqlite_errorname", ""), pause)
            await asyncio.sleep(pause)

    async def cancel_work(self) -> None:
        """Interrupt the running statement and wait until the thread is free."""
        free = asyncio.create_task(self.run_in_thread(lambda db: None))
        while not free.done():
            # Repeated, because an interrupt before the statement begins has no effect.
            self.interrupt_now()
            await asyncio.wait({free}, timeout=0.01)

    def interrupt_now(self) -> None:
        """Interrupt the running statement, if any. Thread-safe."""
        if self._connection is not None:
            self._connection.interrupt()

    async def close(self) -> None:
        """Close the connection after its running work, in bounded time, even when cancelled.

        Logs a warning when that fails. Raises only CancelledError.
        """
        self._is_closing = True
        if self._pid != os.getpid():
            # A forked process has no thread that could close it, and the locks belong to the parent.
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
        # aiosqlite reports the close just before its thread ends.
        for delay in backoff():
            if not self._worker.is_alive():
                break
            await asyncio.sleep(delay)


def read_transaction(work: Callable[[sqlite3.Connection], T], db: sqlite3.Connection) -> T:
    """Run work on one snapshot of the database."""
    db.execute("BEGIN")
    try:
        return work(db)
    finally:
        # Unlike COMMIT, ROLLBACK never fails because of a lock.
        if db.in_transaction:
            db.execute("ROLLBACK")


def write_transaction(work: Callable[[sqlite3.Connection], T], db: sqlite3.Connection) -> T:
    """Run work atomically, under the write lock."""
    db.execute("BEGIN IMMEDIATE")
    try:
        result = work(db)
        db.execute("COMMIT")
        return result
    finally:
        # Some errors have already rolled back.
        if db.in_transaction:
            db.execute("ROLLBACK")


def backoff() -> Iterator[float]:
    """Seconds to sleep before each retry, jittered. At most 25 ms: a waiter that rarely polls starves."""
    longest = 0.002
    while True:
        yield random.uniform(longest / 4, longest)
        longest = min(longest * 1.5, 0.025)
