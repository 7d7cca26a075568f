"""The queue of writes, and the thread that serves it.

The writer's thread does nothing but run groups: one hop to it and one back for a whole group, and no
task in between. While it runs one group the calls for the next gather.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import sqlite3
from collections.abc import Callable, Coroutine, Sequence
from contextvars import Context
from functools import partial
from typing import Any

from flowstore_core import OutcomeUnknownError
from flowstore_core.batching import Batcher, Call, Method
from flowstore_core.observing import NOBODY, Observers, Resolution
from flowstore_sqlite.connection import Connection
from flowstore_sqlite.errors import map_error
from flowstore_sqlite.transactions import Transactions, Write

_log = logging.getLogger("flowstore_sqlite")

GROUP = 1000
"""How many waiting writes share one transaction, and so one sync of the disk, at most."""


class Writing(Batcher):
    """A Batcher whose one lane is the writer's thread."""

    def __init__(
        self,
        writer: Connection,
        transactions: Transactions,
        *,
        patience: float,
        observers: Observers = NOBODY,
    ) -> None:
        super().__init__(
            lanes=1,
            largest=GROUP,
            patience=patience,
            advice="send fewer calls at once, or smaller ones",
            observers=observers,
            log=_log,
        )
        self._writer = writer
        self._transactions = transactions
        self._groups: queue.SimpleQueue[Sequence[Call] | None] = queue.SimpleQueue()
        self._serving: asyncio.Task[None] | None = None
        self._sent: list[Call] | None = None
        self._is_crowded = False
        """Whether the last group was more than one call, so that more will follow at once."""
        self._flush: asyncio.Handle | None = None
        self._idle_again: asyncio.Future[None] | None = None
        self._method: Method[Write[Any], Any] = self.method("write", _never)
        self.write: Callable[..., Coroutine[Any, Any, Any]] = self._method.call

    def _wake(self) -> None:
        if self._sent is None and self._flush is None:
            if self._is_crowded:
                # Whoever was answered together queues its next call before the group is made up.
                self._flush = self.loop.call_soon(self._send)
            else:
                self._send()

    def _open_lane(self) -> None:
        self._wake()

    def _send(self) -> None:
        self._flush = None
        if self._sent is None and self._method.queue and (calls := self._take(self._method)):
            self._sent = calls
            self._is_crowded = len(calls) > 1
            if self._serving is None:
                self._serving = self.loop.create_task(
                    self._writer.run_work(self._run_groups), context=Context()
                )
            self._groups.put(calls)
        elif self._idle_again is not None and self._sent is None:
            if not self._idle_again.done():
                self._idle_again.set_result(None)
            self._idle_again = None

    def _run_groups(self, db: sqlite3.Connection) -> None:
        """Run group after group, on the writer's thread."""
        # Waiting for the lock is the turnstile's; SQLite's own sleeps are longer the longer it waits.
        db.execute("PRAGMA busy_timeout = 0").fetchall()
        while (calls := self._groups.get()) is not None:
            outcomes: list[Any]
            try:
                outcomes = self._transactions.run(calls, db)
            except sqlite3.Error as error:
                outcomes = [map_error(error, self._writer.path) for _ in calls]
            except Exception as error:  # noqa: BLE001 - not swallowed: each caller of the group gets it
                outcomes = [error for _ in calls]
            try:
                self.loop.call_soon_threadsafe(self._receive, outcomes)
            except RuntimeError:
                # The event loop was closed; nobody waits any more.
                return

    def _receive(self, outcomes: list[Any]) -> None:
        calls, self._sent = self._sent, None
        if calls is None:
            # Closed meanwhile, and the callers know.
            return
        if isinstance(outcomes[0], OutcomeUnknownError):
            self._tell_unknown(len(outcomes))
        self._answer(self._method, calls, outcomes)
        if self._is_crowded or self.waiting or self._idle_again is not None:
            self._is_crowded = True
            if self._flush is None:
                self._flush = self.loop.call_soon(self._send)

    def _tell_unknown(self, calls: int) -> None:
        """The disk failed in a COMMIT, so of none of the calls in it is it known whether it happened."""
        _log.warning(
            "the outcome of %d writes is unknown",
            calls,
            extra={
                "flowstore.operation": self._method.name,
                "flowstore.calls": calls,
                "flowstore.resolution": Resolution.UNKNOWN.value,
            },
        )
        if self._observers:
            self._observers.outcome_unknown(self._method.name, Resolution.UNKNOWN, calls)

    def give_back(self, call: Call, outcome: Any) -> None:
        undo = getattr(call.item, "undo", None)
        if undo is not None and (work := undo(outcome)) is not None:
            call.give_back = partial(self._undo, work)
        super().give_back(call, outcome)

    async def _undo(self, work: Write[None], outcome: Any) -> None:
        await self.write(None, work)

    def _unfinished(self) -> set[asyncio.Future[None]]:
        unfinished = super()._unfinished()
        if self._sent is not None or self.waiting:
            if self._idle_again is None:
                self._idle_again = self.loop.create_future()
            unfinished.add(self._idle_again)
        return unfinished

    async def drain(self, seconds: float) -> None:
        """As Batcher.drain; then the thread is free for other work."""
        try:
            await super().drain(seconds)
        finally:
            calls, self._sent = self._sent, None
            for call in calls or ():
                self._settle(call, OutcomeUnknownError("a write"))
            self._groups.put(None)
            if self._serving is not None:
                await asyncio.wait({self._serving}, timeout=1)


async def _never(items: Sequence[Any]) -> Sequence[Any]:
    raise AssertionError("the writer's thread takes the groups")
