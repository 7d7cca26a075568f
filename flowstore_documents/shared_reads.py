"""Reads that wait at the same time share a request, which costs much less than one for each."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from flowstore_documents.senders import Senders
from flowstore_documents.space import KeyValueSpace, NotApplied, Page, Range, View

MAX_SHARED = 100
"""Maximum number of keys and ranges in a request that several reads share."""
MAX_READS = 4
"""Number of shared requests in progress at once."""
SHORT_RANGE = 100
"""Maximum limit of a range whose read may share a request: a long one would delay the others."""
CLOSED = "the store was closed"


@dataclass(slots=True, eq=False)
class _WaitingRead:
    keys: Collection[bytes]
    ranges: Sequence[Range]
    done: asyncio.Future[View] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def size(self) -> int:
        return len(self.keys) + len(self.ranges)


class SharedReads:
    """Reads of one space. A shared request begins after all calls that share it, so each is linearizable."""

    def __init__(self, space: KeyValueSpace) -> None:
        self._space = space
        self._queues: dict[object | None, deque[_WaitingRead]] = {}
        """The waiting reads by the state that they read."""
        self._senders = Senders(self._send_waiting, MAX_READS)

    async def read(
        self, keys: Collection[bytes], ranges: Sequence[Range] = (), *, at: object | None = None
    ) -> View:
        """See KeyValueSpace."""
        waiting = _WaitingRead(keys, ranges)
        if waiting.size > MAX_SHARED or not all(map(_is_short, ranges)):
            return await self._space.read(keys, ranges, at=at)
        self._queues.setdefault(at, deque()).append(waiting)
        self._senders.wake()
        return await waiting.done

    async def _send_waiting(self) -> None:
        while self._queues:
            at = next(iter(self._queues))
            if not (group := self._next_group(at)):
                continue
            keys = dict.fromkeys(key for waiting in group for key in waiting.keys)
            # Calls on one queue read the same ranges.
            ranges = list(dict.fromkeys(wanted for waiting in group for wanted in waiting.ranges))
            try:
                view = await self._space.read(keys, ranges, at=at)
            except Exception as error:  # noqa: BLE001 - raised to the callers
                _fail(group, error)
            except asyncio.CancelledError:
                _fail(group, NotApplied(CLOSED, retry=False))
                raise
            else:
                _resolve(group, view, dict(zip(ranges, view.pages, strict=True)))

    def _next_group(self, at: object | None) -> Sequence[_WaitingRead]:
        """The oldest waiting reads of one state that fit into one request."""
        queue = self._queues.pop(at)
        group: list[_WaitingRead] = []
        left = MAX_SHARED
        while queue and queue[0].size <= left:
            waiting = queue.popleft()
            if not waiting.done.done():  # Its caller was not cancelled.
                group.append(waiting)
                left -= waiting.size
        if queue:
            self._queues[at] = queue  # Behind those of other states.
        return group

    async def aclose(self) -> None:
        """End the requests in progress; the calls that wait for them get NotApplied."""
        await self._senders.cancel()
        for queue in self._queues.values():
            _fail(queue, NotApplied(CLOSED, retry=False))
        self._queues.clear()


def _is_short(wanted: Range) -> bool:
    return wanted.limit is not None and wanted.limit <= SHORT_RANGE and not wanted.count


def _resolve(group: Sequence[_WaitingRead], view: View, pages: Mapping[Range, Page]) -> None:
    for waiting in group:
        if not waiting.done.done():
            found = {key: view.found[key] for key in waiting.keys if key in view.found}
            own_pages = [pages[wanted] for wanted in waiting.ranges]
            waiting.done.set_result(View(found, own_pages, view.at, view.time))


def _fail(group: Sequence[_WaitingRead], error: Exception) -> None:
    for waiting in group:
        if not waiting.done.done():
            waiting.done.set_exception(error)
