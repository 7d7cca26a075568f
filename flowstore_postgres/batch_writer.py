"""Batched writes: concurrent calls of a step's lifecycle share a statement, through core's Batcher.

A BatchStatement writes any number of calls as one transaction, with an array for each column. The rows are
sorted by key, so that batches of two processes cannot deadlock. After a lost reply the note of the batch is
probed for, or each row by its token; rows that were not written are sent again, once the server can no longer
execute the lost statement (CON-3).

A call takes the direct path when nothing else is queued: its row is sent alone, by the caller's own task. A
row of a locked run leaves its batch and waits in a batch of contended rows, so that it delays no call on
another run. Contended rows have their own Batcher: see database.py.
"""

from __future__ import annotations

import asyncio
import copy
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any
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
from flowstore_postgres.array_params import encode_rows
from flowstore_postgres.batch_statement import BatchStatement, Row
from flowstore_postgres.commit_resolution import (
    FIND_NOTE,
    UnackedStatement,
    ensure_durable,
    fence,
    report_resolution,
)
from flowstore_postgres.connection import Connection, ServerProcess
from flowstore_postgres.errors import (
    CONNECTION_LOST_ERRORS,
    ROW_LEVEL_SQLSTATE_CLASSES,
    RetryableError,
    describe,
)
from flowstore_postgres.pool import ConnectionPool
from flowstore_postgres.prepared_connections import PreparedConnection, PreparedConnections

log = logging.getLogger("flowstore_postgres")

WORKERS = 2
MAX_WORKERS = 4
"""Under so much load that WORKERS would send only batches of the maximum size."""
UNKNOWN_PROCESS = ServerProcess(pid=0, started=None, clock_skew=0.0)

# After a lock timeout: rows of runs that are locked move to the contended batches, the others are sent again.
FIND_UNLOCKED_RUNS = """
SELECT run_id FROM {schema}.runs WHERE run_id = ANY($1::uuid[]) FOR SHARE SKIP LOCKED
"""

OnAbandoned = Callable[[Any], Awaitable[None]]


class _LockedRunsError(Exception):
    """A batch ran into the lock timeout on a run or a step; nothing of it happened."""

    def __init__(self, unlocked: set[UUID]) -> None:
        super().__init__()
        self.unlocked = unlocked
        """The runs of the batch that are not locked."""


class BatchWriter:
    """The batched writes of one store, and the connections reserved for them."""

    def __init__(
        self, pool: ConnectionPool, *, pool_size: int, queue_timeout: float, pgbouncer: bool
    ) -> None:
        self._pool = pool
        # A single connection is needed by every other call too.
        keep = pool_size > 1
        self._connections = PreparedConnections(pool, keep=keep, index_only_plans=keep and not pgbouncer)

        def new_batcher(workers: int, limit: int) -> Batcher:
            return Batcher(
                workers=lambda batcher: TaskWorkers(batcher, workers, limit),
                queue_timeout=queue_timeout,
                timeout_hint="raise pool_size or acquire_timeout, or send fewer calls at once",
                observers=pool.observers,
                log=log,
            )

        limit = max(1, min(MAX_WORKERS, (pool_size + 1) // 2))
        workers = min(WORKERS, limit)
        self._batcher = new_batcher(workers, limit)
        self._operations: dict[BatchStatement, BatchedOperation[Row, Any]] = {}
        self._contended_batcher = new_batcher(workers, workers)
        self._contended: dict[BatchStatement, BatchedOperation[Row, Any]] = {}
        self._loop = asyncio.get_running_loop()
        self._unacked: WeakKeyDictionary[OutcomeUnknownError, Sequence[UnackedStatement]] = (
            WeakKeyDictionary()
        )
        self._locked_runs: Counter[UUID] = Counter()
        """The number of contended calls of each locked run."""

    def submit(
        self, statement: BatchStatement, row: Row, on_abandoned: OnAbandoned | None = None
    ) -> Coroutine[Any, Any, Any]:
        """Write one row with the next batch; the coroutine returns the row's result."""
        if self._locked_runs and row[0] in self._locked_runs:
            return self._submit_contended(statement, row, on_abandoned)
        operation = self._operations.get(statement) or self._operation(statement, contended=False)
        if self._batcher.is_idle and statement.single_sql is not None:
            return self._submit_direct(operation, statement, row, on_abandoned)
        return operation.submit((row[0].int, row[1]), row, on_abandoned)

    async def _submit_direct(
        self,
        operation: BatchedOperation[Row, Any],
        statement: BatchStatement,
        row: Row,
        on_abandoned: OnAbandoned | None,
    ) -> Any:
        """Send a row at once, in its caller's own task, because no other call could share its batch."""
        pool, batcher = self._pool, self._batcher
        if not batcher.is_idle or (prepared := self._connections.try_acquire()) is None:
            return await operation.submit((row[0].int, row[1]), row, on_abandoned)
        batcher.acquire_direct_slot()
        if pool.observers or log.isEnabledFor(logging.DEBUG):
            report_batch(pool.observers, log, statement.operation, 1, 0.0)
        unacked: list[UnackedStatement] = []
        try:
            (result,) = await self._send(prepared, statement, [row], unacked)
        except asyncio.CancelledError:
            pool.discard(prepared.connection)
            if on_abandoned is not None:
                unacked.append(UnackedStatement(prepared.process, pool.expires_at(batcher.time())))
                batcher.start_compensation(on_abandoned, self._unknown(statement, unacked))
            raise
        except (_LockedRunsError, RetryableError, asyncpg.PostgresError):
            result = REQUEUE
        finally:
            try:
                await self._connections.release(prepared, keep=True)
            finally:
                batcher.release_direct_slot()
        if result is REQUEUE:
            if not unacked:
                # The batched path handles the error.
                return await operation.submit((row[0].int, row[1]), row, on_abandoned)
            result = await pool.shielded.run(self._retry_unacked(statement, row, unacked), on_abandoned)
        return result if statement.to_result is None else statement.to_result(row, result)

    async def _retry_unacked(
        self, statement: BatchStatement, row: Row, unacked: list[UnackedStatement]
    ) -> Any:
        (result,) = await self._run(statement, [row], contended=True, unacked=unacked)
        if isinstance(result, Exception):
            raise result
        return result

    def _unknown(self, statement: BatchStatement, unacked: Sequence[UnackedStatement]) -> OutcomeUnknownError:
        error = OutcomeUnknownError(statement.operation)
        self._unacked[error] = tuple(unacked)
        return error

    def unacked_statements(self, error: OutcomeUnknownError) -> Sequence[UnackedStatement]:
        """The statements on which an unknown outcome depends."""
        unacked = self._unacked.get(error)
        if unacked is None:
            # The batch was abandoned with its worker, so the server process is not known.
            expires_at = self._pool.expires_at(self._loop.time())
            unacked = self._unacked[error] = (UnackedStatement(UNKNOWN_PROCESS, expires_at),)
        return unacked

    async def _submit_contended(
        self, statement: BatchStatement, row: Row, on_abandoned: OnAbandoned | None
    ) -> Any:
        """Write a row of a locked run, in a batch of contended rows."""
        run_id = row[0]
        self._locked_runs[run_id] += 1
        try:
            operation = self._operation(statement, contended=True)
            return await operation.submit((run_id.int, row[1]), row, on_abandoned)
        finally:
            self._contended_call_done(run_id)

    def _move_to_contended(self, statement: BatchStatement, call: PendingCall) -> None:
        """Move a call whose row ran into the lock timeout; nothing of it happened."""
        run_id = call.item[0]
        self._locked_runs[run_id] += 1
        call.future.add_done_callback(lambda _: self._contended_call_done(run_id))
        self._operation(statement, contended=True).accept_transfer(call)

    def _contended_call_done(self, run_id: UUID) -> None:
        self._locked_runs[run_id] -= 1
        if not self._locked_runs[run_id]:
            del self._locked_runs[run_id]

    def _operation(self, statement: BatchStatement, *, contended: bool) -> BatchedOperation[Row, Any]:
        batcher = self._contended_batcher if contended else self._batcher
        operations = self._contended if contended else self._operations
        operation = operations.get(statement)
        if operation is None:

            async def run(rows: Sequence[Row]) -> Sequence[Any]:
                return await self._run(statement, rows, contended=contended)

            # Ordered by key, so that two batches cannot deadlock.
            operation = operations[statement] = batcher.operation(
                statement.operation,
                run,
                keyed=True,
                ordered=True,
                coalesce=statement.coalesce,
                size_of=statement.size_of,
                decode=statement.to_result,
            )
        return operation

    async def _run(
        self,
        statement: BatchStatement,
        rows: Sequence[Row],
        *,
        contended: bool,
        unacked: list[UnackedStatement] | None = None,
    ) -> Sequence[Any]:
        """The result of each row, or the error for its caller.

        ``contended`` uses none of the kept connections; ``unacked`` are earlier statements with these rows.
        """
        pool, observers = self._pool, self._pool.observers
        results: dict[int, Any] = {}
        left = list(range(len(rows)))
        unacked = [] if unacked is None else unacked
        had_loss = False
        """Whether any reply was lost."""

        async def attempt() -> None:
            nonlocal left, had_loss
            prepared = await self._connections.acquire(contended=contended)
            connection = prepared.connection
            try:
                if unacked:
                    had_loss = True
                    sent_rows = {n: rows[n] for n in left}
                    written = await self._find_written(connection, statement, sent_rows, unacked)
                    if not written:
                        # One row that was written proves that the statement has ended.
                        await fence(pool, connection, unacked)
                        written = await self._find_written(connection, statement, sent_rows, unacked)
                    unacked.clear()
                    results.update(written)
                    left = [n for n in left if n not in written]
                    report_resolution(observers, statement.operation, Resolution.HAPPENED, len(written))
                    report_resolution(observers, statement.operation, Resolution.DID_NOT_HAPPEN, len(left))
                while left:
                    try:
                        sent = await self._send(prepared, statement, [rows[n] for n in left], unacked)
                    except _LockedRunsError as locked:
                        transfer = Transfer(partial(self._move_to_contended, statement))
                        blocked = [n for n in left if rows[n][0] not in locked.unlocked] or left
                        results.update((n, transfer) for n in blocked)
                        left = [n for n in left if n not in results]
                    else:
                        results.update(zip(left, sent, strict=True))
                        left = []
                if had_loss:
                    await ensure_durable(pool, connection)
            except asyncio.CancelledError:
                pool.discard(connection)
                raise
            finally:
                await self._connections.release(prepared, keep=not contended)

        try:
            await pool.retries.run(attempt, statement.operation)
        except FlowStoreError as error:
            for n, result in results.items():
                if not isinstance(result, Transfer):
                    # Found or written, but not confirmed to be durable.
                    results[n] = self._unknown(statement, unacked)
            for n in left:
                results[n] = self._unknown(statement, unacked) if unacked else copy.copy(error)
            unknown = sum(isinstance(result, OutcomeUnknownError) for result in results.values())
            report_resolution(observers, statement.operation, Resolution.UNKNOWN, unknown)
        return [results[n] for n in range(len(rows))]

    async def _find_written(
        self,
        connection: Connection,
        statement: BatchStatement,
        rows: Mapping[int, Row],
        unacked: Sequence[UnackedStatement],
    ) -> dict[int, Any]:
        """The results of the rows that unacknowledged statements wrote, with the numbers of the rows."""
        written: dict[int, Any] = {}
        if statement.probe_sql is not None:
            for n, row in rows.items():
                token = row[statement.token_column]
                found = await self._pool.probe(connection, statement.probe_sql, row[0], row[1], token)
                if found is not None:
                    written[n] = statement.decode_probe(found)
            return written
        for one in unacked:
            note = None if one.note is None else await self._pool.probe(connection, FIND_NOTE, *one.note)
            if note is None:
                continue
            keys = None
            if note["run_ids"] is not None:
                keys = set(zip(note["run_ids"], note["step_keys"], strict=True))
            for n, row in rows.items():
                if keys is None or row[:2] in keys:
                    written[n] = statement.decode_probe(note)
        return written

    async def _send(
        self,
        prepared: PreparedConnection,
        statement: BatchStatement,
        rows: Sequence[Row],
        unacked: list[UnackedStatement],
    ) -> Sequence[Any]:
        pool, fetchrow = self._pool, self._connections.fetchrow
        connection = prepared.connection
        note = prepared.notes.next() if statement.probe_sql is None else None
        note_values = note or ()
        sent, deadline = pool.deadline(prepared.process)
        try:
            if statement.single_sql is not None and len(rows) == 1:
                found = await fetchrow(
                    prepared, statement.single_sql, deadline, pool.now(), *rows[0], *note_values
                )
                if found is not None:
                    return [statement.decode_probe(found)]
            sql, columns = encode_rows(statement.batch_sql, rows)
            found = await fetchrow(prepared, sql, deadline, pool.now(), *columns, *note_values)
        except CONNECTION_LOST_ERRORS as error:
            pool.discard(connection)
            unacked.append(UnackedStatement(prepared.process, pool.expires_at(sent), note))
            raise RetryableError(describe(error)) from None
        except asyncpg.LockNotAvailableError:
            if prepared.prepared is None:
                raise
            runs = {row[0] for row in rows}
            try:
                unlocked = await connection.fetch(
                    pool.sql(FIND_UNLOCKED_RUNS), runs, timeout=pool.client_timeout()
                )
            except CONNECTION_LOST_ERRORS as error:
                pool.discard(connection)
                raise RetryableError(describe(error)) from None
            raise _LockedRunsError({row[0] for row in unlocked}) from None
        except asyncpg.InvalidCachedStatementError as error:
            # The tables were altered since; a new connection prepares its statements again.
            pool.discard(connection)
            raise RetryableError(describe(error)) from None
        except asyncpg.PostgresError as error:
            if len(rows) > 1 and (error.sqlstate or "")[:2] in ROW_LEVEL_SQLSTATE_CLASSES:
                raise BatchError(describe(error)) from None
            raise
        if not found["before_deadline"]:
            # The measured clock skew is wrong; a new connection measures it again.
            pool.discard(connection)
            raise RetryableError(StoreUnavailableError("the statement reached PostgreSQL too late"))
        return statement.decode_batch(rows, found)

    async def aclose(self, seconds: float) -> None:
        """Finish every accepted call and every compensation, and release the connections."""
        # In this order: the first may transfer calls to the second.
        await self._batcher.drain(seconds)
        await self._contended_batcher.drain(seconds)
        await self._connections.aclose()
