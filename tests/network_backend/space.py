"""A space on the key-value server, and spaces with one bug each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any

from flowstore_documents import (
    Change,
    MaybeApplied,
    NotApplied,
    Range,
    SpaceLimits,
    Version,
    View,
)
from tests.network_backend.server import encode_message, read_message

TIMEOUT = 5.0
"""Seconds for a connection, and for a reply."""


class LostReply(Exception):  # noqa: N818
    """The request was sent, and its reply did not come."""


class NetworkSpace:
    """Implements KeyValueSpace."""

    limits = SpaceLimits()
    snapshots = True

    def __init__(self, addresses: Sequence[tuple[str, int]], namespace: str) -> None:
        self._addresses = addresses
        self._namespace = namespace
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def request(self, method: str, *arguments: Any) -> Any:
        """Send one request. Raises NotApplied if it was not sent, LostReply if its reply did not come."""
        stream, writer = await self._connect()
        try:
            writer.write(encode_message((self._namespace, method, arguments)))
            reply = await asyncio.wait_for(read_message(stream), TIMEOUT)
        except (OSError, EOFError, TimeoutError):
            writer.close()
            raise LostReply from None
        except BaseException:
            writer.close()
            raise
        self._idle.append((stream, writer))
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            stream, writer = self._idle.pop()
            if not stream.at_eof() and not writer.is_closing():
                return stream, writer
            writer.close()
        for address in self._addresses:
            with suppress(OSError, TimeoutError):
                return await asyncio.wait_for(asyncio.open_connection(*address), TIMEOUT)
        raise NotApplied("cannot_connect", retry=True)

    async def read(
        self, keys: Collection[bytes], ranges: Sequence[Range] = (), *, at: object | None = None
    ) -> View:
        try:
            view: View = await self.request("read", tuple(keys), tuple(ranges), at)
        except LostReply:
            raise NotApplied("connection_lost", retry=True) from None
        return view

    async def commit(self, changes: Sequence[Change]) -> Sequence[Version | None]:
        try:
            versions: Sequence[Version | None] = await self.request("commit", tuple(changes))
        except LostReply:
            raise MaybeApplied from None
        return versions

    async def clock(self) -> datetime:
        try:
            now: datetime = await self.request("clock")
        except LostReply:
            raise NotApplied("connection_lost", retry=True) from None
        return now

    def watch(self, ranges: Sequence[tuple[bytes, bytes]]) -> AsyncIterator[None]:
        raise NotImplementedError("the backend does not declare WATCH")

    async def drop(self) -> None:
        with suppress(LostReply):
            await self.request("drop")

    async def aclose(self) -> None:
        for _, writer in self._idle:
            writer.close()


class StaleSpace(NetworkSpace):
    """Answers reads from its last answer to the same question while the server does not answer."""

    def __init__(self, addresses: Sequence[tuple[str, int]], namespace: str) -> None:
        super().__init__(addresses, namespace)
        self._answers: dict[object, View] = {}

    async def read(
        self, keys: Collection[bytes], ranges: Sequence[Range] = (), *, at: object | None = None
    ) -> View:
        question = (tuple(keys), tuple(ranges))
        try:
            self._answers[question] = view = await super().read(keys, ranges, at=at)
        except NotApplied:
            if question not in self._answers:
                raise
            return self._answers[question]
        return view


class LeakingSpace(NetworkSpace):
    """Does not translate the errors of its connection."""

    async def read(
        self, keys: Collection[bytes], ranges: Sequence[Range] = (), *, at: object | None = None
    ) -> View:
        try:
            return await super().read(keys, ranges, at=at)
        except NotApplied:
            raise ConnectionResetError from None
