"""Groups of writes as transactions, on the writer's thread.

A group shares one transaction, and so one sync of the disk. Most writes check first and change last,
so one that fails has changed nothing and its neighbours may stand. Only when one fails after it has
changed something is the group undone and run again, each write behind a savepoint of its own.
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
"""Work of one transaction: gets the connection and the store's time, in microseconds.

It runs under the write lock, so the times of transactions rise in the order of their commits. It may
run again when nothing came of the first time, so it must change nothing but rows of the database.
"""
Read = Callable[[sqlite3.Connection], T]
"""Work on one snapshot."""

MAX_HOLD = 0.02
"""How long a group may go on beginning new writes; the rest waits for the next turn."""


class _DirtyFailureError(Exception):
    """A write failed after it had changed something."""


class GroupCommit:
    """Runs groups of writes; its methods are called on one thread at a time."""

    def __init__(self, files: OpenFiles, now: Callable[[], int], busy_timeout: float) -> None:
        self._files = files
        self._path = files.path
        self._now = now
        self._busy_timeout = busy_timeout
        self._writer_lock = FairWriterLock(files.path)
        self.db: sqlite3.Connection
        """Given before the first group, by the thread that runs them."""
        self.shutdown_deadline: float | None = None
        """Set when the store closes: from then on nobody waits for the lock, by time.monotonic()."""

    def close(self) -> None:
        self._writer_lock.close()

    def run(self, calls: Sequence[PendingCall]) -> list[Any]:
        """For each call its result, the error that its caller gets, or REQUEUE if it has not run."""
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
            outcomes: list[Any] = []
            try:
                self._run_optimistic(calls, outcomes)
            except (_DirtyFailureError, sqlite3.Error):
                # One of them failed all: they run again, told apart.
                self._roll_back()
                return self._run_with_savepoints(calls)
            outcomes = self._commit(outcomes)
            if len(outcomes) < len(calls):
                outcomes += [REQUEUE] * (len(calls) - len(outcomes))
            return outcomes
        except sqlite3.Error as error:
            return self._failures(error, calls)
        finally:
            self._roll_back()

    def _failures(self, error: sqlite3.Error, calls: Sequence[PendingCall]) -> list[Any]:
        try:
            # Tells more than any error that follows from a missing file.
            self._files.verify()
        except StoreUnavailableError as lost:
            return [StoreUnavailableError(lost.reason) for _ in calls]
        return [map_error(error, self._path) for _ in calls]

    def _run_optimistic(self, calls: Sequence[PendingCall], outcomes: list[Any]) -> None:
        db, monotonic, now = self.db, time.monotonic, self._now
        until = monotonic() + MAX_HOLD
        for call in calls:
            changes = db.total_changes
            try:
                outcome = call.item(db, now())
            except sqlite3.Error:
                raise
            except Exception as error:
                if db.total_changes != changes:
                    raise _DirtyFailureError from error
                outcome = error
            outcomes.append(outcome)
            if monotonic() >= until:
                break

    def _run_with_savepoints(self, calls: Sequence[PendingCall]) -> list[Any]:
        if (failures := self._begin(calls)) is not None:
            return failures
        try:
            outcomes = [self._run_in_savepoint(call.item) for call in calls]
        except sqlite3.Error as error:
            self._roll_back()
            if is_transient(error):
                return [REQUEUE] * len(calls)
            if len(calls) == 1:
                return [map_error(error, self._path)]
            # It took the whole transaction with it, so the parts get transactions of their own.
            middle = len(calls) // 2
            return self._run_with_savepoints(calls[:middle]) + self._run_with_savepoints(calls[middle:])
        return self._commit(outcomes)

    def _run_in_savepoint(self, work: Write[Any]) -> Any:
        db = self.db
        outcome: Any
        db.execute("SAVEPOINT call")
        try:
            outcome = work(db, self._now())
        except sqlite3.Error as error:
            if is_transient(error) or not db.in_transaction:
                raise
            outcome = map_error(error, self._path)
        except Exception as error:  # noqa: BLE001 - not swallowed: the caller gets it
            outcome = error
        if isinstance(outcome, Exception):
            db.execute("ROLLBACK TO call")
        db.execute("RELEASE call")
        return outcome

    def _begin(self, calls: Sequence[PendingCall]) -> list[Any] | None:
        """Get the write lock in turn, or give the errors that the callers get instead."""
        deadline = calls[0].queued_at + self._busy_timeout

        def give_up() -> bool:
            now = time.monotonic()
            return now >= deadline or (self.shutdown_deadline is not None and now >= self.shutdown_deadline)

        try:
            if self._writer_lock.acquire(self._try_begin, give_up):
                return None
        except sqlite3.Error as error:
            failure = error
        else:
            return self._timed_out(calls)
        return self._failures(failure, calls)

    def _try_begin(self) -> bool:
        try:
            # IMMEDIATE: a transaction that reads first and writes then fails at once when another
            # wrote between.
            self.db.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            if not is_transient(error):
                raise
            return False
        return True

    def _timed_out(self, calls: Sequence[PendingCall]) -> list[Any]:
        now = time.monotonic()
        if self.shutdown_deadline is not None and now >= self.shutdown_deadline:
            return [StoreClosedError() for _ in calls]
        waited = f"{self._path} was locked by others for {self._busy_timeout:g} s"
        reason = f"{waited}; try again, or raise busy_timeout"
        latest = now - self._busy_timeout
        return [StoreUnavailableError(reason) if call.queued_at <= latest else REQUEUE for call in calls]

    def _commit(self, outcomes: list[Any]) -> list[Any]:
        try:
            # As late as possible: in a log that another process has replaced, a commit damages that one's.
            self._files.verify()
        except StoreUnavailableError as error:
            self._roll_back()
            return [StoreUnavailableError(error.reason) for _ in outcomes]
        try:
            self.db.execute("COMMIT")
        except sqlite3.Error as error:
            self._roll_back()
            if is_transient(error):
                return [REQUEUE for _ in outcomes]
            return [map_commit_error(error, self._path) for _ in outcomes]
        try:
            # Again, because the commit may have gone into a file that was removed since.
            self._files.verify()
        except StoreUnavailableError:
            what = f"COMMIT on {self._path}, which was removed or replaced at that moment,"
            return [OutcomeUnknownError(what) for _ in outcomes]
        return outcomes

    def _roll_back(self) -> None:
        # Some errors have rolled back already.
        if self.db.in_transaction:
            self.db.execute("ROLLBACK")
