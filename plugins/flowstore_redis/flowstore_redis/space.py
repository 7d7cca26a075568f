"""The space: a commit is a script, and so are all reads that wait at the same time."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass, field
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
MAX_READS = 2
"""Number of read requests in progress at once."""
MAX_LIMIT = 2**40
"""No range has as many keys; Lua writes larger numbers with an exponent, which Redis does not read."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_COMMIT, _READ = Script("commit.lua"), Script("read.lua")


@dataclass(slots=True, eq=False)
class _Waiting:
    """A read that waits for its turn; without keys and ranges it asks for the time."""

    keys: Sequence[bytes] = ()
    ranges: Sequence[Range] = ()
    done: asyncio.Future[tuple[int, Sequence[bytes | None], Sequence[Any]]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    @property
    def wants_time(self) -> bool:
        return not self.keys and not self.ranges


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
        self._waiting: list[_Waiting] = []
        self._readers: set[asyncio.Task[None]] = set()

    async def read(
        self, keys: Collection[bytes], ranges: Sequence[Range] = (), *, at: object | None = None
    ) -> View:
        assert at is None
        waiting = _Waiting(tuple(keys), ranges)
        _, values, pages = await self._ask(waiting)
        found = {
            key: _versioned(value)
            for key, value in zip(waiting.keys, values, strict=True)
            if value is not None
        }
        return View(found, [_page(*page) for page in pages])

    async def clock(self) -> datetime:
        time, _, _ = await self._ask(_Waiting())
        return _EPOCH + time * _MICROSECOND

    async def commit(self, changes: Sequence[Change]) -> Sequence[Version | None]:
        version = Version(self._opened + next(self._commits).to_bytes(6))
        heads = {key[:HEAD_BYTES] for change in changes for key in (*change.puts, *change.deletes)}
        message = b"".join(head.ljust(HEAD_BYTES, b"\0") for head in heads)
        arguments: list[bytes | str | int] = [self._channel, message, len(changes)]
        for change in changes:
            _add(arguments, change, version)
        applied = await self.connection.run(_COMMIT, self._keys, *arguments)
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
        await asyncio.gather(*self._readers, return_exceptions=True)

    # Reads that wait at the same time share a request, which is sent after all of them have begun.

    async def _ask(self, waiting: _Waiting) -> tuple[int, Sequence[bytes | None], Sequence[Any]]:
        """The time, the values of the keys and the pages of the ranges."""
        self._waiting.append(waiting)
        if len(self._readers) < MAX_READS:
            self._readers.add(asyncio.create_task(self._send_reads()))
        return await waiting.done

    async def _send_reads(self) -> None:
        try:
            await self._send_groups()
        finally:
            # At once, not in a callback of the task: a read that comes meanwhile needs a new reader.
            reader = asyncio.current_task()
            assert reader is not None
            self._readers.discard(reader)

    async def _send_groups(self) -> None:
        while group := self._waiting:
            self._waiting = []
            try:
                time, values, *pages = await self.connection.run(_READ, self._keys, *_read_arguments(group))
            except BaseException as error:
                failure = error if isinstance(error, NotApplied) else NotApplied("no answer", retry=True)
                for one in group:
                    if not one.done.done():
                        one.done.set_exception(failure)
                if not isinstance(error, (NotApplied, MaybeApplied)):
                    raise
                continue
            for one in group:
                if not one.done.done():
                    one.done.set_result((time, values[: len(one.keys)], pages[: len(one.ranges)]))
                del values[: len(one.keys)], pages[: len(one.ranges)]


def _read_arguments(group: Sequence[_Waiting]) -> list[bytes | str | int]:
    keys = [key for one in group for key in one.keys]
    arguments: list[bytes | str | int] = [int(any(one.wants_time for one in group)), len(keys), *keys]
    for wanted in (wanted for one in group for wanted in one.ranges):
        limit = b"" if wanted.limit is None or wanted.limit >= MAX_LIMIT else wanted.limit
        arguments += [wanted.start, wanted.end, limit, int(wanted.keys_only), int(wanted.count)]
    return arguments


def _add(arguments: list[bytes | str | int], change: Change, version: Version) -> None:
    """Add a change to the arguments of the script."""
    before = b"" if change.before is None else (change.before - _EPOCH) // _MICROSECOND
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
