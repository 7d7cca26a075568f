"""The protocol that an author implements: a key-value store with atomic conditional commits."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import NewType, Protocol

MAX_KEY_BYTES = 2_100
"""The size of the longest key."""

Version = NewType("Version", bytes)
"""The version of a key's value. Compared for equality only, and never used again for a key, even if the key
is deleted and put again."""


@dataclass(frozen=True, slots=True)
class Versioned:
    """A value and its version."""

    value: bytes
    version: Version


@dataclass(frozen=True, slots=True)
class Range:
    """The keys from ``start`` up to, and excluding, ``end``."""

    start: bytes
    end: bytes
    limit: int | None = None
    """Maximum number of items; None: all."""
    keys_only: bool = False
    """Whether the values may be empty."""
    count: bool = False
    """Whether to count the keys of the whole range, whatever the limit."""


@dataclass(frozen=True, slots=True)
class Page:
    """The items of a range, ascending by key."""

    items: Sequence[tuple[bytes, Versioned]]
    more: bool
    """Whether the range has more keys than the limit allows. Exact."""
    count: int | None = None
    """The number of keys in the whole range, if it was asked for."""


@dataclass(frozen=True, slots=True)
class View:
    """The result of a read."""

    found: Mapping[bytes, Versioned]
    """The keys that exist, of those that were asked for."""
    pages: Sequence[Page] = ()
    """One for each range, in their order."""
    at: object | None = None
    """The state that was read, for ``read(at=)``; hashable. None if the space has no snapshots."""
    time: datetime | None = None
    """The time for decisions on this state. It is not before any earlier time of the space. Other clients may
    see an earlier time until a change with this ``Change.time`` is committed. None: ask ``clock``."""


@dataclass(frozen=True, slots=True)
class Change:
    """An atomic conditional write: all of it, if every expectation holds, or nothing."""

    expected: Mapping[bytes, Version | None] = field(default_factory=dict)
    """The version that each key must have; None: the key must be absent."""
    puts: Mapping[bytes, bytes] = field(default_factory=dict)
    """Values by key. Keys that are not in ``expected`` are put whatever they have been."""
    deletes: Collection[bytes] = ()
    """Keys to delete, present or not; disjoint from ``puts``."""
    before: datetime | None = None
    """The change has no effect once the space's clock has reached this time."""
    time: datetime | None = None
    """Once the change has happened, the space's clock tells no time before this one, the ``View.time`` on
    which the change was decided."""


def change_bytes(change: Change) -> int:
    """The size of a change: its keys and values."""
    key_bytes = sum(map(len, change.expected)) + sum(map(len, change.puts)) + sum(map(len, change.deletes))
    return key_bytes + sum(map(len, change.puts.values()))


@dataclass(frozen=True, slots=True)
class SpaceLimits:
    """What one value and one change may hold. The defaults are the least that a space must offer."""

    value_bytes: int = 65_536
    expected: int = 16
    """Maximum number of expectations of a change."""
    writes: int = 24
    """Maximum number of puts and deletes of a change, together."""
    request_bytes: int = 1_048_576
    """Maximum size of a commit: the keys and values of all its changes."""
    changes: int = 60
    """Maximum number of changes of a commit."""


class NotApplied(Exception):  # noqa: N818 - a fact about a request
    """The request has had no effect and never will have one."""

    def __init__(self, reason: str, *, retry: bool) -> None:
        self.reason = reason
        """One or a few words, without keys or values."""
        self.retry = retry
        """Whether the same request may succeed soon."""
        super().__init__(reason)


class MaybeApplied(Exception):  # noqa: N818
    """The request may have had its effect, or may still have it: anything that is not certain."""


class AppliedOrRefused(MaybeApplied):
    """The server has applied or refused the request, and its reply is the same in both cases. The request has
    no later effect, so a read shows whether it was applied."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        """The reason of the refusal. A refused request would be refused again."""
        super().__init__(reason)


class SnapshotGone(Exception):  # noqa: N818
    """The state of ``read(at=)`` cannot be read any more."""


class TooLarge(Exception):  # noqa: N818
    """The request is beyond a limit of the space, and had no effect."""

    def __init__(self, limit: str) -> None:
        self.limit = limit
        super().__init__(f"larger than {limit}")


class KeyValueSpace(Protocol):
    """A key-value store. Keys are compared as bytes.

    A read fails with NotApplied. A commit fails with NotApplied only if none of its changes took effect or
    can still take effect, and with MaybeApplied after everything else: time-outs, lost connections and
    cancellation included.
    """

    @property
    def limits(self) -> SpaceLimits: ...

    @property
    def snapshots(self) -> bool:
        """Whether ``read(at=)`` reads an earlier state."""
        ...

    async def read(
        self, keys: Collection[bytes], ranges: Sequence[Range] = (), *, at: object | None = None
    ) -> View:
        """Read keys and ranges, all from one state.

        Without ``at`` the state is linearizable: it includes every commit that returned before the read
        began. With ``at``, the ``at`` of an earlier View, it is that view's state, or SnapshotGone is raised.
        """
        ...

    async def commit(self, changes: Sequence[Change]) -> Sequence[Version | None]:
        """Apply changes, each all or nothing and each decided alone, against the state before the commit.

        Returns for each change the version that its puts have received, or None if an expectation failed or
        ``before`` had passed. What it applied is durable when it returns, and was applied at one moment: no
        read and no other commit sees a part of it. No key that a change writes occurs in another change of
        the commit. It never sends a request again, and neither does its driver.

        A change without writes has only the effect of its ``time``.
        """
        ...

    async def clock(self) -> datetime:
        """The time of the space, in UTC. Linearizable: it never falls, for any client."""
        ...

    def watch(self, ranges: Sequence[tuple[bytes, bytes]]) -> AsyncIterator[None]:
        """Yield after every commit that wrote a key in one of the ranges.

        Hints may be spurious, and several commits may share one. The first one comes once the watch is
        established. NotApplied ends the iteration when the connection breaks.
        """
        ...

    async def aclose(self) -> None:
        """Release all resources."""
        ...
