"""Work in the background: in turns so short, and so far apart, that those who write hardly notice."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

from flowstore_sqlite.transactions import Write

T = TypeVar("T")
Share = Callable[[sqlite3.Connection, int, float], T]
"""Work of one turn: gets the connection, the store's time, and when to stop, by time.monotonic()."""

SHORT_SECONDS = 0.003
"""How long a turn is while others write; they wait for it."""
APART_SECONDS = 0.1
"""Between two turns then. One in a hundred calls may meet a turn, however fast the calls come; turns that
are shorter and closer together meet more of them, and syncs of the disk and merges in the index of searches
keep them from being much shorter."""
LONG_SECONDS = 0.01
"""How long a turn becomes while nobody else writes; who comes then waits for that once."""
FIRST_PAUSE_SECONDS = 0.02
"""Behind the first turn: time for others to show that they write."""
PAUSE_SECONDS = 0.001
"""Between two turns then, for processes that have not got hold of the file yet."""


class _Seen(NamedTuple):
    """Rises with every write: of this connection, and of any other."""

    ours: int
    others: int


class Turns:
    """The turns of one piece of work."""

    def __init__(self, write: Callable[[Write[Any]], Awaitable[Any]]) -> None:
        self._write = write
        self._seconds = SHORT_SECONDS
        self._pause = 0.0
        self._seen: _Seen | None = None
        """As the last turn left it."""

    async def take(self, work: Share[T]) -> T:
        """Do a share of the work in a turn of its own."""
        await asyncio.sleep(self._pause)
        result: T
        result, found, left = await self._write(partial(_turn, work, self._seconds))
        if self._seen is None:
            # Nothing is known of others yet.
            self._pause = FIRST_PAUSE_SECONDS
        elif self._seen == found:
            self._seconds, self._pause = min(2 * self._seconds, LONG_SECONDS), PAUSE_SECONDS
        else:
            self._seconds, self._pause = SHORT_SECONDS, APART_SECONDS
        self._seen = left
        return result


def _turn(work: Share[T], seconds: float, db: sqlite3.Connection, now: int) -> tuple[T, _Seen, _Seen]:
    found = _look(db)
    result = work(db, now, time.monotonic() + seconds)
    return result, found, _look(db)


def _look(db: sqlite3.Connection) -> _Seen:
    return _Seen(db.total_changes, db.execute("PRAGMA data_version").fetchone()[0])
