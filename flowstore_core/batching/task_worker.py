"""Workers that are tasks of the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from contextvars import Context
from typing import Any

from flowstore_core.batching.call import BatchError, PendingCall, copy_exception, count_callers
from flowstore_core.batching.queue import BatchedOperation
from flowstore_core.batching.workers import GRACE_SECONDS, Batch, BatchSource


class TaskWorkers:
    """Up to ``workers`` batches in flight at once; each awaits ``run`` of its operation.

    Under load up to ``limit`` workers run: a further one starts while there are more calls than full batches
    of the running workers can hold.
    """

    def __init__(self, source: BatchSource, workers: int, limit: int | None = None) -> None:
        self._source = source
        self._workers = workers
        self._limit = workers if limit is None else max(workers, limit)
        self._stopped = False
        self._tasks: set[asyncio.Task[None]] = set()
        """The running workers. A worker ends when there is nothing left to send."""
        self._in_flight: dict[asyncio.Task[None], Batch] = {}
        self._in_flight_calls = 0
        """The number of callers in ``_in_flight``, counted as it changes because every call reads it."""

    def wake(self) -> None:
        # A worker without a batch in flight checks the queues anyway.
        if len(self._in_flight) == (running := len(self._tasks)) < self._limit and self._may_start(running):
            # In an empty context, or the first caller's context variables would reach all later callers.
            task = Context().run(self._source.loop.create_task, self._work())
            if not task.done():
                self._tasks.add(task)
            task.add_done_callback(self._worker_ended)

    def _may_start(self, running: int) -> bool:
        """Whether one more worker may start."""
        source = self._source
        if self._stopped:
            return False
        if running < self._workers:
            return running < self._workers - source.direct_in_use
        return source.queued + self._in_flight_calls > running * source.max_rows

    def _worker_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        # Code that cancels every task of the loop cancels workers too.
        if self._source.has_calls():
            self.wake()

    def pending(self) -> Collection[asyncio.Future[Any]]:
        return self._tasks

    async def stop(self) -> None:
        self._stopped = True
        for task in (tasks := set(self._tasks)):
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=GRACE_SECONDS)
        for unresponsive in list(self._in_flight):
            self._abandon(unresponsive)

    async def _work(self) -> None:
        """Send batch after batch until the queues are empty."""
        worker: Any = asyncio.current_task()
        source = self._source
        returning = 0
        """Callers about to be resolved, most of which will queue their next call at once."""
        try:
            while not self._is_surplus() and (
                batch := source.next_batch(
                    max(self._workers, len(self._tasks)), self._in_flight_calls + returning
                )
            ):
                operation, calls = self._in_flight[worker] = batch
                self._in_flight_calls += (callers := count_callers(calls))
                if source.queued:
                    self.wake()
                outcomes = await self._run(operation, calls)
                self._take_finished(worker)
                if outcomes is not None and 2 * source.queued >= callers > 1:
                    # Send the next batch first: the database works on it while these callers wake.
                    source.loop.call_soon(source.resolve, operation, calls, outcomes)
                    returning = callers
                    continue
                if outcomes is not None:
                    source.resolve(operation, calls, outcomes)
                returning = 0
                if callers > 1:
                    # Resolved callers queue their next calls before the next batch is taken.
                    await asyncio.sleep(0)
        finally:
            self._tasks.discard(worker)
            self._abandon(worker)

    def _is_surplus(self) -> bool:
        """Whether there are too few calls for a worker beyond the regular number."""
        extra = len(self._tasks) - self._workers
        return extra > 0 and self._source.queued + self._in_flight_calls <= extra * self._source.max_rows

    def _take_finished(self, worker: asyncio.Task[None]) -> Batch | None:
        """Remove and return the batch that a worker had in flight."""
        if batch := self._in_flight.pop(worker, None):
            self._in_flight_calls -= count_callers(batch[1])
        return batch

    def _abandon(self, worker: asyncio.Task[None]) -> None:
        """Abandon the batch of a worker that was cancelled while it was in flight."""
        if batch := self._take_finished(worker):
            self._source.abandon(*batch)

    async def _run(
        self, operation: BatchedOperation[Any, Any], calls: list[PendingCall]
    ) -> Sequence[Any] | None:
        """The outcome of each call; None when the calls were resolved in parts."""
        outcomes: Sequence[Any]
        try:
            outcomes = await operation.run([call.item for call in calls])
            if len(outcomes) != len(calls):
                raise RuntimeError(
                    f"{operation.name} returned {len(outcomes)} outcomes for {len(calls)} calls"
                )
        except BatchError as error:
            if len(calls) > 1:
                middle = len(calls) // 2
                for part in (calls[:middle], calls[middle:]):
                    # Resolve each part at once: a cancelled worker abandons only the unresolved calls.
                    if (results := await self._run(operation, part)) is not None:
                        self._source.resolve(operation, part, results)
                return None
            outcomes = [error.cause]
        except Exception as error:  # noqa: BLE001 - each caller gets it
            outcomes = [error, *(copy_exception(error) for _ in calls[1:])]
        return outcomes
