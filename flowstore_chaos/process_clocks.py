"""Adjustable wrong clocks for other processes, by a preloaded library; see ``preload/clock.c``."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from flowstore_chaos.ld_preload import build, preloaded

CLOCKS = 1024
"""Number of clocks; must equal CLOCKS in clock.c."""
_OFFSET = struct.Struct("=q")


class ProcessClocks:
    """Clock offsets of the processes started with ``environment``."""

    def __init__(self, folder: Path) -> None:
        path = folder / "clocks"
        path.write_bytes(bytes(CLOCKS * _OFFSET.size))
        self.environment = preloaded(build("clock", folder), FLOWSTORE_CHAOS_CLOCKS=str(path))
        with path.open("r+b") as file:
            self._offsets = mmap.mmap(file.fileno(), 0)

    def close(self) -> None:
        self._offsets.close()

    def set(self, pid: int, offset: timedelta) -> None:
        """Set the clock offset of one process. Process ids that differ by CLOCKS share a clock."""
        _OFFSET.pack_into(
            self._offsets, pid % CLOCKS * _OFFSET.size, offset // timedelta(microseconds=1) * 1000
        )

    def set_all(self, offset: timedelta) -> None:
        """Set one clock offset for all processes."""
        for pid in range(CLOCKS):
            self.set(pid, offset)

    @contextmanager
    def inherited(self) -> Iterator[None]:
        """Within the context, child processes inherit the environment."""
        before = dict(os.environ)
        os.environ.update(self.environment)
        try:
            yield
        finally:
            for name in self.environment.keys() - before.keys():
                del os.environ[name]
            os.environ.update(before)
