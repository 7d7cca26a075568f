"""The one place where all writes, and the one where all reads, go to the database file."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

from flowstore_core import (
    ConfigurationError,
    OutcomeUnknownError,
    StoreClosedError,
    StoreUnavailableError,
)
from flowstore_core.inflight import InFlight
from flowstore_sqlite.connection import Connection, delays, snapshot, to_the_end
from flowstore_sqlite.errors import is_transient, map_commit_error, map_error
from flowstore_sqlite.values import to_us

T = TypeVar("T")
Write = Callable[[sqlite3.Connection, int], T]
"""Work of one transaction: gets the connection and the store's time, in microseconds.

It runs under the write lock, so the times of transactions rise in the order of their commits. It may
run again when nothing came of the first time, so it must change nothing but the database.
"""
Read = Callable[[sqlite3.Connection], T]
"""Work on one snapshot."""

GROUP = 128
"""How many waiting writes share one transaction, and so one sync of the disk, at most."""
DRAIN_SECONDS = 5.0

_ABANDONED: Any = object()


class _CommitError(Exception):
    """COMMIT itself failed."""

    def __init__(self, cause: sqlite3.Error) -> None:
        super().__init__()
        self.cause = cause


class _Call:
    """One write on its way."""

    __slots__ = ("abandoned", "deadline", "outcome", "work")

    def __init__(self, work: Write[Any], outcome: asyncio.Future[Any], deadline: float) -> None:
        self.work = work
        self.outcome = outcome
        self.deadline = deadline
        self.abandoned = False
        """Set when the caller was cancelled: what has not begun by then never happens."""


class Database:
    """A writer and some readers on one file."""

    def __init__(
        self,
        writer: Connection,
        readers: Iterable[Connection],
        *,
        clock: Callable[[], datetime] | None,
        busy_timeout: float,
    ) -> None:
        self._writer = writer
        self._readers = tuple(readers)
        self._idle = deque(self._readers)
        self._free = asyncio.Semaphore(len(self._readers))
        self._clock = clock
        self._busy_timeout = busy_timeout
        self._inflight = InFlight()
        self._reading: set[asyncio.Task[Any]] = set()
        self._queue: deque[_Call] = deque()
        self._pump: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()
        self._closed = False
        self._give_up_at: float | None = None

    def now(self) -> int:
        """The store's time in microseconds: the caller's clock if one was given, else the system's."""
        return to_us(self._clock() if self._clock is not None else datetime.now(UTC))

    async def write(self, work: Write[T], *, give_back: Callable[[T], Write[None] | None] | None = None) -> T:
        """Run work in a transaction of the writer, whole or not at all.

        Waiting writes are gathered into one transaction, each in a savepoint of its own. When the
        caller is cancelled, work that has begun ends, and ``give_back`` names the work that undoes what
        nobody will hear of; work that has not begun never does.

        Raises StoreUnavailableError when the lock was not free within busy_timeout.
        """
        self._check_usable()
        call = self._make_call(work)

        async def undo(result: T) -> None:
            if result is not _ABANDONED and give_back is not None and (step := give_back(result)) is not None:
                await self._submit(self._make_call(step))

        undoing: Callable[[T], Awaitable[None]] | None = undo if give_back is not None else None
        try:
            return await self._inflight.run(self._submit(call), undoing)
        except asyncio.CancelledError:
            call.abandoned = True
            if self._closed and not _is_cancelling():
                # Closing could not wait any longer for it.
                raise OutcomeUnknownError("a write that was under way when the store was closed") from None
            raise

    async def read(self, work: Read[T]) -> T:
        """Run work on one snapshot, which holds every write that has returned before."""
        self._check_usable()
        async with self._free:
            self._check_usable()
            reader = self._idle.popleft()
            try:
                return await self._read_on(reader, work)
            finally:
                self._idle.append(reader)

    async def _read_on(self, reader: Connection, work: Read[T]) -> T:
        task = asyncio.create_task(reader.run_patiently(partial(snapshot, work), self._busy_timeout))
        self._reading.add(task)
        task.add_done_callback(self._reading.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.done():
                # Nobody waits for the rows any more, but the reader must be free when it is put back.
                task.cancel()
                await to_the_end(reader.stop_work())
            raise
        except StoreUnavailableError:
            if self._closed:
                raise StoreClosedError from None
            raise

    def _check_usable(self) -> None:
        if self._pid != os.getpid():
            raise ConfigurationError("a store cannot be used in a forked process; open another one there")
        if asyncio.get_running_loop() is not self._loop:
            raise ConfigurationError(
                "a store belongs to the event loop that it was opened in; open another one in this loop"
            )
        if self._closed:
            raise StoreClosedError

    def _make_call(self, work: Write[Any]) -> _Call:
        return _Call(work, self._loop.create_future(), self._loop.time() + self._busy_timeout)

    async def _submit(self, call: _Call) -> Any:
        self._queue.append(call)
        if self._pump is None:
            self._pump = asyncio.create_task(self._run_queue())
        return await call.outcome

    async def _run_queue(self) -> None:
        """Write what is queued, group by group, until nothing is."""
        wait = delays()
        group: list[_Call] = []
        try:
            while self._queue:
                group = [self._queue.popleft() for _ in range(min(GROUP, len(self._queue)))]
                if await self._run_group(group):
                    wait = delays()
                    continue
                # Others hold the lock. New calls join this group while it waits.
                self._queue.extendleft(reversed(group))
                group = []
                self._fail_late()
                await asyncio.sleep(next(wait))
        finally:
            self._pump = None
            # Only when this task itself was cancelled, with the event loop coming to its end.
            for call in (*group, *self._queue):
                if not call.outcome.done():
                    call.outcome.cancel()
            self._queue.clear()

    def _fail_late(self) -> None:
        """Answer those who have waited long enough for the lock."""
        now = self._loop.time()
        for _ in range(len(self._queue)):
            call = self._queue.popleft()
            if call.abandoned or call.outcome.done():
                _settle(call, _ABANDONED)
            elif self._give_up_at is not None and now >= self._give_up_at:
                _settle(call, StoreClosedError())
            elif now >= call.deadline:
                reason = f"{self._writer.path} was locked by others for {self._busy_timeout:g} s"
                _settle(call, StoreUnavailableError(reason))
            else:
                self._queue.append(call)

    async def _run_group(self, group: list[_Call]) -> bool:
        """Run and answer a group of calls; False if the lock was not free, and nothing happened."""
        outcomes: list[Any]
        try:
            outcomes = await self._writer.run_work(partial(_transact, group, self.now))
        except _CommitError as error:
            outcomes = [map_commit_error(error.cause, self._writer.path) for _ in group]
        except sqlite3.Error as error:
            if is_transient(error):
                return False
            if len(group) > 1:
                # One of them failed all; which one shows when each runs alone.
                await self._run_apart(group)
                return True
            outcomes = [map_error(error, self._writer.path)]
        except Exception as error:  # noqa: BLE001 - not swallowed: each caller of the group gets it
            outcomes = [error for _ in group]
        for call, outcome in zip(group, outcomes, strict=True):
            _settle(call, outcome)
        return True

    async def _run_apart(self, group: list[_Call]) -> None:
        for call in group:
            for delay in delays():
                if await self._run_group([call]):
                    break
                if self._loop.time() >= call.deadline:
                    _settle(call, StoreUnavailableError(f"{self._writer.path} was locked by others"))
                    break
                await asyncio.sleep(delay)

    async def aclose(self) -> None:
        """Wait, bounded, for what is under way, then close every connection; idempotent."""
        if self._pid != os.getpid():
            # In a forked process nothing of it is under way, and the connections are the parent's.
            self._closed = True
            return
        await to_the_end(self._close())

    async def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            if asyncio.get_running_loop() is self._loop:
                await self._drain()
        finally:
            if self._pump is not None:
                self._pump.cancel()
            for reader in self._readers:
                reader.interrupt_now()
            await asyncio.gather(*(reader.shut() for reader in self._readers))
            # Last and alone: only who knows itself alone empties and removes the log.
            await self._writer.shut()

    async def _drain(self) -> None:
        self._give_up_at = self._loop.time() + DRAIN_SECONDS / 2
        if self._reading:
            await asyncio.wait(set(self._reading), timeout=DRAIN_SECONDS / 2)
        await self._inflight.drain(DRAIN_SECONDS)


def _is_cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _settle(call: _Call, result: Any) -> None:
    """Answer a call with its result, or with the error that it met."""
    if call.outcome.done():
        return
    if isinstance(result, Exception):
        call.outcome.set_exception(result)
    else:
        call.outcome.set_result(result)


def _transact(group: list[_Call], now: Callable[[], int], db: sqlite3.Connection) -> list[Any]:
    """Run a group of calls in one transaction; for each its result, or the error that it raised.

    An error of the driver undoes the whole group and is raised.
    """
    # IMMEDIATE: a transaction that reads first and writes then fails at once when another wrote between.
    db.execute("BEGIN IMMEDIATE")
    try:
        results = [_run_call(call, now, db) for call in group]
        try:
            db.execute("COMMIT")
        except sqlite3.Error as error:
            raise _CommitError(error) from error
        return results
    finally:
        # Some errors have rolled back already.
        if db.in_transaction:
            db.execute("ROLLBACK")


def _run_call(call: _Call, now: Callable[[], int], db: sqlite3.Connection) -> Any:
    if call.abandoned:
        return _ABANDONED
    db.execute("SAVEPOINT call")
    try:
        result = call.work(db, now())
    except sqlite3.Error:
        raise
    except Exception as error:  # noqa: BLE001 - not swallowed: the caller gets it
        result = error
    if isinstance(result, Exception):
        db.execute("ROLLBACK TO call")
    db.execute("RELEASE call")
    return result
