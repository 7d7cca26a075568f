"""Retrying a write until the store is available, and cancelling tasks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from flowstore_core import StoreUnavailableError

RETRY_INTERVAL = 0.3
"""Seconds between two attempts to reach an unavailable store."""

_log = logging.getLogger("flowstore_replay")


async def retry_until_available(call: Callable[[], Awaitable[None]]) -> None:
    """Await an idempotent call, retrying while the store is unavailable.

    There is no limit: a worker whose claim expires meanwhile is cancelled by its LeaseKeeper.
    """
    while True:
        try:
            return await call()
        except StoreUnavailableError as error:
            _log.warning("%s", error)
            await asyncio.sleep(RETRY_INTERVAL)


async def cancel_and_wait(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait until it has ended. Its error, if any, is logged and dropped."""
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled() and (error := task.exception()):
            _log.debug("dropped: %s", error)
