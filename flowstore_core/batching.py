"""Coalescing: concurrent calls gather while the database is busy and go out together.

A database answers one statement of a hundred rows far sooner than a hundred statements. So while every
lane (a connection, a writer thread) is busy, calls of one method gather; the moment one is free, what
has gathered goes out as one batch, and each caller gets its own row's answer. There is no timer and no
added delay: a call that finds a lane free leaves alone, at once.

A backend makes one Batcher per store and one Method for each kind of call::

    batcher = Batcher(lanes=2)
    claim = batcher.method("try_claim_step", run_claims, keyed=True)
    won = await claim.call((run_id, step_key), row)

What it keeps, whatever the backend:

- a call returns after its batch was written, never before;
- two calls with one key never meet in one batch of a keyed method, unless ``share`` answers the second
  from the first's answer;
- an error in one row stays with its caller: ``run`` returns it in its place, or raises BatchError, and
  the batch is halved until the row stands alone;
- a cancelled caller leaves the batch as it is: a call that was not sent never happens, and what a sent
  one wins is given back (CON-4);
- the queue is bounded in length and in time: callers wait, and then get StoreUnavailableError.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextvars import Context
from typing import Any, Generic, TypeVar

from flowstore_core.errors import OutcomeUnknownError, StoreClosedError, StoreUnavailableError

I = TypeVar("I")  # noqa: E741 - an item
R = TypeVar("R")

LARGEST_BATCH = 256
"""Rows in one batch, at most."""
WORTH_SPLITTING = 64
"""From this many waiting calls on, two free lanes take half each."""
CAPACITY = 10_000
"""Calls that may wait in a queue; further callers wait for a place."""
PATIENCE_SECONDS = 10.0

AGAIN: Any = object()
"""The outcome of a call that has to be sent again: ``run`` did not come to it, or ``share`` cannot tell."""

_log = logging.getLogger("flowstore_core")


class BatchError(Exception):
    """Nothing of the batch happened, and one row may be the reason: the parts are to be tried."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause
        """What the caller of a row that fails alone gets."""


class _Call:
    """One call on its way."""

    __slots__ = ("followers", "give_back", "item", "key", "order", "outcome", "since")

    def __init__(
        self,
        key: Hashable,
        item: Any,
        outcome: asyncio.Future[Any],
        give_back: Callable[[Any], Awaitable[None]] | None,
        order: int,
        since: float,
    ) -> None:
        self.key = key
        self.item = item
        self.outcome = outcome
        self.give_back = give_back
        self.order = order
        self.since = since
        self.followers: list[_Call] | None = None
        """Calls with the same key that hope to be answered from this one's answer."""


class Method(Generic[I, R]):
    """One kind of call, whose concurrent calls share batches; made by Batcher.method."""

    def __init__(
        self,
        batcher: Batcher,
        name: str,
        run: Callable[[Sequence[I]], Awaitable[Sequence[R | Exception]]],
        keyed: bool,
        share: Callable[[I, R, I], R | Exception] | None,
    ) -> None:
        self.name = name
        self.run = run
        self.keyed = keyed
        self.share = share
        self.queue: deque[_Call] = deque()
        self._batcher = batcher

    async def call(
        self, key: Hashable, item: I, give_back: Callable[[R], Awaitable[None]] | None = None
    ) -> R:
        """Send an item with the next batch and return its own outcome.

        When the caller is cancelled after the item was sent, ``give_back`` gets the outcome, to undo
        what nobody will hear of.

        Raises what ``run`` answered for the item; StoreUnavailableError when it was not sent within the
        batcher's patience (it never happened); StoreClosedError.
        """
        batcher = self._batcher
        if (batcher.closing or batcher.waiting >= batcher.capacity) and not batcher.is_giving_back():
            await batcher.wait_for_place()
        outcome = batcher.loop.create_future()
        call = _Call(key, item, outcome, give_back, batcher.next_order(), batcher.loop.time())
        self.queue.append(call)
        batcher.notice()
        try:
            return await outcome  # type: ignore[no-any-return]
        except asyncio.CancelledError:
            # A future that was answered at the same moment has its outcome; else it is cancelled with
            # its caller, and whoever comes to answer it gives back.
            if outcome.done() and not outcome.cancelled() and outcome.exception() is None:
                batcher.give_back(call, outcome.result())
            raise


class Batcher:
    """The queues of one store, and the lanes that serve them; belongs to one event loop.

    One scheduler for all methods: whoever has waited longest goes first, with all that its method has
    gathered. ``lanes`` is how many batches may be on their way at once; ``patience`` is in seconds, and
    ``advice`` ends the message of the error that follows it.
    """

    def __init__(
        self,
        *,
        lanes: int,
        largest: int = LARGEST_BATCH,
        capacity: int = CAPACITY,
        patience: float = PATIENCE_SECONDS,
        advice: str = "send fewer calls at once",
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.capacity = capacity
        self.waiting = 0
        self.closing = False
        self._lanes = lanes
        self._largest = largest
        self._patience = patience
        self._advice = advice
        self._methods: list[Method[Any, Any]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle: list[asyncio.Future[None]] = []
        self._busy = 0
        self._giving_back: set[asyncio.Task[None]] = set()
        self._order = 0
        self._places: deque[asyncio.Future[None]] = deque()
        self._sweeper: asyncio.TimerHandle | None = None

    def method(
        self,
        name: str,
        run: Callable[[Sequence[I]], Awaitable[Sequence[R | Exception]]],
        *,
        keyed: bool = False,
        share: Callable[[I, R, I], R | Exception] | None = None,
    ) -> Method[I, R]:
        """A kind of call.

        ``run`` writes a batch and returns an outcome for each item, in order: a result, the exception
        that its caller gets, or AGAIN for one that it did not come to. It is not cancelled with any
        caller. With ``keyed``, items of one key never meet in a batch: the later waits for the next
        one, or, with ``share``, for the answer of the first: ``share(first item, its result, later
        item)`` gives the later one's outcome, or AGAIN to have it sent.
        """
        made: Method[I, R] = Method(self, name, run, keyed, share)
        self._methods.append(made)
        return made

    def next_order(self) -> int:
        self._order += 1
        return self._order

    def notice(self) -> None:
        """A call was queued: wake a lane that is free."""
        self.waiting += 1
        if self._sweeper is None:
            self._sweeper = self.loop.call_later(self._patience, self._sweep)
        self._wake()

    def _wake(self) -> None:
        if self._idle:
            lane = self._idle.pop()
            if not lane.done():
                lane.set_result(None)
        else:
            self._open_lane()

    def _open_lane(self) -> None:
        if len(self._tasks) < self._lanes:
            # In an empty context: a lane must not carry the first caller's variables to all others.
            task = self.loop.create_task(self._serve(), context=Context())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def is_giving_back(self) -> bool:
        """Whether the running task undoes what a cancelled call has won: it may go on while closing."""
        return asyncio.current_task() in self._giving_back

    async def wait_for_place(self) -> None:
        """Wait until the queue is shorter than its capacity."""
        deadline = self.loop.time() + self._patience
        while self.waiting >= self.capacity and not self.closing:
            place: asyncio.Future[None] = self.loop.create_future()
            self._places.append(place)
            try:
                await asyncio.wait_for(place, deadline - self.loop.time())
            except TimeoutError:
                raise self._too_slow(f"{self.capacity} calls were waiting") from None
        if self.closing:
            raise StoreClosedError

    def _too_slow(self, what: str) -> StoreUnavailableError:
        return StoreUnavailableError(
            f"{what} for {self._patience:g} s and the database did not keep up; {self._advice}"
        )

    def _sweep(self) -> None:
        """Answer the calls that have waited too long to be sent."""
        self._sweeper = None
        now = self.loop.time()
        oldest = now
        for method in self._methods:
            while method.queue and method.queue[0].since <= now - self._patience:
                self._settle(method.queue.popleft(), self._too_slow("the call waited"))
                self._leave_queue(1)
            if method.queue:
                oldest = min(oldest, method.queue[0].since)
        if self.waiting:
            self._sweeper = self.loop.call_at(oldest + self._patience, self._sweep)
            # Somebody who cancels every task of the loop cancels lanes too.
            self._open_lane()

    def _leave_queue(self, count: int, *, wake: int | None = None) -> None:
        self.waiting -= count
        free = count if wake is None else wake
        while self._places and free:
            place = self._places.popleft()
            if not place.done():
                place.set_result(None)
                free -= 1

    async def _serve(self) -> None:
        """One lane: send batch after batch until the store is closed and nothing is left."""
        while True:
            method = min((m for m in self._methods if m.queue), key=_head, default=None)
            if method is not None:
                if calls := self._take(method):
                    self._busy += 1
                    try:
                        await self._run(method, calls)
                    finally:
                        self._busy -= 1
                    # Whoever was answered queues its next call before the next batch is made up.
                    await asyncio.sleep(0)
            elif self.closing:
                return
            else:
                idle: asyncio.Future[None] = self.loop.create_future()
                self._idle.append(idle)
                await idle

    def _take(self, method: Method[Any, Any]) -> list[_Call]:
        """The calls of the next batch, out of their queue."""
        queue = method.queue
        length = len(queue)
        largest = self._largest
        if length >= WORTH_SPLITTING and self._busy < self._lanes - 1:
            largest = min(largest, (length + 1) // 2)
        if length <= largest and not method.keyed:
            # All of them, but for those that were cancelled before they were sent: they never happen.
            whole = [call for call in queue if not call.outcome.done()]
            queue.clear()
            self._leave_queue(length)
            return whole
        batch: list[_Call] = []
        later: list[_Call] = []
        firsts: dict[Hashable, _Call] = {}
        while queue and len(batch) < largest and len(later) < largest:
            call = queue.popleft()
            if call.outcome.done():
                # Cancelled before it was sent: it never happens.
                continue
            if method.keyed:
                first = firsts.setdefault(call.key, call)
                if first is not call:
                    if method.share is None:
                        later.append(call)
                    else:
                        if first.followers is None:
                            first.followers = []
                        first.followers.append(call)
                    continue
            batch.append(call)
        queue.extendleft(reversed(later))
        self._leave_queue(length - len(queue))
        return batch

    async def _run(self, method: Method[Any, Any], calls: list[_Call]) -> None:
        outcomes: Sequence[Any]
        try:
            outcomes = await method.run([call.item for call in calls])
            if len(outcomes) != len(calls):
                raise RuntimeError(f"{method.name} gave {len(outcomes)} outcomes for {len(calls)} calls")
        except BatchError as error:
            if len(calls) > 1:
                middle = len(calls) // 2
                await self._run(method, calls[:middle])
                await self._run(method, calls[middle:])
                return
            outcomes = [error.cause]
        except Exception as error:  # noqa: BLE001 - not swallowed: each caller gets it
            outcomes = [error for _ in calls]
        except asyncio.CancelledError:
            for call in calls:
                for one in (call, *(call.followers or ())):
                    self._settle(one, OutcomeUnknownError(method.name))
            raise
        self._answer(method, calls, outcomes)

    def _answer(self, method: Method[Any, Any], calls: Sequence[_Call], outcomes: Sequence[Any]) -> None:
        again: list[_Call] = []
        for call, outcome in zip(calls, outcomes, strict=True):
            if outcome is AGAIN:
                again.append(call)
                again.extend(call.followers or ())
                call.followers = None
                continue
            if isinstance(outcome, Exception) or call.outcome.done():
                self._settle(call, outcome)
            else:
                call.outcome.set_result(outcome)
            if call.followers is not None:
                self._answer_followers(method, call, outcome)
        self._queue_again(method, again)

    def _answer_followers(self, method: Method[Any, Any], first: _Call, outcome: Any) -> None:
        followers, first.followers = first.followers or [], None
        again: list[_Call] = []
        for call in followers:
            if call.outcome.done():
                continue
            answer = AGAIN
            if method.share is not None and not isinstance(outcome, Exception):
                answer = method.share(first.item, outcome, call.item)
            if answer is AGAIN:
                again.append(call)
            else:
                self._settle(call, answer)
        self._queue_again(method, again)

    def _queue_again(self, method: Method[Any, Any], calls: list[_Call]) -> None:
        # In front: they have waited longest.
        method.queue.extendleft(reversed(calls))
        for _ in calls:
            self.notice()

    def _settle(self, call: _Call, outcome: Any) -> None:
        if call.outcome.done():
            if not isinstance(outcome, Exception):
                self.give_back(call, outcome)
        elif isinstance(outcome, Exception):
            call.outcome.set_exception(outcome)
        else:
            call.outcome.set_result(outcome)

    def give_back(self, call: _Call, outcome: Any) -> None:
        """Undo what a cancelled call has won."""
        if call.give_back is not None:
            task = self.loop.create_task(_undo(call.give_back(outcome)))
            self._giving_back.add(task)
            task.add_done_callback(self._giving_back.discard)

    def _unfinished(self) -> set[asyncio.Future[None]]:
        return {*self._tasks, *self._giving_back}

    async def drain(self, seconds: float) -> None:
        """Take no further call, wait, bounded, until all that were taken are answered, and stop.

        A call that could not be sent in time gets StoreClosedError, one that was sent and not answered
        OutcomeUnknownError.
        """
        self.closing = True
        deadline = self.loop.time() + seconds
        self._leave_queue(0, wake=len(self._places))
        if self.waiting:
            self._open_lane()
        for idle in self._idle:
            if not idle.done():
                idle.set_result(None)
        self._idle.clear()
        # Giving back may queue calls of its own, which the lanes have to serve, hence the loop.
        while (unfinished := self._unfinished()) and (left := deadline - self.loop.time()) > 0:
            await asyncio.wait(unfinished, timeout=left)
        if self._sweeper is not None:
            self._sweeper.cancel()
        rest = [call for method in self._methods for call in method.queue]
        for method in self._methods:
            method.queue.clear()
        for call in rest:
            self._settle(call, StoreClosedError())
        unfinished = self._unfinished()
        if rest or unfinished:
            _log.warning("closing after %.1f s with %d calls not sent", seconds, len(rest))
        for task in unfinished:
            task.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)


def _head(method: Method[Any, Any]) -> int:
    return method.queue[0].order


async def _undo(giving_back: Awaitable[None]) -> None:
    try:
        await giving_back
    except Exception:  # noqa: BLE001 - see below
        # The caller is gone, so the log is the only place left to say it; the store's own errors
        # hold no secret.
        _log.warning("a cancelled call could not give back what it had won", exc_info=True)
