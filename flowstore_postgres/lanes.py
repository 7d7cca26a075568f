"""The connections that are kept for batches, with their statements ready, and the watch over them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from flowstore_postgres.connection import Connection
from flowstore_postgres.errors import LOST, Retry, describe

if TYPE_CHECKING:
    from flowstore_postgres.database import Database

WATCH_SECONDS = 0.25

# A plan made while the tables were small must not be kept as they grow: with these, rows are found by
# key, one after another, in the order in which they are asked for. That plan is right for any number of
# rows, so it is made once; PostgreSQL would else make one anew for every small batch. The last of them, in
# milliseconds, is for batches.FIND_FREE_RUNS.
BY_KEY = """
SET enable_seqscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off; SET enable_material = off;
SET plan_cache_mode = force_generic_plan; SET lock_timeout = 100
"""


class Lane:
    """A connection for batches, and what is ready on it."""

    __slots__ = ("connection", "peer", "prepared", "until")

    def __init__(self, connection: Connection, prepared: dict[str, Any] | None) -> None:
        self.connection = connection
        self.peer = connection.peer
        """A connection that breaks forgets it."""
        self.prepared = prepared
        """The statements made ready on it; None where it is not kept."""
        self.until = 0.0
        """How long it waits for an answer to the statement that it is at, by the event loop's time."""


class Lanes:
    """The connections of one store's batches."""

    def __init__(self, database: Database, *, hold: bool, by_key: bool) -> None:
        self._database = database
        self._loop = asyncio.get_running_loop()
        self._hold = hold
        self._by_key = by_key
        self._free: list[Lane] = []
        self._sending: set[Lane] = set()
        self._watcher: asyncio.TimerHandle | None = None

    def take_free(self) -> Lane | None:
        """A kept connection, if one is at hand and usable."""
        if self._free and self._database.is_usable(self._free[-1].connection):
            return self._free.pop()
        return None

    async def ask(self, lane: Lane, statement: str, *arguments: object) -> Any:
        """The first row, or None."""
        lane.until = self._loop.time() + self._database.client_timeout()
        self._sending.add(lane)
        if self._watcher is None:
            self._watcher = self._loop.call_later(WATCH_SECONDS, self._watch)
        try:
            if lane.prepared is None:
                return await lane.connection.fetchrow(self._database.sql(statement), *arguments)
            ready = lane.prepared.get(statement)
            if ready is None:
                ready = await lane.connection.prepare(self._database.sql(statement))
                lane.prepared[statement] = ready
            return await ready.fetchrow(*arguments)
        finally:
            self._sending.discard(lane)

    def _watch(self) -> None:
        """Drop the connections whose server has gone silent.

        One look for all in a while: a time-out of each call's own costs a good part of its sending.
        """
        self._watcher = None
        for lane in self._sending:
            if self._loop.time() > lane.until:
                self._database.drop(lane.connection)
        if self._sending:
            self._watcher = self._loop.call_later(WATCH_SECONDS, self._watch)

    async def take(self, *, apart: bool) -> Lane:
        while self._free and not apart:
            lane = self._free.pop()
            if self._database.is_usable(lane.connection):
                return lane
            await self._database.release(lane.connection)
        connection = await self._database.acquire()
        if apart or not self._by_key:
            return Lane(connection, None)
        try:
            await connection.execute(BY_KEY, timeout=self._database.client_timeout())
        except LOST as error:
            self._database.drop(connection)
            await self._database.release(connection)
            raise Retry(describe(error)) from None
        return Lane(connection, {})

    async def put(self, lane: Lane, *, keep: bool) -> None:
        if keep and self._hold and self._database.is_usable(lane.connection):
            self._free.append(lane)
        else:
            await self._database.release(lane.connection)

    async def aclose(self) -> None:
        """Let the connections go."""
        if self._watcher is not None:
            self._watcher.cancel()
        for lane in self._sending:
            # Somebody waits alone for a server that does not answer.
            self._database.drop(lane.connection)
        while self._free:
            connection = self._free.pop().connection
            if self._by_key:
                # What it was set to must not leak into the pool.
                self._database.drop(connection)
            await self._database.release(connection)
