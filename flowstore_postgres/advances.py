"""Advancing runs on PostgreSQL: end a step, settle requests and complete the run (QUE-4, QUE-6).

Two steps of one run may end at once, and the later one must find the earlier one ended. So the transaction
locks the run before the snapshot in which it reads the run's steps. The lock is FOR NO KEY UPDATE: it keeps
other advances of the run away, and every call that dispatches, claims, starts or skips one of its steps. It
lets claim_next_steps pass.

Concurrent advances share a transaction. It skips runs that are locked; their calls join the next one, and
later use a transaction of their own, which waits.

Most steps have successors that wait for them alone. ADVANCE_STEPS is the fast path for these: it closes the
attempts and dispatches the successors. All other advances, and those that it leaves alone, are decided one by
one in the same transaction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg

from flowstore_core import (
    ClaimLostError,
    FlowStoreError,
    RunAdvance,
    RunNotFoundError,
    RunStatus,
    StaleAttemptError,
    StepAlreadyCompletedError,
    StepNotFoundError,
    StepRequest,
    StepStatus,
)
from flowstore_core.batching import REQUEUE, BatchedOperation, Batcher
from flowstore_postgres.array_params import encode_columns
from flowstore_postgres.errors import ROW_LEVEL_SQLSTATE_CLASSES
from flowstore_postgres.requests import (
    Changes,
    Settlement,
    StepRows,
    dispatch_steps,
    read_steps,
    requested_keys,
    settle,
    skip_steps,
)
from flowstore_postgres.transactions import BEGIN_INDEX_ONLY, Transaction, Transactions

MAX_BATCH = 256
"""Maximum number of calls that share a transaction."""
MAX_FOUND_LOCKED = 2
"""After more shared transactions than this that found its run locked, a call waits for the lock."""

# The time is read once the runs are locked.
LOCK_RUNS = """
SELECT array_agg(run_id) AS run_ids, array_agg(status) AS statuses, max(now) AS now FROM (
    SELECT run_id, status, coalesce($2, clock_timestamp()) AS now FROM (
        SELECT run_id, status FROM {schema}.runs WHERE run_id = ANY($1::uuid[])
        ORDER BY run_id FOR NO KEY UPDATE{wait}
    ) locked
) timed
"""
# Fast path, for the shared transaction.
LOCK_UNLOCKED_RUNS = LOCK_RUNS.replace("{wait}", " SKIP LOCKED")
# Slow path, for a dedicated transaction.
WAIT_FOR_RUN = LOCK_RUNS.replace("{wait}", "")
# Fast path: closes open attempts ($3 to $9) and dispatches the steps of requests ($10 to $16), each of which
# names the number of its advance. Leaves an advance alone if its attempt is not open, or if a row of one of
# the requested steps exists. No call adds such a row meanwhile, because the run is locked. Writes table
# pending itself, in place of the trigger. Subqueries instead of joins, so that rows are found by key alone.
ADVANCE_STEPS = """
WITH advance AS MATERIALIZED (
    SELECT * FROM unnest($3::uuid[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[], $9::text[])
           WITH ORDINALITY AS a (run_id, step_key, attempt, owner, status, output_json, error_message, n)
), request AS MATERIALIZED (
    SELECT q.*, number::bigint AS n, ($3::uuid[])[number::bigint] AS run_id
    FROM unnest($10::text[], $11::text[], $12::timestamptz[], $13::text[], $14::text[], $15::text[],
                $16::text[])
         AS q (number, step_key, due_at, queue, priority, step_type, input_json)
), closed AS (
    UPDATE {schema}.steps s
    SET status = a.status, output_json = a.output_json, error_message = a.error_message,
        completed_at = coalesce($1, greatest(clock_timestamp(), started_at)),
        pending_writes = s.pending_writes + 1
    FROM advance a
    WHERE s.run_id = a.run_id AND s.step_key = a.step_key AND s.status = 'Running'
      AND s.last_attempt = a.attempt::bigint AND (a.owner IS NULL OR s.started_owner = a.owner)
      AND a.n <> ALL (ARRAY(
          SELECT q.n FROM request q
          WHERE (SELECT true FROM {schema}.steps s WHERE s.run_id = q.run_id AND s.step_key = q.step_key)))
    RETURNING s.run_id, s.step_key, a.n
), ended AS (
    DELETE FROM {schema}.pending p USING closed c WHERE p.run_id = c.run_id AND p.step_key = c.step_key
), dispatched AS (
    INSERT INTO {schema}.steps (run_id, step_key, dispatched_at, due_at, dispatch_queue, dispatch_priority,
                                dispatch_step_type, dispatch_input_json, pending_writes, stall_noted)
    SELECT q.run_id, q.step_key, $2, q.due_at, q.queue, q.priority::smallint, q.step_type,
           q.input_json, 1, false
    FROM request q WHERE q.n <> ALL (ARRAY(SELECT n FROM advance EXCEPT SELECT n FROM closed))
    RETURNING run_id, step_key, dispatch_queue, dispatch_priority, coalesce(due_at, dispatched_at) AS ready_at
), queued AS (
    INSERT INTO {schema}.pending (run_id, step_key, queue, priority, ready_at, late)
    SELECT d.run_id, d.step_key, d.dispatch_queue, d.dispatch_priority,
           greatest(d.ready_at, (SELECT coalesce(w.expires_at, 'infinity') FROM {schema}.waiters w
                                 WHERE w.run_id = d.run_id AND w.step_key = d.step_key
                                   AND w.delivered_at IS NULL)),
           d.ready_at < clock_timestamp() - interval '1 second'
    FROM dispatched d
)
SELECT array_agg(n) AS closed FROM closed
"""
READ_OUTCOME = "SELECT output_json, error_message FROM {schema}.steps WHERE run_id = $1 AND step_key = $2"
# Deletes the rows of pending itself, in place of the trigger.
CLOSE_ATTEMPTS = """
WITH closed AS (
    SELECT * FROM unnest($2::uuid[], $3::text[], $4::text[], $5::text[], $6::text[])
           AS a (run_id, step_key, status, output_json, error_message)
), ended AS (
    DELETE FROM {schema}.pending p USING closed a WHERE p.run_id = a.run_id AND p.step_key = a.step_key
)
UPDATE {schema}.steps s
SET status = a.status, output_json = a.output_json, error_message = a.error_message,
    completed_at = coalesce($1, greatest(clock_timestamp(), started_at)),
    pending_writes = s.pending_writes + 1
FROM closed a WHERE s.run_id = a.run_id AND s.step_key = a.step_key
"""
# The runs that are not finished: a step is not terminal, or an unstarted key has a dispatch or a live claim.
# Every queued step that is not terminal has a row in pending, which is found faster than a step among many
# that have ended. The locks wait for a record_step_complete in progress, and then the row is checked again.
FIND_UNFINISHED = """
SELECT run_id FROM unnest($1::uuid[]) AS a (run_id)
WHERE coalesce(
    (SELECT true FROM {schema}.pending p WHERE p.run_id = a.run_id LIMIT 1 FOR KEY SHARE),
    (SELECT true FROM {schema}.steps s
     WHERE s.run_id = a.run_id
       AND (s.status IN ('Pending', 'Running')
            OR s.status IS NULL AND s.dispatched_at IS NOT NULL
            OR s.status IS NULL AND s.claimed_at IS NOT NULL
               AND (s.claim_expires_at IS NULL OR s.claim_expires_at > $2))
     LIMIT 1 FOR SHARE),
    false)
"""
COMPLETE_RUNS = """
UPDATE {schema}.runs r
SET completed_at = coalesce($1, clock_timestamp()), status = CASE
    WHEN a.failed_as IS NOT NULL
         AND (a.stayed_behind
              OR EXISTS (SELECT FROM {schema}.steps s WHERE s.run_id = a.run_id AND s.status = 'Failed'))
    THEN a.failed_as ELSE a.complete_as END
FROM unnest($2::uuid[], $3::text[], $4::text[], $5::boolean[])
     AS a (run_id, complete_as, failed_as, stayed_behind)
WHERE r.run_id = a.run_id
"""


@dataclass(slots=True, eq=False)
class Advance:
    """A call of advance_run."""

    run_id: UUID
    step_key: str
    status: StepStatus
    attempt: int
    owner: str | None
    output_json: str | None
    error_message: str | None
    dispatch: Sequence[StepRequest]
    complete_as: RunStatus | None
    failed_as: RunStatus | None
    found_locked: int = 0
    """The number of shared transactions that skipped the run because it was locked, or not found."""

    @property
    def is_simple(self) -> bool:
        """Whether each requested step will be dispatched, unless a row of it exists."""
        return all(
            not request.after or (request.after == (self.step_key,) and self.status in request.accept)
            for request in self.dispatch
        )


class _Decision(NamedTuple):
    """The effects of an advance that raises no error."""

    advance: Advance
    closes: bool
    """Whether the attempt is open; otherwise it was closed with the same outcome."""
    settlement: Settlement | None
    """None on a terminal run."""


async def advance_runs(transaction: Transaction, lock_runs: str, advances: Sequence[Advance]) -> list[Any]:
    """Advance runs; a result, an error or REQUEUE for each call.

    Several advances of one run take effect in their order. A call whose run is not found, or is skipped by
    ``lock_runs``, gets a RunNotFoundError.
    """
    run_ids = list({advance.run_id for advance in advances})
    locked = await transaction.row(lock_runs, run_ids, transaction.now)
    if locked["now"] is None:
        return [RunNotFoundError(advance.run_id) for advance in advances]
    statuses = dict(zip(locked["run_ids"], locked["statuses"], strict=True))
    now = locked["now"]
    calls = Counter(advance.run_id for advance in advances)
    simple = [
        advance
        for advance in advances
        if advance.is_simple and calls[advance.run_id] == 1 and statuses.get(advance.run_id) == "Running"
    ]
    decisions: dict[Advance, _Decision | FlowStoreError | None] = {}
    decisions.update(await _advance_simple(transaction, simple, now))
    others = [advance for advance in advances if advance not in decisions]
    decisions.update(await _advance_others(transaction, others, statuses, now))
    # The last advance of a run decides: during an earlier one the step of the last one was open.
    last: dict[UUID, tuple[Advance, Settlement]] = {}
    dispatching = set()
    for advance in advances:
        decision = decisions[advance]
        if isinstance(decision, _Decision) and decision.settlement is not None:
            last[advance.run_id] = advance, decision.settlement
            if decision.settlement.dispatched:
                dispatching.add(advance.run_id)
    completed = await _complete(
        transaction,
        [
            (advance, settlement)
            for advance, settlement in last.values()
            if advance.complete_as is not None and advance.run_id not in dispatching
        ],
        now,
    )
    return [
        _result(one, completed) if isinstance(one, _Decision) else REQUEUE if one is None else one
        for one in map(decisions.__getitem__, advances)
    ]


async def _advance_simple(
    transaction: Transaction, advances: Sequence[Advance], now: datetime
) -> dict[Advance, _Decision]:
    """Close attempts and dispatch their successors. Returns the advances that were not left alone."""
    if not advances:
        return {}
    # In key order, as batches of record_step_complete lock their rows, so that they cannot deadlock.
    advances = sorted(advances, key=lambda advance: (advance.run_id.int, advance.step_key))
    rows = [
        (
            advance.run_id,
            advance.step_key,
            str(advance.attempt),
            advance.owner,
            advance.status.value,
            advance.output_json,
            advance.error_message,
        )
        for advance in advances
    ]
    requests = [
        (
            str(n),
            request.step_key,
            request.due_at,
            request.queue,
            str(request.priority),
            request.step_type,
            request.input_json,
        )
        for n, advance in enumerate(advances, 1)
        for request in advance.dispatch
    ]
    request_columns = [*zip(*requests, strict=True)] or [()] * 7
    statement, columns = encode_columns(ADVANCE_STEPS, [*zip(*rows, strict=True), *request_columns])
    row = await transaction.row(statement, transaction.now, now, *columns)
    closed = [advances[n - 1] for n in row["closed"] or ()]
    return {advance: _Decision(advance, True, Settlement(advance.dispatch, (), False)) for advance in closed}


async def _advance_others(
    transaction: Transaction, advances: Sequence[Advance], statuses: Mapping[UUID, str], now: datetime
) -> dict[Advance, _Decision | FlowStoreError | None]:
    """Decide on each advance in turn, then write all of them.

    The run is locked and no row is written before the last decision, so the changes of the earlier advances
    are kept in memory.
    """
    if not advances:
        return {}
    keys: dict[UUID, set[str]] = {}
    for advance in advances:
        if advance.run_id in statuses:
            keys.setdefault(advance.run_id, set()).update(
                (advance.step_key, *requested_keys(advance.dispatch))
            )
    steps = await read_steps(transaction, keys, now)
    changes: dict[UUID, Changes] = {}
    decisions: dict[Advance, _Decision | FlowStoreError | None] = {}
    for advance in advances:
        try:
            status, rows_of_run = statuses.get(advance.run_id), steps.get(advance.run_id, {})
            decisions[advance] = await _decide(transaction, advance, status, rows_of_run, changes)
        except FlowStoreError as error:
            decisions[advance] = error
    decided = [one for one in decisions.values() if isinstance(one, _Decision)]
    closing = [one.advance for one in decided if one.closes]
    if closing:
        await transaction.execute(
            CLOSE_ATTEMPTS,
            transaction.now,
            [advance.run_id for advance in closing],
            [advance.step_key for advance in closing],
            [advance.status.value for advance in closing],
            [advance.output_json for advance in closing],
            [advance.error_message for advance in closing],
        )
    settled = [(one.advance, one.settlement) for one in decided if one.settlement is not None]
    for advance, settlement in settled:
        await skip_steps(transaction, advance.run_id, settlement.skipped, steps[advance.run_id], now)
    dispatches = [(advance.run_id, one) for advance, settled_ in settled for one in settled_.dispatched]
    await dispatch_steps(transaction, dispatches, now)
    return decisions


async def _decide(
    transaction: Transaction,
    advance: Advance,
    run_status: str | None,
    steps: StepRows,
    changes: dict[UUID, Changes],
) -> _Decision | None:
    """Check an advance in the order of its errors, and settle its requests.

    None: it needs a snapshot with the changes of the advances before it.
    """
    run_id, step_key = advance.run_id, advance.step_key
    if run_status is None:
        raise RunNotFoundError(run_id)
    earlier = changes.get(run_id)
    if earlier is not None and earlier.affect(step_key):
        return None
    step = steps.get(step_key)
    if step is None or step["status"] is None:
        raise StepNotFoundError(run_id, step_key)
    if step["reopened"] or advance.attempt != step["last_attempt"]:
        raise StaleAttemptError(run_id, step_key, advance.attempt, step["last_attempt"])
    if advance.owner is not None and advance.owner != step["started_owner"]:
        raise ClaimLostError(run_id, step_key)
    closes = step["status"] == "Running"
    if not closes:
        outcome = await transaction.row(READ_OUTCOME, run_id, step_key)
        if (step["status"], *outcome) != (advance.status.value, advance.output_json, advance.error_message):
            raise StepAlreadyCompletedError(run_id, step_key, step["last_attempt"])
        if earlier is not None:
            # The advance before it may complete the run.
            return None
    if run_status != "Running":
        return _Decision(advance, closes, None)
    if earlier is None:
        earlier = changes[run_id] = Changes(steps)
    earlier.end(step_key, advance.status)
    return _Decision(advance, closes, settle(advance.dispatch, steps, earlier))


async def _complete(
    transaction: Transaction, settled: Sequence[tuple[Advance, Settlement]], now: Any
) -> dict[UUID, Advance]:
    """Complete the runs in which nothing is left to do (QUE-6) and return the advances that did it."""
    if not settled:
        return {}
    # In key order, as batches of record_step_complete lock their rows, so that they cannot deadlock.
    run_ids = sorted(advance.run_id for advance, _ in settled)
    rows = await transaction.rows(FIND_UNFINISHED, run_ids, now)
    unfinished = {row[0] for row in rows}
    finished = [one for one in settled if one[0].run_id not in unfinished]
    if finished:
        await transaction.execute(
            COMPLETE_RUNS,
            transaction.now,
            [advance.run_id for advance, _ in finished],
            [advance.complete_as for advance, _ in finished],
            [advance.failed_as for advance, _ in finished],
            [settlement.stayed_behind for _, settlement in finished],
        )
    return {advance.run_id: advance for advance, _ in finished}


def _result(decision: _Decision, completed: Mapping[UUID, Advance]) -> RunAdvance:
    settlement = decision.settlement
    return RunAdvance(
        dispatched=() if settlement is None else tuple(request.step_key for request in settlement.dispatched),
        run_completed=completed.get(decision.advance.run_id) is decision.advance,
    )


class _BatchRejectedError(FlowStoreError):
    """One of the rows made the batch fail. Each call then uses its own transaction and gets its own error."""


class RunAdvancer:
    """The calls of advance_run of one store."""

    def __init__(self, transactions: Transactions, *, queue_timeout: float) -> None:
        self._transactions = transactions
        # A second batch would find the runs of the first one locked, where steps of a run end together.
        self._batcher = Batcher(workers=1, max_rows=MAX_BATCH, queue_timeout=queue_timeout)
        self._operation: BatchedOperation[Advance, RunAdvance] = self._batcher.operation(
            "advance_run", self._run, keyed=True, size_of=_size
        )

    async def advance(self, advance: Advance) -> RunAdvance:
        try:
            return await self._operation.submit((advance.run_id, advance.step_key), advance)
        except (RunNotFoundError, _BatchRejectedError):
            # The run may be locked instead.
            pass

        async def work(transaction: Transaction) -> RunAdvance:
            [outcome] = await advance_runs(transaction, WAIT_FOR_RUN, [advance])
            if isinstance(outcome, FlowStoreError):
                raise outcome
            result: RunAdvance = outcome
            return result

        return await self._transactions.run("advance_run", work, begin=BEGIN_INDEX_ONLY)

    async def _run(self, advances: Sequence[Advance]) -> Sequence[RunAdvance | Exception]:
        async def work(transaction: Transaction) -> list[Any]:
            try:
                return await advance_runs(transaction, LOCK_UNLOCKED_RUNS, advances)
            except asyncpg.PostgresError as error:
                if (error.sqlstate or "")[:2] in ROW_LEVEL_SQLSTATE_CLASSES:
                    raise _BatchRejectedError from None
                raise

        outcomes = await self._transactions.run("advance_run", work, begin=BEGIN_INDEX_ONLY)
        for n, advance in enumerate(advances):
            if isinstance(outcomes[n], RunNotFoundError) and advance.found_locked < MAX_FOUND_LOCKED:
                # Advances of another store hold the lock for some milliseconds.
                advance.found_locked += 1
                outcomes[n] = REQUEUE
        return outcomes

    async def aclose(self, seconds: float) -> None:
        await self._batcher.drain(seconds)


def _size(advance: Advance) -> int:
    """The length of the texts of an advance."""
    texts = [advance.output_json, advance.error_message, *(one.input_json for one in advance.dispatch)]
    return sum(len(text) for text in texts if text)
