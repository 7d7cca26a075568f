"""The scheduler of one store: it selects the next calls to send and forms batches of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextvars import Context
from itertools import islice
from operator import attrgetter
from typing import Any, TypeVar

from flowstore_core.batching.call import REQUEUE, PendingCall, Transfer, coalesced_results
from flowstore_core.batching.queue import BatchedOperation
from flowstore_core.batching.slots import SlotQueue
from flowstore_core.batching.task_worker import TaskWorkers
from flowstore_core.batching.workers import GRACE_SECONDS, Batch, BatchWorkers
from flowstore_core.errors import OutcomeUnknownError, StoreClosedError, StoreUnavailableError
from flowstore_core.instrumentation import NO_OBSERVERS, Observers, Resolution, report_batch
from flowstore_core.shielding import ShieldedTasks

I = TypeVar("I")  # noqa: E741 - an item
R = TypeVar("R")

MAX_BATCH_ROWS = 256
"""Maximum number of rows in a batch."""
SPLIT_THRESHOLD = 64
"""With this many calls or more, two free workers take half of them each."""
HOLDBACK_THRESHOLD = 128
"""With this many calls or more, each takes a third: the last third waits for the first worker to return."""
MAX_BATCH_BYTES = 4 * 1024 * 1024
"""Maximum size of a batch in bytes, as ``size_of`` measures it; a single larger row is still sent."""
MAX_QUEUED = 10_000
"""Maximum number of queued calls; further callers wait for a slot."""
QUEUE_TIMEOUT = 10.0
ABANDON_DELAY = 0.5
"""Seconds between the end of a cancelled worker and the compensation of its cancelled calls."""

_log = logging.getLogger("flowstore_core")
_key = attrgetter("key")


class Batcher:
    """The queues of one store and the workers that serve them; belongs to one event loop.

    One scheduler serves all operations: the call that has waited longest goes first, with all the calls
    that its operation has queued.

    ``workers`` is the number of batches that may be in flight at once, or a factory of a different kind of
    workers. ``max_rows`` bounds a batch, ``max_queued`` the queue. A call that is not sent within
    ``queue_timeout`` seconds fails with an error that ends with ``timeout_hint``. Each batch is reported
    to ``observers``, and to ``log`` at debug level.
    """

    def __init__(
        self,
        *,
        workers: int | Callable[[Batcher], BatchWorkers],
        max_rows: int = MAX_BATCH_ROWS,
        max_queued: int = MAX_QUEUED,
        queue_timeout: float = QUEUE_TIMEOUT,
        timeout_hint: str = "send fewer calls at once",
        observers: Observers = NO_OBSERVERS,
        log: logging.Logger = _log,
    ) -> None:
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self.time: Callable[[], float] = self.loop.time
        self.slots: SlotQueue = SlotQueue(max_queued)
        self.closing: bool = False
        self.max_rows: int = max_rows
        self._queue_timeout = queue_timeout
        self._timeout_hint = timeout_hint
        self._observers = observers
        self._batch_log = log
        self._operations: list[BatchedOperation[Any, Any]] = []
        self._direct_call: asyncio.Future[None] | None = None
        """Done when the caller that holds the direct slot releases it."""
        self._compensations = ShieldedTasks()
        self._stopped = False
        self._sweeper: asyncio.TimerHandle | None = None
        self._workers: BatchWorkers = (
            TaskWorkers(self, workers) if isinstance(workers, int) else workers(self)
        )
        self._wake_worker = self._workers.wake

    def operation(
        self,
        name: str,
        run: Callable[[Sequence[I]], Awaitable[Sequence[R | Exception]]]
        | Callable[[Sequence[PendingCall]], Sequence[R | Exception]],
        *,
        keyed: bool = False,
        coalesce: Callable[[I, R, I], R | Exception] | None = None,
        size_of: Callable[[I], int] | None = None,
        ordered: bool = False,
        decode: Callable[[I, Any], R] | None = None,
    ) -> BatchedOperation[I, R]:
        """Add a kind of call.

        ``run`` writes a batch and returns an outcome for each item, in order: a result, the exception
        that its caller gets, or REQUEUE for an item that it did not reach. Cancelling a caller does not
        cancel it.

        With ``keyed``, items with the same key never share a batch: the later one waits for the next
        batch or, with ``coalesce``, for the outcome of the first. ``coalesce(first item, its outcome,
        later item)`` returns the outcome of the later one, or REQUEUE to have it sent.

        ``size_of`` returns the size of an item in bytes where it may be large, so that MAX_BATCH_BYTES
        bounds a batch. With ``ordered`` the items of a batch are sorted by key. ``decode(item, outcome)``
        turns an outcome into the caller's result, or raises; ``coalesce`` and ``on_abandoned`` see the
        outcome itself.
        """
        made: BatchedOperation[I, R] = BatchedOperation(
            self,
            name,
            run,
            keyed=keyed,
            coalesce=coalesce,
            size_of=size_of,
            ordered=ordered,
            decode=decode,
        )
        self._operations.append(made)
        return made

    def wake(self) -> None:
        """A call was queued: start a worker unless a running one will check the queues anyway."""
        if self._sweeper is None:
            self._sweeper = self.loop.call_later(self._queue_timeout, self._sweep, context=Context())
        self._wake_worker()

    def acquire_direct_slot(self) -> bool:
        """Whether the caller may send its call itself, in its own task: only while the Batcher is idle.

        A caller that gets True must call ``release_direct_slot``.
        """
        if self.is_idle:
            self._direct_call = self.loop.create_future()
            return True
        return False

    @property
    def is_idle(self) -> bool:
        """Whether no call is queued or in flight."""
        return not (
            self.slots.in_use or self._workers.pending() or self._direct_call is not None or self.closing
        )

    def release_direct_slot(self) -> None:
        if self._direct_call is not None and not self._direct_call.done():
            self._direct_call.set_result(None)
        self._direct_call = None
        if self.slots.in_use:
            self._wake_worker()

    @property
    def direct_in_use(self) -> int:
        """1 while a caller holds the direct slot, else 0."""
        return 0 if self._direct_call is None else 1

    @property
    def queued(self) -> int:
        """The number of queued calls, including callers that were just granted a slot."""
        return self.slots.in_use

    async def wait_for_slot(self, queued_at: float) -> None:
        """Acquire a slot in the queue, at most until the queue timeout."""
        if self._compensations.is_current():
            # Compensation may continue while the store is closing.
            self.slots.in_use += 1
            return
        if not self.closing:
            try:
                await self.slots.acquire(queued_at + self._queue_timeout)
            except TimeoutError:
                raise self._timed_out(f"{self.slots.capacity} calls were queued") from None
            if not self.closing:
                return
            self.slots.release(1)
        raise StoreClosedError

    def _timed_out(self, what: str) -> StoreUnavailableError:
        return StoreUnavailableError(
            f"{what} for {self._queue_timeout:g} s and the database did not keep up; {self._timeout_hint}"
        )

    def _sweep(self) -> None:
        """Fail the calls that have been queued too long."""
        self._sweeper = None
        now = self.time()
        oldest = now
        for operation in self._operations:
            queue = operation.queue
            while queue and (queue[0].future.done() or queue[0].queued_at + self._queue_timeout <= now):
                self._settle(queue.popleft(), self._timed_out("the call waited"))
                self.slots.release(1)
            if queue:
                oldest = min(oldest, queue[0].queued_at)
        if self.queued:
            self._sweeper = self.loop.call_at(oldest + self._queue_timeout, self._sweep)

    def has_calls(self) -> bool:
        """Whether a caller still waits for a queued call."""
        return any(not call.future.done() for operation in self._operations for call in operation.queue)

    def next_batch(self, workers: int = 1, in_flight: int = 0) -> Batch | None:
        """Take the next batch from the queues; see BatchSource."""
        while True:
            first: BatchedOperation[Any, Any] | None = None
            for operation in self._operations:
                if operation.queue and (
                    first is None or operation.queue[0].queued_at < first.queue[0].queued_at
                ):
                    first = operation
            if first is None:
                return None
            if calls := self._take(first, workers, in_flight):
                if first.ordered:
                    calls.sort(key=_key)
                return first, calls

    def _take(self, operation: BatchedOperation[Any, Any], workers: int, in_flight: int) -> list[PendingCall]:
        queue = operation.queue
        length = len(queue)
        # Coalesced callers do not count towards the batch size.
        limit = self.max_rows if operation.coalesce is None else length
        outstanding = self.queued + in_flight
        if workers > 1 and outstanding >= SPLIT_THRESHOLD:
            # Otherwise one worker would take nearly all calls, and a lock that it waits for would delay
            # them all. Above the second threshold some calls stay queued while every worker is busy, so
            # that a returning worker has a batch at once.
            workers += outstanding >= HOLDBACK_THRESHOLD
            limit = min(limit, -(-outstanding // workers))
        now = self.time()
        batch = self._take_fast_path(operation, limit, now)
        if batch is None:
            batch = self._take_general(operation, limit, now)
        self.slots.release(length - len(queue))
        if batch and (self._observers or self._batch_log.isEnabledFor(logging.DEBUG)):
            self._report(operation, batch, now)
        return batch

    def _take_fast_path(
        self, operation: BatchedOperation[Any, Any], limit: int, now: float
    ) -> list[PendingCall] | None:
        """The common case: no call has timed out and everything fits. None where that does not hold."""
        queue = operation.queue
        if queue[0].queued_at + self._queue_timeout <= now:
            return None
        if len(queue) == 1 and not queue[0].future.done():
            # A lone call pays for this path in latency.
            return [queue.popleft()]
        head = list(islice(queue, limit))
        # A call that was cancelled before it was sent never happens.
        batch = [call for call in head if not call.future.done()]
        repeated: list[PendingCall] = []
        if operation.keyed:
            firsts = {call.key: call for call in reversed(batch)}
            if len(firsts) < len(batch):
                if operation.coalesce is None:
                    return None
                repeated = [call for call in batch if firsts[call.key] is not call]
                batch = [call for call in batch if firsts[call.key] is call]
        if len(batch) > self.max_rows or (
            operation.size_of is not None
            and sum(operation.size_of(call.item) for call in batch) > MAX_BATCH_BYTES
        ):
            return None
        for call in repeated:
            firsts[call.key].coalesce_with(call)
        for _ in head:
            queue.popleft()
        return batch

    def _take_general(
        self, operation: BatchedOperation[Any, Any], limit: int, now: float
    ) -> list[PendingCall]:
        """The slow path: timeouts, repeated keys and large rows, one call at a time."""
        queue = operation.queue
        size = 0
        batch: list[PendingCall] = []
        later: list[PendingCall] = []
        firsts: dict[Hashable, PendingCall] = {}
        while queue and len(batch) < self.max_rows and len(later) < self.max_rows and limit > 0:
            call = queue.popleft()
            if call.future.done():
                continue
            if call.queued_at + self._queue_timeout <= now:
                self._settle(call, self._timed_out("the call waited"))
                continue
            if operation.keyed:
                first = firsts.setdefault(call.key, call)
                if first is not call:
                    if operation.coalesce is None:
                        later.append(call)
                    else:
                        first.coalesce_with(call)
                        limit -= 1
                    continue
            if operation.size_of is not None:
                size += operation.size_of(call.item)
                if size > MAX_BATCH_BYTES and batch:
                    queue.appendleft(call)
                    break
            batch.append(call)
            limit -= 1
        queue.extendleft(reversed(later))
        return batch

    def _report(
        self, operation: BatchedOperation[Any, Any], batch: Sequence[PendingCall], now: float
    ) -> None:
        waited = now - min(call.queued_at for call in batch)
        report_batch(self._observers, self._batch_log, operation.name, len(batch), waited)

    def resolve(
        self, operation: BatchedOperation[Any, Any], calls: Sequence[PendingCall], outcomes: Sequence[Any]
    ) -> None:
        """Hand each call its outcome, in order; REQUEUE returns it to the front of its queue."""
        requeued: list[PendingCall] = []
        for call, outcome in zip(calls, outcomes, strict=True):
            if outcome is REQUEUE:
                requeued.append(call)
            elif type(outcome) is Transfer:
                for one in (call, *(call.coalesced or ())):
                    outcome.to(one)
                call.coalesced = None
            elif isinstance(outcome, Exception) or call.future.done():
                self._settle(call, outcome)
            else:
                call.future.set_result(outcome)
            if call.coalesced is not None:
                coalesced, call.coalesced = call.coalesced, None
                results = coalesced_results(operation.coalesce, call, outcome, coalesced)
                for later, result in zip(coalesced, results, strict=True):
                    if result is REQUEUE:
                        requeued.append(later)
                    elif later.future.done():
                        continue
                    elif isinstance(result, Exception):
                        later.future.set_exception(result)
                    else:
                        later.future.set_result(result)
        if requeued:
            self._requeue(operation, requeued)

    def abandon(self, operation: BatchedOperation[Any, Any], calls: Sequence[PendingCall]) -> None:
        """Fail the calls of a batch whose outcome will never be known with OutcomeUnknownError."""
        coalesced = [one for call in calls for one in call.coalesced or ()]
        # They were not sent. When the loop is ending they are cancelled, and no worker must start.
        self._requeue(operation, [one for one in coalesced if not one.future.done()])
        if self._observers:
            self._observers.outcome_unknown(operation.name, Resolution.UNKNOWN, len(calls))
        for call in calls:
            call.coalesced = None
            error = OutcomeUnknownError(operation.name)
            if call.future.cancelled():
                # Delayed, because no task must start in a loop that is ending.
                self.loop.call_later(ABANDON_DELAY, self._compensate_abandoned, call, error)
            else:
                self._settle(call, error)

    def _compensate_abandoned(self, call: PendingCall, error: OutcomeUnknownError) -> None:
        if not self._stopped:
            self.compensate(call, error)

    def _requeue(self, operation: BatchedOperation[Any, Any], calls: list[PendingCall]) -> None:
        # At the front: they have waited longest.
        operation.queue.extendleft(reversed(calls))
        self.slots.in_use += len(calls)
        for _ in calls:
            self.wake()

    def _settle(self, call: PendingCall, outcome: Any) -> None:
        if call.future.cancelled():
            self.compensate(call, outcome)
        elif call.future.done():
            return
        elif isinstance(outcome, Exception):
            call.future.set_exception(outcome)
        else:
            call.future.set_result(outcome)

    def compensate(self, call: PendingCall, outcome: Any) -> None:
        """Start the compensation of a cancelled call. A call that failed had no effect and needs none."""
        if call.on_abandoned is not None and (
            not isinstance(outcome, Exception) or isinstance(outcome, OutcomeUnknownError)
        ):
            self.start_compensation(call.on_abandoned, outcome)

    def start_compensation(
        self,
        on_abandoned: Callable[[R | OutcomeUnknownError], Awaitable[None]],
        outcome: R | OutcomeUnknownError,
    ) -> None:
        """Start ``on_abandoned(outcome)``. It is retried until it succeeds; ``drain`` waits for it."""
        if self._stopped:
            # A task that starts now would outlive the store.
            _log.warning("the store was closed before a cancelled call was compensated for")
            return
        self._compensations.compensate(on_abandoned, outcome)

    def _unfinished(self) -> set[asyncio.Future[Any]]:
        direct = () if self._direct_call is None else (self._direct_call,)
        return {*self._workers.pending(), *self._compensations.tasks, *direct}

    async def drain(self, seconds: float) -> None:
        """Refuse further calls, wait until every accepted call is resolved, and stop the workers.

        After ``seconds`` a call that was not sent fails with StoreClosedError, a call that was sent
        and has no outcome with OutcomeUnknownError.
        """
        self.closing = True
        self._compensations.hasten()
        deadline = self.time() + seconds
        # Callers that wait for a slot wake, see that the Batcher is closing, and release it.
        self.slots.open_all()
        if self.queued:
            self._wake_worker()
        try:
            # A compensation may queue further calls, which the workers have to serve, hence the loop.
            while (unfinished := self._unfinished()) and (left := deadline - self.time()) > 0:
                await asyncio.wait(unfinished, timeout=left)
        finally:
            self._stopped = True
            if self._sweeper is not None:
                self._sweeper.cancel()
            if (not_sent := self._refuse_queued()) or self._unfinished():
                _log.warning(
                    "closing after %.1f s with %d calls not sent",
                    seconds,
                    not_sent,
                    extra={"flowstore.wait_seconds": seconds, "flowstore.calls": not_sent},
                )
            for task in (unfinished_compensations := set(self._compensations.tasks)):
                task.cancel()
            await self._workers.stop()
            if unfinished_compensations:
                await asyncio.wait(unfinished_compensations, timeout=GRACE_SECONDS)
            self._refuse_queued()

    def _refuse_queued(self) -> int:
        rest = [call for operation in self._operations for call in operation.queue]
        for operation in self._operations:
            operation.queue.clear()
        self.slots.release(len(rest))
        for call in rest:
            self._settle(call, StoreClosedError())
        return len(rest)
