"""The network between the members of a cluster: proxies that can separate some members, or slow them down."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager

import etcd_cluster

SENDER = re.compile(rb"^X-Server-From: ([0-9a-f]+)\r$", re.MULTILINE | re.IGNORECASE)


class PeerNetwork:
    """Relays what members send to each other. Clients reach every member all the time."""

    def __init__(self, members: Sequence[etcd_cluster.Member]) -> None:
        self._members = members
        self._numbers: dict[int, int] = {}
        self._separate: frozenset[int] = frozenset()
        self._slow: frozenset[int] = frozenset()
        self._delay = 0.0
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.delayed = 0
        """Number of pieces that were held back or came late."""

    def learn_ids(self) -> None:
        """Ask the members for their ids, which their connections begin with."""
        for number, member in enumerate(self._members):
            self._numbers[int(member.call("maintenance/status")["header"]["member_id"])] = number

    def separate(self, members: Collection[etcd_cluster.Member]) -> None:
        """Let nothing pass between these members and the others, until ``join``."""
        self._separate = frozenset(map(self._members.index, members))

    def slow_down(self, members: Collection[etcd_cluster.Member], seconds: float) -> None:
        """Let everything from and to these members come late, until ``join``."""
        self._slow, self._delay = frozenset(map(self._members.index, members)), seconds

    def join(self) -> None:
        self._separate = self._slow = frozenset()
        self._changed.set()
        self._changed = asyncio.Event()

    async def serve(self, to: int, peer_in: asyncio.StreamReader, peer_out: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        member_out = None
        try:
            head = await peer_in.readuntil(b"\r\n\r\n")
            found = SENDER.search(head)
            sender = self._numbers.get(int(found[1], 16)) if found else None
            member_in, member_out = await asyncio.open_connection("127.0.0.1", self._members[to].peer_port)
            member_out.write(head)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pump(sender, to, peer_in, member_out))
                both.create_task(self._pump(sender, to, member_in, peer_out))
        except* (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, EOFError):
            pass  # One of the two has closed the connection.
        finally:
            self._tasks.discard(task)
            for writer in (peer_out, member_out):
                if writer is not None:
                    writer.transport.abort()

    async def _pump(
        self, sender: int | None, to: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while data := await reader.read(65_536):
            while (sender in self._separate) != (to in self._separate):
                self.delayed += 1
                await self._changed.wait()
            if {sender, to} & self._slow:
                self.delayed += 1
                await asyncio.sleep(self._delay)
            writer.write(data)
            await writer.drain()
        raise EOFError

    async def aclose(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def cluster_with_network(
    size: int = 3, arguments: Sequence[str] = ()
) -> AsyncIterator[tuple[etcd_cluster.Cluster, PeerNetwork]]:
    with etcd_cluster.data_folder() as folder:
        cluster = etcd_cluster.Cluster(folder, size, arguments)
        network = PeerNetwork(cluster.members)
        servers = []
        try:
            for number, member in enumerate(cluster.members):
                server = await asyncio.start_server(
                    lambda reader, writer, number=number: network.serve(number, reader, writer),
                    "127.0.0.1",
                    0,
                )
                member.advertised_peer_port = server.sockets[0].getsockname()[1]
                servers.append(server)
            await asyncio.to_thread(cluster.start)
            await asyncio.to_thread(network.learn_ids)
            yield cluster, network
        finally:
            await asyncio.to_thread(cluster.stop)
            for server in servers:
                server.close()
            await network.aclose()
