"""Retries with jittered backoff for operations that are known not to have happened."""

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
from flowstore_postgres.errors import (
    DRIVER_ERRORS,
    RETRYABLE_SQLSTATES,
    RetryableError,
    describe,
    name_error,
    report_retry,
)

T = TypeVar("T")

log = logging.getLogger("flowstore_postgres")

FIRST_PAUSE = 0.01
MAX_PAUSE = 0.5
"""Bounds of the backoff, in seconds."""
MIN_TIMEOUT = 0.1
"""The least time, in seconds, that a retried call waits for one reply."""

_retry_deadline: ContextVar[float | None] = ContextVar("flowstore_postgres_retry_deadline", default=None)
# The event loop's time at which the current call stops retrying; None before its first failure.


class RetryLoop:
    """Retries for ``retry_timeout`` seconds, counted from the first failure.

    The first failure may itself take long, so the time before it does not count. After it, no wait of the
    call exceeds the remaining time.
    """

    def __init__(self, retry_timeout: float, observers: Observers) -> None:
        self._retry_timeout = retry_timeout
        self._observers = observers
        self._loop = asyncio.get_running_loop()

    @staticmethod
    def is_retrying() -> bool:
        """Whether the current call has failed before and is being retried."""
        return _retry_deadline.get() is not None

    def remaining(self, seconds: float) -> float:
        """``seconds``, capped at the remaining time if the current call is being retried."""
        deadline = _retry_deadline.get()
        return seconds if deadline is None else max(MIN_TIMEOUT, min(seconds, deadline - self._loop.time()))

    async def run(self, attempt: Callable[[], Awaitable[T]], operation: str, *, failed: bool = False) -> T:
        """Await ``attempt`` until it neither raises RetryableError nor is rolled back by the server.

        ``failed`` starts the retry time at once, for an operation that has failed already. Raises the error
        of the last attempt.
        """
        deadline = _retry_deadline.get()
        token: Token[float | None] | None = None
        pause = FIRST_PAUSE
        error: FlowStoreError | None = None
        resolvable_at: float | None = None
        try:
            for tries in count():
                if deadline is None and (failed or error is not None):
                    deadline = self._loop.time() + self._retry_timeout
                    token = _retry_deadline.set(deadline)
                if error is not None and deadline is not None:
                    if resolvable_at is None:
                        pause = min(pause, MAX_PAUSE)
                    wait = pause * random.uniform(0.5, 1.5)
                    left = deadline - self._loop.time()
                    if resolvable_at is not None:
                        # The outcome may be known earlier, and is probed once more at the deadline.
                        wait = min(wait, max(resolvable_at - self._loop.time(), FIRST_PAUSE), left)
                    if left <= 0 or wait > left:
                        raise strip_driver_exceptions(error)
                    report_retry(self._observers, operation, tries, error, wait)
                    await asyncio.sleep(wait)
                    pause *= 2
                resolvable_at = None
                try:
                    return await attempt()
                except RetryableError as raised:
                    error, retryable, resolvable_at = raised.error, True, raised.resolvable_at
                except FlowStoreError as raised:
                    error, retryable = raised, False
                except DRIVER_ERRORS as raised:
                    error = describe(raised)
                    retryable = getattr(raised, "sqlstate", None) in RETRYABLE_SQLSTATES
                    if not retryable:
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
                # Outside of the except clauses, where Python would chain the driver's error.
                if not retryable:
                    raise strip_driver_exceptions(error)
        finally:
            if token is not None:
                _retry_deadline.reset(token)
        raise AssertionError("unreachable")
