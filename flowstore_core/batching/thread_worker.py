"""A worker that is a thread, for databases whose calls block: SQLite, or files.

``run`` of an operation is a plain function there, and gets the calls instead of their items::

    import sqlite3

    from flowstore_core.backend import Batcher, BatchError, ThreadWorker


    class Writing:
        def __init__(self, path):
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._batcher = Batcher(workers=ThreadWorker)
            self._write = self._batcher.operation("a write", self._run)

        async def write(self, work):
            return await self._write.submit(None, work)

        def _run(self, calls):
            # On the thread: all queued calls in one transaction, with one sync of the disk.
            self._db.execute("BEGIN IMMEDIATE")
            try:
                outcomes = [call.item(self._db) for call in calls]
                self._db.execute("COMMIT")
            except Exception as error:
                self._db.execute("ROLLBACK")
                raise BatchError(error) from None
            return outcomes

        async def aclose(self):
            await self._batcher.drain(5.0)

Each call has ``item`` and ``queued_at`` (in ``loop.time()``), so that ``run`` can fail calls that have waited
too long, and return REQUEUE for the others. To use an existing thread, pass
``workers=lambda source: ThreadWorker(source, run_on)``: ``await run_on(work_loop)`` calls ``work_loop`` on
the thread, and returns when it has returned.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import weakref
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from contextvars import Context
from typing import Any

from flowstore_core.batching.call import BatchError, PendingCall, copy_exception
from flowstore_core.batching.queue import BatchedOperation
from flowstore_core.batching.workers import GRACE_SECONDS, Batch, BatchSource

WorkLoop = Callable[[], None]
"""Runs batch after batch on the thread that calls it, until the Batcher has drained."""


async def spawn_thread(work_loop: WorkLoop) -> None:
    """Run a work loop on a new daemon thread and wait until it returns."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def work() -> None:
        try:
            work_loop()
        finally:
            with suppress(RuntimeError):
                # The event loop may be closed by now.
                loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=work, name="flowstore", daemon=True).start()
    await ended.wait()


class _LoopWaker:
    """Runs a callback on the event loop at the request of a different thread.

    Like ``loop.call_soon_threadsafe``, but with an eventfd where the system has one. The loop's own socket
    pair costs two more system calls, a tenth of a round trip to the thread.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._callback = callback
        self._counter: int | None = None
        if not hasattr(os, "eventfd"):
            return
        try:
            counter = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        except OSError:
            return
        # Close the descriptor together with this object, never while a thread may still write to it:
        # threads may outlive the interpreter's exit handlers.
        close = weakref.finalize(self, os.close, counter)
        close.atexit = False
        try:
            # In an empty context, or the first caller's context variables would reach every callback.
            Context().run(loop.add_reader, counter, self._read)
        except NotImplementedError:
            close()
            return
        self._counter = counter

    def wake(self) -> None:
        """Schedule the callback; safe on any thread. Raises RuntimeError when the event loop is closed."""
        if self._counter is None:
            self._loop.call_soon_threadsafe(self._callback)
        elif self._loop.is_closed():
            raise RuntimeError("Event loop is closed")
        else:
            os.eventfd_write(self._counter, 1)

    def _read(self) -> None:
        assert self._counter is not None
        os.eventfd_read(self._counter)
        self._callback()

    def close(self) -> None:
        """Run the callback no more."""
        if self._counter is not None:
            self._loop.remove_reader(self._counter)


class ThreadWorker:
    """One thread that runs batches: one hop to the thread and one back for each batch, and no task.

    Calls queue while a batch runs. Here ``run`` of an operation is a plain function: the thread calls it
    with the ``PendingCall`` objects, of which it may read ``item`` and ``queued_at``. ``thread`` runs a
    work loop on a thread and returns when the loop has ended.
    """

    def __init__(
        self, source: BatchSource, thread: Callable[[WorkLoop], Awaitable[None]] = spawn_thread
    ) -> None:
        self._source = source
        self._loop = source.loop
        self._thread = thread
        self._running: asyncio.Task[None] | None = None
        """Runs the thread; started by the first call."""
        self._batches: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._in_flight: Batch | None = None
        self._outcomes: Sequence[Any] = ()
        """Outcomes of the batch that the thread ran last."""
        self._waker: _LoopWaker | None = None
        self._is_busy = False
        """Whether the last batch held several calls, so that more will follow immediately."""
        self._flush: asyncio.Handle | None = None
        self._stopped = False
        self._drained: asyncio.Future[None] | None = None
        """Done when nothing is queued or in flight; exists while a caller waits for that."""

    def wake(self) -> None:
        if self._in_flight is None and self._flush is None:
            if self._is_busy:
                # Callers resolved together queue their next calls before the batch is taken.
                self._flush = self._loop.call_soon(self._send)
            else:
                self._send()

    def _send(self) -> None:
        self._flush = None
        if self._in_flight is not None or self._stopped:
            return
        batch = self._source.next_batch()
        if batch is not None:
            self._in_flight = batch
            self._is_busy = len(batch[1]) > 1
            if self._running is None:
                if self._waker is None:
                    self._waker = _LoopWaker(self._loop, self._receive)
                # In an empty context, or the first caller's context variables would reach all later callers.
                self._running = self._loop.create_task(self._run_thread(), context=Context())
            self._batches.put(batch)
        elif self._drained is not None:
            if not self._drained.done():
                self._drained.set_result(None)
            self._drained = None

    async def _run_thread(self) -> None:
        try:
            await self._thread(self._run_batches)
        except Exception as error:  # noqa: BLE001 - each caller gets it
            # There is no thread. The next call starts one.
            self._running = None
            self._batches = queue.SimpleQueue()
            if self._in_flight is not None:
                self._outcomes = [copy_exception(error) for _ in self._in_flight[1]]
                self._receive()

    def _run_batches(self) -> None:
        batches, waker = self._batches, self._waker
        assert waker is not None
        while (batch := batches.get()) is not None:
            self._outcomes = _run(*batch)
            try:
                waker.wake()
            except RuntimeError:
                # The event loop is closed: no caller waits.
                return

    def _receive(self) -> None:
        batch, self._in_flight = self._in_flight, None
        if batch is None:
            # Abandoned in the meantime; its calls are already resolved.
            return
        outcomes, self._outcomes = self._outcomes, ()
        self._source.resolve(*batch, outcomes)
        if self._is_busy or self._drained is not None or self._source.queued:
            self._is_busy = True
            if self._flush is None:
                self._flush = self._loop.call_soon(self._send)

    def pending(self) -> Collection[asyncio.Future[Any]]:
        if self._in_flight is None and not self._source.queued:
            return ()
        if self._drained is None:
            self._drained = self._loop.create_future()
        return (self._drained,)

    async def stop(self) -> None:
        """As BatchWorkers.stop; afterwards the thread returns from the work loop."""
        self._stopped = True
        self._abandon()
        self._batches.put(None)
        if self._running is not None:
            await asyncio.wait({self._running}, timeout=GRACE_SECONDS)
        if self._waker is not None:
            self._waker.close()
            # A running thread holds its own reference.
            self._waker = None

    def _abandon(self) -> None:
        batch, self._in_flight = self._in_flight, None
        if batch is not None:
            self._source.abandon(*batch)


def _run(operation: BatchedOperation[Any, Any], calls: list[PendingCall]) -> Sequence[Any]:
    try:
        outcomes: Sequence[Any] = operation.run(calls)
        if len(outcomes) != len(calls):
            raise RuntimeError(f"{operation.name} returned {len(outcomes)} outcomes for {len(calls)} calls")
    except BatchError as error:
        if len(calls) == 1:
            return [error.cause]
        middle = len(calls) // 2
        return [*_run(operation, calls[:middle]), *_run(operation, calls[middle:])]
    except Exception as error:  # noqa: BLE001 - each caller gets it
        return [error, *(copy_exception(error) for _ in calls[1:])]
    return outcomes
