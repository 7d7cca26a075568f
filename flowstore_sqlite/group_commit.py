"""Group commit: waiting writes share one transaction, and so one disk sync. Runs on the writer's thread.

Most writes check first and change last, so a write that fails has usually changed nothing, and the group
continues without it. If a write fails after a change, the whole group is rolled back and runs again with a
savepoint around each write.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from flowstore_core import OutcomeUnknownError, StoreClosedError, StoreUnavailableError
from flowstore_core.batching import REQUEUE, PendingCall
from flowstore_sqlite.errors import is_transient, map_commit_error, map_error
from flowstore_sqlite.open_files import OpenFiles
from flowstore_sqlite.writer_queue import FairWriterLock

T = TypeVar("T")
Write = Callable[[sqlite3.Connection, int], T]
"""The work of one write. Its arguments are the connection and the store's time in microseconds.

It runs under the write lock, so the times of transactions rise in commit order. It may run again after a
rollback, so it must have no effect outside of the database.
"""
Read = Callable[[sqlite3.Connection], T]
"""The work of one read, on one snapshot."""

MAX_HOLD = 0.02
"""Seconds after which a group starts no further write; the remaining calls are requeued."""


class _DirtyFailureError(Exception):
    """A write failed after it had changed something."""


class GroupCommit:
    """Runs groups of writes. Its methods are called on one thread at a time."""

    def __init__(self, files: OpenFiles, now: Callable[[], int], busy_timeout: float) -> None:
        self._files = files
        self._path = files.path
        self._now = now
        self._busy_timeout = busy_timeout
        self._writer_lock = FairWriterLock(files.path)
        self.db: sqlite3.Connection
        """Set by the writer's thread before the first group."""
        self.shutdown_deadline: float | None = None
        """Set when the store closes: the time (time.monotonic()) after which no call waits for the lock."""

    def close(self) -> None:
        self._writer_lock.close()

    def run(self, calls: Sequence[PendingCall]) -> list[Any]:
        """Return for each call its result, the error for its caller, or REQUEUE if it has not run."""
        if self._files.is_read_only:
            reason = (
                f"{self._path} can only be read: this process may not write to the file or its directory; "
                "change the permissions, then open the store again"
            )
            return [StoreUnavailableError(reason) for _ in calls]
        try:
            has_begun = self._writer_lock.holds_slice() and self._try_begin()
            if not has_begun and (failures := self._begin(calls)) is not None:
                return failures
            results: list[Any] = []
            try:
                self._run_optimistic(calls, results)
            except (_DirtyFailureError, sqlite3.Error):
                self._roll_back()
                return self._run_with_savepoints(calls)
            results = self._commit(results)
            if len(results) < len(calls):
                results += [REQUEUE] * (len(calls) - len(results))
            return results
        except sqlite3.Error as error:
            return self._failures(error, calls)
        finally:
            self._roll_back()

    # Fast path: no savepoints.
    def _run_optimistic(self, calls: Sequence[PendingCall], results: list[Any]) -> None:
        db, monotonic, now = self.db, time.monotonic, self._now
        until = monotonic() + MAX_HOLD
        for call in calls:
            changes = db.total_changes
            try:
                result = call.item(db, now())
            except sqlite3.Error:
                raise
            except Exception as error:
                if db.total_changes != changes:
                    raise _DirtyFailureError from error
                result = error
            results.append(result)
            if monotonic() >= until:
                break

    # Slow path: a savepoint around each write.
    def _run_with_savepoints(self, calls: Sequence[PendingCall]) -> list[Any]:
        if (failures := self._begin(calls)) is not None:
            return failures
        try:
            results = [self._run_in_savepoint(call.item) for call in calls]
        except sqlite3.Error as error:
            self._roll_back()
            if is_transient(error):
                return [REQUEUE] * len(calls)
            if len(calls) == 1:
                return [map_error(error, self._path)]
            # The error ended the whole transaction; each half gets a transaction to itself.
            middle = len(calls) // 2
            return self._run_with_savepoints(calls[:middle]) + self._run_with_savepoints(calls[middle:])
        return self._commit(results)

    def _run_in_savepoint(self, work: Write[Any]) -> Any:
        db = self.db
        result: Any
        db.execute("SAVEPOINT call")
        try:
            result = work(db, self._now())
        except sqlite3.Error as error:
            if is_transient(error) or not db.in_transaction:
                raise
            result = map_error(error, self._path)
        except Exception as error:  # noqa: BLE001 - the caller gets it
            result = error
        if isinstance(result, Exception):
            db.execute("ROLLBACK TO call")
        db.execute("RELEASE call")
        return result

    def _begin(self, calls: Sequence[PendingCall]) -> list[Any] | None:
        """Queue for the write lock; None when it is held, else the errors for the callers."""
        deadline = calls[0].queued_at + self._busy_timeout

        def timed_out() -> bool:
            now = time.monotonic()
            return now >= deadline or (self.shutdown_deadline is not None and now >= self.shutdown_deadline)

        try:
            if self._writer_lock.acquire(self._try_begin, timed_out):
                return None
        except sqlite3.Error as error:
            failure = error
        else:
            return self._timed_out(calls)
        return self._failures(failure, calls)

    def _try_begin(self) -> bool:
        try:
            # A deferred transaction that reads first fails at its first write if another process wrote in
            # between.
            self.db.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            if not is_transient(error):
                raise
            return False
        return True

    def _commit(self, results: list[Any]) -> list[Any]:
        try:
            # Right before the commit: a commit into a log that another process has replaced damages that log.
            self._files.verify()
        except StoreUnavailableError as error:
            self._roll_back()
            return [StoreUnavailableError(error.reason) for _ in results]
        try:
            self.db.execute("COMMIT")
        except sqlite3.Error as error:
            self._roll_back()
            if is_transient(error):
                return [REQUEUE for _ in results]
            return [map_commit_error(error, self._path) for _ in results]
        try:
            # The commit may have gone into a file that was removed since the first check.
            self._files.verify()
        except StoreUnavailableError:
            operation = f"COMMIT on {self._path}, which was removed or replaced at that moment,"
            return [OutcomeUnknownError(operation) for _ in results]
        return results

    def _failures(self, error: sqlite3.Error, calls: Sequence[PendingCall]) -> list[Any]:
        try:
            # A missing file explains more than the error that follows from it.
            self._files.verify()
        except StoreUnavailableError as missing:
            return [StoreUnavailableError(missing.reason) for _ in calls]
        return [map_error(error, self._path) for _ in calls]

    def _timed_out(self, calls: Sequence[PendingCall]) -> list[Any]:
        now = time.monotonic()
        if self.shutdown_deadline is not None and now >= self.shutdown_deadline:
            return [StoreClosedError() for _ in calls]
        waited = f"{self._path} was locked by others for {self._busy_timeout:g} s"
        reason = f"{waited}; try again, or raise busy_timeout"
        latest = now - self._busy_timeout
        return [StoreUnavailableError(reason) if call.queued_at <= latest else REQUEUE for call in calls]

    def _roll_back(self) -> None:
        # Some errors have already rolled back.
        if self.db.in_transaction:
            self.db.execute("ROLLBACK")
