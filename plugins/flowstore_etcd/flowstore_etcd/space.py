"""The space: reads and commits are transactions of etcd, versions are revisions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from datetime import datetime

from flowstore_documents import (
    Change,
    NotApplied,
    Page,
    Range,
    SnapshotGone,
    SpaceLimits,
    Version,
    Versioned,
    View,
)
from flowstore_documents.clock_register import KEY as CLOCK
from flowstore_documents.clock_register import ClockRegister
from flowstore_documents.keys import time_bytes
from flowstore_etcd import etcd_pb2 as pb
from flowstore_etcd.connection import Connection
from flowstore_etcd.settings import Settings

# etcd allows 128 comparisons and 128 operations along a path of nested transactions: a commit of 60 changes,
# and one of the clock, leaves 67 for each, of which one is the comparison with the clock.
LIMITS = SpaceLimits(value_bytes=65_536, expected=64, writes=64, request_bytes=1_048_576, changes=60)
MAX_OPERATIONS = 128
"""Maximum number of operations in one request."""


class EtcdSpace:
    """Implements KeyValueSpace."""

    limits: SpaceLimits = LIMITS
    snapshots = True

    def __init__(self, settings: Settings) -> None:
        self._connection = Connection(settings)
        self._prefix = settings.prefix
        self._clock = ClockRegister(self, settings.max_skew)

    async def read(
        self, keys: Collection[bytes], ranges: Sequence[Range] = (), *, at: object | None = None
    ) -> View:
        assert at is None or isinstance(at, int)
        wanted: list[bytes | Range] = [CLOCK, *keys, *ranges]
        answers: list[pb.RangeResponse] = []
        revision = at or 0  # To etcd 0 is the newest one.
        for start in range(0, len(wanted), MAX_OPERATIONS):
            request = pb.TxnRequest()
            for one in wanted[start : start + MAX_OPERATIONS]:
                self._add_read(request.success.add().request_range, one, revision)
            try:
                response = await self._connection.read(request)
            except SnapshotGone:
                if at is not None:
                    raise
                raise NotApplied("the state was compacted during the read", retry=True) from None
            revision = revision or response.header.revision
            answers += [answer.response_range for answer in response.responses]
        clock, *answers = answers
        found = {
            key: _versioned(answer.kvs[0]) for key, answer in zip(keys, answers, strict=False) if answer.kvs
        }
        pages = [self._page(one, answer) for one, answer in zip(ranges, answers[len(keys) :], strict=True)]
        moment = self._clock.time_of(_versioned(clock.kvs[0]) if clock.kvs else None)
        return View(found, pages, revision, moment)

    def _add_read(self, request: pb.RangeRequest, wanted: bytes | Range, revision: int) -> None:
        request.revision = revision
        if isinstance(wanted, bytes):
            request.key = self._prefix + wanted
            return
        request.key, request.range_end = self._prefix + wanted.start, self._prefix + wanted.end
        request.limit = wanted.limit or 0
        request.keys_only = wanted.keys_only
        request.count_only = wanted.limit == 0  # To etcd a limit of 0 is none.

    def _page(self, wanted: Range, answer: pb.RangeResponse) -> Page:
        start = len(self._prefix)
        items = [(item.key[start:], _versioned(item)) for item in answer.kvs]
        more = answer.count > 0 if wanted.limit == 0 else answer.more
        return Page(items, more, answer.count if wanted.count else None)

    async def commit(self, changes: Sequence[Change]) -> Sequence[Version | None]:
        clock_change = self._clock.change_for(changes)
        sent = [*changes, *clock_change]
        if not any(change.puts or change.deletes for change in sent):
            return [Version(b"")] * len(changes)
        request = pb.TxnRequest()
        if len(sent) == 1:
            self._add(request, sent[0])
        else:
            for change in sent:
                nested = request.success.add().request_txn
                nested.SetInParent()  # Also if the change is empty.
                self._add(nested, change)
        response = await self._connection.commit(request)
        self._clock.told(clock_change)
        if len(sent) == 1:
            succeeded = [response.succeeded]
        else:
            succeeded = [answer.response_txn.succeeded for answer in response.responses[: len(changes)]]
        # All nested transactions write at one revision. They write different keys.
        version = _version(response.header.revision)
        return [version if happened else None for happened in succeeded]

    def _add(self, request: pb.TxnRequest, change: Change) -> None:
        """Add a change to a transaction that is empty."""
        for key, version in change.expected.items():
            request.compare.add(
                target=pb.Compare.MOD,
                key=self._prefix + key,
                # The revision of an absent key is 0.
                mod_revision=0 if version is None else int.from_bytes(version),
            )
        if change.before is not None:
            # Without a clock the comparison fails, and the caller asks for the time again, which sets it.
            request.compare.add(
                result=pb.Compare.LESS,
                target=pb.Compare.VALUE,
                key=self._prefix + CLOCK,
                value=time_bytes(change.before),
            )
        for key, value in change.puts.items():
            put = request.success.add().request_put
            put.key, put.value = self._prefix + key, value
        for key in change.deletes:
            request.success.add().request_delete_range.key = self._prefix + key

    async def clock(self) -> datetime:
        return await self._clock.now()

    async def watch(self, ranges: Sequence[tuple[bytes, bytes]]) -> AsyncIterator[None]:
        requests = []
        for start, end in ranges:
            request = pb.WatchRequest()
            request.create_request.key = self._prefix + start
            request.create_request.range_end = self._prefix + end
            requests.append(request)
        missing = len(requests)
        async for response in self._connection.watch(requests):
            missing -= response.created
            if missing <= 0:
                yield

    async def aclose(self) -> None:
        await self._connection.aclose()


def _version(revision: int) -> Version:
    return Version(revision.to_bytes(8))


def _versioned(item: pb.KeyValue) -> Versioned:
    return Versioned(item.value, _version(item.mod_revision))
