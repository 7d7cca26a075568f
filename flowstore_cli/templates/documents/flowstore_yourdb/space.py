"""The key-value space: a dictionary in this process, until you replace it by your database.

``flowstore_documents.KeyValueSpace`` has the promises of each method. Two of them decide whether the store
is correct: NotApplied only for a request that certainly has no effect, now and later, MaybeApplied for every
other failed commit; and no request is ever sent twice, by the driver either.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from datetime import datetime

from flowstore_documents import Change, Range, SpaceLimits, Version, View
from flowstore_documents.memory_space import MemoryData


class YourdbSpace:
    """Implements KeyValueSpace. Raise NotApplied, MaybeApplied, SnapshotGone or TooLarge, nothing else."""

    limits: SpaceLimits = SpaceLimits()
    """The least that a space must offer; state what your database allows."""
    snapshots: bool = True
    """False if the database cannot read an earlier state: the store then lacks DASHBOARD."""

    def __init__(self, data: MemoryData) -> None:
        self._data = data

    async def read(
        self, keys: Collection[bytes], ranges: Sequence[Range] = (), *, at: object | None = None
    ) -> View:
        """Read keys and ranges from one state: the newest one, or the earlier one that ``at`` names."""
        assert at is None or isinstance(at, int)
        with self._data.lock:
            return self._data.read(keys, ranges, at)

    async def commit(self, changes: Sequence[Change]) -> Sequence[Version | None]:
        """Apply each change whose expectations hold; None for a change that was not applied."""
        with self._data.lock:
            return self._data.commit(changes)

    async def clock(self) -> datetime:
        """The time of the server. Without one, use ``flowstore_documents.clock_register``."""
        with self._data.lock:
            return self._data.clock()

    async def watch(self, ranges: Sequence[tuple[bytes, bytes]]) -> AsyncIterator[None]:
        """Yield once at first, then after each commit that wrote a key in one of the ranges."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(changed.set)

        with self._data.lock:
            self._data.watches[wake] = ranges
        try:
            while True:
                yield
                await changed.wait()
                changed.clear()
        finally:
            with self._data.lock:
                del self._data.watches[wake]

    async def aclose(self) -> None:
        """Release connections and tasks."""
