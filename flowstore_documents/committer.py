"""Sending changes: in groups, exactly once, with a true answer also after a lost one (CON-3).

Every change has a slot: a key of this store that only one change at a time uses. The change expects the
version that the slot has, and puts its own number there. When the answer is lost, a fence does the same with
another number. If the fence succeeds, the change has not happened and never can, because the slot's version
has changed; if the version has changed before, the number in the slot tells whether the change did it or an
earlier fence.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from flowstore_core import LimitExceededError, OutcomeUnknownError, StoreUnavailableError
from flowstore_core.backend import Observers, Resolution, report_batch
from flowstore_documents import keys
from flowstore_documents.senders import Senders
from flowstore_documents.space import (
    AppliedOrRefused,
    Change,
    KeyValueSpace,
    MaybeApplied,
    NotApplied,
    TooLarge,
    Version,
    change_bytes,
)

REQUEST_LIFETIME = timedelta(seconds=30)
"""A change takes no effect later than this after it was sent."""
CLOCK_TTL = 5.0
"""Seconds for which an answer of the space's clock is extrapolated, for ``Change.before``."""
SLOT_LIFETIME = timedelta(days=1)
"""After this time without use a slot belongs to a process that has died, and cleanup deletes it."""
FENCE = b"fence"
MAX_PASSED_OVER = 30
"""Number of waiting changes that one search for a group leaves for later commits."""
SHARED_TICKS_BYTES = 128
"""Room in a commit for a change that puts the ticks of a run."""
CHECKED_REFUSALS = 3
"""After this number of refused changes in a row their slot is checked."""
MAX_COMMITS = 4
"""Number of commits in progress at once."""
FIRST_PAUSE = 0.005
MAX_PAUSE = 0.5

_log = logging.getLogger("flowstore_documents")


class Retries:
    """The bounded retries of one operation, with a jittered backoff (CON-2)."""

    def __init__(self, operation: str, seconds: float, observers: Observers) -> None:
        self.operation = operation
        self._deadline = time.monotonic() + seconds
        self._observers = observers
        self._pause = FIRST_PAUSE

    async def wait(self, reason: str, *, retry: bool = True) -> None:
        """Pause before the next attempt; StoreUnavailableError if there must be none."""
        left = self._deadline - time.monotonic()
        if not retry or left <= 0:
            raise StoreUnavailableError(reason)
        pause = min(self._pause * random.uniform(0.5, 1.5), left)
        self._pause = min(self._pause * 2, MAX_PAUSE)
        self._observers.retried(self.operation, reason, pause)
        await asyncio.sleep(pause)


@dataclass(slots=True, eq=False)
class _Slot:
    key: bytes
    used_at: datetime
    version: Version | None = None
    mark: bytes = b""
    """The value that the newest change puts: its number and its time."""
    refused: list[bytes] = field(default_factory=list)
    """The marks of the changes that were refused since the last one that was applied."""


@dataclass(slots=True, eq=False)
class _Pending:
    change: Change
    writes: frozenset[bytes]
    """The keys that the change writes, but the ticks."""
    ticks: Mapping[bytes, tuple[bytes, Version | None]]
    """The ticks that the change puts blindly, each with the gate that it expects."""
    size: int
    since: float
    done: asyncio.Future[Version | None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Committer:
    """Commits the changes of one store."""

    def __init__(
        self, space: KeyValueSpace, retry_seconds: float, observers: Observers, backend: str
    ) -> None:
        self._space = space
        self._backend = backend
        self._retry_seconds = retry_seconds
        self._observers = observers
        self._opened = secrets.token_bytes(16)
        self._free: list[_Slot] = []
        self._slots = self._changes = 0
        self._doubts: list[_Slot] = []
        self._settling = asyncio.Lock()
        self._queue: deque[_Pending] = deque()
        self._senders = Senders(self._send_waiting, MAX_COMMITS)
        self._clock: tuple[datetime, float] | None = None

    def retries(self, operation: str) -> Retries:
        return Retries(operation, self._retry_seconds, self._observers)

    async def commit(self, operation: str, change: Change) -> bool:
        """Whether the change happened; False: an expectation failed, or the change must be tried again.

        Raises StoreUnavailableError if it did not happen and the retries ended, LimitExceededError if the
        space cannot hold it (LIM-2), and OutcomeUnknownError if it may have happened.
        """
        retries = self.retries(operation)
        while True:
            now = await self._now(retries)
            slot = self._take_slot(now)
            guarded = Change(
                expected={**change.expected, slot.key: slot.version},
                puts={**change.puts, slot.key: slot.mark},
                deletes=change.deletes,
                before=now + REQUEST_LIFETIME,
                time=change.time,
            )
            try:
                version = await self._send(guarded)
            except NotApplied as error:
                self._free.append(slot)
                await retries.wait(error.reason, retry=error.retry)
                continue
            except TooLarge as error:
                self._free.append(slot)
                raise LimitExceededError(self._backend, error.limit) from None
            except MaybeApplied as error:
                if isinstance(error, AppliedOrRefused) and await self._was_refused(slot):
                    self._free.append(slot)
                    raise StoreUnavailableError(error.reason) from None
                return await self._resolve(operation, slot)
            if version is None:
                self._clock = None  # Its time may have passed because the space's clock has jumped.
                slot.refused.append(slot.mark)
                if len(slot.refused) >= CHECKED_REFUSALS and not await self._is_intact(slot):
                    # What the server has lost is more than this slot. The others may be many.
                    self._free.clear()
                    return False
            else:
                slot.version = version
                slot.refused.clear()
            self._free.append(slot)
            return version is not None

    async def _was_refused(self, slot: _Slot) -> bool:
        """Whether the change in the slot was certainly refused, after AppliedOrRefused."""
        try:
            found = (await self._space.read([slot.key])).found.get(slot.key)
        except NotApplied:
            return False
        return slot.version == (None if found is None else found.version)

    async def _is_intact(self, slot: _Slot) -> bool:
        """Whether a slot is as its next change expects it. It is not if the server has lost data.

        A slot with the mark of a refused change shows a space that sends a request twice and returns the
        result of the second time: RuntimeError.
        """
        try:
            found = (await self._space.read([slot.key])).found.get(slot.key)
        except NotApplied:
            return True  # Unknown; the next refusal asks again.
        if slot.version == (None if found is None else found.version):
            slot.refused.clear()
            return True
        if found is not None and found.value in slot.refused:
            raise RuntimeError(
                f"the backend {self._backend} has applied a change that it reported as refused; "
                "does its driver send requests again?"
            )
        return False

    def _take_slot(self, now: datetime) -> _Slot:
        while self._free and now - self._free[-1].used_at > SLOT_LIFETIME / 2:
            self._free.pop()
        if self._free:
            slot = self._free.pop()
        else:
            self._slots += 1
            slot = _Slot(keys.slot(self._opened, self._slots), now)
        self._changes += 1
        slot.used_at = now
        slot.mark = keys.time_bytes(now) + self._changes.to_bytes(8)
        return slot

    async def space_time(self, operation: str) -> datetime:
        """The time of the space's own clock, at most a few seconds old."""
        return await self._now(self.retries(operation))

    def saw_clock(self, reading: tuple[datetime, float] | None) -> None:
        """Use a time of the space that was read with other data, and the time.monotonic() of that moment."""
        if reading is not None:
            self._clock = reading

    async def _now(self, retries: Retries) -> datetime:
        while self._clock is None or time.monotonic() - self._clock[1] > CLOCK_TTL:
            try:
                self._clock = await self._space.clock(), time.monotonic()
            except NotApplied as error:
                await retries.wait(error.reason, retry=error.retry)
        moment, asked = self._clock
        return moment + timedelta(seconds=time.monotonic() - asked)

    # Resolving lost answers

    async def _resolve(self, operation: str, slot: _Slot) -> bool:
        retries = self.retries(operation)
        while True:
            try:
                happened = await self._fence(slot)
                break
            except NotApplied as error:
                reason = error.reason
            except MaybeApplied as error:
                reason = str(error) or "connection_lost"
            try:
                await retries.wait(reason)
            except StoreUnavailableError:
                self._doubts.append(slot)
                self._observers.outcome_unknown(operation, Resolution.UNKNOWN)
                _log.warning("%s is unacknowledged, and its outcome is unknown", operation)
                raise OutcomeUnknownError(operation) from None
        resolution = Resolution.HAPPENED if happened else Resolution.DID_NOT_HAPPEN
        self._observers.outcome_unknown(operation, resolution)
        _log.info("%s was unacknowledged: %s", operation, resolution)
        self._free.append(slot)
        return happened

    async def _fence(self, slot: _Slot) -> bool:
        """Whether the change in the slot happened; if not, it never will."""
        while True:
            # First, because a change that has happened needs no fence: a space that is full refuses one.
            found = (await self._space.read([slot.key])).found.get(slot.key)
            version = None if found is None else found.version
            if version != slot.version:
                # By the change, by an earlier fence, or because the server has lost the slot. The change
                # expects the former version, so it never happens from now on.
                slot.version = version
                return found is not None and found.value == slot.mark
            # The value differs from the change's own, also for a fence whose own answer is lost.
            fence = Change(expected={slot.key: version}, puts={slot.key: slot.mark + FENCE})
            (version,) = await self._space.commit([fence])
            if version is not None:
                slot.version = version
                return False

    @property
    def has_doubts(self) -> bool:
        """Whether the outcome of a change is unknown; it may still happen."""
        return bool(self._doubts)

    async def settle_doubts(self) -> None:
        """Fence every change whose outcome is unknown, so that none takes effect from now on.

        Raises StoreUnavailableError if the space cannot be reached.
        """
        async with self._settling:
            while self._doubts:
                slot = self._doubts[-1]
                try:
                    await self._fence(slot)
                except NotApplied as error:
                    raise StoreUnavailableError(error.reason) from None
                except MaybeApplied as error:
                    raise StoreUnavailableError(str(error) or "connection_lost") from None
                self._doubts.remove(slot)
                self._free.append(slot)

    # Groups

    async def _send(self, change: Change) -> Version | None:
        ticks = _ticks(change)
        writes = frozenset([*change.puts, *change.deletes]).difference(ticks)
        pending = _Pending(change, writes, ticks, change_bytes(change), time.monotonic())
        self._queue.append(pending)
        self._senders.wake()
        return await pending.done

    async def _send_waiting(self) -> None:
        while group := self._next_group():
            if self._observers or _log.isEnabledFor(logging.DEBUG):
                waited = time.monotonic() - group[0].since
                report_batch(self._observers, _log, "commit", len(group), waited)
            versions: Sequence[Version | None]
            try:
                versions = await self._space.commit(_share_ticks(group))
            except (NotApplied, MaybeApplied, TooLarge) as error:
                _fail(group, error)
            except BaseException as error:
                # The space must raise nothing else; a cancelled sender ends the calls that wait for it.
                _fail(group, MaybeApplied())
                if not isinstance(error, Exception):
                    raise
                _log.exception("the space raised %s", type(error).__name__)
            else:
                for pending, version in zip(group, versions[: len(group)], strict=True):
                    if not pending.done.done():
                        pending.done.set_result(version)

    def _next_group(self) -> list[_Pending]:
        """The oldest waiting changes that fit into one commit.

        A change is left for a later commit if it writes a key that the group names, or names one that the
        group writes: all changes of a commit are decided against the state before it. Only a tick may be put
        by several changes, if all of them expect the same gate.
        """
        limits = self._space.limits
        group: list[_Pending] = []
        left: deque[_Pending] = deque()
        named: set[bytes] = set()
        written: set[bytes] = set()
        ticks: dict[bytes, tuple[bytes, Version | None]] = {}
        shared: set[bytes] = set()
        size = 0
        while self._queue and len(group) < limits.changes and len(left) < MAX_PASSED_OVER:
            pending = self._queue.popleft()
            expected = pending.change.expected
            # The gates whose ticks this change shares with another one: each adds a change to the commit.
            gates = shared | {pending.ticks[tick][0] for tick in pending.ticks if tick in ticks}
            can_share = all(ticks.get(tick) == gate for tick, gate in pending.ticks.items() if tick in named)
            fits = not group or (
                len(group) + 1 + len(gates) <= limits.changes
                and size + pending.size + len(gates) * SHARED_TICKS_BYTES <= limits.request_bytes
            )
            is_apart = pending.writes.isdisjoint(named) and written.isdisjoint(expected)
            if not (fits and is_apart and can_share):
                left.append(pending)
                continue
            group.append(pending)
            size += pending.size
            ticks |= pending.ticks
            shared = gates
            written |= pending.writes | pending.ticks.keys()
            named |= pending.writes | pending.ticks.keys()
            named.update(expected)
        self._queue.extendleft(reversed(left))
        return group

    async def aclose(self) -> None:
        """Delete the slots, unless a change may still be on its way to one."""
        if await self._senders.cancel() or self._doubts:
            return
        limit = self._space.limits.writes
        try:
            for start in range(0, len(self._free), limit):
                slots = self._free[start : start + limit]
                await self._space.commit([Change(deletes=[slot.key for slot in slots if slot.version])])
        except (NotApplied, MaybeApplied) as error:
            _log.info("the slots of a closed store stay: %s", type(error).__name__)


def _ticks(change: Change) -> dict[bytes, tuple[bytes, Version | None]]:
    """The ticks that a change puts and does not compare, each with the gate that the change expects."""
    found = {}
    for key in change.puts:
        gate = keys.gate_of_tick(key)
        if gate is not None and gate in change.expected and key not in change.expected:
            found[key] = gate, change.expected[gate]
    return found


def _share_ticks(group: Sequence[_Pending]) -> list[Change]:
    """The changes of a commit: a tick that several of them put is put once, by a change of its own.

    That change expects only the gate that all of them expect, so it happens if one of them does. If it
    happens although none does, an operation that compares the tick tries again.
    """
    counts = Counter(tick for pending in group for tick in pending.ticks)
    ticks = {tick for tick, count in counts.items() if count > 1}
    if not ticks:
        return [pending.change for pending in group]
    shared: dict[tuple[bytes, Version | None], dict[bytes, bytes]] = {}
    for pending in group:
        for tick, gate in pending.ticks.items():
            if tick in ticks:
                shared.setdefault(gate, {})[tick] = b""
    changes = [
        replace(pending.change, puts={k: v for k, v in pending.change.puts.items() if k not in ticks})
        for pending in group
    ]
    return [*changes, *(Change({gate: version}, puts) for (gate, version), puts in shared.items())]


def _fail(group: Sequence[_Pending], error: BaseException) -> None:
    for pending in group:
        if not pending.done.done():
            pending.done.set_exception(error)
