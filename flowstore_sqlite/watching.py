"""Watching: wait until a step is ready or a run has ended (WAT).

SQLite has no notifications. While a call waits, a thread polls ``PRAGMA data_version`` of a connection of its
own; the number changes with every commit of any other connection, in this process or another. A write to the
log announces a commit, so that the thread sleeps while nothing is written (log_writes.py).
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from functools import partial
from uuid import UUID

from flowstore_core import RunStatus, StoreClosedError
from flowstore_core.watching import WaitingCalls
from flowstore_sqlite.connection import CLOSE_TIMEOUT, Connection
from flowstore_sqlite.database import Database
from flowstore_sqlite.log_writes import LogWrites, watch_log
from flowstore_sqlite.runs import read_run_status

FIRST_PAUSE = 0.002
"""The first pause between polls after a write, in seconds. The pauses double, because a commit becomes
visible only after its write, when the log is on disk."""
MAX_BUSY_PAUSE = 0.03
"""The longest pause that a write does not end. It bounds the polls while others write all the time."""

DATA_VERSION = "PRAGMA data_version"
# The first entry of each queue and priority in the index queued_steps_ready. The largest integer is the time
# of a step that no time makes ready.
NEXT_READY_AT = """
SELECT MIN((
    SELECT ready_at FROM queued_steps WHERE queue = ? AND priority = levels.priority AND ready_at IS NOT NULL
    ORDER BY ready_at LIMIT 1
)) FROM (
    SELECT 0 AS priority UNION ALL SELECT 1 UNION ALL SELECT 2 UNION ALL SELECT 3 UNION ALL SELECT 4
    UNION ALL SELECT 5 UNION ALL SELECT 6 UNION ALL SELECT 7 UNION ALL SELECT 8 UNION ALL SELECT 9
) AS levels
"""
NEVER = 2**63 - 1


class CommitWatcher:
    """Wakes the waiting calls of a store after every commit of any connection, while there are any."""

    def __init__(self, path: str) -> None:
        self.waiting = WaitingCalls()
        self._path = path
        self._connection: Connection | None = None
        self._writes: LogWrites | None = None
        self._lock = asyncio.Lock()
        self._users = 0
        self._polling: asyncio.Task[None] | None = None
        self._stop = threading.Event()
        self._pid = os.getpid()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """A context in which commits wake the waiting calls."""
        self._users += 1
        try:
            async with self._lock:
                if self.waiting.is_closed:
                    raise StoreClosedError
                if self._polling is None or self._stop.is_set() or self._polling.done():
                    await self._start()
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._stop_polling()

    async def _start(self) -> None:
        if self._connection is None:
            connection = Connection(self._path, read_only=True)
            try:
                await connection.open()
            except BaseException:
                await connection.close()
                raise
            self._connection = connection
        elif self._polling is not None:
            await asyncio.wait({self._polling})
        if self._writes is None:
            self._writes = watch_log(self._path)
        self._stop = threading.Event()
        connection, poll = self._connection, partial(self._poll, self._writes, self._stop)
        # The first number is read before the caller looks at the store, so no later commit is missed.
        version = await connection.run_in_thread(_read_version)
        self._polling = asyncio.create_task(connection.run_in_thread(partial(poll, version)))
        # A store that is closed at this moment ends it with an error, as it ends the waiting calls.
        self._polling.add_done_callback(lambda polling: polling.cancelled() or polling.exception())

    def _poll(
        self, writes: LogWrites, stop: threading.Event, version: int | None, db: sqlite3.Connection
    ) -> None:
        """Runs in the connection's thread until ``stop`` is set."""
        # The write of a commit that becomes visible now may be older than the watch.
        pause = FIRST_PAUSE
        while not stop.is_set():
            is_busy = pause <= MAX_BUSY_PAUSE
            was_written = writes.wait(pause, until_write=not is_busy)
            found = _read_version(db)
            if found != version:
                version = found
                with suppress(RuntimeError):  # The event loop was closed; nothing waits any more.
                    self.waiting.wake_from_thread()
            if was_written:
                pause = min(2 * pause, MAX_BUSY_PAUSE) if is_busy else FIRST_PAUSE
            else:
                pause = min(2 * pause, writes.max_pause)

    def _stop_polling(self) -> None:
        self._stop.set()
        if self._writes is not None:
            self._writes.interrupt()

    async def aclose(self) -> None:
        """End the waiting calls and the thread, in bounded time."""
        self.waiting.close()
        if self._pid != os.getpid():
            # A forked process has no thread that could end, and the files belong to the parent.
            return
        # A call that began before may still be starting the thread.
        async with self._lock:
            if self._connection is None:
                return
            self._stop_polling()
            if self._writes is not None:
                writes, self._writes = self._writes, None
                # In the thread, and so after the last poll; the kernel may take some milliseconds.
                closing = asyncio.create_task(self._connection.run_in_thread(lambda _: writes.close()))
                await asyncio.wait({closing}, timeout=CLOSE_TIMEOUT)
            await self._connection.close()


def _read_version(db: sqlite3.Connection) -> int | None:
    try:
        version: int = db.execute(DATA_VERSION).fetchone()[0]
    except sqlite3.Error:
        # The calls that are woken find out what is wrong with the file.
        return None
    return version


def _next_ready_at(queues: Sequence[str], db: sqlite3.Connection) -> int | None:
    """The time in microseconds at which the next step of the queues is ready; None: no time makes one so."""
    moments = [db.execute(NEXT_READY_AT, (queue,)).fetchone()[0] for queue in queues]
    return min((moment for moment in moments if moment is not None and moment < NEVER), default=None)


class Watch:
    _database: Database
    _commits: CommitWatcher

    async def wait_for_steps(self, queues: Sequence[str], *, timeout: timedelta) -> bool:
        async def look() -> tuple[bool | None, float | None]:
            moment = await self._database.read(partial(_next_ready_at, queues))
            seconds = None if moment is None else (moment - self._database.now()) / 1_000_000
            return (True, None) if seconds is not None and seconds <= 0 else (None, seconds)

        async with self._commits.running():
            return await self._commits.waiting.wait(look, timeout) or False

    async def wait_for_run(self, run_id: UUID, *, timeout: timedelta) -> RunStatus | None:
        async def look() -> tuple[tuple[RunStatus | None] | None, float | None]:
            status = await self._database.read(lambda db: read_run_status(db, run_id))
            return (None, None) if status is RunStatus.RUNNING else ((status,), None)

        async with self._commits.running():
            found = await self._commits.waiting.wait(look, timeout)
            return None if found is None else found[0]
