"""Reads that wait at the same time share a request, which costs much less than one for each."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from flowstore_documents import NotApplied
from flowstore_etcd import etcd_pb2 as pb
from flowstore_etcd.connection import Connection

MAX_OPERATIONS = 100
"""Maximum number of keys and ranges in one request; etcd allows 128."""
MAX_REQUESTS = 4
"""Number of requests in progress at once."""


@dataclass(slots=True, eq=False)
class _Waiting:
    operations: Sequence[pb.RangeRequest]
    done: asyncio.Future[tuple[Sequence[pb.RangeResponse], int]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class SharedReads:
    """Sends reads of the newest state. Each begins after its call, so each is linearizable."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._waiting: deque[_Waiting] = deque()
        self._senders: set[asyncio.Task[None]] = set()

    async def read(self, operations: Sequence[pb.RangeRequest]) -> tuple[Sequence[pb.RangeResponse], int]:
        """The answers to at most MAX_OPERATIONS operations, and the revision of their state."""
        waiting = _Waiting(operations)
        self._waiting.append(waiting)
        if len(self._senders) < MAX_REQUESTS:
            sender = asyncio.create_task(self._send_groups())
            self._senders.add(sender)
            sender.add_done_callback(self._senders.discard)
        return await waiting.done

    async def _send_groups(self) -> None:
        while group := self._next_group():
            request = read_request([operation for one in group for operation in one.operations])
            try:
                response = await self._connection.read(request)
            except BaseException as error:
                cause = error if isinstance(error, NotApplied) else NotApplied("interrupted", retry=True)
                for one in group:
                    if not one.done.done():
                        one.done.set_exception(cause)
                if cause is not error:
                    raise
                continue
            answers = [answer.response_range for answer in response.responses]
            start = 0
            for one in group:
                end = start + len(one.operations)
                if not one.done.done():
                    one.done.set_result((answers[start:end], response.header.revision))
                start = end

    def _next_group(self) -> Sequence[_Waiting]:
        group: list[_Waiting] = []
        left = MAX_OPERATIONS
        while self._waiting and len(self._waiting[0].operations) <= left:
            one = self._waiting.popleft()
            if not one.done.done():  # Its caller was cancelled.
                group.append(one)
                left -= len(one.operations)
        return group


def read_request(operations: Sequence[pb.RangeRequest]) -> pb.TxnRequest:
    return pb.TxnRequest(success=[pb.RequestOp(request_range=operation) for operation in operations])
