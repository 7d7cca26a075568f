"""What an engine does until it is done: ask again, and wait for what it has cancelled."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from flowstore_core import StoreUnavailableError
from flowstore_replay.looks import LONGEST_PAUSE

_log = logging.getLogger("flowstore_replay")


async def insist(call: Callable[[], Awaitable[None]]) -> None:
    """Repeat a call that is harmless to repeat until the store answers; losing the claim cancels it."""
    while True:
        try:
            return await call()
        except StoreUnavailableError as error:
            _log.warning("%s", error)
            await asyncio.sleep(LONGEST_PAUSE)


async def cancel(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait for its end; what it may still have raised concerns nobody any more."""
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled() and (error := task.exception()):
            _log.debug("dropped: %s", error)
