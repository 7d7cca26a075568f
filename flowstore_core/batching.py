"""Coalescing: concurrent calls gather while the database is busy and go out together.

A database answers one statement of a hundred rows far sooner than a hundred statements. So while every
lane (a connection, a writer thread) is busy, calls of one method gather; the moment one is free, what
has gathered goes out as one batch, and each caller gets its own row's answer. There is no timer and no
added delay: a call that finds a lane free leaves alone, at once.

A backend makes one Batcher per store and one Method for each kind of call; the lanes are tasks, or what
flowstore_core.lanes.Lanes describes::

    batcher = Batcher(lanes=2)
    claim = batcher.method("try_claim_step", run_claims, keyed=True)
    won = await claim.call((run_id, step_key), row)

What it keeps, whatever the backend:

- a call returns after its batch was written, never before; so one caller's calls happen in its order.
  No order is promised among concurrent callers, of one key either: two lanes may carry the same key;
- two calls with one key never meet in one batch of a keyed method, unless ``share`` answers the second
  from the first's answer;
- an error in one row stays with its caller: ``run`` returns it in its place, or raises BatchError, and
  the batch is halved until the row stands alone;
- a cancelled caller leaves the batch as it is: a call that was not sent never happens, and what a sent
  one wins is given back, whatever fails meanwhile (CON-4);
- the queue is bounded in length and in time: callers wait in line, then get StoreUnavailableError.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextvars import Context
from itertools import islice
from operator import attrgetter
from typing import Any, TypeVar

from flowstore_core.calls import AGAIN, BatchError, Call, Elsewhere, shared
from flowstore_core.errors import OutcomeUnknownError, StoreClosedError, StoreUnavailableError
from flowstore_core.inflight import InFlight
from flowstore_core.lanes import GRACE_SECONDS, Lanes, TaskLanes
from flowstore_core.methods import Method
from flowstore_core.observing import NOBODY, Observers, Resolution, report_batch
from flowstore_core.places import Places
from flowstore_core.threads import ThreadLane

__all__ = [
    "AGAIN",
    "BatchError",
    "Batcher",
    "Call",
    "Elsewhere",
    "Lanes",
    "Method",
    "TaskLanes",
    "ThreadLane",
]

I = TypeVar("I")  # noqa: E741 - an item
R = TypeVar("R")

LARGEST_BATCH = 256
"""Rows in one batch, at most."""
WORTH_SPLITTING = 64
"""From this many waiting calls on, two free lanes take half each."""
WORTH_WAITING = 128
"""From this many on they take a third each: the last third waits for the lane that comes back first."""
HEAVIEST_BATCH = 4 * 1024 * 1024
"""What rows that are weighed may weigh together; one may weigh more."""
CAPACITY = 10_000
"""Calls that may wait in a queue; further callers wait for a place."""
PATIENCE_SECONDS = 10.0
ABANDONED_SECONDS = 0.5
"""How long after a lane was cancelled the compensation of its cancelled calls begins."""

_log = logging.getLogger("flowstore_core")
_key = attrgetter("key")


class Batcher:
    """The queues of one store, and the lanes that serve them; belongs to one event loop.

    One scheduler for all methods: whoever has waited longest goes first, with all that its method has
    gathered. ``lanes`` is how many batches may be on their way at once, or makes lanes of another kind;
    ``patience`` is in seconds, and ``advice`` ends the message of the error that follows it.
    ``observers`` hear of each batch, and ``log`` at level debug.
    """

    def __init__(
        self,
        *,
        lanes: int | Callable[[Batcher], Lanes],
        largest: int = LARGEST_BATCH,
        capacity: int = CAPACITY,
        patience: float = PATIENCE_SECONDS,
        advice: str = "send fewer calls at once",
        observers: Observers = NOBODY,
        log: logging.Logger = _log,
    ) -> None:
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self.time: Callable[[], float] = self.loop.time
        self.places: Places = Places(capacity)
        self.closing: bool = False
        self.largest: int = largest
        self._patience = patience
        self._advice = advice
        self._observers = observers
        self._batch_log = log
        self._methods: list[Method[Any, Any]] = []
        self._borrower: asyncio.Future[None] | None = None
        """Done when the caller who has borrowed a lane gives it back."""
        self._giving_back = InFlight()
        self._stopped = False
        self._sweeper: asyncio.TimerHandle | None = None
        self._lanes: Lanes = TaskLanes(self, lanes) if isinstance(lanes, int) else lanes(self)
        self._wake = self._lanes.wake

    def method(
        self,
        name: str,
        run: Callable[[Sequence[I]], Awaitable[Sequence[R | Exception]]]
        | Callable[[Sequence[Call]], Sequence[R | Exception]],
        *,
        keyed: bool = False,
        share: Callable[[I, R, I], R | Exception] | None = None,
        weigh: Callable[[I], int] | None = None,
        ordered: bool = False,
        tell: Callable[[I, Any], R] | None = None,
    ) -> Method[I, R]:
        """A kind of call.

        ``run`` writes a batch and returns an outcome for each item, in order: a result, the exception
        that its caller gets, or AGAIN for one that it did not come to. It is not cancelled with any
        caller. With ``keyed``, items of one key never meet in a batch: the later waits for the next
        one, or, with ``share``, for the answer of the first: ``share(first item, its result, later
        item)`` gives the later one's outcome, or AGAIN to have it sent. ``weigh`` tells an item's size
        where it may be large, so that HEAVIEST_BATCH bounds a batch as well. With ``ordered`` the items of
        a batch come in the order of their keys. ``tell(item, outcome)`` makes of an outcome what the
        caller gets, or raises; ``share`` and ``give_back`` see the outcome itself.
        """
        self._methods.append(made := Method(self, name, run, keyed, share, weigh, ordered, tell))
        return made

    def notice(self) -> None:
        """A call was queued: wake a lane if none is coming anyway."""
        if self._sweeper is None:
            self._sweeper = self.loop.call_later(self._patience, self._sweep, context=Context())
        self._wake()

    def borrow_lane(self) -> bool:
        """Whether the caller may send its call itself, in its own task: only while nobody else has one.

        Whoever got True must call return_lane.
        """
        if self.is_idle:
            self._borrower = self.loop.create_future()
            return True
        return False

    @property
    def is_idle(self) -> bool:
        """Nobody has a lane, and nothing waits for one."""
        return not (
            self.places.taken or self._lanes.under_way() or self._borrower is not None or self.closing
        )

    def return_lane(self) -> None:
        if self._borrower is not None and not self._borrower.done():
            self._borrower.set_result(None)
        self._borrower = None
        if self.places.taken:
            self._wake()

    @property
    def borrowed(self) -> int:
        """How many lanes a caller has borrowed."""
        return 0 if self._borrower is None else 1

    @property
    def waiting(self) -> int:
        """Calls in the queues, and callers that were given a place a moment ago."""
        return self.places.taken

    async def wait_for_place(self, since: float) -> None:
        """Take a place in the queue as soon as there is one."""
        if self._giving_back.is_current():
            # It may go on while the store is closing.
            self.places.taken += 1
            return
        if not self.closing:
            try:
                await self.places.take(since + self._patience)
            except TimeoutError:
                raise self._too_slow(f"{self.places.capacity} calls were waiting") from None
            if not self.closing:
                return
            self.places.leave(1)
        raise StoreClosedError

    def _too_slow(self, what: str) -> StoreUnavailableError:
        return StoreUnavailableError(
            f"{what} for {self._patience:g} s and the database did not keep up; {self._advice}"
        )

    def _sweep(self) -> None:
        """Answer the calls that have waited too long to be sent."""
        self._sweeper = None
        now = self.time()
        oldest = now
        for method in self._methods:
            queue = method.queue
            while queue and (queue[0].outcome.done() or queue[0].since + self._patience <= now):
                self._settle(queue.popleft(), self._too_slow("the call waited"))
                self.places.leave(1)
            if queue:
                oldest = min(oldest, queue[0].since)
        if self.waiting:
            self._sweeper = self.loop.call_at(oldest + self._patience, self._sweep)

    def has_calls(self) -> bool:
        """Whether anybody waits for a call that is queued."""
        return any(not call.outcome.done() for method in self._methods for call in method.queue)

    def next_batch(self, lanes: int = 1, under_way: int = 0) -> tuple[Method[Any, Any], list[Call]] | None:
        """For a lane: the calls that it is to send now, out of their queue, or None.

        ``lanes`` is how many share the calls, ``under_way`` how many of these the others have.
        """
        while True:
            first: Method[Any, Any] | None = None
            for method in self._methods:
                if method.queue and (first is None or method.queue[0].since < first.queue[0].since):
                    first = method
            if first is None:
                return None
            if calls := self._take(first, lanes, under_way):
                if first.ordered:
                    calls.sort(key=_key)
                return first, calls

    def _take(self, method: Method[Any, Any], lanes: int, under_way: int) -> list[Call]:
        queue = method.queue
        length = len(queue)
        largest = self.largest
        # Those who hope for the answer to another's call are no rows of the batch.
        most = largest if method.share is None else length
        outstanding = self.waiting + under_way
        if lanes > 1 and outstanding >= WORTH_SPLITTING:
            # Else one lane would gather nearly all callers, and what it waits for would hold up them all.
            # Of many some wait while all lanes are busy, so that a lane that comes back need not.
            lanes += outstanding >= WORTH_WAITING
            most = min(most, -(-outstanding // lanes))
        now = self.time()
        batch = self._take_plain(method, largest, most, now)
        if batch is None:
            batch = self._take_carefully(method, largest, most, now)
        self.places.leave(length - len(queue))
        if batch and (self._observers or self._batch_log.isEnabledFor(logging.DEBUG)):
            self._report(method, batch, now)
        return batch

    def _take_plain(self, method: Method[Any, Any], largest: int, most: int, now: float) -> list[Call] | None:
        """The common case, quickly: nobody is late, and what waits may all go. None where it is another."""
        queue = method.queue
        if queue[0].since + self._patience <= now:
            return None
        if len(queue) == 1 and not queue[0].outcome.done():
            # Nothing to weigh up: where a call takes a trip of its own, what comes before it counts.
            return [queue.popleft()]
        some = list(islice(queue, most))
        # Those that were cancelled before they were sent never happen.
        batch = [call for call in some if not call.outcome.done()]
        followers: list[Call] = []
        if method.keyed:
            firsts = {call.key: call for call in reversed(batch)}
            if len(firsts) < len(batch):
                if method.share is None:
                    return None
                followers = [call for call in batch if firsts[call.key] is not call]
                batch = [call for call in batch if firsts[call.key] is call]
        if len(batch) > largest or (
            method.weigh is not None and sum(method.weigh(call.item) for call in batch) > HEAVIEST_BATCH
        ):
            return None
        for call in followers:
            firsts[call.key].follow(call)
        for _ in some:
            queue.popleft()
        return batch

    def _take_carefully(self, method: Method[Any, Any], largest: int, most: int, now: float) -> list[Call]:
        queue = method.queue
        weight = 0
        batch: list[Call] = []
        later: list[Call] = []
        firsts: dict[Hashable, Call] = {}
        while queue and len(batch) < largest and len(later) < largest and most > 0:
            call = queue.popleft()
            if call.outcome.done():
                continue
            if call.since + self._patience <= now:
                self._settle(call, self._too_slow("the call waited"))
                continue
            if method.keyed:
                first = firsts.setdefault(call.key, call)
                if first is not call:
                    if method.share is None:
                        later.append(call)
                    else:
                        first.follow(call)
                        most -= 1
                    continue
            if method.weigh is not None:
                weight += method.weigh(call.item)
                if weight > HEAVIEST_BATCH and batch:
                    queue.appendleft(call)
                    break
            batch.append(call)
            most -= 1
        queue.extendleft(reversed(later))
        return batch

    def _report(self, method: Method[Any, Any], batch: Sequence[Call], now: float) -> None:
        waited = now - min(call.since for call in batch)
        report_batch(self._observers, self._batch_log, method.name, len(batch), waited)

    def answer(self, method: Method[Any, Any], calls: Sequence[Call], outcomes: Sequence[Any]) -> None:
        """For a lane: give each call its outcome, in order; AGAIN puts it in front of its queue."""
        again: list[Call] = []
        for call, outcome in zip(calls, outcomes, strict=True):
            if outcome is AGAIN:
                again.append(call)
            elif type(outcome) is Elsewhere:
                for one in (call, *(call.followers or ())):
                    outcome.take(one)
                call.followers = None
            elif isinstance(outcome, Exception) or call.outcome.done():
                self._settle(call, outcome)
            else:
                call.outcome.set_result(outcome)
            if call.followers is not None:
                followers, call.followers = call.followers, None
                for follower, answer in zip(
                    followers, shared(method.share, call, outcome, followers), strict=True
                ):
                    if answer is AGAIN:
                        again.append(follower)
                    elif follower.outcome.done():
                        continue
                    elif isinstance(answer, Exception):
                        follower.outcome.set_exception(answer)
                    else:
                        follower.outcome.set_result(answer)
        if again:
            self._queue_again(method, again)

    def lose(self, method: Method[Any, Any], calls: Sequence[Call]) -> None:
        """For a lane that will never know what became of a batch: tell its callers so."""
        followers = [one for call in calls for one in call.followers or ()]
        # They were not sent. Where the loop is ending they are cancelled, and no lane must open.
        self._queue_again(method, [one for one in followers if not one.outcome.done()])
        if self._observers:
            self._observers.outcome_unknown(method.name, Resolution.UNKNOWN, len(calls))
        for call in calls:
            call.followers = None
            error = OutcomeUnknownError(method.name)
            if call.outcome.cancelled():
                # Not at once: if the loop is ending, it must not meet a new task.
                self.loop.call_later(ABANDONED_SECONDS, self._compensate_abandoned, call, error)
            else:
                self._settle(call, error)

    def _compensate_abandoned(self, call: Call, error: OutcomeUnknownError) -> None:
        if not self._stopped:
            self.give_back(call, error)

    def _queue_again(self, method: Method[Any, Any], calls: list[Call]) -> None:
        # In front: they have waited longest.
        method.queue.extendleft(reversed(calls))
        self.places.taken += len(calls)
        for _ in calls:
            self.notice()

    def _settle(self, call: Call, outcome: Any) -> None:
        if call.outcome.cancelled():
            self.give_back(call, outcome)
        elif call.outcome.done():
            return
        elif isinstance(outcome, Exception):
            call.outcome.set_exception(outcome)
        else:
            call.outcome.set_result(outcome)

    def give_back(self, call: Call, outcome: Any) -> None:
        """Begin the compensation of a cancelled call; a call that failed had no effect."""
        if call.give_back is not None and (
            not isinstance(outcome, Exception) or isinstance(outcome, OutcomeUnknownError)
        ):
            self.undo(call.give_back, outcome)

    def undo(
        self,
        give_back: Callable[[R | OutcomeUnknownError], Awaitable[None]],
        outcome: R | OutcomeUnknownError,
    ) -> None:
        """Begin ``give_back(outcome)``, which is retried until it succeeds, and for which drain waits."""
        self._giving_back.undo(give_back, outcome)

    def _unfinished(self) -> set[asyncio.Future[Any]]:
        borrower = () if self._borrower is None else (self._borrower,)
        return {*self._lanes.under_way(), *self._giving_back.tasks, *borrower}

    async def drain(self, seconds: float) -> None:
        """Take no further call, wait, bounded, until all that were taken are answered, and stop.

        A call that could not be sent in time gets StoreClosedError, one that was sent and not answered
        OutcomeUnknownError.
        """
        self.closing = True
        self._giving_back.hasten()
        deadline = self.time() + seconds
        # Those who wait for a place wake, see that it is too late, and leave it.
        self.places.open()
        if self.waiting:
            self._wake()
        try:
            # Giving back may queue calls of its own, which the lanes have to serve, hence the loop.
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
            for task in (undoing := set(self._giving_back.tasks)):
                task.cancel()
            await self._lanes.stop()
            if undoing:
                await asyncio.wait(undoing, timeout=GRACE_SECONDS)
            self._refuse_queued()

    def _refuse_queued(self) -> int:
        rest = [call for method in self._methods for call in method.queue]
        for method in self._methods:
            method.queue.clear()
        self.places.leave(len(rest))
        for call in rest:
            self._settle(call, StoreClosedError())
        return len(rest)
