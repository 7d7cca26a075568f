"""A space in the memory of this process, with faults to inject, for tests of the toolkit."""

from __future__ import annotations

import asyncio
import threading
from bisect import bisect_left, insort
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from enum import Enum

from flowstore_documents.space import (
    Change,
    MaybeApplied,
    NotApplied,
    Page,
    Range,
    SnapshotGone,
    SpaceLimits,
    TooLarge,
    Version,
    Versioned,
    View,
    change_bytes,
)

HISTORY = 5_000
"""Number of commits whose earlier states can be read."""

Wake = Callable[[], None]


class MemoryData:
    """The data that all spaces with one name share; threads may share it too."""

    def __init__(self) -> None:
        self.lock: threading.Lock = threading.Lock()
        self.watches: dict[Wake, Sequence[tuple[bytes, bytes]]] = {}
        self._values: dict[bytes, Versioned] = {}
        self._keys: list[bytes] = []
        self._revision = 0
        self._replaced: deque[tuple[int, dict[bytes, Versioned | None]]] = deque(maxlen=HISTORY)
        self._clock = datetime.min.replace(tzinfo=UTC)

    def clock(self) -> datetime:
        """The machine's time; it stands still while the machine's clock is behind an earlier answer."""
        self._clock = max(self._clock, datetime.now(UTC))
        return self._clock

    def read(self, keys: Collection[bytes], ranges: Sequence[Range], at: int | None) -> View:
        old = self._replaced_since(at)
        found = {}
        for key in keys:
            value = old[key] if key in old else self._values.get(key)
            if value is not None:
                found[key] = value
        pages = [self._page(wanted, old) for wanted in ranges]
        return View(found, pages, self._revision if at is None else at, self.clock())

    def _replaced_since(self, at: int | None) -> Mapping[bytes, Versioned | None]:
        """The values that keys had at an earlier revision, if they have been written since."""
        if at is None or at == self._revision:
            return {}
        if not self._replaced or self._replaced[0][0] > at + 1:
            raise SnapshotGone
        old: dict[bytes, Versioned | None] = {}
        for revision, values in reversed(self._replaced):
            if revision <= at:
                break
            old.update(values)
        return old

    def _page(self, wanted: Range, old: Mapping[bytes, Versioned | None]) -> Page:
        low, high = bisect_left(self._keys, wanted.start), bisect_left(self._keys, wanted.end)
        changed = [key for key in old if wanted.start <= key < wanted.end]
        if changed:
            present = set(self._keys[low:high]).difference(changed)
            present.update(key for key in changed if old[key] is not None)
            keys = sorted(present)
            low, high = 0, len(keys)
        else:
            keys = self._keys
        stop = high if wanted.limit is None else min(high, low + wanted.limit)
        items = []
        for key in keys[low:stop]:
            value = old[key] if key in old else self._values[key]
            assert value is not None
            items.append((key, Versioned(b"", value.version) if wanted.keys_only else value))
        return Page(items, stop < high, high - low if wanted.count else None)

    def commit(self, changes: Sequence[Change]) -> Sequence[Version | None]:
        now = self.clock()
        decided = [
            (change.before is None or now < change.before)
            and all(self._has(key, version) for key, version in change.expected.items())
            for change in changes
        ]
        return [
            self._apply(change) if holds else None for change, holds in zip(changes, decided, strict=True)
        ]

    def _has(self, key: bytes, version: Version | None) -> bool:
        value = self._values.get(key)
        return version is None if value is None else value.version == version

    def _apply(self, change: Change) -> Version:
        self._revision += 1
        version = Version(self._revision.to_bytes(8))
        written = [*change.puts, *change.deletes]
        self._replaced.append((self._revision, {key: self._values.get(key) for key in written}))
        for key, value in change.puts.items():
            if key not in self._values:
                insort(self._keys, key)
            self._values[key] = Versioned(value, version)
        for key in change.deletes:
            if self._values.pop(key, None) is not None:
                del self._keys[bisect_left(self._keys, key)]
        for wake, ranges in self.watches.items():
            if any(start <= key < end for start, end in ranges for key in written):
                wake()
        return version

    def all_keys(self) -> Sequence[bytes]:
        """Every key, for tests."""
        return tuple(self._keys)


class Fault(Enum):
    """What happens to one request."""

    NOT_APPLIED = "it is refused, and may be sent again"
    LOST_REQUEST = "it is lost on its way"
    LOST_REPLY = "its reply is lost"
    DELAYED = "it arrives late"
    SNAPSHOT_GONE = "its snapshot is gone"


_OF_READS = frozenset({Fault.NOT_APPLIED})
_OF_LATER_READS = frozenset({Fault.NOT_APPLIED, Fault.SNAPSHOT_GONE})
_OF_COMMITS = frozenset(Fault) - {Fault.SNAPSHOT_GONE}


class MemorySpace:
    """Implements KeyValueSpace. Each request is lost, late or refused as ``arm`` decides."""

    def __init__(
        self, data: MemoryData, *, limits: SpaceLimits | None = None, snapshots: bool = True
    ) -> None:
        self.limits: SpaceLimits = SpaceLimits() if limits is None else limits
        self.snapshots = snapshots
        self.data = data
        self._fault: Fault | None = None
        self._skip = 0
        self._isolates = False
        self._is_isolated = False
        self.has_struck: bool = False
        """Whether the fault that was armed last has happened."""
        self._late: list[Sequence[Change]] = []

    def arm(self, fault: Fault, *, skip: int = 0, isolates: bool = False) -> None:
        """Let a fault happen to the next request that it can happen to, after ``skip`` others.

        Only commits are lost or late, and only a read of an earlier state finds its snapshot gone.
        With ``isolates`` no later request arrives until ``disarm``.
        """
        self._fault, self._skip, self._isolates = fault, skip, isolates
        self.has_struck = False

    def disarm(self) -> bool:
        """End the fault. True if it has happened."""
        self._fault, self._is_isolated = None, False
        return self.has_struck

    def release(self) -> None:
        """Let the late requests arrive."""
        with self.data.lock:
            for changes in self._late:
                self.data.commit(changes)
        self._late.clear()

    def _strike(self, possible: Collection[Fault]) -> Fault | None:
        """The fault of this request, if it is one of those that are possible for it."""
        if self._is_isolated:
            return Fault.NOT_APPLIED
        if self._fault not in possible:
            return None
        if self._skip:
            self._skip -= 1
            return None
        fault, self._fault = self._fault, None
        self.has_struck, self._is_isolated = True, self._isolates
        return fault

    async def read(
        self, keys: Collection[bytes], ranges: Sequence[Range] = (), *, at: object | None = None
    ) -> View:
        await asyncio.sleep(0)
        fault = self._strike(_OF_READS if at is None else _OF_LATER_READS)
        if fault is Fault.SNAPSHOT_GONE:
            raise SnapshotGone
        if fault is not None:
            raise NotApplied(fault.value, retry=True)
        assert at is None or (self.snapshots and isinstance(at, int))
        with self.data.lock:
            view = self.data.read(keys, ranges, at)
        await asyncio.sleep(0)
        return view if self.snapshots else replace(view, at=None)

    async def commit(self, changes: Sequence[Change]) -> Sequence[Version | None]:
        self._check(changes)
        await asyncio.sleep(0)
        fault = self._strike(_OF_COMMITS)
        if fault is Fault.NOT_APPLIED:
            raise NotApplied(fault.value, retry=True)
        if fault is Fault.DELAYED:
            self._late.append(changes)
        if fault in (Fault.DELAYED, Fault.LOST_REQUEST):
            raise MaybeApplied
        with self.data.lock:
            versions = self.data.commit(changes)
        await asyncio.sleep(0)
        if fault is Fault.LOST_REPLY:
            raise MaybeApplied
        return versions

    def _check(self, changes: Sequence[Change]) -> None:
        limits = self.limits
        if len(changes) > limits.changes:
            raise TooLarge(f"{limits.changes} changes")
        if sum(map(change_bytes, changes)) > limits.request_bytes:
            raise TooLarge(f"{limits.request_bytes} bytes in one request")
        written: set[bytes] = set()
        for change in changes:
            keys = {*change.puts, *change.deletes}
            if len(keys) != len(change.puts) + len(change.deletes):
                raise ValueError("a change puts and deletes one key")
            if written & (keys | set(change.expected)) or any(
                keys & set(other.expected) for other in changes if other is not change
            ):
                raise ValueError("a key that a change writes occurs in another change of the commit")
            written |= keys
            if len(change.expected) > limits.expected:
                raise TooLarge(f"{limits.expected} expectations in one change")
            if len(keys) > limits.writes:
                raise TooLarge(f"{limits.writes} writes in one change")
            if any(len(value) > limits.value_bytes for value in change.puts.values()):
                raise TooLarge(f"{limits.value_bytes} bytes in one value")

    async def clock(self) -> datetime:
        with self.data.lock:
            return self.data.clock()

    async def watch(self, ranges: Sequence[tuple[bytes, bytes]]) -> AsyncIterator[None]:
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(changed.set)

        with self.data.lock:
            self.data.watches[wake] = ranges
        try:
            while True:
                yield
                await changed.wait()
                changed.clear()
        finally:
            with self.data.lock:
                del self.data.watches[wake]

    async def aclose(self) -> None:
        """Has no resources to release."""
