"""Taking turns: which of the processes that share a file writes next.

SQLite's write lock goes to whoever asks at the right moment. A process that has just written asks
again at once and gets it again, while another, asleep between two tries, can starve. Here only the
process that holds a lock on a small file beside the database may ask for the write lock. Whoever got it
may go on writing for a turn, because the pages it has just written need not be read again, as they must
be by the next process; then it queues behind who waits. Who is next asks so seldom that it rarely breaks
a turn off, and often enough to find a file that nobody writes to. Where nobody else writes, nobody queues.

It is a courtesy, not a safeguard: SQLite's own lock keeps the data right. Where the file cannot be made
or locked, or when its holder hangs, processes ask for the write lock directly. The system frees the
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
except ImportError:  # Windows has no flock; there SQLite's own waiting has to do.
    fcntl = None  # type: ignore[assignment]

LOCK_SUFFIX = "-turn"
TIME_SLICE = 0.02
"""How long who has got the write lock in turn may write again without queueing. Shorter turns make shorter
waits and less work done: with turns of a single group, four processes do three quarters of it."""
LOCK_TIMEOUT = 1.0
"""How long one waits for its turn before it goes without: nobody waits for a process that hangs."""
BYPASS_SECONDS = 10.0
"""How long it then goes without."""
MIN_SLEEP = 0.0005
MAX_SLEEP = 0.005

_log = logging.getLogger("flowstore_sqlite")


class FairWriterLock:
    """The queue in front of one file's write lock; used by one thread at a time."""

    def __init__(self, database: str) -> None:
        self.path = database + LOCK_SUFFIX
        self._database = database
        self._file: int | None = None
        self._is_opened = False
        """Before the first write there is no need for the file, and a read-only store must not make it."""
        self._bypass_until = 0.0
        self._slice_until = 0.0

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def holds_slice(self) -> bool:
        """Whether this process has its turn still: it need not pass through."""
        return time.monotonic() < self._slice_until

    def acquire(self, begin: Callable[[], bool], timed_out: Callable[[], bool]) -> bool:
        """Call ``begin`` in turn until it is True; False when ``give_up`` said so first."""
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
    """How long who is next sleeps before it asks again, at most.

    It came to be next when the turn of the one before began, so it knows when that ends. It asks a few
    times before, because the other may have nothing left to write, and often from then on, lest the file
    lie idle.
    """
    left = TIME_SLICE - waited
    if left > 0:
        return min(0.004 + waited, max(left, MIN_SLEEP))
    return min(MIN_SLEEP - left / 4, MAX_SLEEP)


def _open(path: str, database: str) -> int | None:
    """Open the lock's file, making it if need be for those who may write to the database; else None."""
    if fcntl is None:
        return None
    # Never through a link, and never stuck on a pipe that somebody put there.
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        mode = stat.S_IMODE(os.stat(database).st_mode) & 0o660
        file = os.open(path, flags, mode)
    except OSError as error:
        _log.debug("%s cannot be used (%s); processes write in no order", path, error.strerror)
        return None
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        _log.debug("%s is no plain file; processes write in no order", path)
        return None
    return file
