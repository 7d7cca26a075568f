"""Background writes in short slices with gaps between them, so that concurrent writers hardly notice."""

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
"""The work of one slice. Its arguments are the connection, the store's time in microseconds and the deadline
of the slice by time.monotonic()."""

# Seconds.
MIN_SLICE = 0.003
"""Length of a slice while others write: they wait for it."""
SLICE_GAP = 0.1
"""Gap between two slices while others write. About one call in a hundred meets a slice, at any rate of calls.
Shorter slices with shorter gaps meet more calls, and disk syncs and index merges put a floor under the
length of a slice."""
MAX_SLICE = 0.01
"""Length to which a slice grows while nobody else writes; the first new writer waits for it once."""
FIRST_GAP = 0.02
"""Gap after the first slice, in which other writers show up."""
IDLE_GAP = 0.001
"""Gap while nobody else writes, for processes that have not reached the file yet."""


class _WriteCounters(NamedTuple):
    """Counters that rise with every write: of this connection, and of all others."""

    own: int
    others: int


class PacedWriter:
    """Runs one piece of background work, slice by slice."""

    def __init__(self, write: Callable[[Write[Any]], Awaitable[Any]]) -> None:
        self._write = write
        self._seconds = MIN_SLICE
        self._gap = 0.0
        self._last_counters: _WriteCounters | None = None
        """The counters at the end of the last slice."""

    async def run_slice(self, work: SliceWork[T]) -> T:
        """Run the next slice of the work in one transaction."""
        await asyncio.sleep(self._gap)
        result: T
        result, before, after = await self._write(partial(_run_slice, work, self._seconds))
        if self._last_counters is None:
            # The first slice says nothing about other writers.
            self._gap = FIRST_GAP
        elif self._last_counters == before:
            self._seconds, self._gap = min(2 * self._seconds, MAX_SLICE), IDLE_GAP
        else:
            self._seconds, self._gap = MIN_SLICE, SLICE_GAP
        self._last_counters = after
        return result


def _run_slice(
    work: SliceWork[T], seconds: float, db: sqlite3.Connection, now: int
) -> tuple[T, _WriteCounters, _WriteCounters]:
    before = _read_counters(db)
    result = work(db, now, time.monotonic() + seconds)
    return result, before, _read_counters(db)


def _read_counters(db: sqlite3.Connection) -> _WriteCounters:
    return _WriteCounters(db.total_changes, db.execute("PRAGMA data_version").fetchone()[0])
