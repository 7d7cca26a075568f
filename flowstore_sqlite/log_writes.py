"""Writes to the write-ahead log, as inotify reports them on Linux.

Every commit of any process is a write to the log. Processes that share a file in WAL mode share memory, so
they run on one kernel, and inotify reports the writes of all.
"""

from __future__ import annotations

import os
import select
import sys
import threading
from contextlib import suppress
from typing import Protocol

from flowstore_sqlite.file_access import WAL_SUFFIX

IN_MODIFY = 0x2
EVENTS_BYTES = 4096
"""The kernel merges equal events, and all of them are equal, so this reads more than there are."""


class LogWrites(Protocol):
    """Waits for writes to a log, in one thread at a time."""

    max_pause: float
    """The longest time between two polls, in seconds."""

    def wait(self, seconds: float, *, until_write: bool) -> bool:
        """Wait until ``interrupt`` is called, with ``until_write`` also until the next write.

        Returns whether the log was written since the last call.
        """
        ...

    def interrupt(self) -> None:
        """End the current or next ``wait``. Thread-safe."""
        ...

    def close(self) -> None: ...


def watch_log(path: str) -> LogWrites:
    """Watch the log of that database; where that is not possible, only time passes."""
    if sys.platform == "linux" and hasattr(os, "eventfd"):
        try:
            return InotifyWrites(path + WAL_SUFFIX)
        except OSError:
            # No log yet, or the limit of inotify instances of this user is reached.
            pass
    return UnknownWrites()


class UnknownWrites:
    """Where writes are not reported: a watcher polls often."""

    max_pause = 0.03
    """Half of it is the mean delay of a wake-up; with this pause all polls take under 1 % of a core."""

    def __init__(self) -> None:
        self._interrupted = threading.Event()

    def wait(self, seconds: float, *, until_write: bool) -> bool:
        self._interrupted.wait(seconds)
        self._interrupted.clear()
        return False

    def interrupt(self) -> None:
        self._interrupted.set()

    def close(self) -> None:
        pass


if sys.platform == "linux":

    class InotifyWrites:
        """Raises OSError if the file cannot be watched."""

        max_pause = 1.0
        """For file systems that do not report every write."""

        def __init__(self, path: str) -> None:
            # Not every Python has it.
            import ctypes

            libc = ctypes.CDLL(None, use_errno=True)
            self._events = libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
            if self._events < 0:
                raise OSError(ctypes.get_errno(), "inotify_init1")
            try:
                if libc.inotify_add_watch(self._events, os.fsencode(path), IN_MODIFY) < 0:
                    raise OSError(ctypes.get_errno(), "inotify_add_watch")
                self._interrupts = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            except OSError:
                os.close(self._events)
                raise
            self._until_interrupt = select.poll()
            self._until_interrupt.register(self._interrupts, select.POLLIN)
            self._until_write = select.poll()
            self._until_write.register(self._interrupts, select.POLLIN)
            self._until_write.register(self._events, select.POLLIN)

        def wait(self, seconds: float, *, until_write: bool) -> bool:
            (self._until_write if until_write else self._until_interrupt).poll(seconds * 1000)
            with suppress(BlockingIOError):
                os.eventfd_read(self._interrupts)
            try:
                return bool(os.read(self._events, EVENTS_BYTES))
            except BlockingIOError:
                return False

        def interrupt(self) -> None:
            os.eventfd_write(self._interrupts, 1)

        def close(self) -> None:
            os.close(self._events)
            os.close(self._interrupts)
