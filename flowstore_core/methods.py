"""One kind of call whose concurrent calls share batches; see batching."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from flowstore_core.calls import Call
from flowstore_core.errors import OutcomeUnknownError

if TYPE_CHECKING:
    from flowstore_core.batching import Batcher

I = TypeVar("I")  # noqa: E741 - an item
R = TypeVar("R")


class Method(Generic[I, R]):
    """One kind of call, whose concurrent calls share batches; made by Batcher.method."""

    def __init__(
        self,
        batcher: Batcher,
        name: str,
        run: Callable[[Sequence[I]], Awaitable[Sequence[R | Exception]]]
        | Callable[[Sequence[Call]], Sequence[R | Exception]],
        keyed: bool,
        share: Callable[[I, R, I], R | Exception] | None,
        weigh: Callable[[I], int] | None,
        ordered: bool,
        tell: Callable[[I, Any], R] | None,
    ) -> None:
        self.name = name
        self.run: Callable[..., Any] = run
        self.keyed = keyed
        self.ordered = ordered
        self.share = share
        self.weigh = weigh
        self.queue: deque[Call] = deque()
        self._batcher = batcher
        self._tell = tell

    async def call(
        self,
        key: Hashable,
        item: I,
        give_back: Callable[[R | OutcomeUnknownError], Awaitable[None]] | None = None,
    ) -> R:
        """Send an item with the next batch and return its own outcome.

        When the caller is cancelled after the item was sent, ``give_back`` gets the outcome, or the
        OutcomeUnknownError that the call ended with, to undo its effect. See InFlight.run.

        Raises what ``run`` answered for the item; StoreUnavailableError when it was not sent within the
        batcher's patience (it never happened); StoreClosedError.
        """
        batcher = self._batcher
        since = batcher.time()
        places = batcher.places
        if places.taken < places.capacity and not batcher.closing:
            places.taken += 1
        else:
            await batcher.wait_for_place(since)
        # As loop.create_future, without the way there: this is done for every call.
        outcome: asyncio.Future[Any] = asyncio.Future(loop=batcher.loop)
        call = Call(key, item, outcome, give_back, since)
        self.queue.append(call)
        batcher.notice()
        try:
            result = await outcome
        except asyncio.CancelledError:
            # Answered at the same moment; else it is cancelled too, and whoever answers it gives back.
            if outcome.done() and not outcome.cancelled():
                batcher.give_back(call, outcome.exception() or outcome.result())
            raise
        return result if self._tell is None else self._tell(item, result)

    def adopt(self, call: Call) -> None:
        """Take over a call of another batcher's method, to whom its outcome was Elsewhere."""
        call.since = self._batcher.time()
        self._batcher.places.taken += 1
        self.queue.append(call)
        self._batcher.notice()
