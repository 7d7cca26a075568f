"""The part of SyncFlowStore that is not an operation: its facts, and its end."""

from __future__ import annotations

import warnings
from datetime import timedelta
from typing import Self

from flowstore_core.limits import StoreLimits
from flowstore_core.status import Capability
from flowstore_core.sync.loop_thread import LoopThread


class SyncStoreBase:
    """A store whose operations run in a thread of its own; SyncFlowStore adds the operations."""

    def __init__(self, thread: LoopThread) -> None:
        self._thread = thread
        self._store = thread.store

    def __repr__(self) -> str:
        return f"<flowstore {self.backend}, synchronous{'' if self._thread.is_open else ' (closed)'}>"

    @property
    def backend(self) -> str:
        """The backend's name, as listed by ``flowstore backends``."""
        return self._store.backend

    @property
    def capabilities(self) -> frozenset[Capability]:
        """The capabilities of this store; they may depend on the URL."""
        return self._store.capabilities

    @property
    def limits(self) -> StoreLimits:
        """What this store holds (LIM-1)."""
        return self._store.limits

    @property
    def max_skew(self) -> timedelta | None:
        """How far one wrong clock can move the clock of the store; None without SHARED_CLOCK (CLK-1)."""
        return self._store.max_skew

    def close(self) -> None:
        """Close the store; idempotent. Later calls raise StoreClosedError (argument errors come first).

        Calls that wait in other threads end: with their results if the store can still complete them,
        otherwise with StoreClosedError. Waits, for a bounded time, until the effects of cancelled calls are
        undone (CON-4). Does nothing in a forked process.
        """
        self._thread.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._thread.is_open:
            message = f"unclosed {self!r}; close it, or use it in a with block"
            self._thread.stop()
            # After stopping: a filter may turn the warning into an exception.
            warnings.warn(message, ResourceWarning, stacklevel=2, source=self)
