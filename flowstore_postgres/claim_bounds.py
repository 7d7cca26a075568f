"""Times before which a queue has no ready step, so that a claim need not read the index from its start.

A claim moves the row of its step in the index, and while an old snapshot is open, such as that of a dump, the
server keeps the entries at the old places. Without a bound each claim reads past all of them.

A claim reads each queue and priority from its bound on, and the rows before it that are marked late. No other
row comes before the new bound, which is the earliest of three times:

- The first row that the claim's snapshot shows. The claim has read all of them, up to its own now.
- That now.
- A time before which no row will appear that the snapshot does not show. Such a row belongs to a transaction
  that had not ended. Each claim notes a sample: the id and the beginning of its transaction. Once every
  transaction up to this id has ended, the others got their ids after this beginning, and so wrote their rows
  after it. A row is marked late if its ready_at is more than LATE_SECONDS before its writing (migration 12),
  so no other row is before the beginning less LATE_SECONDS.

A long writing transaction holds the bounds back. Claims then read more, as without them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from flowstore_core.queues import MAX_PRIORITY

LATE_SECONDS = 1.0
"""As in migration 12: a row is late if its ready_at is further in the past than this when it is written."""
SAMPLE_SECONDS = 0.1
"""The least time between two samples."""
MAX_SAMPLE_SECONDS = 1.0
"""After this time a claim that finds nothing takes an id too, for a sample."""
MAX_AGE_SECONDS = 60.0
"""The time after which claims read from the start once, in case somebody wrote rows without the triggers."""
MAX_CLOCK_CHANGE = 0.25
"""How far the server's clock may fall behind this process's before the bounds are dropped, in seconds."""
MAX_BOUNDS = 10_000
PRIORITIES = MAX_PRIORITY + 1


class ClaimBounds:
    """The bounds of one store's claims, which must come one after another."""

    def __init__(self) -> None:
        self._server: datetime | None = None
        """The start of the server that the bounds are about; a replica that takes over has another."""
        self._bounds: dict[tuple[str, int], datetime] = {}
        self._samples: deque[tuple[int, datetime]] = deque()
        """Ids and beginnings of transactions; some with such an id or a smaller one had not ended."""
        self._settled: datetime | None = None
        """The beginning of the latest sample for which all of them have ended."""
        self._clock_offset = 0.0
        self._made_at = self._sampled_at = float("-inf")

    def parameters(self, queues: Sequence[str]) -> tuple[list[datetime | None], datetime | None, bool]:
        """The bounds of the queues by queue and priority, their server, and whether to take an id."""
        clock = time.monotonic()
        if clock > self._made_at + MAX_AGE_SECONDS:
            self._bounds.clear()
            self._made_at = clock
        bounds = [self._bounds.get((queue, priority)) for queue in queues for priority in range(PRIORITIES)]
        return bounds, self._server, clock > self._sampled_at + MAX_SAMPLE_SECONDS

    def update(self, queues: Sequence[str], row: Any) -> bool:
        """Take the bounds from the result of a claim.

        Returns False if that claim may have missed steps, because the server's clock was set back.
        """
        clock = time.monotonic()
        offset = row["began"].timestamp() - clock
        is_same = row["server"] == self._server
        was_set_back = is_same and offset < self._clock_offset - MAX_CLOCK_CHANGE
        if was_set_back or not is_same:
            self._server = row["server"]
            self._bounds.clear()
            self._samples.clear()
            self._settled = None
            self._clock_offset = offset
            self._sampled_at = float("-inf")
        self._clock_offset = max(self._clock_offset, offset)
        while self._samples and self._samples[0][0] < row["oldest_id"]:
            self._settled = self._samples.popleft()[1]
        if row["id"] is not None and clock > self._sampled_at + SAMPLE_SECONDS:
            self._samples.append((row["id"], row["began"]))
            self._sampled_at = clock
        if self._settled is not None:
            if len(self._bounds) > MAX_BOUNDS:
                self._bounds.clear()
            first = dict(zip(row["levels"] or (), row["first"] or (), strict=True))
            written_later = self._settled - timedelta(seconds=LATE_SECONDS + MAX_CLOCK_CHANGE)
            for number, queue in enumerate(queues):
                for priority in range(PRIORITIES):
                    found = first.get(number * PRIORITIES + priority, row["now"])
                    bound = min(found, row["now"], written_later)
                    self._bounds[queue, priority] = max(bound, self._bounds.get((queue, priority), bound))
        return not was_set_back
