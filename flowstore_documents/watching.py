"""Watching: wait until a step is ready or a run has ended (WAT)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

from flowstore_core import RunStatus
from flowstore_core.backend import WaitingCalls
from flowstore_core.queues import MAX_PRIORITY
from flowstore_core.timeseries import EARLIEST
from flowstore_documents import keys
from flowstore_documents.access import Access, finish_intents
from flowstore_documents.run_state import read_run
from flowstore_documents.space import KeyValueSpace, NotApplied, Range
from flowstore_documents.transactions import Transaction, Transactions

FIRST_PAUSE = 0.1
MAX_PAUSE = 5.0

WATCHED = [
    (keys.QUEUES, keys.end_of(keys.QUEUES)),
    (keys.COMPLETED, keys.end_of(keys.COMPLETED)),
    (keys.INTENTS, keys.end_of(keys.INTENTS)),
]
"""What changes when a step becomes ready, a run ends or is deleted."""

_log = logging.getLogger("flowstore_documents")


class Watch(Access):
    def __init__(self, space: KeyValueSpace, transactions: Transactions) -> None:
        super().__init__(space, transactions)
        self._waiting = WaitingCalls()
        self._watcher: asyncio.Task[None] | None = None
        self._is_watching = asyncio.Event()

    async def wait_for_steps(self, queues: Sequence[str], *, timeout: timedelta) -> bool:
        async def look() -> tuple[bool | None, float | None]:
            await self._start_watching()
            seconds = await self._read("wait_for_steps", lambda tx: _seconds_until_ready(tx, queues))
            return (True, None) if seconds is not None and seconds <= 0 else (None, seconds)

        return await self._waiting.wait(look, timeout) or False

    async def wait_for_run(self, run_id: UUID, *, timeout: timedelta) -> RunStatus | None:
        async def read(tx: Transaction) -> tuple[RunStatus | None] | None:
            run = (await read_run(tx, run_id)).run
            if run is None:
                return (None,)
            return (run.status,) if run.is_terminal else None

        async def look() -> tuple[tuple[RunStatus | None] | None, float | None]:
            await self._start_watching()
            return await self._read("wait_for_run", read), None

        found = await self._waiting.wait(look, timeout)
        return None if found is None else found[0]

    async def _start_watching(self) -> None:
        """Begin to watch before the caller looks, so that no change after its look is missed."""
        if self._watcher is None:
            self._watcher = asyncio.create_task(self._watch())
        await self._is_watching.wait()

    async def _watch(self) -> None:
        """Wake the waiting calls after changes, over one connection for all of them."""
        pause = FIRST_PAUSE
        while True:
            try:
                async for _ in self._space.watch(WATCHED):
                    pause = FIRST_PAUSE
                    self._is_watching.set()
                    self._waiting.wake()
                reason = "the watch ended"
            except NotApplied as error:
                reason = error.reason
            _log.info("watching begins again: %s", reason)
            # Without a watch the calls look for themselves, and again once it is back.
            self._is_watching.set()
            self._waiting.wake()
            await asyncio.sleep(pause)
            pause = min(pause * 2, MAX_PAUSE)

    async def _stop_watching(self) -> None:
        self._waiting.close()
        self._is_watching.set()
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)


async def _seconds_until_ready(tx: Transaction, queues: Sequence[str]) -> float | None:
    """The time until the next step is ready; None: no time makes one ready."""
    await finish_intents(tx)
    levels = [keys.queue_level(queue, priority) for queue in queues for priority in range(MAX_PRIORITY + 1)]
    # A step that no time makes ready is behind all others.
    view = await tx.read((), [Range(level, level + keys.NEVER, 1, keys_only=True) for level in levels])
    heads = [keys.parse_queued_step(key)[1] for page in view.pages for key, _ in page.items]
    if not heads:
        return None
    return ((keys.parse_time(min(heads)) or EARLIEST) - await tx.now()).total_seconds()
