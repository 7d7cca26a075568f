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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg

from flowstore_core import (
    ClaimLostError,
    EndedStep,
    FlowStoreError,
    RunAdvance,
    RunNotFoundError,
    StaleAttemptError,
    StepAlreadyCompletedError,
    StepNotFoundError,
    StepRequest,
)
from flowstore_core.batching import REQUEUE, BatchedOperation, Batcher
from flowstore_core.batching.scheduler import MAX_BATCH_BYTES
from flowstore_postgres.array_params import encode_columns
from flowstore_postgres.commit_resolution import NOTE_COMMIT
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
from flowstore_postgres.transactions import BEGIN_BY_KEY, INDEX_ONLY, Transaction, Transactions

MAX_BATCH = 256
"""Maximum number of calls that share a transaction."""
MAX_FOUND_LOCKED = 2
"""After more shared transactions than this that found its run locked, a call waits for the lock."""

# The time is read once the runs are locked. Does the work of NOTE_COMMIT in the same round trip.
LOCK_RUNS = f"""
WITH noted AS ({NOTE_COMMIT})
SELECT array_agg(run_id) AS run_ids, array_agg(status) AS statuses, max(now) AS now,
       (SELECT xid FROM noted) AS xid
FROM (
    SELECT run_id, status, coalesce($4, clock_timestamp()) AS now FROM (
        SELECT run_id, status FROM {{schema}}.runs WHERE run_id = ANY($3::uuid[])
        ORDER BY run_id FOR NO KEY UPDATE{{wait}}
    ) locked
) timed
"""
# Fast path, for the shared transaction.
LOCK_UNLOCKED_RUNS = LOCK_RUNS.replace("{wait}", " SKIP LOCKED")
# Slow path, for a dedicated transaction.
WAIT_FOR_RUN = LOCK_RUNS.replace("{wait}", "")
# Whether a run is not finished: a step is not terminal, or an unstarted key has a dispatch or a live claim.
# {besides} is the key of a step that the statement itself ends. Every queued step that is not terminal has a
# row in pending, which is found faster than a step among many that have ended. The locks wait for a
# record_step_complete in progress, and then the row is checked again.
IS_UNFINISHED = """coalesce(
    (SELECT true FROM {schema}.pending p WHERE p.run_id = {run} AND p.step_key <> {besides}
     LIMIT 1 FOR KEY SHARE),
    (SELECT true FROM {schema}.steps s
     WHERE s.run_id = {run} AND s.step_key <> {besides}
       AND (s.status IN ('Pending', 'Running')
            OR s.status IS NULL AND s.dispatched_at IS NOT NULL
            OR s.status IS NULL AND s.claimed_at IS NOT NULL
               AND (s.claim_expires_at IS NULL OR s.claim_expires_at > $2))
     LIMIT 1 FOR SHARE),
    false)"""
# Fast path: closes open attempts ($3 to $11), dispatches the steps of requests ($12 to $18), each of which
# names the number of its advance, and completes the runs of advances without requests (QUE-6). Leaves an
# advance alone if its attempt is not open, or if a row of one of the requested steps exists. No call adds
# such a row meanwhile, because the run is locked. Writes table pending itself, in place of the trigger.
# For BEGIN_BY_KEY: subqueries instead of joins, and keys compared with ANY, so that no plan reads an index in
# its order instead of by key.
ADVANCE_STEPS = """
WITH advance AS MATERIALIZED (
    SELECT * FROM unnest($3::uuid[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[], $9::text[],
                         $10::text[], $11::text[])
           WITH ORDINALITY AS a (run_id, step_key, attempt, owner, status, output_json, error_message,
                                 complete_as, failed_as, n)
), request AS MATERIALIZED (
    SELECT q.*, number::bigint AS n, ($3::uuid[])[number::bigint] AS run_id
    FROM unnest($12::text[], $13::text[], $14::timestamptz[], $15::text[], $16::text[], $17::text[],
                $18::text[])
         AS q (number, step_key, due_at, queue, priority, step_type, input_json)
), closed AS (
    UPDATE {schema}.steps s
    SET status = a.status, output_json = a.output_json, error_message = a.error_message,
        completed_at = coalesce($1, greatest(clock_timestamp(), started_at)),
        pending_writes = s.pending_writes + 1
    FROM advance a
    WHERE s.run_id = ANY (ARRAY[a.run_id]) AND s.step_key = ANY (ARRAY[a.step_key]) AND s.status = 'Running'
      AND s.last_attempt = a.attempt::bigint AND (a.owner IS NULL OR s.started_owner = a.owner)
      AND a.n <> ALL (ARRAY(
          SELECT q.n FROM request q
          WHERE (SELECT true FROM {schema}.steps s WHERE s.run_id = q.run_id AND s.step_key = q.step_key)))
    RETURNING s.run_id, s.step_key, a.n, a.status, a.complete_as, a.failed_as
), ended AS (
    DELETE FROM {schema}.pending p
    USING closed c WHERE p.run_id = ANY (ARRAY[c.run_id]) AND p.step_key = ANY (ARRAY[c.step_key])
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
           greatest(d.ready_at, CASE
               -- One scan for all steps, which usually finds no waiter and ends with the first.
               WHEN (SELECT true FROM {schema}.waiters w WHERE w.run_id = ANY ($3::uuid[]) LIMIT 1)
               THEN (SELECT coalesce(w.expires_at, 'infinity') FROM {schema}.waiters w
                     WHERE w.run_id = d.run_id AND w.step_key = d.step_key AND w.delivered_at IS NULL)
           END),
           d.ready_at < clock_timestamp() - interval '1 second'
    FROM dispatched d
), completed AS (
    UPDATE {schema}.runs r
    SET completed_at = coalesce($1, clock_timestamp()), status = CASE
        WHEN c.failed_as IS NOT NULL
             AND (c.status = 'Failed'
                  -- Not EXISTS, for which a plan may read the whole table.
                  OR (SELECT true FROM {schema}.steps s WHERE s.run_id = c.run_id AND s.status = 'Failed'
                      LIMIT 1))
        THEN c.failed_as ELSE c.complete_as END
    FROM closed c
    WHERE r.run_id = ANY (ARRAY[c.run_id]) AND c.complete_as IS NOT NULL
      AND c.n <> ALL (ARRAY(SELECT n FROM request)) AND NOT {is_unfinished}
    RETURNING c.n
)
SELECT ARRAY(SELECT n FROM closed) AS closed, ARRAY(SELECT n FROM completed) AS completed
""".replace("{is_unfinished}", IS_UNFINISHED.replace("{run}", "c.run_id").replace("{besides}", "c.step_key"))
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
FIND_UNFINISHED = f"""
SELECT run_id FROM unnest($1::uuid[]) AS a (run_id)
WHERE {IS_UNFINISHED.replace("{run}", "a.run_id").replace("{besides}", "''")}
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


class _Decision(NamedTuple):
    """The effects of an advance that raises no error."""

    closes: bool
    """Whether the attempt is open; otherwise it was closed with the same outcome."""
    settlement: Settlement | None
    """None on a terminal run."""


async def advance_steps(transaction: Transaction, lock_runs: str, steps: Sequence[EndedStep]) -> list[Any]:
    """End steps and advance their runs; a RunAdvance, an error or REQUEUE for each step.

    Several steps of one run take effect in their order: after a REQUEUE all later ones get it too.
    A step whose run is not found, or is skipped by ``lock_runs``, gets a RunNotFoundError.
    """
    runs = _by_run(steps)
    locked = await transaction.row_and_note(lock_runs, list(runs), transaction.now)
    if locked["now"] is None:
        return [RunNotFoundError(step.run_id) for step in steps]
    # By number, because asyncpg's UUIDs and those of callers are slow to compare.
    statuses = {
        run_id.int: status for run_id, status in zip(locked["run_ids"], locked["statuses"], strict=True)
    }
    simple = [
        ends[0]
        for run_id, ends in runs.items()
        if len(ends) == 1 and statuses.get(run_id.int) == "Running" and _is_simple(steps[ends[0]])
    ]
    outcomes: dict[int, Any] = {}
    if simple:
        # In key order, as batches of record_step_complete lock their rows, so that they cannot deadlock.
        simple.sort(key=lambda n: (steps[n].run_id.int, steps[n].step_key))
        advanced = await _advance_simple(transaction, [steps[n] for n in simple], locked["now"])
        outcomes = {n: one for n, one in zip(simple, advanced, strict=True) if one is not None}
    if len(outcomes) < len(steps):
        others = [n for n in range(len(steps)) if n not in outcomes]
        await transaction.execute(INDEX_ONLY)
        advanced = await _advance_others(transaction, [steps[n] for n in others], statuses, locked["now"])
        outcomes.update(zip(others, advanced, strict=True))
    return [outcomes[n] for n in range(len(steps))]


def _by_run(steps: Sequence[EndedStep]) -> dict[UUID, list[int]]:
    """The runs of the steps, each with the numbers of its steps."""
    runs: dict[UUID, list[int]] = {}
    for n, step in enumerate(steps):
        runs.setdefault(step.run_id, []).append(n)
    return runs


def _is_simple(step: EndedStep) -> bool:
    """Whether each requested step will be dispatched, unless a row of it exists."""
    for request in step.dispatch:
        if request.after and (request.after != (step.step_key,) or step.status not in request.accept):
            return False
    return True


async def _advance_simple(
    transaction: Transaction, steps: Sequence[EndedStep], now: datetime
) -> list[RunAdvance | None]:
    """Take the fast path. None for each step that it left alone."""
    requests = [
        (str(n), one.step_key, one.due_at, one.queue, str(one.priority), one.step_type, one.input_json)
        for n, step in enumerate(steps, 1)
        for one in step.dispatch
    ]
    columns = [
        [step.run_id for step in steps],
        [step.step_key for step in steps],
        [str(step.attempt) for step in steps],
        [step.owner for step in steps],
        [step.status for step in steps],
        [step.output_json for step in steps],
        [step.error_message for step in steps],
        [step.complete_as for step in steps],
        [step.failed_as for step in steps],
        *(zip(*requests, strict=True) if requests else [()] * 7),
    ]
    statement, parameters = encode_columns(ADVANCE_STEPS, columns)
    row = await transaction.row(statement, transaction.now, now, *parameters)
    closed, completed = set(row["closed"]), set(row["completed"])
    return [
        RunAdvance(
            dispatched=tuple([request.step_key for request in step.dispatch]), run_completed=n in completed
        )
        if n in closed
        else None
        for n, step in enumerate(steps, 1)
    ]


async def _advance_others(
    transaction: Transaction, steps: Sequence[EndedStep], statuses: Mapping[int, str], now: datetime
) -> list[Any]:
    """Decide on each step in turn, then write all of them. ``statuses``: of the locked runs, by ``UUID.int``.

    The run is locked and no row is written before the last decision, so the changes of the earlier steps are
    kept in memory.
    """
    keys: dict[UUID, set[str]] = {}
    for step in steps:
        if step.run_id.int in statuses:
            keys.setdefault(step.run_id, set()).update((step.step_key, *requested_keys(step.dispatch)))
    found = await read_steps(transaction, keys, now)
    changes: dict[UUID, Changes] = {}
    outcomes: list[Any] = []
    undecided: set[UUID] = set()
    # The last advance of a run decides whether it completes: during an earlier one the last step was open.
    last: dict[UUID, int] = {}
    closing: list[EndedStep] = []
    dispatches: list[tuple[UUID, StepRequest]] = []
    for n, step in enumerate(steps):
        run_id = step.run_id
        try:
            decision = (
                None
                if run_id in undecided
                else await _decide(
                    transaction, step, statuses.get(run_id.int), found.get(run_id, {}), changes
                )
            )
        except FlowStoreError as error:
            outcomes.append(error)
            continue
        if decision is None:
            undecided.add(run_id)
            outcomes.append(REQUEUE)
            continue
        if decision.closes:
            closing.append(step)
        outcomes.append(decision)
        if decision.settlement is not None:
            last[run_id] = n
            dispatches += [(run_id, request) for request in decision.settlement.dispatched]
    if closing:
        await transaction.execute(
            CLOSE_ATTEMPTS,
            transaction.now,
            [step.run_id for step in closing],
            [step.step_key for step in closing],
            [step.status for step in closing],
            [step.output_json for step in closing],
            [step.error_message for step in closing],
        )
    for step, outcome in zip(steps, outcomes, strict=True):
        if isinstance(outcome, _Decision) and outcome.settlement is not None:
            await skip_steps(transaction, step.run_id, outcome.settlement.skipped, found[step.run_id], now)
    await dispatch_steps(transaction, dispatches, now)
    dispatching = {run_id for run_id, _ in dispatches}
    completing = {
        run_id: (steps[n], outcomes[n].settlement.stayed_behind)
        for run_id, n in last.items()
        if steps[n].complete_as is not None and run_id not in dispatching
    }
    completed = {last[run_id] for run_id in await _complete(transaction, completing, now)}
    return [
        RunAdvance(dispatched=_dispatched(one.settlement), run_completed=n in completed)
        if isinstance(one, _Decision)
        else one
        for n, one in enumerate(outcomes)
    ]


def _dispatched(settlement: Settlement | None) -> tuple[str, ...]:
    return () if settlement is None else tuple(request.step_key for request in settlement.dispatched)


async def _decide(
    transaction: Transaction,
    step: EndedStep,
    run_status: str | None,
    rows: StepRows,
    changes: dict[UUID, Changes],
) -> _Decision | None:
    """Check an advance in the order of its errors, and settle its requests.

    None: it needs a snapshot with the changes of the advances before it.
    """
    run_id, step_key = step.run_id, step.step_key
    if run_status is None:
        raise RunNotFoundError(run_id)
    earlier = changes.get(run_id)
    if earlier is not None and earlier.affect(step_key):
        return None
    row = rows.get(step_key)
    if row is None or row["status"] is None:
        raise StepNotFoundError(run_id, step_key)
    if row["reopened"] or step.attempt != row["last_attempt"]:
        raise StaleAttemptError(run_id, step_key, step.attempt, row["last_attempt"])
    if step.owner is not None and step.owner != row["started_owner"]:
        raise ClaimLostError(run_id, step_key)
    closes = row["status"] == "Running"
    if not closes:
        outcome = await transaction.row(READ_OUTCOME, run_id, step_key)
        if (row["status"], *outcome) != (step.status, step.output_json, step.error_message):
            raise StepAlreadyCompletedError(run_id, step_key, row["last_attempt"])
        if earlier is not None:
            # The advance before it may complete the run.
            return None
    if earlier is None:
        earlier = changes[run_id] = Changes(rows)
    earlier.end(step_key, step.status)
    if run_status != "Running":
        return _Decision(closes, None)
    return _Decision(closes, settle(step.dispatch, rows, earlier))


async def _complete(
    transaction: Transaction, completing: Mapping[UUID, tuple[EndedStep, bool]], now: datetime
) -> Sequence[UUID]:
    """Complete the runs in which nothing is left to do (QUE-6), and return them.

    ``completing`` has for each run its last ended step and whether a request of it stayed behind.
    """
    if not completing:
        return ()
    # In key order, as batches of record_step_complete lock their rows, so that they cannot deadlock.
    run_ids = sorted(completing)
    unfinished = {row[0] for row in await transaction.rows(FIND_UNFINISHED, run_ids, now)}
    finished = [run_id for run_id in run_ids if run_id not in unfinished]
    if finished:
        ends = [completing[run_id] for run_id in finished]
        await transaction.execute(
            COMPLETE_RUNS,
            transaction.now,
            finished,
            [step.complete_as for step, _ in ends],
            [step.failed_as for step, _ in ends],
            [stayed_behind for _, stayed_behind in ends],
        )
    return finished


class _BatchRejectedError(FlowStoreError):
    """One of the rows made the batch fail. Each run then uses its own transaction and gets its own error."""


@dataclass(slots=True, eq=False)
class _Call:
    """A call of advance_run."""

    step: EndedStep
    found_locked: int = 0
    """The number of shared transactions that skipped the run because it was locked, or not found."""


class RunAdvancer:
    """The calls of advance_run and advance_runs of one store."""

    def __init__(self, transactions: Transactions, *, queue_timeout: float) -> None:
        self._transactions = transactions
        # A second batch would find the runs of the first one locked, where steps of a run end together.
        self._batcher = Batcher(workers=1, max_rows=MAX_BATCH, queue_timeout=queue_timeout)
        self._operation: BatchedOperation[_Call, RunAdvance] = self._batcher.operation(
            "advance_run", self._run, keyed=True, size_of=lambda call: _size(call.step)
        )

    async def advance(self, step: EndedStep) -> RunAdvance:
        """End one step, in a transaction that it shares with concurrent calls."""
        try:
            return await self._operation.submit((step.run_id, step.step_key), _Call(step))
        except (RunNotFoundError, _BatchRejectedError):
            # The run may be locked instead.
            [outcome] = await self._advance(WAIT_FOR_RUN, [step])
        if isinstance(outcome, FlowStoreError):
            raise outcome
        result: RunAdvance = outcome
        return result

    async def advance_all(self, steps: Sequence[EndedStep]) -> list[RunAdvance | FlowStoreError]:
        """End steps; the result or the error of each.

        The steps of a run share a transaction, so that they take effect in their order.
        """
        left = list(_by_run(steps).values())
        outcomes: list[Any] = [REQUEUE] * len(steps)
        found_locked = 0
        while left:
            shared = found_locked <= MAX_FOUND_LOCKED
            for batch in _batches(left, steps, MAX_BATCH if shared else 1):
                lock_runs = LOCK_UNLOCKED_RUNS if shared else WAIT_FOR_RUN
                try:
                    advanced = await self._advance(lock_runs, [steps[n] for n in batch])
                except _BatchRejectedError:
                    found_locked = MAX_FOUND_LOCKED
                    continue
                for n, outcome in zip(batch, advanced, strict=True):
                    if not (shared and isinstance(outcome, RunNotFoundError)):
                        outcomes[n] = outcome
            left = [waiting for run in left if (waiting := [n for n in run if outcomes[n] is REQUEUE])]
            found_locked += 1
        return outcomes

    async def _run(self, calls: Sequence[_Call]) -> Sequence[RunAdvance | Exception]:
        outcomes = await self._advance(LOCK_UNLOCKED_RUNS, [call.step for call in calls])
        for n, call in enumerate(calls):
            if isinstance(outcomes[n], RunNotFoundError) and call.found_locked < MAX_FOUND_LOCKED:
                # Advances of another store hold the lock for some milliseconds.
                call.found_locked += 1
                outcomes[n] = REQUEUE
        return outcomes

    async def _advance(self, lock_runs: str, steps: Sequence[EndedStep]) -> list[Any]:
        """Call advance_steps in a transaction."""

        async def work(transaction: Transaction) -> list[Any]:
            try:
                return await advance_steps(transaction, lock_runs, steps)
            except asyncpg.PostgresError as error:
                if (
                    lock_runs is LOCK_UNLOCKED_RUNS
                    and (error.sqlstate or "")[:2] in ROW_LEVEL_SQLSTATE_CLASSES
                ):
                    raise _BatchRejectedError from None
                raise

        return await self._transactions.run("advance_run", work, begin=BEGIN_BY_KEY)

    async def aclose(self, seconds: float) -> None:
        await self._batcher.drain(seconds)


def _size(step: EndedStep) -> int:
    """The length of the texts of an ended step."""
    size = len(step.output_json or "") + len(step.error_message or "")
    for request in step.dispatch:
        size += len(request.input_json or "")
    return size


def _batches(runs: Sequence[Sequence[int]], steps: Sequence[EndedStep], max_rows: int) -> Iterator[list[int]]:
    """Whole runs, each with the numbers of its steps, until ``max_rows`` or MAX_BATCH_BYTES is reached."""
    batch: list[int] = []
    size = 0
    for run in runs:
        batch += run
        size += sum([_size(steps[n]) for n in run])
        if len(batch) >= max_rows or size >= MAX_BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
