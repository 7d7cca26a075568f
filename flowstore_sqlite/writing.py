"""The queue of writes, and the writer's thread, which serves it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, TypeVar

from flowstore_core.batching import Batcher, Call, ThreadLane
from flowstore_sqlite.connection import Connection
from flowstore_sqlite.errors import map_error
from flowstore_sqlite.transactions import Transactions, Write

T = TypeVar("T")

GROUP = 1000
"""How many waiting writes share one transaction, and so one sync of the disk, at most."""


class Writing:
    """Gathers writes; the writer's thread runs what has gathered as one transaction."""

    def __init__(self, writer: Connection, transactions: Transactions, *, patience: float) -> None:
        self._writer = writer
        self._transactions = transactions
        self._batcher = Batcher(
            lanes=lambda batcher: ThreadLane(batcher, self._serve),
            largest=GROUP,
            patience=patience,
            advice="send fewer calls at once, or smaller ones",
        )
        self._write: Callable[..., Coroutine[Any, Any, Any]] = self._batcher.method("a write", self._run).call
        self.drain: Callable[[float], Coroutine[Any, Any, None]] = self._batcher.drain

    def write(self, work: Write[T], undo: Callable[[T], Write[None] | None] | None) -> Coroutine[Any, Any, T]:
        """See Database.write."""
        return self._write(None, work, None if undo is None else partial(self._undo, undo))

    async def _undo(self, undo: Callable[[T], Write[None] | None], outcome: T) -> None:
        if (work := undo(outcome)) is not None:
            await self._write(None, work)

    async def _serve(self, serve: Callable[[], None]) -> None:
        def begin(db: sqlite3.Connection) -> None:
            # Waiting for the lock is the turnstile's; SQLite's own sleeps are longer the longer it waits.
            db.execute("PRAGMA busy_timeout = 0").fetchall()
            self._transactions.db = db
            serve()

        await self._writer.run_work(begin)

    def _run(self, calls: Sequence[Call]) -> Sequence[Any]:
        try:
            return self._transactions.run(calls)
        except sqlite3.Error as error:
            return [map_error(error, self._writer.path) for _ in calls]
