"""Calls that share a statement: the hot calls of a step's life, gathered by core's Batcher.

A ``Batched`` statement writes any number of calls as one transaction, a row of arrays for each, sorted
by key, so that the batches of two processes cannot wait for each other in a circle. When the answer to
one is lost, nothing is guessed: every row is looked for by its token, and what is not found goes out
again, once the server can no longer act on what was sent (CON-3).
"""

from __future__ import annotations

import asyncio
import copy
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID
from weakref import WeakKeyDictionary

import asyncpg

from flowstore_core import FlowStoreError, OutcomeUnknownError, StoreUnavailableError
from flowstore_core.batching import (
    REQUEUE,
    BatchedOperation,
    Batcher,
    BatchError,
    PendingCall,
    TaskWorkers,
    Transfer,
)
from flowstore_core.instrumentation import Resolution, report_batch
from flowstore_postgres.acknowledgements import Lost, confirm, report_lost, settle
from flowstore_postgres.batched import Batched, Row
from flowstore_postgres.columns import pack
from flowstore_postgres.connection import Connection, Peer
from flowstore_postgres.errors import LOST, Retry, describe
from flowstore_postgres.lanes import Lane, Lanes

if TYPE_CHECKING:
    from flowstore_postgres.database import Database

log = logging.getLogger("flowstore_postgres")

LANES = 2
UNSEEN = Peer(pid=0, started=None, clock_offset=0.0)
MOST_LANES = 4
"""For so many callers at once that two lanes would send only batches of full size."""
# The classes of SQLSTATE that one row can be the reason of: a value, a constraint, a limit of the server,
# a trigger. Any other would meet each half of a batch again; a lock that is held, for as long again.
OF_A_ROW = frozenset({"22", "23", "54", "P0"})

# Whoever holds a run for long must hold up the calls on that run alone: they leave the batch, and wait in
# others, apart.
FIND_FREE_RUNS = """
SELECT run_id FROM {schema}.runs WHERE run_id = ANY($1::uuid[]) FOR SHARE SKIP LOCKED
"""


class _LockedRunsError(Exception):
    """Somebody else has held a run, or a step, of a batch for too long; nothing happened."""

    def __init__(self, free: set[UUID]) -> None:
        super().__init__()
        self.free = free
        """The runs that nobody holds."""


class Batches:
    """The batched statements of one store, and the connections held for them."""

    def __init__(self, database: Database, *, pool_size: int, patience: float, pgbouncer: bool) -> None:
        self._database = database
        self._most_lanes = max(1, min(MOST_LANES, (pool_size + 1) // 2))
        # With a single connection every other call needs it as well.
        hold = pool_size > 1
        self._connections = Lanes(database, hold=hold, by_key=hold and not pgbouncer)
        self._patience = patience
        self._batchers: dict[bool, Batcher] = {}
        """By whether they are for runs that somebody holds."""
        self._methods: dict[Batched, BatchedOperation[Row, Any]] = {}
        self._apart: dict[Batched, BatchedOperation[Row, Any]] = {}
        self._loop = asyncio.get_running_loop()
        self._unacknowledged: WeakKeyDictionary[OutcomeUnknownError, Sequence[Lost]] = WeakKeyDictionary()
        self._locked: Counter[UUID] = Counter()
        """How many calls wait for each run that somebody holds."""

    def call(
        self, batched: Batched, row: Row, give_back: Callable[[Any], Awaitable[None]] | None = None
    ) -> Coroutine[Any, Any, Any]:
        """Write one row with the next batch; awaited, it gives the answer to it."""
        if self._locked and row[0] in self._locked:
            return self._wait_apart(batched, row, give_back)
        method = self._methods.get(batched) or self._method(batched, apart=False)
        if self._batchers[False].is_idle and batched.alone is not None:
            return self._call_alone(method, batched, row, give_back)
        return method.submit((row[0].int, row[1]), row, give_back)

    async def _call_alone(
        self,
        method: BatchedOperation[Row, Any],
        batched: Batched,
        row: Row,
        give_back: Callable[[Any], Awaitable[None]] | None,
    ) -> Any:
        """Send a row at once, in its caller's own task: there is nobody to share a batch with."""
        database, batcher = self._database, self._batchers[False]
        if not batcher.is_idle or (lane := self._connections.take_free()) is None:
            return await method.submit((row[0].int, row[1]), row, give_back)
        batcher.acquire_direct_slot()
        if database.observers or log.isEnabledFor(logging.DEBUG):
            report_batch(database.observers, log, batched.operation, 1, 0.0)
        lost: list[Lost] = []
        try:
            (answer,) = await self._send(lane, batched, [row], lost)
        except asyncio.CancelledError:
            database.drop(lane.connection)
            if give_back is not None:
                lost.append(database.lost(lane.peer, batcher.time()))
                batcher.start_compensation(give_back, self._unknown(batched, lost))
            raise
        except (_LockedRunsError, Retry, asyncpg.PostgresError):
            answer = REQUEUE
        finally:
            try:
                await self._connections.put(lane, keep=True)
            finally:
                batcher.release_direct_slot()
        if answer is REQUEUE:
            if not lost:
                # What went wrong, the ordinary way knows how to deal with.
                return await method.submit((row[0].int, row[1]), row, give_back)
            answer = await database.run(self._run_lost(batched, row, lost), give_back)
        return answer if batched.to_result is None else batched.to_result(row, answer)

    async def _run_lost(self, batched: Batched, row: Row, lost: list[Lost]) -> Any:
        (answer,) = await self._run(batched, [row], apart=True, lost=lost)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _unknown(self, batched: Batched, lost: Sequence[Lost]) -> OutcomeUnknownError:
        error = OutcomeUnknownError(batched.operation)
        self._unacknowledged[error] = tuple(lost)
        return error

    def unacknowledged(self, error: OutcomeUnknownError) -> Sequence[Lost]:
        """The statements on which an unknown outcome depends."""
        lost = self._unacknowledged.get(error)
        if lost is None:
            # The batch was abandoned with its lane, so its peer is not known.
            lost = self._unacknowledged[error] = (self._database.lost(UNSEEN, self._loop.time()),)
        return lost

    async def _wait_apart(
        self, batched: Batched, row: Row, give_back: Callable[[Any], Awaitable[None]] | None
    ) -> Any:
        """Write a row of a run that somebody holds, in a batch with others that wait for such runs."""
        run_id = row[0]
        self._locked[run_id] += 1
        try:
            return await self._method(batched, apart=True).submit((run_id.int, row[1]), row, give_back)
        finally:
            self._unlock(run_id)

    def _move_apart(self, batched: Batched, call: PendingCall) -> None:
        """Somebody has held the row's run, or its step, for too long; nothing happened."""
        run_id = call.item[0]
        self._locked[run_id] += 1
        call.future.add_done_callback(lambda _: self._unlock(run_id))
        self._method(batched, apart=True).accept_transfer(call)

    def _unlock(self, run_id: UUID) -> None:
        self._locked[run_id] -= 1
        if not self._locked[run_id]:
            del self._locked[run_id]

    def _method(self, batched: Batched, *, apart: bool) -> BatchedOperation[Row, Any]:
        batcher = self._batchers.get(apart)
        if batcher is None:
            # Those who wait take at most as many connections as those who do not.
            most = min(LANES, self._most_lanes) if apart else self._most_lanes
            batcher = self._batchers[apart] = Batcher(
                workers=lambda batcher: TaskWorkers(batcher, min(LANES, most), most),
                queue_timeout=self._patience,
                timeout_hint="raise pool_size or acquire_timeout, or send fewer calls at once",
                observers=self._database.observers,
                log=log,
            )
        methods = self._apart if apart else self._methods
        method = methods.get(batched)
        if method is None:

            async def run(rows: Sequence[Row]) -> Sequence[Any]:
                return await self._run(batched, rows, apart=apart)

            # In the order of the keys, so that no two batches wait for each other.
            method = methods[batched] = batcher.operation(
                batched.operation,
                run,
                keyed=True,
                ordered=True,
                coalesce=batched.coalesce,
                size_of=batched.size_of,
                decode=batched.to_result,
            )
        return method

    async def _run(
        self, batched: Batched, rows: Sequence[Row], *, apart: bool, lost: list[Lost] | None = None
    ) -> Sequence[Any]:
        """The answer to each row, or the error that its caller gets.

        ``apart`` leaves the lanes free; ``lost`` are statements with these rows that were sent before.
        """
        database, observers = self._database, self._database.observers
        answers: dict[int, Any] = {}
        left = list(range(len(rows)))
        lost = [] if lost is None else lost
        shaken = False
        """Whether a reply was lost at all."""

        async def attempt() -> None:
            nonlocal left, shaken
            lane = await self._connections.take(apart=apart)
            connection = lane.connection
            try:
                if lost:
                    shaken = True
                    if (missing := await self._find(connection, batched, rows, left, answers)) == left:
                        # Had any row been found, the statement would be known to have ended.
                        await settle(database, connection, lost)
                        missing = await self._find(connection, batched, rows, left, answers)
                    lost.clear()
                    report_lost(observers, batched.operation, Resolution.HAPPENED, len(left) - len(missing))
                    gone = Resolution.REPEATED if batched.find is None else Resolution.DID_NOT_HAPPEN
                    report_lost(observers, batched.operation, gone, len(missing))
                    left = missing
                while left:
                    try:
                        found = await self._send(lane, batched, [rows[n] for n in left], lost)
                    except _LockedRunsError as locked:
                        elsewhere = Transfer(partial(self._move_apart, batched))
                        stuck = [n for n in left if rows[n][0] not in locked.free] or left
                        answers.update((n, elsewhere) for n in stuck)
                        left = [n for n in left if n not in answers]
                    else:
                        answers.update(zip(left, found, strict=True))
                        left = []
                if shaken:
                    await confirm(database, connection)
            except asyncio.CancelledError:
                database.drop(connection)
                raise
            finally:
                await self._connections.put(lane, keep=not apart)

        try:
            await database.retrying(attempt, batched.operation)
        except FlowStoreError as error:
            for n, answer in answers.items():
                if not isinstance(answer, Transfer):
                    # Found or written, and not confirmed.
                    answers[n] = self._unknown(batched, lost)
            for n in left:
                answers[n] = self._unknown(batched, lost) if lost else copy.copy(error)
            number = sum(isinstance(answer, OutcomeUnknownError) for answer in answers.values())
            report_lost(observers, batched.operation, Resolution.UNKNOWN, number)
        return [answers[n] for n in range(len(rows))]

    async def _find(
        self,
        connection: Connection,
        batched: Batched,
        rows: Sequence[Row],
        wanted: Sequence[int],
        answers: dict[int, Any],
    ) -> list[int]:
        """Look for the token of each row; return those that have none."""
        if batched.find is None:
            return list(wanted)
        missing = []
        for n in wanted:
            row = rows[n]
            found = await self._database.ask(connection, batched.find, row[0], row[1], row[batched.token])
            if found is None:
                missing.append(n)
            else:
                answers[n] = batched.found(found)
        return missing

    async def _send(
        self, lane: Lane, batched: Batched, rows: Sequence[Row], lost: list[Lost]
    ) -> Sequence[Any]:
        database = self._database
        connection = lane.connection
        sent, not_after = database.not_after(lane.peer)
        try:
            if batched.alone is not None and len(rows) == 1:
                found = await self._connections.ask(lane, batched.alone, not_after, database.now(), *rows[0])
                if found is not None:
                    return [batched.found(found)]
            statement, columns = pack(batched.statement, rows)
            found = await self._connections.ask(lane, statement, not_after, database.now(), *columns)
        except LOST as error:
            database.drop(connection)
            lost.append(database.lost(lane.peer, sent))
            raise Retry(describe(error)) from None
        except asyncpg.LockNotAvailableError:
            if lane.prepared is None:
                raise
            runs = {row[0] for row in rows}
            try:
                free = await connection.fetch(
                    database.sql(FIND_FREE_RUNS), runs, timeout=database.client_timeout()
                )
            except LOST as error:
                database.drop(connection)
                raise Retry(describe(error)) from None
            raise _LockedRunsError({one[0] for one in free}) from None
        except asyncpg.InvalidCachedStatementError as error:
            # The tables were changed under it; a new connection prepares anew.
            database.drop(connection)
            raise Retry(describe(error)) from None
        except asyncpg.PostgresError as error:
            if len(rows) > 1 and (error.sqlstate or "")[:2] in OF_A_ROW:
                raise BatchError(describe(error)) from None
            raise
        if not found["in_time"]:
            # Our idea of the server's clock is off; a new connection brings a better one.
            database.drop(connection)
            raise Retry(StoreUnavailableError("the statement reached PostgreSQL too late"))
        return batched.read(rows, found)

    async def aclose(self, seconds: float) -> None:
        """Answer every call that was taken, wait for what is given back, let the connections go."""
        for _, batcher in sorted(self._batchers.items()):
            await batcher.drain(seconds)
        await self._connections.aclose()
