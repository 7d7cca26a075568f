"""An event loop for checks in a separate thread, which can be abandoned if a backend blocks it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import ctypes
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar, cast

from flowstore_conformance.child_processes import kill_children
from flowstore_conformance.watchdog import Hang, Hung, Watchdog, describe_blocked

T = TypeVar("T")
Work = Callable[[], Awaitable[T]]

POLL_SECONDS = 0.2
ANSWER_SECONDS = 2.0
"""Seconds in which an interrupted loop must report its pending call; otherwise it counts as blocked."""

END_SECONDS = 10.0
"""Seconds for a cancelled work item, or the end of the loop, before the loop is abandoned."""


class Stopped(Exception):  # noqa: N818 - requested by the caller
    """The caller set ``stop`` while work was running."""

    def __init__(self, pending_call: str | None = None) -> None:
        super().__init__(pending_call)
        self.pending_call = pending_call
        """The pending call of the store and where it waits."""


class _Loop:
    """A thread that runs work items sequentially in one task, because stores open and close in one task."""

    def __init__(self, tick: float) -> None:
        self.loop = asyncio.new_event_loop()
        self.heartbeats = 0
        self.ended: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._tick = tick
        self._queue: asyncio.Queue[tuple[Work[Any], concurrent.futures.Future[Any]] | None] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._current: concurrent.futures.Future[Any] | None = None
        self._cancelled: set[concurrent.futures.Future[Any]] = set()
        context = contextvars.copy_context()
        # A daemon thread, so that an abandoned loop does not prevent the interpreter from exiting.
        self.thread = threading.Thread(
            target=lambda: context.run(self._main), name="flowstore-checks", daemon=True
        )
        self.thread.start()

    def submit(self, work: Work[T]) -> concurrent.futures.Future[T]:
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        future.set_running_or_notify_cancel()
        self.loop.call_soon_threadsafe(self._queue.put_nowait, (work, future))
        return future

    def cancel(self, future: concurrent.futures.Future[Any]) -> None:
        """Cancel a work item, begun or not."""
        self.loop.call_soon_threadsafe(self._cancel, future)

    def _cancel(self, future: concurrent.futures.Future[Any]) -> None:
        if future is self._current and self._task is not None:
            self._task.cancel()
        else:
            self._cancelled.add(future)

    def end(self) -> None:
        self.loop.call_soon_threadsafe(self._queue.put_nowait, None)

    def abandon(self) -> None:
        """Abandon the thread. Raises an exception in it, which ends an endless loop of Python code."""
        kill_children(self.loop)
        # Ignores pending tasks and exceptions of callbacks.
        self.loop.set_exception_handler(lambda loop, context: None)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(self.thread.ident or 0), ctypes.py_object(SystemExit)
        )
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.loop.stop)

    def _main(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            # RuntimeError: the loop was stopped because it was abandoned.
            with suppress(SystemExit, RuntimeError):
                self.loop.run_until_complete(self._serve())
        finally:
            self.loop.close()
            self.ended.set_result(None)

    async def _serve(self) -> None:
        task = self._task = asyncio.current_task()
        assert task is not None
        self._heartbeat()
        while (item := await self._queue.get()) is not None:
            work, future = item
            if future in self._cancelled:
                future.set_exception(Stopped())
                continue
            self._current = future
            try:
                future.set_result(await work())
            except asyncio.CancelledError as error:
                future.set_exception(Stopped(str(error) or None))
            except Exception as error:  # noqa: BLE001 - raised again by the submitter's future
                future.set_exception(error)
            self._current = None
            while task.cancelling():
                task.uncancel()
        others = asyncio.all_tasks() - {task}
        for one in others:
            one.cancel()
        if others:
            await asyncio.wait(others, timeout=END_SECONDS / 2)
        await self.loop.shutdown_asyncgens()

    def _heartbeat(self) -> None:
        self.heartbeats += 1
        self.loop.call_later(self._tick, self._heartbeat)


_abandoned: list[_Loop] = []
"""Abandoned loops, whose threads may still run; kept because they hold open resources of a backend."""


class Supervisor:
    """Runs work in a separate event loop, and replaces the loop if a backend blocks it.

    A lock or an endless loop can block an event loop forever. Python code cannot end such a thread, so it is
    abandoned, and ``Hung`` reports where it is blocked.
    """

    def __init__(self, watchdog: Watchdog) -> None:
        self.watchdog = watchdog
        self._loop: _Loop | None = None
        self._future: concurrent.futures.Future[Any] | None = None

    async def run(self, work: Work[T], *, stop: asyncio.Event | None = None) -> T:
        """Run work in the loop; return its result or raise its exception.

        Raises Hung if it blocks the loop or does not end after cancellation; the loop is then abandoned.
        Raises Stopped once ``stop`` is set, after cancelling the work.
        """
        if stop is not None and stop.is_set():
            # Work that ends at once would otherwise complete in spite of the stop.
            raise Stopped(None)
        if self._loop is None:
            self._loop = _Loop(self.watchdog.limits.tick)
        self._future = self._loop.submit(work)
        done = asyncio.wrap_future(self._future)
        stopping = asyncio.ensure_future(stop.wait()) if stop is not None else None
        try:
            while not done.done():
                heartbeats, since = self._loop.heartbeats, time.monotonic()
                blocked = 0.0
                while not done.done() and self._loop.heartbeats == heartbeats:
                    waits: set[asyncio.Future[Any]] = {done} if stopping is None else {done, stopping}
                    await asyncio.wait(waits, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                    if stopping is not None and stopping.done() and not done.done():
                        raise Stopped(await self._stop(done))
                    # Limits the effect of time in which this process did not run.
                    now = time.monotonic()
                    blocked, since = blocked + min(now - since, 2 * POLL_SECONDS), now
                    if blocked >= self._limit():
                        hang = describe_blocked(self._loop.thread.ident or 0, blocked)
                        self._abandon(done)
                        raise Hung(hang)
                if self.watchdog.stuck and not done.done():
                    hang = cast(Hang, self.watchdog.hang)
                    self._abandon(done)
                    raise Hung(hang)
            result: T = await done
            return result
        except asyncio.CancelledError:
            # Cancelled by the caller: wait until the work has closed its resources.
            await asyncio.shield(self._cancel(done))
            raise
        finally:
            if stopping is not None:
                stopping.cancel()

    async def aclose(self) -> None:
        """End the loop in bounded time."""
        if self._loop is not None:
            self._loop.end()
            done = asyncio.wrap_future(self._loop.ended)
            await asyncio.wait({done}, timeout=END_SECONDS)
            if done.done():
                self._loop = None
            else:
                self._abandon(done)

    def _limit(self) -> float:
        """Seconds for which the loop may be blocked: the limit of a call."""
        limits = self.watchdog.limits
        if self.watchdog.known_hangs and self._loop is not None:
            hang = describe_blocked(self._loop.thread.ident or 0, 0.0)
            if hang.operation is not None:
                return self.watchdog.limit_of(hang.operation)
        return limits.call

    async def _stop(self, done: asyncio.Future[Any]) -> str | None:
        """Cancel the running work and return a description of its pending call."""
        assert self._loop is not None
        future: concurrent.futures.Future[str | None] = concurrent.futures.Future()
        future.set_running_or_notify_cancel()
        self._loop.loop.call_soon_threadsafe(lambda: future.set_result(self.watchdog.describe_pending()))
        answer = asyncio.wrap_future(future)
        await asyncio.wait({answer}, timeout=ANSWER_SECONDS)
        if answer.done():
            await self._cancel(done)
            return answer.result()
        answer.cancel()
        hang = describe_blocked(self._loop.thread.ident or 0, ANSWER_SECONDS)
        self._abandon(done)
        return f"{hang.operation or 'the backend'} blocked the event loop at {hang.place}"

    async def _cancel(self, done: asyncio.Future[Any]) -> None:
        if self._loop is None or self._future is None or done.done():
            return
        self._loop.cancel(self._future)
        await asyncio.wait({done}, timeout=END_SECONDS)
        if not done.done():
            self._abandon(done)
        elif not done.cancelled():
            done.exception()  # Retrieved, so that asyncio does not report it.

    def _abandon(self, done: asyncio.Future[Any]) -> None:
        assert self._loop is not None
        done.cancel()
        self._loop.abandon()
        _abandoned.append(self._loop)
        self._loop = None
