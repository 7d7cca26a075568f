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
from flowstore_sqlite.codecs import to_us
from flowstore_sqlite.connection import Connection, read_transaction
from flowstore_sqlite.group_commit import GroupCommit, Read
from flowstore_sqlite.group_commit import Write as Write
from flowstore_sqlite.write_queue import WriteQueue

T = TypeVar("T")

MIN_QUEUE_TIMEOUT = 10.0
"""How long a call may wait for its turn in this process at least, be busy_timeout shorter."""
DRAIN_TIMEOUT = 5.0

_process = object()


def _mark_fork() -> None:
    global _process
    _process = object()


if hasattr(os, "register_at_fork"):
    # Asking for the process id at every call would be a system call each time.
    os.register_at_fork(after_in_child=_mark_fork)


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
        self._idle_readers = deque(self._readers)
        self._free_readers = asyncio.Semaphore(len(self._readers))
        self._clock = clock
        self.now: Callable[[], int] = _system_now if clock is None else (lambda: to_us(clock()))
        """The store's time in microseconds: the caller's clock if one was given, else the system's."""
        self._busy_timeout = busy_timeout
        self._group_commit = GroupCommit(writer.files, self.now, busy_timeout)
        self._write_queue = WriteQueue(
            writer,
            self._group_commit,
            queue_timeout=max(busy_timeout, MIN_QUEUE_TIMEOUT),
            observers=observers,
        )
        self._pending_reads: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.get_running_loop()
        self._process = _process
        self._closed = False

    def write(
        self, work: Write[T], on_abandoned: Callable[[T | OutcomeUnknownError], Awaitable[None]] | None = None
    ) -> Coroutine[Any, Any, T]:
        """Run work in a transaction of the writer, whole or not at all.

        Waiting writes are gathered into one transaction. When the caller is cancelled, work that has
        begun ends, and ``give_back`` gets its result, or OutcomeUnknownError, to undo its effect. Work
        that has not begun never does.

        Raises StoreUnavailableError when the lock was not free within busy_timeout.
        """
        self._check_usable()
        return self._write_queue.write(None, work, on_abandoned)

    def write_while_closing(self, work: Write[None]) -> Coroutine[Any, Any, None]:
        """As write, for what gives back: it may go on while the store is closing."""
        return self._write_queue.write(None, work)

    async def read(self, work: Read[T]) -> T:
        """Run work on one snapshot, which holds every write that has returned before."""
        self._check_usable()
        async with self._free_readers:
            self._check_usable()
            reader = self._idle_readers.popleft()
            try:
                return await self._read_on(reader, work)
            finally:
                self._idle_readers.append(reader)

    async def _read_on(self, reader: Connection, work: Read[T]) -> T:
        task = asyncio.create_task(
            reader.run_with_busy_retry(partial(read_transaction, work), self._busy_timeout)
        )
        self._pending_reads.add(task)
        task.add_done_callback(self._pending_reads.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.done():
                # Nobody waits for the rows any more, but the reader must be free when it is put back.
                task.cancel()
                await run_to_completion(reader.cancel_work())
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
            if self._writer.files.may_checkpoint():
                await self._close_readers()
                # Last and alone: only who knows itself alone empties and removes the log.
                await self._writer.close()
            else:
                # The log at this path is another process's. The readers' locks keep the writer from touching
                # it, and readers cannot.
                await self._writer.close()
                await self._close_readers()
            self._group_commit.close()

    async def _close_readers(self) -> None:
        await asyncio.gather(*(reader.close() for reader in self._readers))

    async def _drain(self) -> None:
        self._group_commit.shutdown_deadline = time.monotonic() + DRAIN_TIMEOUT / 2
        if self._pending_reads:
            await asyncio.wait(set(self._pending_reads), timeout=DRAIN_TIMEOUT / 2)
        await self._write_queue.drain(DRAIN_TIMEOUT)


def _system_now() -> int:
    return time.time_ns() // 1000
