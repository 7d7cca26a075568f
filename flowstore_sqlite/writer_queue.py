"""The queue of processes that write to one file, on top of SQLite's write lock.

SQLite does not queue writers. A process that has just committed usually gets the lock again at once, and a
process that sleeps between two tries can starve. Here a process asks SQLite for the write lock only while it
holds an flock on a small file beside the database. After it got the write lock, it may keep writing for a
time slice without queueing again, because its page cache stays valid while no other process writes. Then it
queues behind the waiting processes.

The next process in the queue rarely polls during the slice of the current one, and often after it. A process
without competitors never waits.

Fairness only; SQLite's own lock protects the data. Processes skip the queue and ask for the write lock
directly where the lock file cannot be created or locked, and when its holder hangs. The kernel releases the
lock of a process that dies.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import stat
import time
from collections.abc import Callable

try:
    import fcntl
except ImportError:  # Windows has no flock; SQLite's own busy handling has to do.
    fcntl = None  # type: ignore[assignment]

LOCK_SUFFIX = "-turn"
"""Part of the on-disk format: a store with another suffix would not see this lock."""
TIME_SLICE = 0.02
"""Seconds for which the lock holder may keep writing before it must requeue. Shorter slices make shorter
waits and less throughput: with one group per slice, four processes reach three quarters of it."""
LOCK_TIMEOUT = 1.0
"""Seconds to wait for the lock file before bypassing the queue: its holder may hang."""
BYPASS_SECONDS = 10.0
"""How long the queue is then bypassed."""
MIN_SLEEP = 0.0005
MAX_SLEEP = 0.005

_log = logging.getLogger("flowstore_sqlite")


class FairWriterLock:
    """One process's place in the queue of writers of a file. For one thread at a time."""

    def __init__(self, database: str) -> None:
        self.path = database + LOCK_SUFFIX
        self._database = database
        self._file: int | None = None
        self._is_opened = False
        """Opened by the first write: a read-only store must not create the file."""
        self._bypass_until = 0.0
        self._slice_until = 0.0

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def holds_slice(self) -> bool:
        """Whether the time slice of this process lasts: it need not call ``acquire``."""
        return time.monotonic() < self._slice_until

    def acquire(self, begin: Callable[[], bool], timed_out: Callable[[], bool]) -> bool:
        """Queue, then call ``begin`` until it returns True; False when ``timed_out`` returns True first."""
        since = now = time.monotonic()
        locked_since = now if self._try_lock() else None
        try:
            while True:
                if locked_since is not None or self._file is None or now < self._bypass_until:
                    if begin():
                        self._slice_until = now + TIME_SLICE
                        return True
                    sleep = _backoff(now - (since if locked_since is None else locked_since))
                elif now - since > LOCK_TIMEOUT:
                    self._bypass_until = now + BYPASS_SECONDS
                    continue
                else:
                    sleep = max(0.001, 0.003 - (now - since) / 50)
                if timed_out():
                    return False
                time.sleep(random.uniform(sleep / 2, sleep))
                now = time.monotonic()
                if locked_since is None and self._try_lock():
                    locked_since = now
        finally:
            if locked_since is not None and self._file is not None:
                with contextlib.suppress(OSError):
                    fcntl.flock(self._file, fcntl.LOCK_UN)

    def _try_lock(self) -> bool:
        if not self._is_opened:
            self._is_opened = True
            self._file = _open(self.path, self._database)
        if self._file is None:
            return False
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            _log.debug("%s cannot be locked (%s); processes write in no order", self.path, error.strerror)
            self.close()
            return False
        return True


def _backoff(waited: float) -> float:
    """The longest sleep before the next process in the queue asks for the write lock again.

    A process locks the file when the slice of its predecessor begins, so ``waited`` tells when the slice
    ends. It polls a few times during the slice, because the predecessor may have nothing left to write, and
    often afterwards, so that the database does not lie idle.
    """
    left = TIME_SLICE - waited
    if left > 0:
        return min(0.004 + waited, max(left, MIN_SLEEP))
    return min(MIN_SLEEP - left / 4, MAX_SLEEP)


def _open(path: str, database: str) -> int | None:
    """Open the lock file; None where it cannot be used.

    Creates it with the database's permissions for owner and group.
    """
    if fcntl is None:
        return None
    # Never follow a link, and never block on a named pipe.
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        mode = stat.S_IMODE(os.stat(database).st_mode) & 0o660
        file = os.open(path, flags, mode)
    except OSError as error:
        _log.debug("%s cannot be used (%s); processes write in no order", path, error.strerror)
        return None
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        _log.debug("%s is not a regular file; processes write in no order", path)
        return None
    return file
