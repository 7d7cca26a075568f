"""The ready steps of queues, in the order of QUE-2, shared out among the calls of one store.

Without it, callers that claim from one queue at the same time would all read its first step.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID
from weakref import WeakValueDictionary

from flowstore_core.queues import MAX_PRIORITY
from flowstore_documents import keys
from flowstore_documents.access import finish_intents
from flowstore_documents.space import Page, Range
from flowstore_documents.transactions import Changed, Transaction, Transactions

SHORT_QUEUE = 32
"""About up to this number of steps of all priorities, running ones included, a queue is read as one range."""
LONG_QUEUE = 1_000
"""Beyond this number of steps of one queue and priority, a window of the first ones is read: a server may
visit all keys of a range, whatever its limit."""
WINDOW = 500
"""The least number of steps in a new window."""
COUNTED = 50
"""The average interval, in reads, of a count of the steps. Such a read shares no request with others."""
MAX_TOGETHER = 1_000
"""Maximum number of steps that several calls take together."""

Entry = tuple[UUID, str]
"""The run and the key of a queued step."""


@dataclass(slots=True, eq=False)
class _Call:
    limit: int
    taken: Sequence[Entry] = ()
    error: Exception | None = None


class _Group:
    """The calls on the same queues. One after another has its turn, and reads for all that wait."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.waiting: dict[_Call, None] = {}


class ReadySteps:
    """The ready steps that calls of one store may take."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions
        self._taken: set[Entry] = set()
        """The steps that calls of this store are about to claim; others pass over them (QUE-2)."""
        self._groups: WeakValueDictionary[tuple[str, ...], _Group] = WeakValueDictionary()
        self._windows: dict[bytes, bytes] = {}
        """The ends of the windows of long levels, a level being a queue and a priority."""
        self._long: set[bytes] = set()
        """The queues with too many steps to read all."""
        self._until_count = 0
        """The number of reads before the next one that counts the steps."""

    async def take(self, queues: Sequence[str], limit: int) -> Sequence[Entry]:
        """The first ready steps that no other call has taken. None takes them until they are released."""
        group = self._groups.setdefault(tuple(queues), _Group())
        taken: Sequence[Entry] = ()

        async def try_to_take(tx: Transaction) -> Sequence[Entry]:
            nonlocal taken
            self.release(taken)
            call = _Call(limit)
            group.waiting[call] = None
            try:
                async with group.turn:
                    while call in group.waiting:
                        await self._take_for_all(tx, queues, group)
            finally:
                group.waiting.pop(call, None)
                taken = call.taken
            if call.error is not None:
                raise call.error
            return taken

        try:
            return await self._transactions.run("claim_next_steps", try_to_take)
        except BaseException:
            self.release(taken)
            raise

    def release(self, entries: Iterable[Entry]) -> None:
        self._taken.difference_update(entries)

    async def _take_for_all(self, tx: Transaction, queues: Sequence[str], group: _Group) -> None:
        """Share out the first steps to the calls that wait now; what is read is too old for later ones."""
        calls: list[_Call] = []
        wanted = 0
        for call in group.waiting:
            if calls and wanted + call.limit > MAX_TOGETHER:
                break
            calls.append(call)
            wanted += call.limit
        try:
            found = await self._read_ready(tx, queues, wanted)
        except Exception as error:  # noqa: BLE001 - raised by each call, which may try again
            for call in calls:
                call.error = error
                group.waiting.pop(call, None)
            return
        free = [entry for entry in found if entry not in self._taken]
        for call in calls:
            if call not in group.waiting:  # It was cancelled.
                continue
            del group.waiting[call]
            call.taken, free = free[: call.limit], free[call.limit :]
            self._taken.update(call.taken)
            if not call.taken and len(found) == wanted:
                # Others, on some of the queues, have taken what was read for this call. There may be more.
                call.error = Changed()

    async def _read_ready(self, tx: Transaction, queues: Sequence[str], wanted: int) -> Sequence[Entry]:
        passed_over = frozenset(self._taken)
        first = await self._read_first(tx, queues, wanted + len(passed_over), self._must_count())
        now = keys.time_bytes(await tx.now())
        # No result has this time: the claim of a step reads the clock again.
        tx.time = None
        # By priority, which the last byte of a level tells, then by time, run and step.
        ordered = sorted(
            (level[-1], ready_at, run_id, key)
            for level, ready_at, run_id, key in map(keys.parse_queued_step, first)
        )
        found = [
            (run_id, key)
            for _, ready_at, run_id, key in ordered
            if ready_at <= now and (run_id, key) not in passed_over
        ]
        return found[:wanted]

    def _must_count(self) -> bool:
        """Whether the next read counts the steps.

        The interval is random: with a fixed one, a caller that polls several queues in turn might have only
        one of them counted.
        """
        self._until_count -= 1
        if self._until_count >= 0:
            return False
        self._until_count = random.randrange(2 * COUNTED - 1)
        return True

    async def _read_first(
        self, tx: Transaction, queues: Sequence[str], wanted: int, is_counted: bool
    ) -> Sequence[bytes]:
        """The keys of the first steps of each priority, ``wanted`` or all; the ready ones come first.

        They are read at once: a step may move from one queue to another.
        """
        uses_windows = True
        while True:
            short = [start for start in map(keys.queue, queues) if start not in self._long]
            levels = [
                keys.queue_level(queue, priority)
                for queue in queues
                if keys.queue(queue) in self._long
                for priority in range(MAX_PRIORITY, -1, -1)
            ]
            known = self._windows if uses_windows else {}
            windows = {level: known[level] for level in levels if level in known}
            ranges = [keys.prefix_range(start, SHORT_QUEUE + wanted, keys_only=True) for start in short]
            for level in levels:
                end = windows.get(level, level + keys.NEVER)
                ranges.append(Range(level, end, wanted, keys_only=True, count=is_counted))
            pages = await finish_intents(tx, ranges)
            of_levels = dict(zip(levels, pages[len(short) :], strict=True))
            grown = [start for start, page in zip(short, pages, strict=False) if page.more]
            used_up = [level for level in windows if len(of_levels[level].items) < wanted]
            self._long.update(grown)
            for level in used_up:
                self._windows.pop(level, None)
            if not grown and not used_up:
                if is_counted:
                    await self._learn_sizes(tx, of_levels, wanted)
                return [key for page in pages for key, _ in page.items]
            uses_windows = uses_windows and not used_up
            is_counted = True

    async def _learn_sizes(self, tx: Transaction, counted: Mapping[bytes, Page], wanted: int) -> None:
        """Give each long level a window, and forget the queues that are no longer long."""
        sizes: defaultdict[bytes, int] = defaultdict(int)
        for level, page in counted.items():
            count = page.count or 0
            if count > LONG_QUEUE:  # Of a window too: steps that are due earlier may enter it.
                end = self._windows.get(level, level + keys.NEVER)
                first = Range(level, end, max(WINDOW, 4 * wanted), keys_only=True)
                (window,) = (await tx.read((), [first])).pages
                if window.items:  # Without snapshots the queue may be empty now.
                    self._windows[level] = window.items[-1][0] + b"\0"
            sizes[level[:-1]] += LONG_QUEUE if level in self._windows else count
        self._long.difference_update(start for start, size in sizes.items() if size <= SHORT_QUEUE)
