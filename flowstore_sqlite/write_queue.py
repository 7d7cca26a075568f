"""The queue of writes, served by the writer's thread."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from flowstore_core import OutcomeUnknownError
from flowstore_core.batching import Batcher, PendingCall, ThreadWorker
from flowstore_core.instrumentation import NO_OBSERVERS, Observers, Resolution
from flowstore_sqlite.connection import Connection
from flowstore_sqlite.group_commit import GroupCommit

_log = logging.getLogger("flowstore_sqlite")

MAX_GROUP = 1000
"""Maximum number of writes that share one transaction, and so one disk sync."""


class WriteQueue:
    """Queues writes; the writer's thread runs the queued ones as one transaction."""

    def __init__(
        self,
        writer: Connection,
        group_commit: GroupCommit,
        *,
        queue_timeout: float,
        observers: Observers = NO_OBSERVERS,
    ) -> None:
        self._writer = writer
        self._observers = observers
        self._group_commit = group_commit
        self._batcher = Batcher(
            workers=lambda batcher: ThreadWorker(batcher, self._serve),
            max_rows=MAX_GROUP,
            queue_timeout=queue_timeout,
            timeout_hint="send fewer calls at once, or smaller ones",
            observers=observers,
            log=_log,
        )
        self.write: Callable[..., Coroutine[Any, Any, Any]] = self._batcher.operation(
            "write", self._run
        ).submit
        """Its arguments: a key (always None, writes have none), the work, and its ``on_abandoned``."""
        self.drain: Callable[[float], Coroutine[Any, Any, None]] = self._batcher.drain

    async def _serve(self, serve: Callable[[], None]) -> None:
        def begin(db: sqlite3.Connection) -> None:
            # FairWriterLock does the waiting; the sleeps of SQLite's busy handler grow with each retry.
            db.execute("PRAGMA busy_timeout = 0").fetchall()
            self._group_commit.db = db
            serve()

        await self._writer.run_in_thread(begin)

    def _run(self, calls: Sequence[PendingCall]) -> Sequence[Any]:
        results = self._group_commit.run(calls)
        if results and isinstance(results[0], OutcomeUnknownError):
            # The COMMIT failed, so the outcome of every call is unknown. Observers belong to the event loop.
            self._batcher.loop.call_soon_threadsafe(self._report_unknown, len(results))
        return results

    def _report_unknown(self, calls: int) -> None:
        _log.warning(
            "the outcome of %d writes is unknown",
            calls,
            extra={
                "flowstore.operation": "write",
                "flowstore.calls": calls,
                "flowstore.resolution": Resolution.UNKNOWN.value,
            },
        )
        if self._observers:
            self._observers.outcome_unknown("write", Resolution.UNKNOWN, calls)
