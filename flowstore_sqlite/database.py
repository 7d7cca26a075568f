"""Runs every read and every write of a store on its connections."""

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
"""Lower bound, in seconds, of the time that a write may wait in the queue of this process."""
DRAIN_TIMEOUT = 5.0

_process = object()


def _mark_fork() -> None:
    global _process
    _process = object()


if hasattr(os, "register_at_fork"):
    # os.getpid() would be a system call in every operation.
    os.register_at_fork(after_in_child=_mark_fork)


class Database:
    """One writer and a pool of readers on one file; every noun class uses it."""

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
        self.now: Callable[[], int] = _system_now if clock is None else (lambda: to_us(clock()))
        """The store's time in microseconds, from the configured clock or from the system."""
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
        """Run work atomically on the writer. Concurrent writes share a transaction.

        When the caller is cancelled, queued work is dropped. Work that has begun is completed, and
        ``on_abandoned`` receives its result, or OutcomeUnknownError, to compensate for its effect.

        Raises StoreUnavailableError when the write lock was not free within busy_timeout.
        """
        self._check_usable()
        return self._write_queue.write(None, work, on_abandoned)

    def write_while_closing(self, work: Write[None]) -> Coroutine[Any, Any, None]:
        """Like write, for compensations: they may run while the store is closing."""
        return self._write_queue.write(None, work)

    async def read(self, work: Read[T]) -> T:
        """Run work on one snapshot, which contains every write that has returned."""
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
                # The reader must be free before it goes back to the pool.
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
        """Wait for running work in bounded time, then close every connection. Idempotent."""
        if self._process is not _process:
            # A forked process has no work to wait for, and the connections belong to the parent.
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
                # SQLite checkpoints and deletes the log when the last connection closes.
                await self._writer.close()
            else:
                # The log at this path belongs to another process. The locks of the readers keep the writer
                # from checkpointing it, and readers cannot.
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
