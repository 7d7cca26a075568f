"""Repeating what is known not to have happened, with jittered backoff."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from contextvars import ContextVar, Token
from itertools import count
from typing import TypeVar

from flowstore_core import FlowStoreError
from flowstore_core.errors import strip_driver_exceptions
from flowstore_core.instrumentation import Observers
from flowstore_postgres.errors import DRIVER, ROLLED_BACK, Retry, describe, name_error, report_retry

T = TypeVar("T")

log = logging.getLogger("flowstore_postgres")

FIRST_PAUSE = 0.01
LONGEST_PAUSE = 0.5
LEAST_SECONDS = 0.1
"""A call that goes on trying waits so long for an answer, however soon its time is up."""

_until: ContextVar[float | None] = ContextVar("flowstore_postgres_until", default=None)
# When the time of the call under way is up; None as long as nothing of it has failed.


class Repeating:
    """Goes on for retry_timeout after the first failure, because that itself may have taken long.

    From then on no wait of the call outlasts that time.
    """

    def __init__(self, seconds: float, observers: Observers) -> None:
        self._seconds = seconds
        self._observers = observers
        self._loop = asyncio.get_running_loop()

    @staticmethod
    def under_way() -> bool:
        """Whether this call has failed and goes on trying."""
        return _until.get() is not None

    def within(self, seconds: float) -> float:
        """So many seconds, or what is left to a call that has failed and goes on trying."""
        until = _until.get()
        return seconds if until is None else max(LEAST_SECONDS, min(seconds, until - self._loop.time()))

    async def repeat(self, attempt: Callable[[], Awaitable[T]], operation: str, *, failed: bool = False) -> T:
        """Await attempts until one neither raises Retry nor was rolled back by the server.

        ``failed`` says that there has been a failure already. Raises what the last attempt failed from.
        """
        until = _until.get()
        token: Token[float | None] | None = None
        pause = FIRST_PAUSE
        error: FlowStoreError | None = None
        fence: float | None = None
        try:
            for tries in count():
                if until is None and (failed or error is not None):
                    until = self._loop.time() + self._seconds
                    token = _until.set(until)
                if error is not None and until is not None:
                    if fence is None:
                        pause = min(pause, LONGEST_PAUSE)
                    wait = pause * random.uniform(0.5, 1.5)
                    left = until - self._loop.time()
                    if fence is not None:
                        # The outcome may be known earlier, and is probed one last time when the time is up.
                        wait = min(wait, max(fence - self._loop.time(), FIRST_PAUSE), left)
                    if left <= 0 or wait > left:
                        raise strip_driver_exceptions(error)
                    report_retry(self._observers, operation, tries, error, wait)
                    await asyncio.sleep(wait)
                    pause *= 2
                fence = None
                try:
                    return await attempt()
                except Retry as retry:
                    error, again, fence = retry.error, True, retry.fence
                except FlowStoreError as raised:
                    error, again = raised, False
                except DRIVER as raised:
                    error = describe(raised)
                    again = getattr(raised, "sqlstate", None) in ROLLED_BACK
                    if not again:
                        log.debug(
                            "%s: the driver raised %s",
                            operation,
                            name_error(raised),
                            extra={
                                "flowstore.operation": operation,
                                "flowstore.error_type": type(raised).__name__,
                                "flowstore.sqlstate": getattr(raised, "sqlstate", None),
                            },
                        )
                # Out here, where no driver's error is being handled that would be chained.
                if not again:
                    raise strip_driver_exceptions(error)
        finally:
            if token is not None:
                _until.reset(token)
        raise AssertionError("unreachable")
