"""A lane that is a thread, for databases whose calls block: SQLite, say, or files."""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import weakref
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from contextvars import Context
from typing import TYPE_CHECKING, Any

from flowstore_core.calls import BatchError, Call, another
from flowstore_core.lanes import GRACE_SECONDS

if TYPE_CHECKING:
    from flowstore_core.batching import Batcher, Method

Serve = Callable[[], None]
"""Runs batch after batch on the thread that calls it, until the batcher has drained."""


async def own_thread(serve: Serve) -> None:
    """Serve on a new thread, and wait until it has ended. It does not keep the interpreter from exiting."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def work() -> None:
        try:
            serve()
        finally:
            with suppress(RuntimeError):
                # The event loop may be closed by now.
                loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=work, name="flowstore", daemon=True).start()
    await ended.wait()


class _Bell:
    """Has the event loop call something, rung by another thread.

    As loop.call_soon_threadsafe, which sends a byte through a socket and reads it twice; where the system
    has counters that can be waited for, a tenth of a hop to the thread and back is saved.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, heard: Callable[[], None]) -> None:
        self._loop = loop
        self._heard = heard
        self._counter: int | None = None
        if not hasattr(os, "eventfd"):
            return
        try:
            counter = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        except OSError:
            return
        # With the bell, so not while a thread that may ring has it; at exit threads may still run.
        close = weakref.finalize(self, os.close, counter)
        close.atexit = False
        try:
            # In an empty context: what is called must not carry the first caller's variables.
            Context().run(loop.add_reader, counter, self._read)
        except NotImplementedError:
            close()
            return
        self._counter = counter

    def ring(self) -> None:
        """On any thread. Raises RuntimeError when the event loop was closed."""
        if self._counter is None:
            self._loop.call_soon_threadsafe(self._heard)
        elif self._loop.is_closed():
            raise RuntimeError("Event loop is closed")
        else:
            os.eventfd_write(self._counter, 1)

    def _read(self) -> None:
        assert self._counter is not None
        os.eventfd_read(self._counter)
        self._heard()

    def silence(self) -> None:
        """Call nothing any more."""
        if self._counter is not None:
            self._loop.remove_reader(self._counter)


class ThreadLane:
    """One thread that does nothing but run batches: one hop to it and one back for each, and no task.

    While it runs one batch the calls for the next gather. ``run`` of a method is a plain function here;
    it is called on the thread and gets the calls themselves, that is ``item`` and ``since`` of each.
    ``thread`` has a thread call what it is given, and ends when that has returned.
    """

    def __init__(self, batcher: Batcher, thread: Callable[[Serve], Awaitable[None]] = own_thread) -> None:
        self._batcher = batcher
        self._loop = batcher.loop
        self._thread = thread
        self._serving: asyncio.Task[None] | None = None
        """From the first call on."""
        self._batches: queue.SimpleQueue[tuple[Method[Any, Any], list[Call]] | None] = queue.SimpleQueue()
        self._sent: tuple[Method[Any, Any], list[Call]] | None = None
        self._outcomes: Sequence[Any] = ()
        """Of the batch that the thread has run last."""
        self._bell: _Bell | None = None
        self._is_crowded = False
        """Whether the last batch was more than one call, so that more will follow at once."""
        self._flush: asyncio.Handle | None = None
        self._stopped = False
        self._done: asyncio.Future[None] | None = None
        """Somebody waits until nothing is left to do."""

    def wake(self) -> None:
        if self._sent is None and self._flush is None:
            if self._is_crowded:
                # Whoever was answered together queues its next call before the batch is made up.
                self._flush = self._loop.call_soon(self._send)
            else:
                self._send()

    def _send(self) -> None:
        self._flush = None
        if self._sent is not None or self._stopped:
            return
        batch = self._batcher.next_batch()
        if batch is not None:
            self._sent = batch
            self._is_crowded = len(batch[1]) > 1
            if self._serving is None:
                if self._bell is None:
                    self._bell = _Bell(self._loop, self._receive)
                # In an empty context: the thread must not carry the first caller's variables to all others.
                self._serving = self._loop.create_task(self._serve(), context=Context())
            self._batches.put(batch)
        elif self._done is not None:
            if not self._done.done():
                self._done.set_result(None)
            self._done = None

    async def _serve(self) -> None:
        try:
            await self._thread(self._run_batches)
        except Exception as error:  # noqa: BLE001 - not swallowed: each caller gets it
            # There was no thread; the next call asks for one again.
            self._serving = None
            self._batches = queue.SimpleQueue()
            if self._sent is not None:
                self._outcomes = [another(error) for _ in self._sent[1]]
                self._receive()

    def _run_batches(self) -> None:
        batches, bell = self._batches, self._bell
        assert bell is not None
        while (batch := batches.get()) is not None:
            self._outcomes = _outcomes(*batch)
            try:
                bell.ring()
            except RuntimeError:
                # The event loop was closed; nobody waits any more.
                return

    def _receive(self) -> None:
        sent, self._sent = self._sent, None
        if sent is None:
            # Lost meanwhile, and the callers know.
            return
        outcomes, self._outcomes = self._outcomes, ()
        self._batcher.answer(*sent, outcomes)
        if self._is_crowded or self._done is not None or self._batcher.waiting:
            self._is_crowded = True
            if self._flush is None:
                self._flush = self._loop.call_soon(self._send)

    def under_way(self) -> Collection[asyncio.Future[Any]]:
        if self._sent is None and not self._batcher.waiting:
            return ()
        if self._done is None:
            self._done = self._loop.create_future()
        return (self._done,)

    async def stop(self) -> None:
        """As Lanes.stop; then the thread is free for other work."""
        self._stopped = True
        self._lose()
        self._batches.put(None)
        if self._serving is not None:
            await asyncio.wait({self._serving}, timeout=GRACE_SECONDS)
        if self._bell is not None:
            self._bell.silence()
            # The thread has it still, unless it has ended.
            self._bell = None

    def _lose(self) -> None:
        sent, self._sent = self._sent, None
        if sent is not None:
            self._batcher.lose(*sent)


def _outcomes(method: Method[Any, Any], calls: list[Call]) -> Sequence[Any]:
    try:
        outcomes: Sequence[Any] = method.run(calls)
        if len(outcomes) != len(calls):
            raise RuntimeError(f"{method.name} gave {len(outcomes)} outcomes for {len(calls)} calls")
    except BatchError as error:
        if len(calls) == 1:
            return [error.cause]
        middle = len(calls) // 2
        return [*_outcomes(method, calls[:middle]), *_outcomes(method, calls[middle:])]
    except Exception as error:  # noqa: BLE001 - not swallowed: each caller gets it
        return [error, *(another(error) for _ in calls[1:])]
    return outcomes
