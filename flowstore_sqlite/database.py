"""The one place where all writes, and the one where all reads, go to the database file."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from datetime import datetime
from functools import partial
from typing import Any, TypeVar

from flowstore_core import ConfigurationError, OutcomeUnknownError, StoreClosedError, StoreUnavailableError
from flowstore_core.instrumentation import NO_OBSERVERS, Observers
from flowstore_core.shielding import run_to_completion
from flowstore_sqlite.connection import Connection, snapshot
from flowstore_sqlite.transactions import Read, Transactions
from flowstore_sqlite.transactions import Write as Write
from flowstore_sqlite.values import to_us
from flowstore_sqlite.writing import Writing

T = TypeVar("T")

QUEUE_SECONDS = 10.0
"""How long a call may wait for its turn in this process at least, be busy_timeout shorter."""
DRAIN_SECONDS = 5.0

_process = object()


def _notice_fork() -> None:
    global _process
    _process = object()


if hasattr(os, "register_at_fork"):
    # Asking for the process id at every call would be a system call each time.
    os.register_at_fork(after_in_child=_notice_fork)


class Database:
    """A writer and some readers on one file."""

    def __init__(
        self,
        writer: Connection,
        readers: Iterable[Connection],
        *,
        clock: Callable[[], datetime] | None,
        busy_timeout: float,
        observers: Observers = NO_OBSERVERS,
    ) -> None:
        self._writer = writer
        self._readers = tuple(readers)
        self._idle = deque(self._readers)
        self._free = asyncio.Semaphore(len(self._readers))
        self._clock = clock
        self.now: Callable[[], int] = _system_now if clock is None else (lambda: to_us(clock()))
        """The store's time in microseconds: the caller's clock if one was given, else the system's."""
        self._busy_timeout = busy_timeout
        self._transactions = Transactions(writer.files, self.now, busy_timeout)
        self._writing = Writing(
            writer,
            self._transactions,
            patience=max(busy_timeout, QUEUE_SECONDS),
            observers=observers,
        )
        self._reading: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.get_running_loop()
        self._process = _process
        self._closed = False

    def write(
        self, work: Write[T], give_back: Callable[[T | OutcomeUnknownError], Awaitable[None]] | None = None
    ) -> Coroutine[Any, Any, T]:
        """Run work in a transaction of the writer, whole or not at all.

        Waiting writes are gathered into one transaction. When the caller is cancelled, work that has
        begun ends, and ``give_back`` gets its result, or OutcomeUnknownError, to undo its effect. Work
        that has not begun never does.

        Raises StoreUnavailableError when the lock was not free within busy_timeout.
        """
        self._check_usable()
        return self._writing.write(None, work, give_back)

    def write_back(self, work: Write[None]) -> Coroutine[Any, Any, None]:
        """As write, for what gives back: it may go on while the store is closing."""
        return self._writing.write(None, work)

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
                await run_to_completion(reader.stop_work())
            raise
        except StoreUnavailableError:
            if self._closed:
                raise StoreClosedError from None
            raise

    def _check_usable(self) -> None:
        if self._process is not _process:
            raise ConfigurationError("a store cannot be used in a forked process; open another one there")
        if self._closed:
            raise StoreClosedError

    async def aclose(self) -> None:
        """Wait, bounded, for what is under way, then close every connection; idempotent."""
        if self._process is not _process:
            # In a forked process nothing of it is under way, and the connections are the parent's.
            self._closed = True
            return
        await run_to_completion(self._close())

    async def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            if asyncio.get_running_loop() is self._loop:
                await self._drain()
        finally:
            for reader in self._readers:
                reader.interrupt_now()
            if self._writer.files.may_take_log_in():
                await self._shut_readers()
                # Last and alone: only who knows itself alone empties and removes the log.
                await self._writer.shut()
            else:
                # The log at this path is another process's. The readers' locks keep the writer from touching
                # it, and readers cannot.
                await self._writer.shut()
                await self._shut_readers()
            self._transactions.close()

    async def _shut_readers(self) -> None:
        await asyncio.gather(*(reader.shut() for reader in self._readers))

    async def _drain(self) -> None:
        self._transactions.give_up_at = time.monotonic() + DRAIN_SECONDS / 2
        if self._reading:
            await asyncio.wait(set(self._reading), timeout=DRAIN_SECONDS / 2)
        await self._writing.drain(DRAIN_SECONDS)


def _system_now() -> int:
    return time.time_ns() // 1000
