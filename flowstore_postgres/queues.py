"""Queues on PostgreSQL: claim the next steps, advance runs, move dispatches, statistics (QUE).

Table pending has a row for each queued step that is not terminal, with the time from which it is ready.
Triggers keep it right after every statement (migration 8), so CLAIM_NEXT_STEPS reads an index range.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

from flowstore_core import (
    ClaimedStep,
    EndedStep,
    FlowStoreError,
    OutcomeUnknownError,
    QueueStatistics,
    RunAdvance,
    new_claim_token,
)
from flowstore_core.queues import MAX_PRIORITY
from flowstore_core.steps import SUPERSEDED_BY
from flowstore_postgres.claim_bounds import ClaimBounds
from flowstore_postgres.connection import NOTES_PER_ROW
from flowstore_postgres.database import Database
from flowstore_postgres.runs import LOCK_RUN, plain_uuid
from flowstore_postgres.sql_placeholders import in_microseconds
from flowstore_postgres.transactions import Transaction

log = logging.getLogger("flowstore_postgres")

CONCURRENT_CLAIMS = 1
"""Concurrent statements of claim_next_steps of one store."""
LOOKAHEAD = 32
"""The number of candidates beyond ``limit`` that a claim reads at first: other claims may hold the first."""

# Claims up to $5 steps and opens their attempts. It takes every lock with SKIP LOCKED, so it never waits
# while it holds a lock, and cannot deadlock.
#
# level: the queues and priorities, each with its bound ($12), which is valid on the server $13 alone.
# found: the first $4 ready steps of each level, without locks. They are a range of the index pending_by_time,
#   from the bound to now, and the late rows before it (claim_bounds.py).
# candidate: the first $4 of all levels.
# picked: the first $5 candidates that can be locked together with their step and their run, in the order of
#   candidate, which nested loops keep. Each subquery locks one row; a subquery with a lock is planned on its
#   own, so that its row is found by key alone. PostgreSQL reads a row again once it is locked. A row of
#   pending that was changed since the snapshot has another ctid by then, and an ended run another status, so
#   neither matches any more. The lock of the run lets advance_run pass.
# latched: the runs that are to stop, usually none. One scan for all takes less than one for each step.
# claimed: a row that was found once is found again by its ctid, for a third of the cost of an index. A step
#   that was changed between the snapshot and its lock is not, so the statements after this one read claimed,
#   and the client claims again: the limit of picked may have kept it from another step.
# moved: a claimed step is ready again when its lease ends. The trigger that does this for other statements is
#   skipped, because pending_writes is incremented.
# noted: the claimed steps, by which a call whose reply was lost finds them.
CLAIM_NEXT_STEPS = f"""
WITH guard AS MATERIALIZED (
    SELECT clock_timestamp() < $1 AS before_deadline, coalesce($2, clock_timestamp()) AS now
), level AS MATERIALIZED (
    SELECT number, queue, priority::smallint,
           CASE WHEN pg_postmaster_start_time() = $13
                THEN coalesce(($12::timestamptz[])[number + 1], '-infinity') ELSE '-infinity' END AS bound
    FROM unnest($3::text[]) WITH ORDINALITY AS q (queue, n),
         generate_series(0, {MAX_PRIORITY}) AS p (priority),
         LATERAL (SELECT (n - 1) * {MAX_PRIORITY + 1} + priority AS number) f
), found AS MATERIALIZED (
    SELECT l.number, p.*
    FROM guard, level l, LATERAL (
        (SELECT ctid, run_id, step_key, priority, ready_at, true AS after_bound
         FROM {{schema}}.pending
         WHERE queue = l.queue AND priority = l.priority AND ready_at >= l.bound AND ready_at <= guard.now
         ORDER BY ready_at, run_id, step_key LIMIT $4)
        UNION ALL
        (SELECT ctid, run_id, step_key, priority, ready_at, false
         FROM {{schema}}.pending
         WHERE queue = l.queue AND priority = l.priority AND late
           AND CASE WHEN late THEN ready_at END < l.bound AND CASE WHEN late THEN ready_at END <= guard.now
         ORDER BY CASE WHEN late THEN ready_at END, run_id, step_key LIMIT $4)
    ) p
    WHERE before_deadline
), candidate AS MATERIALIZED (
    SELECT ctid AS pending_ctid, run_id, step_key, priority, ready_at
    FROM found ORDER BY priority DESC, ready_at, run_id, step_key LIMIT $4
), picked AS MATERIALIZED (
    SELECT c.*, s.step_ctid, s.attempt, r.flow_id, r.flow_name
    FROM candidate c, LATERAL (
        -- The second condition is checked again once the row is locked, in every version of PostgreSQL.
        SELECT FROM {{schema}}.pending p
        WHERE p.ctid = c.pending_ctid AND (p.ctid = c.pending_ctid) IS TRUE
        FOR NO KEY UPDATE SKIP LOCKED
    ) p, LATERAL (
        SELECT s.ctid AS step_ctid, CASE WHEN s.status IS NOT NULL AND NOT s.reopened THEN s END AS attempt
        FROM {{schema}}.steps s WHERE s.run_id = c.run_id AND s.step_key = c.step_key
        FOR NO KEY UPDATE SKIP LOCKED
    ) s, LATERAL (
        SELECT r.flow_id, r.flow_name
        -- IS TRUE, so that runs are found by key alone.
        FROM {{schema}}.runs r WHERE r.run_id = c.run_id AND (r.status = 'Running') IS TRUE
        FOR KEY SHARE SKIP LOCKED
    ) r
    LIMIT $5
), chosen AS MATERIALIZED (
    SELECT row_number() OVER (ORDER BY priority DESC, ready_at, run_id, step_key) AS n, picked.*, now,
           CASE WHEN now < {{latest}} - $6 * {{microsecond}} THEN now + $6 * {{microsecond}} ELSE {{latest}}
           END AS expires_at
    FROM guard, picked
), latched AS MATERIALIZED (
    SELECT c.run_id FROM {{schema}}.controls c
    WHERE c.run_id = ANY (ARRAY(SELECT run_id FROM chosen))
      AND (c.cancel_requested_at IS NOT NULL OR c.timed_out_at IS NOT NULL)
), claimed AS (
    UPDATE {{schema}}.steps s
    SET claim_token = $7 || '-' || a.n, claim_owned = true, claimed_at = a.now,
        claim_expires_at = a.expires_at, status = 'Running',
        step_type = s.dispatch_step_type, input_json = s.dispatch_input_json, job_id = $8,
        output_json = NULL, error_message = NULL, completed_at = NULL,
        started_at = coalesce($2, greatest(a.now, s.completed_at)),
        first_started_at = coalesce(s.first_started_at, a.now), last_attempt = s.last_attempt + 1,
        reopened = false, rescheduled = false, started_owner = $7 || '-' || a.n, started_token = NULL,
        closed_token = NULL, pending_writes = s.pending_writes + 1
    FROM chosen a WHERE s.ctid = a.step_ctid
    RETURNING a.n, a.pending_ctid, {{claimed_step}},
              s.run_id IN (SELECT run_id FROM latched) AS cancel_requested
), archived AS (
    INSERT INTO {{schema}}.attempts (run_id, step_key, attempt, step_type, status, input_json, output_json,
                                     error_message, job_id, started_at, completed_at, started_token,
                                     closed_token)
    SELECT run_id, step_key, last_attempt, step_type,
           CASE status WHEN 'Running' THEN 'Failed' ELSE status END, input_json, output_json,
           CASE status WHEN 'Running' THEN $9 || (last_attempt + 1)::text ELSE error_message END,
           job_id, started_at, coalesce(completed_at, $2, greatest(now, started_at)), started_token,
           closed_token
    FROM (SELECT (attempt).*, now FROM chosen
          WHERE (attempt).run_id IS NOT NULL AND n = ANY (ARRAY(SELECT n FROM claimed))) a
), moved AS (
    UPDATE {{schema}}.pending p
    SET ready_at = c.claim_expires_at, late = c.claim_expires_at < clock_timestamp() - interval '1 second'
    FROM claimed c WHERE p.ctid = c.pending_ctid
), noted AS (
    INSERT INTO {{schema}}.commits (connection, token, run_ids, step_keys)
    SELECT $10, $11, array_agg(run_id ORDER BY n), array_agg(step_key ORDER BY n) FROM chosen
    HAVING count(*) > 0
    ON CONFLICT (connection) DO UPDATE SET token = excluded.token, run_ids = excluded.run_ids,
        step_keys = excluded.step_keys, noted_at = clock_timestamp()
)
SELECT before_deadline, candidates, picked, claimed.*,
       -- Whether candidates belong to ended or deleted runs.
       CASE WHEN picked < candidates AND picked < $5 THEN EXISTS (
           SELECT FROM candidate c
           WHERE (SELECT r.status = 'Running' FROM {{schema}}.runs r WHERE r.run_id = c.run_id) IS NOT TRUE)
       ELSE false END AS stale,
       guard.now, now() AS began, pg_postmaster_start_time() AS server, levels, first,
       pg_snapshot_xmin(pg_current_snapshot())::text::bigint AS oldest_id,
       CASE WHEN $14 THEN pg_current_xact_id() ELSE pg_current_xact_id_if_assigned() END::text::bigint AS id
FROM guard, (SELECT count(*) AS candidates FROM candidate) candidates,
     (SELECT count(*) AS picked FROM picked) picked,
     (SELECT {{columns}} FROM (SELECT * FROM claimed ORDER BY n) c) claimed,
     (SELECT array_agg(number) AS levels, array_agg(first) AS first
      FROM (SELECT number, min(ready_at) AS first FROM found WHERE after_bound GROUP BY number) f) first
"""
CLAIMED_STEP = """s.run_id, a.flow_id, a.flow_name, s.step_key, s.step_type, s.input_json, s.last_attempt,
    s.claim_token, s.dispatch_queue, s.dispatch_priority, s.dispatched_at, s.due_at, s.claimed_at,
    s.claim_expires_at"""
# An array for each column, which the client reads faster than rows. One statement claims all steps at the
# same time, under the same lease.
CLAIMED_COLUMNS = """array_agg(run_id) AS run_ids, array_agg(flow_id) AS flow_ids,
    array_agg(flow_name) AS flow_names, array_agg(step_key) AS step_keys, array_agg(step_type) AS step_types,
    array_agg(input_json) AS inputs, array_agg(last_attempt) AS attempts, array_agg(claim_token) AS owners,
    array_agg(dispatch_queue) AS queues, array_agg(dispatch_priority) AS priorities,
    array_agg(dispatched_at) AS dispatched_at, array_agg(due_at) AS due_at,
    array_agg(cancel_requested) AS cancel_requested, max(claimed_at) AS claimed_at,
    max(claim_expires_at) AS expires_at"""
CLAIM_NEXT_STEPS = CLAIM_NEXT_STEPS.replace("{claimed_step}", CLAIMED_STEP).replace(
    "{columns}", CLAIMED_COLUMNS
)
# The steps of a call whose reply was lost, as far as it still holds their claims (QUE-3).
FIND_CLAIMED_STEPS = """
SELECT 0 AS candidates, 0 AS picked, false AS stale, NULL AS server, claimed.*
FROM {schema}.commits noted, LATERAL (
    SELECT {columns} FROM (
        SELECT {claimed_step},
               -- Not EXISTS, for which a plan may read the whole table.
               coalesce((SELECT c.cancel_requested_at IS NOT NULL OR c.timed_out_at IS NOT NULL
                         FROM {schema}.controls c WHERE c.run_id = s.run_id), false) AS cancel_requested
        FROM unnest(noted.run_ids, noted.step_keys) WITH ORDINALITY AS k (run_id, step_key, n)
        JOIN {schema}.steps s ON s.run_id = k.run_id AND s.step_key = k.step_key
        JOIN {schema}.runs a ON a.run_id = k.run_id
        WHERE s.claim_token = $3 || '-' || k.n AND s.claim_expires_at > coalesce($4, clock_timestamp())
        ORDER BY k.n
    ) c
) claimed
WHERE connection = $1 AND token = $2
""".replace("{claimed_step}", CLAIMED_STEP).replace("{columns}", CLAIMED_COLUMNS)
# Releases the claims of a cancelled call that it still holds, and closes their open attempts.
RELEASE_CLAIMED_STEPS = """
WITH noted AS MATERIALIZED (
    SELECT k.* FROM {schema}.commits noted,
         unnest(noted.run_ids, noted.step_keys) WITH ORDINALITY AS k (run_id, step_key, n)
    WHERE connection = $1 AND token = $2
), locked AS MATERIALIZED (
    SELECT s.run_id, s.step_key
    FROM noted k JOIN {schema}.steps s ON s.run_id = k.run_id AND s.step_key = k.step_key
    WHERE s.claim_token = $3 || '-' || k.n AND (s.status IS NULL OR s.status IN ('Pending', 'Running'))
    ORDER BY s.run_id, s.step_key FOR NO KEY UPDATE OF s
), released AS (
    UPDATE {schema}.steps s
    SET status = CASE WHEN started_owner = claim_token AND status = 'Running' THEN 'Pending' ELSE status END,
        completed_at = CASE WHEN started_owner = claim_token AND status = 'Running'
                            THEN coalesce($4, greatest(clock_timestamp(), started_at)) ELSE completed_at END,
        claim_token = NULL, claim_owned = NULL, claimed_at = NULL, claim_expires_at = NULL
    FROM locked WHERE s.run_id = locked.run_id AND s.step_key = locked.step_key
)
SELECT true FROM noted LIMIT 1
"""

# Candidates of ended and deleted runs, for DELETE_STALE. Their rows are locked first: a call that reopens the
# run or starts it anew then adds the row again after the deletion.
LOCK_STALE = f"""
SELECT p.run_id, p.step_key
FROM unnest($1::text[]) AS q (queue), generate_series({MAX_PRIORITY}, 0, -1) AS level (priority), LATERAL (
    SELECT run_id, step_key FROM {{schema}}.pending
    WHERE queue = q.queue AND priority = level.priority::smallint
      AND ready_at <= coalesce($2, clock_timestamp())
    ORDER BY ready_at, run_id, step_key LIMIT $3
) c
JOIN {{schema}}.pending p ON p.run_id = c.run_id AND p.step_key = c.step_key
WHERE NOT EXISTS (SELECT FROM {{schema}}.runs r
                  WHERE r.run_id = p.run_id AND (r.status = 'Running') IS TRUE)
FOR UPDATE OF p SKIP LOCKED
"""
DELETE_STALE = """
DELETE FROM {schema}.pending p
USING unnest($1::uuid[], $2::text[]) AS k (run_id, step_key)
WHERE p.run_id = k.run_id AND p.step_key = k.step_key AND NOT EXISTS (
    SELECT FROM {schema}.runs r JOIN {schema}.steps s ON s.run_id = r.run_id
    WHERE r.run_id = k.run_id AND r.status = 'Running' AND s.step_key = k.step_key)
"""

REDISPATCH_STEP = """
UPDATE {schema}.steps
SET dispatch_queue = coalesce($3, dispatch_queue), dispatch_priority = coalesce($4, dispatch_priority),
    due_at = coalesce($5, due_at), dispatched_at = coalesce($6, clock_timestamp()), dispatch_job_id = NULL,
    dispatch_token = NULL
WHERE run_id = $1 AND step_key = $2 AND dispatch_queue IS NOT NULL AND dispatched_at IS NOT NULL
  AND (status IS NULL OR status IN ('Pending', 'Running'))
  AND (claimed_at IS NULL OR claim_expires_at <= coalesce($6, clock_timestamp()))
RETURNING true
"""

GET_QUEUES = """
SELECT p.queue, count(*) FILTER (WHERE state = 'ready'), count(*) FILTER (WHERE state = 'scheduled'),
       count(*) FILTER (WHERE state = 'waiting'), count(*) FILTER (WHERE state = 'running'),
       min(p.ready_at) FILTER (WHERE state = 'ready')
FROM (SELECT coalesce($1, clock_timestamp()) AS now) clock, {schema}.pending p
JOIN {schema}.runs r ON r.run_id = p.run_id
JOIN {schema}.steps s ON s.run_id = p.run_id AND s.step_key = p.step_key
LEFT JOIN {schema}.waiters w ON w.run_id = p.run_id AND w.step_key = p.step_key
CROSS JOIN LATERAL (
    SELECT CASE WHEN s.claimed_at IS NOT NULL AND (s.claim_expires_at IS NULL OR s.claim_expires_at > now)
                THEN 'running'
                WHEN w.run_id IS NOT NULL AND w.delivered_at IS NULL AND w.expired_at IS NULL
                     AND (w.expires_at IS NULL OR w.expires_at > now) THEN 'waiting'
                WHEN p.ready_at > now THEN 'scheduled' ELSE 'ready' END AS state
) f
WHERE r.status = 'Running' GROUP BY p.queue ORDER BY p.queue
"""


@dataclass(slots=True, eq=False)
class _ClaimCall:
    """One statement of claim_next_steps."""

    number: int
    """The key of its row in table commits; a later statement uses it again once this one has its result."""
    token: int
    owner: str
    """The beginning of the owner tokens of its claims; a number for each step follows."""
    unknown: OutcomeUnknownError | None = None
    """The error of a statement whose outcome is unknown."""

    @property
    def key(self) -> tuple[int, int, str]:
        """The parameters that find its claims."""
        return self.number, self.token, self.owner


class Queues:
    """The contract of these operations is in flowstore_core/queues.py."""

    _database: Database
    _free_numbers: list[int]
    """The numbers of ended calls of claim_next_steps."""
    _claiming: asyncio.Semaphore
    """Bounds the connections that are kept for claims."""
    _claim_bounds: ClaimBounds

    async def claim_next_steps(
        self, *, queues: Sequence[str], lease: timedelta, limit: int, worker: str | None
    ) -> Sequence[ClaimedStep]:
        calls: list[_ClaimCall] = []
        cancelled = False

        async def claim() -> tuple[ClaimedStep, ...]:
            async with self._claiming:
                return () if cancelled else await self._claim(calls, queues, lease, limit, worker)

        try:
            claimed = await self._database.pool.shielded.run(claim(), partial(self._give_back, calls))
        except asyncio.CancelledError:
            cancelled = True
            raise
        self._free_numbers.extend(
            call.number for call in calls if call.unknown is None and call.token % NOTES_PER_ROW
        )
        return claimed

    async def _give_back(self, calls: Sequence[_ClaimCall], outcome: object) -> None:
        """Release the claims of a cancelled call (QUE-3)."""
        for call in calls:
            unknown = call.unknown
            await self._database.compensate(
                RELEASE_CLAIMED_STEPS,
                *call.key,
                self._database.now(),
                unacked=() if unknown is None else self._database.unacked_statements(unknown),
            )

    async def _claim(
        self,
        calls: list[_ClaimCall],
        queues: Sequence[str],
        lease: timedelta,
        limit: int,
        worker: str | None,
    ) -> tuple[ClaimedStep, ...]:
        """Claim until ``limit`` is reached or no other step is ready and free."""
        claimed: list[ClaimedStep] = []
        lookahead = limit + LOOKAHEAD
        while True:
            number = self._free_numbers.pop() if self._free_numbers else self._database.new_token()
            call = _ClaimCall(number, self._database.new_token(), new_claim_token())
            calls.append(call)
            try:
                row = await self._database.statement(
                    "claim_next_steps",
                    CLAIM_NEXT_STEPS,
                    queues,
                    lookahead,
                    limit - len(claimed),
                    in_microseconds(lease),
                    call.owner,
                    worker,
                    SUPERSEDED_BY,
                    call.number,
                    call.token,
                    *self._claim_bounds.parameters(queues),
                    probe=(FIND_CLAIMED_STEPS, *call.key, self._database.now()),
                    index_only=True,
                )
            except FlowStoreError as error:
                if isinstance(error, OutcomeUnknownError):
                    call.unknown = error
                if not claimed:
                    raise
                # The steps of the earlier statements are claimed, whatever happened to this one.
                log.warning("claim_next_steps: only a part of the steps was claimed: %s", error)
                return tuple(claimed)
            steps = _claimed_steps(row)
            claimed += steps
            if row["stale"]:
                await delete_stale(self._database, queues, lookahead)
            # The row of a claim whose reply was lost has no bounds.
            is_complete = row["server"] is None or self._claim_bounds.update(queues, row)
            if len(claimed) == limit:
                return tuple(claimed)
            if len(steps) < row["picked"]:
                continue  # A picked step was changed after the snapshot.
            if row["candidates"] < lookahead and is_complete:
                # With fewer candidates than that, every ready step was one.
                return tuple(claimed)
            lookahead *= 2

    async def advance_run(self, **arguments: Any) -> RunAdvance:
        return await self._database.run_advancer.advance(EndedStep(**arguments))

    async def advance_runs(self, *, steps: Sequence[EndedStep]) -> Sequence[RunAdvance | FlowStoreError]:
        return tuple(await self._database.run_advancer.advance_all(steps))

    async def redispatch_step(
        self,
        *,
        run_id: UUID,
        step_key: str,
        queue: str | None,
        priority: int | None,
        due_at: datetime | None,
    ) -> bool:
        async def work(transaction: Transaction) -> bool:
            run = await transaction.row(LOCK_RUN, run_id)
            if run is None or run[0] != "Running":
                return False
            row = await transaction.row(
                REDISPATCH_STEP, run_id, step_key, queue, priority, due_at, transaction.now
            )
            return row is not None

        return await self._database.transaction("redispatch_step", work)

    async def get_queues(self) -> Sequence[QueueStatistics]:
        rows = await self._database.read(GET_QUEUES, self._database.now())
        return tuple(
            QueueStatistics(
                queue=row[0],
                ready=row[1],
                scheduled=row[2],
                waiting=row[3],
                running=row[4],
                oldest_ready_at=row[5],
            )
            for row in rows
        )


async def delete_stale(database: Database, queues: Sequence[str], lookahead: int) -> None:
    """Delete rows of ended and deleted runs from the index of queued steps."""

    async def work(transaction: Transaction) -> None:
        rows = await transaction.rows(LOCK_STALE, queues, transaction.now, lookahead)
        if rows:
            keys = [row[0] for row in rows], [row[1] for row in rows]
            await transaction.execute(DELETE_STALE, *keys)

    try:
        await database.transaction("claim_next_steps", work)
    except FlowStoreError as error:
        # The next call that finds them deletes them.
        log.warning("rows of ended runs were not deleted from the index of queues: %s", error)


def _claimed_steps(row: Any) -> list[ClaimedStep]:
    """Build the records of CLAIMED_COLUMNS."""
    if row["run_ids"] is None:
        return []
    flow_ids = {flow_id: plain_uuid(flow_id) for flow_id in set(row["flow_ids"])}
    claimed_at, expires_at = row["claimed_at"], row["expires_at"]
    return [
        ClaimedStep(
            run_id=plain_uuid(run_id),
            flow_id=flow_ids[flow_id],
            flow_name=flow_name,
            step_key=step_key,
            step_type=step_type,
            input_json=input_json,
            attempt=attempt,
            owner=owner,
            queue=queue,
            priority=priority,
            dispatched_at=dispatched_at,
            due_at=due_at,
            claimed_at=claimed_at,
            expires_at=expires_at,
            cancel_requested=cancel_requested,
        )
        for (
            run_id, flow_id, flow_name, step_key, step_type, input_json, attempt, owner, queue, priority,
            dispatched_at, due_at, cancel_requested,
        ) in zip(
            row["run_ids"], row["flow_ids"], row["flow_names"], row["step_keys"], row["step_types"],
            row["inputs"], row["attempts"], row["owners"], row["queues"], row["priorities"],
            row["dispatched_at"], row["due_at"], row["cancel_requested"], strict=True,
        )
    ]  # fmt: skip
