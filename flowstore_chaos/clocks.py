"""Wrong clocks for other processes, which may jump at any moment; see ``preload/clock.c``."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from flowstore_chaos.preloading import build, preloaded

CLOCKS = 1024
"""As in clock.c."""
_SHIFT = struct.Struct("=q")


class Clocks:
    """How far the clock of each process that begins with ``environment`` is from the true time."""

    def __init__(self, folder: Path) -> None:
        path = folder / "clocks"
        path.write_bytes(bytes(CLOCKS * _SHIFT.size))
        self.environment = preloaded(build("clock", folder), FLOWSTORE_CHAOS_CLOCKS=str(path))
        with path.open("r+b") as file:
            self._shifts = mmap.mmap(file.fileno(), 0)

    def close(self) -> None:
        self._shifts.close()

    def set(self, pid: int, shift: timedelta) -> None:
        """Let one process's clock jump; processes whose ids are CLOCKS apart share one."""
        _SHIFT.pack_into(self._shifts, pid % CLOCKS * _SHIFT.size, shift // timedelta(microseconds=1) * 1000)

    def set_all(self, shift: timedelta) -> None:
        """Let the clock that all processes share jump."""
        for pid in range(CLOCKS):
            self.set(pid, shift)

    @contextmanager
    def inherited(self) -> Iterator[None]:
        """Processes that this one starts meanwhile begin with the environment."""
        before = dict(os.environ)
        os.environ.update(self.environment)
        try:
            yield
        finally:
            for name in self.environment.keys() - before.keys():
                del os.environ[name]
            os.environ.update(before)
