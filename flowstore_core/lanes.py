"""What carries the batches of a Batcher to the database: tasks of the event loop.

A Batcher gathers calls and answers them. Its lanes fetch batch after batch and have them written; for
what blocks a thread there is ThreadLane, and a backend may bring lanes of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from contextvars import Context
from typing import TYPE_CHECKING, Any, Protocol

from flowstore_core.calls import BatchError, Call, another

if TYPE_CHECKING:
    from flowstore_core.batching import Batcher, Method

GRACE_SECONDS = 1.0
"""How long what was told to stop may take to do so."""


class Lanes(Protocol):
    """What a Batcher needs of its lanes; every method is called on the event loop.

    A lane that is free calls ``batcher.next_batch()``, has the batch written, and calls
    ``batcher.answer(method, calls, outcomes)``; or ``batcher.lose(method, calls)``, when it will never
    know what became of it.
    """

    def wake(self) -> None:
        """Calls are waiting. Comes with every call that is queued, so mostly there is nothing to do."""

    def under_way(self) -> Collection[asyncio.Future[Any]]:
        """What to wait for until nothing is queued and nothing on its way any more; empty when it is so."""
        ...

    async def stop(self) -> None:
        """Fetch nothing more, and answer or lose what is on its way within GRACE_SECONDS."""


class TaskLanes:
    """So many batches on their way at once; ``run`` of a method is awaited with the items of each.

    Further lanes open, up to ``most``, while there are more calls than batches of full size would take
    on the lanes that are open.
    """

    def __init__(self, batcher: Batcher, lanes: int, most: int | None = None) -> None:
        self._batcher = batcher
        self._lanes = lanes
        self._most = lanes if most is None else max(lanes, most)
        self._stopped = False
        self._tasks: set[asyncio.Task[None]] = set()
        """The open lanes: a lane lasts as long as there is something to send."""
        self._on_the_way: dict[asyncio.Task[None], tuple[Method[Any, Any], list[Call]]] = {}
        self._carried = 0
        """How many calls are on their way; kept, because it is asked for with every call."""

    def wake(self) -> None:
        # A lane that is open and has nothing on its way is coming anyway.
        if len(self._on_the_way) == (lanes := len(self._tasks)) < self._most and self._may_open(lanes):
            # In an empty context: a lane must not carry the first caller's variables to all others.
            task = Context().run(self._batcher.loop.create_task, self._serve())
            if not task.done():
                self._tasks.add(task)
            task.add_done_callback(self._lane_ended)

    def _may_open(self, lanes: int) -> bool:
        """Whether there may be another lane beside so many."""
        batcher = self._batcher
        if self._stopped:
            return False
        if lanes < self._lanes:
            return lanes < self._lanes - batcher.borrowed
        return batcher.waiting + self._carried > lanes * batcher.largest

    def _lane_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        # Somebody who cancels every task of the loop cancels lanes too.
        if self._batcher.has_calls():
            self.wake()

    def under_way(self) -> Collection[asyncio.Future[Any]]:
        return self._tasks

    async def stop(self) -> None:
        self._stopped = True
        for task in (tasks := set(self._tasks)):
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=GRACE_SECONDS)
        for deaf in list(self._on_the_way):
            self._lose(deaf)

    async def _serve(self) -> None:
        """One lane: send batch after batch until nothing is left."""
        lane: Any = asyncio.current_task()
        batcher = self._batcher
        returning = 0
        """How many callers are about to hear of their calls, and will mostly come back with the next."""
        try:
            while not self._is_too_many() and (
                batch := batcher.next_batch(max(self._lanes, len(self._tasks)), self._carried + returning)
            ):
                method, calls = self._on_the_way[lane] = batch
                self._carried += (callers := _callers(calls))
                if batcher.waiting:
                    self.wake()
                outcomes = await self._run(method, calls)
                self._arrived(lane)
                if outcomes is not None and 2 * batcher.waiting >= callers > 1:
                    # The next batch goes out first: the database works on it while these callers wake.
                    batcher.loop.call_soon(batcher.answer, method, calls, outcomes)
                    returning = callers
                    continue
                if outcomes is not None:
                    batcher.answer(method, calls, outcomes)
                returning = 0
                if callers > 1:
                    # Whoever was answered queues its next call before the next batch is made up.
                    await asyncio.sleep(0)
        finally:
            self._tasks.discard(lane)
            self._lose(lane)

    def _is_too_many(self) -> bool:
        """Whether a further lane, of those that are open, is no longer worth it."""
        further = len(self._tasks) - self._lanes
        return further > 0 and self._batcher.waiting + self._carried <= further * self._batcher.largest

    def _arrived(self, lane: asyncio.Task[None]) -> tuple[Method[Any, Any], list[Call]] | None:
        """What the lane had on its way until now."""
        if sent := self._on_the_way.pop(lane, None):
            self._carried -= _callers(sent[1])
        return sent

    def _lose(self, lane: asyncio.Task[None]) -> None:
        """Answer for a lane that was cancelled with a batch on its way."""
        if sent := self._arrived(lane):
            self._batcher.lose(*sent)

    async def _run(self, method: Method[Any, Any], calls: list[Call]) -> Sequence[Any] | None:
        """The outcome of each call; None where they were answered in parts."""
        outcomes: Sequence[Any]
        try:
            outcomes = await method.run([call.item for call in calls])
            if len(outcomes) != len(calls):
                raise RuntimeError(f"{method.name} gave {len(outcomes)} outcomes for {len(calls)} calls")
        except BatchError as error:
            if len(calls) > 1:
                middle = len(calls) // 2
                for part in (calls[:middle], calls[middle:]):
                    # At once, so that what is known stays known should the lane be cancelled.
                    if (answers := await self._run(method, part)) is not None:
                        self._batcher.answer(method, part, answers)
                return None
            outcomes = [error.cause]
        except Exception as error:  # noqa: BLE001 - not swallowed: each caller gets it
            outcomes = [error, *(another(error) for _ in calls[1:])]
        return outcomes


def _callers(calls: Sequence[Call]) -> int:
    """How many wait for these calls."""
    return len(calls) + sum(len(call.followers) for call in calls if call.followers is not None)
