"""One event loop for the store of a saver, whichever way the saver is called."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class StoreLoop:
    """Runs coroutines in the event loop that a store belongs to.

    That is the loop in which it is created, or a loop in a thread of its own.
    """

    def __init__(self) -> None:
        try:
            self._loop = asyncio.get_running_loop()
            self._thread = None
        except RuntimeError:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(
                target=self._loop.run_forever, name="flowstore-langgraph", daemon=True
            )
            self._thread.start()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Await a coroutine, from any event loop."""
        if asyncio.get_running_loop() is self._loop:
            return await work
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Block until a coroutine is done, from any thread except that of the loop."""
        try:
            is_own = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            is_own = False
        if is_own:
            work.close()
            raise RuntimeError(
                "this call would block the event loop in which the saver was opened; "
                "use its async method, such as aget_tuple, or graph.ainvoke"
            )
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            # KeyboardInterrupt: the call ends with its caller.
            future.cancel()
            raise

    def stop(self) -> None:
        """End the thread, if there is one."""
        if self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
