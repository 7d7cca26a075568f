"""Detects files that were removed or replaced while a store has them open.

SQLite uses paths only when it opens the files and when it deletes the log at closing. In between it does not
notice a removed or replaced file: commits succeed in a file that no other process will ever open.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from flowstore_core import StoreUnavailableError
from flowstore_sqlite.file_access import JOURNAL_SUFFIX, SHM_SUFFIX, WAL_SUFFIX, Access, size

CTIME_LAG_NS = 3_000_000_000
"""How far a new ctime can lie behind the clock of this process: some file systems store whole seconds, FAT
multiples of two."""

Fingerprint = Callable[[str], tuple[int, ...]]


def _identity(path: str) -> tuple[int, ...]:
    # While a file is open, no other file has its device and inode.
    found = os.lstat(path)
    return found.st_dev, found.st_ino


def _version(path: str) -> tuple[int, ...]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _size(path: str) -> tuple[int, ...]:
    return (size(path),)


class OpenFiles:
    """The database file, its log and the log's index, shared by all connections of a store.

    Once one of them was missing or replaced, every call fails, even if the file comes back: another process
    may have written in between. Thread-safe.
    """

    def __init__(self, path: str, access: Access) -> None:
        """Record the database file. Call this before SQLite opens it. Raises StoreUnavailableError."""
        self.path = path
        self.access = access
        self._recorded: list[tuple[str, Fingerprint, tuple[int, ...]]] = []
        self._failure: str | None = None
        self._folder = os.path.dirname(path)
        self._verified: tuple[int, ...] | None = None
        """The result of _stat_settled_folder when the files were last verified."""
        if access is Access.FROZEN:
            # SQLite reads it without locks, so no byte of it may change.
            self._record(path, _version)
            for suffix in (WAL_SUFFIX, JOURNAL_SUFFIX):
                self._recorded.append((path + suffix, _size, (0,)))
        else:
            self._record(path, _identity)

    @property
    def is_read_only(self) -> bool:
        return self.access is not Access.WRITE

    def record_wal(self) -> None:
        """Record the log and its index. Call this in a transaction, while SQLite has them open.

        Raises StoreUnavailableError.
        """
        if self.access is Access.WRITE or (self.access is Access.READ and size(self.path + WAL_SUFFIX)):
            for suffix in (WAL_SUFFIX, SHM_SUFFIX):
                self._record(self.path + suffix, _identity)
        self.verify()

    def _record(self, path: str, fingerprint: Fingerprint) -> None:
        try:
            self._recorded.append((path, fingerprint, fingerprint(path)))
        except OSError as error:
            raise StoreUnavailableError(
                f"{path} cannot be reached: {error.strerror}; check its directory"
            ) from None

    def verify(self) -> None:
        """Raise StoreUnavailableError unless each path still leads to the file that was opened."""
        # Fast path: one stat of the directory instead of one per file, while no entry of it has changed since
        # the last verification. Unlike an mtime, a ctime cannot be set.
        if self._verified is not None and self._verified == self._stat_folder():
            return
        folder = None if self.access is Access.FROZEN else self._stat_settled_folder()
        if self._failure is None:
            self._failure = self._find_change()
        if self._failure is not None:
            self._verified = None
            raise StoreUnavailableError(self._failure)
        self._verified = folder

    def _stat_folder(self) -> tuple[int, ...] | None:
        try:
            found = os.stat(self._folder)
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_ctime_ns

    def _stat_settled_folder(self) -> tuple[int, ...] | None:
        """Device, inode and ctime of the directory; None if its next change might set the same ctime.

        That is possible until the clock of the file system has passed the ctime, which takes up to two
        seconds on FAT. A log with a later ctime proves that it has, even if that clock is coarse or differs
        from the clock of this process. While the log is not written, the clock of this process decides, less
        CTIME_LAG_NS.
        """
        # The log comes first: if it were written after the stat of the directory, the directory might have
        # changed in between, with the same ctime.
        try:
            clock = os.lstat(self.path + WAL_SUFFIX).st_ctime_ns
        except OSError:
            clock = 0
        clock = max(clock, time.time_ns() - CTIME_LAG_NS)
        folder = self._stat_folder()
        return folder if folder is not None and folder[-1] < clock else None

    def _find_change(self) -> str | None:
        for path, fingerprint, recorded in self._recorded:
            try:
                if fingerprint(path) == recorded:
                    continue
                change = "is no longer the file that was opened"
            except (FileNotFoundError, NotADirectoryError):
                change = "was removed or moved while the store was open"
            except OSError as error:
                raise StoreUnavailableError(
                    f"{path} cannot be reached: {error.strerror}; check its directory"
                ) from None
            return self._explain(path, change)
        return None

    def _explain(self, path: str, change: str) -> str:
        if self.access is Access.FROZEN:
            return (
                f"{self.path} was changed by another process while it was open without write permission; "
                "open the store again"
            )
        if path == self.path:
            remedy = "put the right file in its place, then open the store again"
        else:
            remedy = (
                "close the store without killing the process, so that SQLite can save the newest commits, "
                "then open it again"
            )
        return f"{path} {change}, so every call is refused; {remedy}"

    def may_checkpoint(self) -> bool:
        """Whether SQLite may checkpoint and delete the log when the last connection closes.

        False if that could overwrite or delete commits of another process in other files at these paths.
        SQLite does it only while no other process has the database open.
        """
        database, *log = self._recorded
        if not self._is_same(*database):
            return False
        if self.access is not Access.WRITE or len(log) < 2:
            return True
        (log_path, _, _), (index_path, _, _) = log
        if not os.path.lexists(log_path) or size(log_path) == 0:
            # The removed log has the commits, and no other process has written any.
            return True
        return self._is_same(*log[0]) and (not os.path.lexists(index_path) or self._is_same(*log[1]))

    @staticmethod
    def _is_same(path: str, fingerprint: Fingerprint, recorded: tuple[int, ...]) -> bool:
        try:
            return fingerprint(path) == recorded
        except OSError:
            return False
