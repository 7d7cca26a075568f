"""TCP proxies between a store and its servers, which break connections without knowing the protocol.

A request is what a client sends on a connection up to the next bytes of the server: with a protocol of one
request at a time, each of its requests. The first bytes of a connection, such as a handshake, count too.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import Any

Address = tuple[str, int]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

LOOPBACK = "127.0.0.1"
CHUNK = 1 << 16
REPLY_SECONDS = 1.0
"""How long the proxy waits for a reply that is to be lost, or for that to a request that arrives late."""
QUIET_SECONDS = 0.01
"""A request that is held has ended when the client sends nothing for this time."""
MAX_HOLD_SECONDS = 3.0
"""A held request is delivered after this time, because its transaction may hold locks."""

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class NetworkFault(Enum):
    """What happens to a request and its connection; the value is a description."""

    LOSE_REPLY = "the reply was lost and the connection cut"
    LOSE_REQUEST = "the request was lost and the connection cut"
    CUT_REPLY = "the connection ended in the middle of the reply"
    CUT_REQUEST = "the connection ended in the middle of the request"
    HOLD_REQUEST = "the connection was cut, and the request arrived later"
    RESET = "the request was sent, and both sides of the connection were reset at once"
    BLACK_HOLE = "the network fell silent, and connections stayed open without an answer"


@dataclass(frozen=True, slots=True)
class Injection:
    """A fault that happened."""

    fault: NetworkFault
    moment: float
    """By time.monotonic()."""
    request: int
    """The number of the request to its server, from 1."""
    address: Address
    """Of the server."""


@dataclass(frozen=True, slots=True)
class _ArmedFault:
    fault: NetworkFault
    skip: int
    at_byte: int
    isolates: bool


class FaultyNetwork:
    """One proxy on loopback for each server. An armed fault happens to one request to any of them."""

    def __init__(self, addresses: Sequence[Address]) -> None:
        self._addresses = addresses
        self.ports: list[int] = []
        """The ports of the proxies, in the order of the addresses."""
        self.connections = 0
        """The number of connections that clients have opened."""
        self.injections: list[Injection] = []
        """The faults that happened, in order."""
        self.injected: asyncio.Event = asyncio.Event()
        """Set when the armed fault has happened."""
        self._armed: _ArmedFault | None = None
        self._passable = asyncio.Event()
        self._passable.set()
        self._healed: asyncio.Event | None = None
        """Set at the end of a silence; None if there is none."""
        self._held: list[_HeldRequest] = []
        self._requests = dict.fromkeys(addresses, 0)
        self._tasks: set[asyncio.Task[None]] = set()
        self._servers: list[asyncio.Server] = []

    async def start(self) -> None:
        for address in self._addresses:
            server = await asyncio.start_server(partial(self._accept, address), LOOPBACK, 0)
            self._servers.append(server)
            self.ports.append(server.sockets[0].getsockname()[1])

    def arm(self, fault: NetworkFault, *, skip: int = 0, at_byte: int = 0, isolates: bool = False) -> None:
        """Let a fault happen to the next request after ``skip`` others.

        CUT_REPLY and CUT_REQUEST pass ``at_byte`` bytes on, modulo the length of the message. BLACK_HOLE
        lasts until ``heal``. With ``isolates`` no later request is passed on until ``disarm``. Replaces a
        fault that is armed.
        """
        self._armed = _ArmedFault(fault, skip, at_byte, isolates)
        self.injected.clear()

    def disarm(self) -> bool:
        """Inject nothing from now on. True if the fault that was armed last has happened."""
        self._armed = None
        self._passable.set()
        return self.injected.is_set()

    def heal(self) -> None:
        """End a black hole: its connections are reset, and new ones work."""
        if self._healed is not None:
            self._healed.set()
            self._healed = None

    async def release(self) -> None:
        """Deliver the held requests; returns when the servers have replied or closed the connections."""
        held, self._held = self._held, []
        await asyncio.gather(*(request.deliver() for request in held))

    async def aclose(self) -> None:
        for server in self._servers:
            server.close()
        self.disarm()
        self.heal()
        await self.release()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(
        self, address: Address, client_in: asyncio.StreamReader, client_out: asyncio.StreamWriter
    ) -> None:
        self.connections += 1
        await self._run(self._connect(address, (client_in, client_out)))

    async def _connect(self, address: Address, client: Streams) -> None:
        try:
            server = await asyncio.open_connection(*address)
            await _Connection(self, address, client, server).relay()
        except OSError:
            pass  # The server refuses connections.
        finally:
            client[1].close()

    async def _run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run work that ends with the network at the latest."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.wait({task})

    # For the connections

    async def pass_on(self) -> bool:
        """Wait while the network is isolated. False if it has fallen silent, after the end of the silence."""
        await self._passable.wait()
        if self._healed is None:
            return True
        await self._healed.wait()
        return False

    def take_fault(self, address: Address) -> _ArmedFault | None:
        """The fault of the next request to a server, which then has happened."""
        self._requests[address] += 1
        armed = self._armed
        if armed is None:
            return None
        if armed.skip:
            self._armed = replace(armed, skip=armed.skip - 1)
            return None
        self._armed = None
        if armed.isolates:
            self._passable.clear()
        if armed.fault is NetworkFault.BLACK_HOLE:
            self._healed = asyncio.Event()
        self.injections.append(Injection(armed.fault, time.monotonic(), self._requests[address], address))
        self.injected.set()
        return armed

    def hold(self, request: _HeldRequest) -> None:
        self._held.append(request)
        task = asyncio.ensure_future(request.deliver_after(MAX_HOLD_SECONDS))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Connection:
    """One connection of a client and the one to its server."""

    def __init__(self, network: FaultyNetwork, address: Address, client: Streams, server: Streams) -> None:
        self._network = network
        self._address = address
        self._client_in, self._client_out = client
        self._server_in, self._server_out = server
        self._begins = True
        """Whether the next bytes of the client begin a request."""
        self._reply_fault: _ArmedFault | None = None
        self._held: _HeldRequest | None = None

    async def relay(self) -> None:
        forwarders = [asyncio.ensure_future(one) for one in (self._send_requests(), self._send_replies())]
        try:
            await asyncio.wait(forwarders, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in forwarders:
                one.cancel()
            self._client_out.close()
            if self._held is None:
                self._server_out.close()
            ends = await asyncio.gather(*forwarders, return_exceptions=True)
            if self._held is not None:
                self._held.is_detached.set()
        for end in ends:
            # A connection may end at any time.
            if isinstance(end, Exception) and not isinstance(end, OSError):
                raise end

    async def _send_requests(self) -> None:
        while data := await self._client_in.read(CHUNK):
            begins, self._begins = self._begins, False
            if not await self._network.pass_on():
                self._reset()
                return
            armed = self._network.take_fault(self._address) if begins else None
            if armed is not None and await self._break_request(armed, data):
                return
            self._server_out.write(data)
            await self._server_out.drain()
            if armed is not None and armed.fault is NetworkFault.RESET:
                self._reset()
                return

    async def _break_request(self, armed: _ArmedFault, data: bytes) -> bool:
        """Inject a fault. True if the request does not reach the server now; the connection has ended."""
        match armed.fault:
            case NetworkFault.LOSE_REQUEST:
                _reset(self._client_out)
            case NetworkFault.CUT_REQUEST:
                self._server_out.write(data[: armed.at_byte % len(data)])
                _reset(self._client_out)
            case NetworkFault.HOLD_REQUEST:
                whole = data + await self._rest_of_request()
                self._held = _HeldRequest(whole, (self._server_in, self._server_out))
                self._network.hold(self._held)
                _reset(self._client_out)
            case NetworkFault.BLACK_HOLE:
                await self._network.pass_on()
                self._reset()
            case NetworkFault.RESET:
                return False
            case NetworkFault.LOSE_REPLY | NetworkFault.CUT_REPLY:
                self._reply_fault = armed
                # The server may never reply.
                asyncio.get_running_loop().call_later(REPLY_SECONDS, self._reset)
                return False
        return True

    async def _rest_of_request(self) -> bytes:
        rest = b""
        with suppress(TimeoutError):
            while more := await asyncio.wait_for(self._client_in.read(CHUNK), QUIET_SECONDS):
                rest += more
        return rest

    async def _send_replies(self) -> None:
        while data := await self._server_in.read(CHUNK):
            if not await self._network.pass_on():
                self._reset()
                return
            self._begins = True
            if self._reply_fault is not None:
                if self._reply_fault.fault is NetworkFault.LOSE_REPLY:
                    _reset(self._client_out)
                else:
                    self._client_out.write(data[: self._reply_fault.at_byte % len(data)])
                return
            self._client_out.write(data)
            await self._client_out.drain()

    def _reset(self) -> None:
        _reset(self._client_out)
        _reset(self._server_out)


class _HeldRequest:
    """A request whose client is gone; the connection to its server is still open."""

    def __init__(self, data: bytes, server: Streams) -> None:
        self.is_detached: asyncio.Event = asyncio.Event()
        """Set when nobody else reads from the server."""
        self._data = data
        self._server_in, self._server_out = server
        self._is_delivered = False

    async def deliver(self) -> None:
        """Send the request and wait for its reply."""
        await self.is_detached.wait()
        if self._is_delivered:
            return
        self._is_delivered = True
        try:
            # The server may have ended the connection meanwhile, and may not reply.
            with suppress(ConnectionError, TimeoutError):
                self._server_out.write(self._data)
                await self._server_out.drain()
                await asyncio.wait_for(self._server_in.read(CHUNK), REPLY_SECONDS)
        finally:
            self._server_out.close()

    async def deliver_after(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self.deliver()


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection with RST."""
    with suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    writer.transport.abort()
