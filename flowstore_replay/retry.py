"""A store whose calls wait until it is available."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, cast

from flowstore_core import FlowStore, StoreUnavailableError

RETRY_INTERVAL = 0.3
"""Seconds between two attempts to reach an unavailable store."""

_log = logging.getLogger("flowstore_replay")


def retrying(store: FlowStore) -> FlowStore:
    """A store that repeats each call until the store is available, without limit.

    For calls that are safe to repeat. A worker whose claim expires meanwhile learns it from the answer.
    """
    return cast(FlowStore, _RetryingStore(store))


class _RetryingStore:
    def __init__(self, store: FlowStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if not callable(method):
            # A property, such as limits.
            return method

        async def call(*args: Any, **kwargs: Any) -> Any:
            while True:
                try:
                    return await method(*args, **kwargs)
                except StoreUnavailableError as error:
                    _log.warning("%s", error)
                    await asyncio.sleep(RETRY_INTERVAL)

        setattr(self, name, call)
        return call
