"""The space: a read is one script, and so is a commit."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import AsyncIterator, Collection, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from flowstore_documents import (
    Change,
    MaybeApplied,
    NotApplied,
    Page,
    Range,
    SpaceLimits,
    Version,
    Versioned,
    View,
)
from flowstore_redis.connection import Connection, Script
from flowstore_redis.settings import Settings

LIMITS = SpaceLimits(value_bytes=65_536, expected=128, writes=128, request_bytes=4_194_304, changes=60)
"""Redis has none in this range; a commit must not occupy the server for more than some milliseconds."""
VERSION_BYTES = 16
HEAD_BYTES = 2
"""How much of each written key a commit publishes."""
MAX_LIMIT = 2**40
"""No range has as many keys; Lua writes larger numbers with an exponent, which Redis does not read."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
COMMIT, READ = Script("commit.lua"), Script("read.lua")


class RedisSpace:
    """Implements KeyValueSpace."""

    limits: SpaceLimits = LIMITS
    snapshots = False

    def __init__(self, settings: Settings) -> None:
        self.connection = Connection(settings)
        self._keys = tuple(f"{settings.prefix}:{name}" for name in ("keys", "values", "clock"))
        # Channels are shared by all databases of a server.
        self._channel = f"{settings.prefix}:commits:{settings.database}"
        # No other commit has this version, in whatever state the server comes back from a crash.
        self._opened = secrets.token_bytes(VERSION_BYTES - 6)
        self._commits = itertools.count()
        self._told = _EPOCH
        """The latest time that is known to be stored."""

    async def read(
        self, keys: Collection[bytes], ranges: Sequence[Range] = (), *, at: object | None = None
    ) -> View:
        assert at is None
        moment, values, pages = await self._read(keys, ranges)
        found = {key: _versioned(value) for key, value in zip(keys, values, strict=True) if value is not None}
        return View(found, [_page(*page) for page in pages], time=moment)

    async def clock(self) -> datetime:
        return await self._tell(_EPOCH)

    async def _tell(self, least: datetime) -> datetime:
        """Store the time, or a later one than the server's if ``least`` is. Works with full memory too."""
        moment, _, _ = await self._read((), (), least)
        self._told = max(self._told, moment)
        return moment

    async def _read(
        self, keys: Collection[bytes], ranges: Sequence[Range], least: datetime | None = None
    ) -> tuple[datetime, Sequence[bytes | None], Sequence[Any]]:
        """The reply of read.lua: the time, the values of the keys, and the pages."""
        arguments: list[bytes | str | int] = [
            b"" if least is None else _microseconds(least),
            len(keys),
            *keys,
        ]
        for wanted in ranges:
            limit = b"" if wanted.limit is None or wanted.limit >= MAX_LIMIT else wanted.limit
            arguments += [wanted.start, wanted.end, limit, int(wanted.keys_only), int(wanted.count)]
        try:
            moment, values, *pages = await self.connection.run(READ, self._keys, *arguments)
        except MaybeApplied:
            raise NotApplied("no answer", retry=True) from None
        return _EPOCH + moment * _MICROSECOND, values, pages

    async def commit(self, changes: Sequence[Change]) -> Sequence[Version | None]:
        told = max((change.time for change in changes if change.time is not None), default=_EPOCH)
        if not any(change.puts or change.deletes for change in changes):
            if told > self._told:
                await self._tell(told)
            return [Version(b"")] * len(changes)
        version = Version(self._opened + next(self._commits).to_bytes(6))
        heads = {key[:HEAD_BYTES] for change in changes for key in (*change.puts, *change.deletes)}
        message = b"".join(head.ljust(HEAD_BYTES, b"\0") for head in heads)
        arguments: list[bytes | str | int] = [self._channel, message, _microseconds(told), len(changes)]
        for change in changes:
            _add(arguments, change, version)
        applied = await self.connection.run(COMMIT, self._keys, *arguments)
        self._told = max(self._told, told)
        return [version if mark == ord("1") else None for mark in applied]

    async def watch(self, ranges: Sequence[tuple[bytes, bytes]]) -> AsyncIterator[None]:
        async for message in self.connection.subscribe(self._channel):
            heads = [message[at : at + HEAD_BYTES] for at in range(0, len(message), HEAD_BYTES)]
            # A key of one byte ends with a zero byte here.
            if not message or any(
                start[:HEAD_BYTES] <= head and head.rstrip(b"\0") < end
                for head in heads
                for start, end in ranges
            ):
                yield

    async def clock_lead(self) -> timedelta:
        """How far the clock of the space is ahead of the server's. Raises NotApplied."""
        clock = await self.clock()
        try:
            seconds, microseconds = await self.connection.send("TIME")
        except MaybeApplied:
            raise NotApplied("no answer", retry=True) from None
        return clock - _EPOCH - timedelta(seconds=int(seconds), microseconds=int(microseconds))

    async def delete_all(self) -> None:
        """Delete all keys. Raises NotApplied or MaybeApplied."""
        await self.connection.send("UNLINK", *self._keys)

    async def aclose(self) -> None:
        await self.connection.aclose()


def _microseconds(moment: datetime) -> int:
    return (moment - _EPOCH) // _MICROSECOND


def _add(arguments: list[bytes | str | int], change: Change, version: Version) -> None:
    """Add a change to the arguments of the script."""
    before = b"" if change.before is None else _microseconds(change.before)
    added = [key for key in change.puts if change.expected.get(key) is None]
    arguments += [before, len(change.expected), 2 * len(change.puts), 2 * len(added), len(change.deletes)]
    arguments += change.expected
    arguments += [expected or b"" for expected in change.expected.values()]
    for key, value in change.puts.items():
        arguments += (key, version + value)
    for key in added:
        arguments += (0, key)
    arguments += change.deletes


def _versioned(value: bytes) -> Versioned:
    return Versioned(value[VERSION_BYTES:], Version(value[:VERSION_BYTES]))


def _page(more: int, count: int | None, keys: Sequence[bytes], values: Sequence[bytes]) -> Page:
    return Page([*zip(keys, map(_versioned, values), strict=True)], bool(more), count)
