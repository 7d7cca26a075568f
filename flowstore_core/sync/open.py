"""open_store_sync: a store for code without an event loop."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from flowstore_core.open import open_store
from flowstore_core.sync.loop_thread import LoopThread
from flowstore_core.sync.store import SyncFlowStore


def open_store_sync(
    url: str | None = None,
    *,
    clock: Callable[[], datetime] | None = None,
    migrate: bool = True,
    **options: object,
) -> SyncFlowStore:
    """Open the store at a URL for code without an event loop.

    The store is open when this returns. Use it in a ``with`` block, or call ``close`` at the end. The
    arguments and errors are those of open_store; ``clock`` is called in the store's own thread.
    """
    return SyncFlowStore(LoopThread(open_store(url, clock=clock, migrate=migrate, **options)))
