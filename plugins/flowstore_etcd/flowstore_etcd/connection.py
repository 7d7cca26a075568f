"""Requests to the members of a cluster, and what a failed one means.

No request is ever sent twice. gRPC would send one again after some failures, so its retries are switched
off. A failed commit is NotApplied only if it never left this process, or if etcd rejects such requests
before it decides on them; after everything else it may have happened.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias, TypeVar
from weakref import WeakSet

import grpc
import grpc.aio
from google.protobuf.message import Message

from flowstore_core import ConfigurationError
from flowstore_documents import AppliedOrRefused, MaybeApplied, NotApplied, SnapshotGone, TooLarge
from flowstore_etcd import etcd_pb2 as pb
from flowstore_etcd.settings import Settings

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)
Method: TypeAlias = grpc.aio.UnaryUnaryMultiCallable[Request, Response]
Metadata: TypeAlias = Sequence[tuple[str, str]]

_LOST = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED})
_ESTABLISHED_OR_FAILED = frozenset(
    {
        grpc.ChannelConnectivity.READY,
        grpc.ChannelConnectivity.TRANSIENT_FAILURE,
        grpc.ChannelConnectivity.SHUTDOWN,
    }
)

CLOSED = "the store was closed"
FULL = "the database of etcd is full: compact it, defragment it and disarm the alarm, or raise its quota"
NO_SPACE = "etcdserver: mvcc: database space exceeded"
_INVALID_TOKEN = "etcdserver: invalid auth token"
_NO_SNAPSHOT = frozenset(
    {
        "etcdserver: mvcc: required revision has been compacted",
        "etcdserver: mvcc: required revision is a future revision",  # After a backup was restored.
    }
)
_TOO_LARGE = {
    "etcdserver: request is too large": "--max-request-bytes of etcd",
    "etcdserver: too many operations in txn request": "--max-txn-ops of etcd",
}
# Every answer that etcd gives before it hands a request to the members, or that each of them gives before
# it changes anything; and whether the request may succeed soon. Two similar ones are not in the list:
# "request timed out" and "leader changed" say nothing about the request, and "database space exceeded" is
# also the answer to the last transaction that is applied.
_REJECTED = {
    "etcdserver: no leader": ("etcd has no leader", True),
    "etcdserver: too many requests": ("etcd has too many requests", True),
    _INVALID_TOKEN: ("the login has expired", True),
    "etcdserver: permission denied": ("the user has no permission for the prefix", False),
    "etcdserver: user name is empty": ("etcd asks for a user and a password", False),
    "etcdserver: authentication failed, invalid user ID or password": ("wrong user or password", False),
    "etcdserver: authentication is not enabled": (
        "authentication is not enabled in etcd: leave out the user",
        False,
    ),
}


_open: WeakSet[Connection] = WeakSet()
_is_broken_by_fork = False


def _after_fork() -> None:
    global _is_broken_by_fork
    _is_broken_by_fork = _is_broken_by_fork or bool(_open)


os.register_at_fork(after_in_child=_after_fork)


@dataclass(slots=True, eq=False)
class _Member:
    address: str
    channel: grpc.aio.Channel
    txn: Method[pb.TxnRequest, pb.TxnResponse]


def _method(
    channel: grpc.aio.Channel, name: str, request: type[Request], response: type[Response]
) -> Method[Request, Response]:
    return channel.unary_unary(
        f"/etcdserverpb.{name}",
        request_serializer=request.SerializeToString,
        response_deserializer=response.FromString,
    )


class Connection:
    """Sends requests to one member of a cluster, and to the next one after it has failed."""

    def __init__(self, settings: Settings) -> None:
        if _is_broken_by_fork:
            raise ConfigurationError(
                "this process was forked while a store on etcd was open, which gRPC does not survive; "
                "close the store before the fork, or start processes with spawn"
            )
        self._settings = settings
        self._members = [self._new_member(address) for address in settings.addresses]
        self._current = 0
        self._token: str | None = None
        self._login = asyncio.Lock()
        self._is_closed = False
        _open.add(self)

    def _new_member(self, address: str) -> _Member:
        options = (
            # Nothing is sent again: neither by a policy, nor "transparently" by gRPC itself.
            ("grpc.enable_retries", 0),
            ("grpc.service_config_disable_resolution", 1),
            # A connection of its own, with a backoff of its own.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
            ("grpc.min_reconnect_backoff_ms", int(self._settings.connect_timeout * 1000)),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
            # Finds a dead peer behind a watch. etcd forbids pings within 5 seconds, or without a call.
            ("grpc.keepalive_time_ms", 10_000),
            ("grpc.keepalive_timeout_ms", 5_000),
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
        )
        credentials = self._settings.credentials
        if credentials is None:
            channel = grpc.aio.insecure_channel(address, options)
        else:
            channel = grpc.aio.secure_channel(address, credentials, options)
        return _Member(address, channel, _method(channel, "KV/Txn", pb.TxnRequest, pb.TxnResponse))

    async def read(self, request: pb.TxnRequest) -> pb.TxnResponse:
        """Raises NotApplied or SnapshotGone."""
        member, metadata = await self._prepare()
        return await self._read(member, member.txn, request, metadata)

    async def _read(
        self,
        member: _Member,
        method: Method[Request, Response],
        request: Request,
        metadata: Metadata = (),
    ) -> Response:
        try:
            return await self._call(method, request, metadata)
        except MaybeApplied:
            raise NotApplied(CLOSED, retry=False) from None
        except grpc.aio.AioRpcError as error:
            raise self._failed_read(member, error) from None

    async def commit(self, request: pb.TxnRequest) -> pb.TxnResponse:
        """Raises NotApplied, MaybeApplied or TooLarge."""
        member, metadata = await self._prepare()
        try:
            return await self._call(member.txn, request, metadata)
        except grpc.aio.AioRpcError as error:
            raise self._failed_commit(member, error) from None

    async def _call(
        self, method: Method[Request, Response], request: Request, metadata: Metadata = ()
    ) -> Response:
        """Raises AioRpcError, or MaybeApplied if the connection is closed."""
        if self._is_closed:  # Since the member was chosen.
            raise MaybeApplied
        try:
            return await method(request, timeout=self._settings.request_timeout, metadata=tuple(metadata))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._is_closed and task is not None and not task.cancelling():
                # Closing a channel cancels its calls, which to their tasks looks like a cancellation.
                raise MaybeApplied from None
            raise

    async def watch(self, requests: Collection[pb.WatchRequest]) -> AsyncIterator[pb.WatchResponse]:
        """Yield the responses to several requests on one stream. Raises NotApplied when it breaks."""
        member, metadata = await self._prepare()
        call = member.channel.stream_stream(
            "/etcdserverpb.Watch/Watch",
            request_serializer=pb.WatchRequest.SerializeToString,
            response_deserializer=pb.WatchResponse.FromString,
        )(metadata=metadata)
        try:
            for request in requests:
                await call.write(request)
            async for response in call:
                if response.canceled:
                    break
                yield response
            raise NotApplied("etcd ended the watch", retry=True)
        except grpc.aio.AioRpcError as error:
            raise self._failed_read(member, error) from None
        except asyncio.InvalidStateError:  # The stream has ended before it was written to.
            raise NotApplied("etcd ended the watch", retry=True) from None
        finally:
            call.cancel()

    async def statuses(self) -> Mapping[str, pb.StatusResponse | str]:
        """For each member its status, or what gRPC says about the failure."""
        found = await asyncio.gather(*map(self._status, self._members))
        return {member.address: status for member, status in zip(self._members, found, strict=True)}

    async def aclose(self) -> None:
        self._is_closed = True
        for member in self._members:
            await member.channel.close()
        # With its last channel gRPC ends its thread, so that the process can be forked.
        self._members.clear()
        _open.discard(self)

    # Members

    async def _prepare(self) -> tuple[_Member, Metadata]:
        """A member with an open connection, and the metadata of a request."""
        for _ in range(len(self._settings.addresses)):
            if self._is_closed:
                raise NotApplied(CLOSED, retry=False)
            member = self._members[self._current]
            if await self._is_ready(member.channel):
                break
            self._leave(member)
        else:
            raise await self._unreachable(member)
        # A member without a leader says so at once; otherwise it would let the request wait.
        metadata = [("hasleader", "true")]
        if self._settings.user:
            metadata.append(("token", await self._log_in(member)))
        return member, metadata

    async def _is_ready(self, channel: grpc.aio.Channel) -> bool:
        with suppress(TimeoutError, grpc.aio.UsageError):  # The latter if the channel is closed meanwhile.
            async with asyncio.timeout(self._settings.connect_timeout):
                while (state := channel.get_state(try_to_connect=True)) not in _ESTABLISHED_OR_FAILED:
                    await channel.wait_for_state_change(state)
            return state is grpc.ChannelConnectivity.READY
        return False

    def _leave(self, member: _Member) -> None:
        """Send later requests to the next member, if they go to this one."""
        if self._members and self._members[self._current] is member:
            self._current = (self._current + 1) % len(self._members)

    async def _unreachable(self, member: _Member) -> NotApplied:
        if member.channel.get_state() is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
            status = await self._status(member)  # Answered by gRPC at once, with the reason.
            if isinstance(status, str) and "handshake" in status.lower():
                reason = "the TLS handshake with etcd fails: check cacert, cert and key"
                return NotApplied(reason, retry=False)
        return NotApplied("no member of etcd can be reached", retry=not self._is_closed)

    async def _status(self, member: _Member) -> pb.StatusResponse | str:
        status = _method(member.channel, "Maintenance/Status", pb.StatusRequest, pb.StatusResponse)
        try:
            return await self._call(status, pb.StatusRequest())
        except MaybeApplied:
            return CLOSED
        except grpc.aio.AioRpcError as error:
            return error.details() or error.code().name

    async def _log_in(self, member: _Member) -> str:
        async with self._login:
            if self._token is None:
                authenticate = _method(
                    member.channel, "Auth/Authenticate", pb.AuthenticateRequest, pb.AuthenticateResponse
                )
                settings = self._settings
                request = pb.AuthenticateRequest(name=settings.user, password=settings.password)
                self._token = (await self._read(member, authenticate, request)).token
            return self._token

    # Failures

    def _rejected(self, member: _Member, error: grpc.aio.AioRpcError) -> NotApplied | None:
        if error.code() in _LOST:
            self._leave(member)
        details = error.details()
        if details not in _REJECTED:
            return None
        if details == _INVALID_TOKEN:
            self._token = None
        reason, retry = _REJECTED[details]
        return NotApplied(reason, retry=retry)

    def _failed_read(self, member: _Member, error: grpc.aio.AioRpcError) -> Exception:
        if error.details() in _NO_SNAPSHOT:
            return SnapshotGone()
        if error.details() == NO_SPACE:  # From old releases (fixed by etcd #14254 and #14884).
            return NotApplied(FULL, retry=False)
        if (rejected := self._rejected(member, error)) is not None:
            return rejected
        return NotApplied(f"etcd has not answered ({error.code().name})", retry=True)

    def _failed_commit(self, member: _Member, error: grpc.aio.AioRpcError) -> Exception:
        details = error.details()
        if details == NO_SPACE:
            return AppliedOrRefused(FULL)
        if details in _TOO_LARGE:
            return TooLarge(_TOO_LARGE[details])
        return self._rejected(member, error) or MaybeApplied()
