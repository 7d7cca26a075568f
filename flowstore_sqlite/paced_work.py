"""Work in the background: in turns so short, and so far apart, that those who write hardly notice."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

from flowstore_sqlite.group_commit import Write

T = TypeVar("T")
SliceWork = Callable[[sqlite3.Connection, int, float], T]
"""Work of one turn: gets the connection, the store's time, and when to stop, by time.monotonic()."""

MIN_SLICE = 0.003
"""How long a turn is while others write; they wait for it."""
SLICE_GAP = 0.1
"""Between two turns then. One in a hundred calls may meet a turn, however fast the calls come; turns that
are shorter and closer together meet more of them, and syncs of the disk and merges in the index of searches
keep them from being much shorter."""
MAX_SLICE = 0.01
"""How long a turn becomes while nobody else writes; who comes then waits for that once."""
FIRST_GAP = 0.02
"""Behind the first turn: time for others to show that they write."""
IDLE_GAP = 0.001
"""Between two turns then, for processes that have not got hold of the file yet."""


class _WriteCounters(NamedTuple):
    """Rises with every write: of this connection, and of any other."""

    ours: int
    others: int


class PacedWriter:
    """The turns of one piece of work."""

    def __init__(self, write: Callable[[Write[Any]], Awaitable[Any]]) -> None:
        self._write = write
        self._seconds = MIN_SLICE
        self._pause = 0.0
        self._last_counters: _WriteCounters | None = None
        """As the last turn left it."""

    async def run_slice(self, work: SliceWork[T]) -> T:
        """Do a share of the work in a turn of its own."""
        await asyncio.sleep(self._pause)
        result: T
        result, found, left = await self._write(partial(_run_slice, work, self._seconds))
        if self._last_counters is None:
            # Nothing is known of others yet.
            self._pause = FIRST_GAP
        elif self._last_counters == found:
            self._seconds, self._pause = min(2 * self._seconds, MAX_SLICE), IDLE_GAP
        else:
            self._seconds, self._pause = MIN_SLICE, SLICE_GAP
        self._last_counters = left
        return result


def _run_slice(
    work: SliceWork[T], seconds: float, db: sqlite3.Connection, now: int
) -> tuple[T, _WriteCounters, _WriteCounters]:
    found = _read_counters(db)
    result = work(db, now, time.monotonic() + seconds)
    return result, found, _read_counters(db)


def _read_counters(db: sqlite3.Connection) -> _WriteCounters:
    return _WriteCounters(db.total_changes, db.execute("PRAGMA data_version").fetchone()[0])
