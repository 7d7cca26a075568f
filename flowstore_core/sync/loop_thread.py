"""The thread of a synchronous store: it runs the event loop in which the store is open."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, Generic, NoReturn, ParamSpec, TypeVar

from flowstore_core.errors import ConfigurationError, StoreClosedError
from flowstore_core.store import FlowStore

P = ParamSpec("P")
T = TypeVar("T")

CLOSING_SECONDS = 5.0
"""How long calls may run after their store has closed. Only those of a faulty backend need it."""


class _Call(Generic[T]):
    """A call that a thread waits for and that the event loop executes."""

    def __init__(self, operation: Coroutine[Any, Any, T]) -> None:
        self.operation = operation
        self.task: asyncio.Task[T] | None = None
        self.ended: SimpleQueue[asyncio.Task[T] | None] = SimpleQueue()
        """Receives the task when it is done, or None if the loop ended before."""

    def start(self) -> None:
        self.task = asyncio.create_task(self.operation)
        self.task.add_done_callback(self.ended.put)

    def cancel(self) -> None:
        if self.task is None:
            self.operation.close()
        else:
            self.task.cancel()


class LoopThread:
    """A thread with an event loop in which one store is open. Calls come from any other thread.

    Nothing here takes a lock, so a signal handler may call the store while it interrupts a call.
    """

    store: FlowStore

    def __init__(self, opening: AbstractAsyncContextManager[FlowStore]) -> None:
        """Open the store; returns when it is open and raises the error if it does not open."""
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._calls: set[_Call[Any]] = set()
        self._is_closed = False
        """Whether the store has closed. Set and read in the thread."""
        self._failure: BaseException | None = None
        opened: SimpleQueue[FlowStore | None] = SimpleQueue()
        # A daemon: a program may end without closing the store. It loses nothing that was acknowledged.
        self._thread = threading.Thread(
            target=self._run, args=(opening, opened), name="flowstore-sync", daemon=True
        )
        try:
            self._thread.start()
            store = opened.get()
        except BaseException as error:
            if isinstance(error, RuntimeError) and self._thread.ident is None:
                # The system could not start a thread.
                self._loop.close()
            else:
                # Interrupted by a signal, perhaps in start(): the thread closes the store when it has opened.
                self.stop()
            raise
        if store is None:
            self._thread.join()
            self._raise_failure()
        else:
            self.store = store

    # In the thread

    def _run(
        self, opening: AbstractAsyncContextManager[FlowStore], opened: SimpleQueue[FlowStore | None]
    ) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._serve(opening, opened))
        except BaseException as error:  # noqa: BLE001 - raised in the thread that opens or closes
            self._failure = error
        finally:
            opened.put(None)
            # The loop is closed, so no call can start any more; these came too late.
            for call in list(self._calls):
                call.ended.put(None)

    async def _serve(
        self, opening: AbstractAsyncContextManager[FlowStore], opened: SimpleQueue[FlowStore | None]
    ) -> None:
        async with opening as store:
            opened.put(store)
            await self._stopping.wait()
        self._is_closed = True
        # Closing has ended every call. Let their tasks notice it, or the runner would cancel them.
        if tasks := [call.task for call in list(self._calls) if call.task is not None]:
            await asyncio.wait(tasks, timeout=CLOSING_SECONDS)

    def _start(self, call: _Call[Any]) -> None:
        if self._is_closed:
            # The loop may end before a task that starts now.
            call.ended.put(None)
        else:
            call.start()

    # In other threads

    @property
    def is_open(self) -> bool:
        """Whether calls can be made. False in a forked process, where the thread does not exist."""
        return self._thread.is_alive() and not self._stopping.is_set()

    def call(self, operation: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run an operation of the store in the event loop, and wait for its result.

        If the waiting thread is interrupted by an exception, such as KeyboardInterrupt, the operation is
        cancelled (CON-4).
        """
        self._refuse_own_thread()
        coroutine = operation(*args, **kwargs)
        task = self._execute(coroutine) if self._thread.is_alive() else None
        if task is None:
            _refuse(coroutine)
        try:
            if task.cancelled():
                raise StoreClosedError
            return task.result()
        finally:
            # Or the exception would refer to itself, through its traceback and this frame.
            del task

    def _execute(self, operation: Coroutine[Any, Any, T]) -> asyncio.Task[T] | None:
        """The finished task of an operation; None if it did not start, because the loop has ended."""
        call = _Call(operation)
        # Before it is scheduled: then it is either started or found by _run after the end of the loop.
        self._calls.add(call)
        try:
            if not self._schedule(partial(self._start, call)):
                return None
            return call.ended.get()
        except BaseException:
            self._schedule(call.cancel)
            raise
        finally:
            self._calls.discard(call)

    def _schedule(self, callback: Callable[[], None]) -> bool:
        """Call back in the thread, in a copy of this context; False if the loop has ended."""
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            return False
        return True

    def stop(self) -> None:
        """Begin to close the store, and return at once."""
        self._schedule(self._stopping.set)

    def close(self) -> None:
        """Close the store and wait for the end of the thread; raises the error if closing fails."""
        self._refuse_own_thread()
        self.stop()
        self._thread.join()
        self._raise_failure()

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            try:
                raise failure
            finally:
                del failure

    def _refuse_own_thread(self) -> None:
        if threading.current_thread() is self._thread:
            raise ConfigurationError(
                "a synchronous store cannot be used in its own thread, in which clocks, observers and log "
                "handlers are called; the call would wait for itself; make it in a different thread"
            )


def _refuse(operation: Coroutine[Any, Any, Any]) -> NoReturn:
    """Raise the error of an operation on a store that is closed, or that a forked process inherited.

    Such an operation checks its arguments and raises before it waits for anything, so it needs no loop.
    """
    with suppress(StopIteration):
        operation.send(None)
    operation.close()
    raise StoreClosedError
