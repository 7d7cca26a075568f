"""Stalled steps on PostgreSQL (STP-8).

get_stalled_steps reads the steps that are due, by index. For a step with a queue, table pending has the time
of its stall. For the others a run has a bound, before which none of them stalls (migration 12):
get_stalled_steps reads the runs in the order of their bounds, those without one first.

It sets the bounds itself, because the statements of a step's usual way would become slower. A run gets one
when its steps sleep or have stalled, so a run without has been active lately. Each change of a run with a
bound removes it again, at the next call.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from flowstore_core import FlowStoreError, StalledStep, StallReason, StepStatus
from flowstore_postgres.database import Database
from flowstore_postgres.queues import delete_stale
from flowstore_postgres.runs import plain_uuid
from flowstore_postgres.transactions import Transaction

log = logging.getLogger("flowstore_postgres")

LOOKAHEAD = 100
"""The number of runs with a bound, and of steps of each queue and priority, that are read beyond ``take``."""
MAX_UNBOUNDED = 10_000
"""The number of runs without a bound that are read at first."""
BOUNDS_PER_TRANSACTION = 1_000

# The steps of a run that are in no queue. since is infinity if the step does not stall. A claimed step stalls
# when its lease expires, a dispatched step when its dispatch is due, any other step at the end of its last
# attempt, but none before its dispatch is due and its waiter's time is over. A claim without a lease never
# expires.
UNQUEUED_STEPS = """
SELECT s.step_key, s.status, s.stall_noted, e.reason, f.since
FROM {schema}.steps s
LEFT JOIN {schema}.waiters w ON w.run_id = s.run_id AND w.step_key = s.step_key AND w.delivered_at IS NULL
CROSS JOIN LATERAL (
    SELECT CASE WHEN s.claimed_at IS NOT NULL THEN 'LeaseExpired'
                WHEN s.dispatched_at IS NOT NULL THEN 'DispatchDue' ELSE 'NotDispatched' END AS reason,
           CASE WHEN s.claimed_at IS NOT NULL THEN s.claim_expires_at
                WHEN s.dispatched_at IS NOT NULL THEN coalesce(s.due_at, s.dispatched_at)
                WHEN s.status IS NOT NULL THEN coalesce(s.completed_at, s.started_at) END AS began,
           w.run_id IS NOT NULL AND w.expires_at IS NULL AND w.expired_at IS NULL AS waits
) e
CROSS JOIN LATERAL (
    SELECT CASE WHEN e.waits OR e.began IS NULL THEN 'infinity' ELSE greatest(
        e.began, CASE WHEN s.dispatched_at IS NOT NULL THEN coalesce(s.due_at, s.dispatched_at) END,
        w.expires_at) END AS since
) f
WHERE s.run_id = r.run_id AND {unqueued}
"""
UNQUEUED = """(s.status IS NULL OR s.status IN ('Pending', 'Running'))
  AND (s.dispatched_at IS NULL OR s.dispatch_queue IS NULL)"""
UNQUEUED_STEPS = UNQUEUED_STEPS.replace("{unqueued}", UNQUEUED)
# A run gets a bound if it is unlikely to change soon: its steps have stalled, or will not within a minute.
IS_SETTLED = "({bound} <= as_of OR {bound} > now + interval '1 minute')"
STALL_BOUND = "CASE WHEN status = 'Running' THEN stall_bound END"

# Reads up to $4 runs with a bound, up to $5 without one, and up to $4 steps of each queue and priority.
# settled: runs whose bound can be set or is wrong. unsettled: runs whose bound must be removed.
# more: whether steps to list may follow those that were read.
# OFFSET 0 keeps the planner, when it expects few rows, from reading all of them and joining them afterwards.
GET_STALLED_STEPS = """
WITH RECURSIVE clock AS MATERIALIZED (
    SELECT coalesce($1, now) AS as_of, now FROM (SELECT coalesce($2, clock_timestamp()) AS now) now
), entry AS MATERIALIZED (
    SELECT r.* FROM (
        SELECT run_id, {stall_bound} AS bound FROM {schema}.runs
        WHERE status = 'Running' AND {stall_bound} = '-infinity' ORDER BY {stall_bound}, run_id LIMIT $5
    ) r
    UNION ALL
    SELECT r.* FROM clock, LATERAL (
        SELECT run_id, {stall_bound} AS bound FROM {schema}.runs
        WHERE status = 'Running' AND {stall_bound} > '-infinity' AND {stall_bound} <= as_of
        ORDER BY {stall_bound}, run_id LIMIT $4
    ) r
), examined AS MATERIALIZED (
    SELECT run_id, bool_or(changed) AS changed
    FROM (SELECT run_id, false AS changed FROM entry
          UNION ALL SELECT run_id, true FROM {schema}.stall_changes) x
    GROUP BY run_id
), step AS MATERIALIZED (
    SELECT x.run_id, x.changed, r.stall_bound, (r.status = 'Running') IS TRUE AS open, s.*
    FROM examined x
    LEFT JOIN LATERAL (
        SELECT run_id, status, stall_bound FROM {schema}.runs WHERE run_id = x.run_id OFFSET 0
    ) r ON true
    LEFT JOIN LATERAL ({unqueued_steps} AND r.status = 'Running' OFFSET 0) s ON true
), run AS MATERIALIZED (
    SELECT run_id, changed, stall_bound, open, coalesce(min(since), 'infinity') AS bound
    FROM step GROUP BY run_id, changed, stall_bound, open
), queue AS (
    (SELECT queue FROM {schema}.pending ORDER BY queue LIMIT 1)
    UNION ALL
    SELECT (SELECT p.queue FROM {schema}.pending p WHERE p.queue > q.queue ORDER BY p.queue LIMIT 1)
    FROM queue q WHERE q.queue IS NOT NULL
), queued AS MATERIALIZED (
    SELECT p.*, (r.status = 'Running') IS TRUE AS open
    FROM clock, queue q, generate_series(0, 9) AS level (priority), LATERAL (
        SELECT run_id, step_key, queue, priority, ready_at FROM {schema}.pending
        WHERE queue = q.queue AND priority = level.priority::smallint AND ready_at <= as_of
        ORDER BY ready_at, run_id, step_key LIMIT $4
    ) p
    LEFT JOIN LATERAL (SELECT status FROM {schema}.runs WHERE run_id = p.run_id OFFSET 0) r ON true
), listed AS MATERIALIZED (
    SELECT run_id, step_key, status, reason, since FROM step, clock WHERE since <= as_of
    UNION ALL
    SELECT q.run_id, q.step_key, s.status,
           CASE WHEN s.claimed_at IS NOT NULL THEN 'LeaseExpired' ELSE 'DispatchDue' END, q.ready_at
    FROM queued q, LATERAL (
        SELECT status, claimed_at FROM {schema}.steps
        WHERE run_id = q.run_id AND step_key = q.step_key OFFSET 0
    ) s WHERE q.open
    ORDER BY since, run_id, step_key LIMIT $3
)
SELECT ARRAY(SELECT ROW(listed.*) FROM listed ORDER BY since, run_id, step_key) AS steps,
       ARRAY(SELECT run_id FROM run, clock
             WHERE open AND {is_settled} AND (changed OR bound <> stall_bound)) AS settled,
       ARRAY(SELECT run_id FROM run, clock
             WHERE changed AND NOT open OR NOT {is_settled} AND (changed OR stall_bound > '-infinity')
            ) AS unsettled,
       ARRAY(SELECT DISTINCT queue FROM queued WHERE NOT open) AS stale_queues,
       (SELECT count(*) = $5 FROM entry WHERE bound = '-infinity')
       OR (SELECT count(*) = $4 AND (
               SELECT count(*) FROM listed WHERE (listed.since, listed.run_id)
                   <= (SELECT bound, run_id FROM entry ORDER BY bound DESC, run_id DESC LIMIT 1)) < $3
           FROM entry WHERE bound > '-infinity')
       OR EXISTS (SELECT FROM queued GROUP BY queue, priority
                  HAVING count(*) = $4 AND count(*) FILTER (WHERE open) < $3) AS more
"""
GET_STALLED_STEPS = (
    GET_STALLED_STEPS.replace("{unqueued_steps}", UNQUEUED_STEPS)
    .replace("{stall_bound}", STALL_BOUND)
    .replace("{is_settled}", IS_SETTLED.replace("{bound}", "bound"))
)

# Nothing waits for a lock; a later call finds the runs and steps that are locked. The lock of the run keeps
# other calls from adding steps and from changing waiters, and that of a step from changing it.
LOCK_RUNS = """
SELECT run_id FROM {schema}.runs WHERE run_id = ANY($1::uuid[]) ORDER BY run_id FOR NO KEY UPDATE SKIP LOCKED
"""
# The changes that are committed by now are visible to SET_BOUNDS. Later ones stay.
DELETE_CHANGES = "DELETE FROM {schema}.stall_changes WHERE run_id = ANY($1::uuid[])"
DELETE_CHANGES_OF_DELETED_RUNS = """
DELETE FROM {schema}.stall_changes c
WHERE run_id = ANY($1::uuid[]) AND NOT EXISTS (SELECT FROM {schema}.runs r WHERE r.run_id = c.run_id)
"""
NOTE_STEPS = """
WITH unnoted AS MATERIALIZED (
    SELECT s.run_id, s.step_key
    FROM unnest($1::uuid[]) AS r (run_id) JOIN {schema}.steps s ON s.run_id = r.run_id
    WHERE {unqueued} AND NOT s.stall_noted
    ORDER BY s.run_id, s.step_key FOR NO KEY UPDATE OF s SKIP LOCKED
)
UPDATE {schema}.steps s SET stall_noted = true
FROM unnoted u WHERE s.run_id = u.run_id AND s.step_key = u.step_key
""".replace("{unqueued}", UNQUEUED)
SET_BOUNDS = """
UPDATE {schema}.runs r SET stall_bound = b.bound
FROM (
    SELECT r.run_id, CASE WHEN noted AND {is_settled} THEN since ELSE '-infinity' END AS bound
    FROM (SELECT coalesce($2, now) AS as_of, now
          FROM (SELECT coalesce($3, clock_timestamp()) AS now) now) clock,
         unnest($1::uuid[]) AS r (run_id), LATERAL (
        SELECT coalesce(min(since), 'infinity') AS since, coalesce(bool_and(stall_noted), true) AS noted
        FROM ({unqueued_steps}) s
    ) f
) b
WHERE r.run_id = b.run_id AND r.stall_bound <> b.bound
""".replace("{unqueued_steps}", UNQUEUED_STEPS).replace(
    "{is_settled}", IS_SETTLED.replace("{bound}", "since")
)
REMOVE_BOUNDS = """
UPDATE {schema}.runs SET stall_bound = '-infinity'
WHERE run_id = ANY($1::uuid[]) AND stall_bound > '-infinity'
"""


class StalledSteps:
    """The contract of get_stalled_steps is in flowstore_core/steps.py."""

    _database: Database

    async def get_stalled_steps(self, *, as_of: datetime | None, take: int) -> Sequence[StalledStep]:
        now = self._database.now()
        lookahead, unbounded = take + LOOKAHEAD, MAX_UNBOUNDED
        while True:
            [row] = await self._database.read_by_index(
                GET_STALLED_STEPS, as_of, now, take, lookahead, unbounded
            )
            changed = await self._update_bounds(row["settled"], row["unsettled"], as_of)
            if row["stale_queues"]:
                await delete_stale(self._database, row["stale_queues"], lookahead)
            if not row["more"]:
                return tuple(
                    StalledStep(
                        run_id=plain_uuid(step[0]),
                        step_key=step[1],
                        status=StepStatus.PENDING if step[2] is None else StepStatus(step[2]),
                        reason=StallReason(step[3]),
                        since=step[4],
                    )
                    for step in row["steps"]
                )
            # The runs that have got a bound now make room for others.
            if changed < unbounded // 2:
                lookahead, unbounded = 2 * lookahead, 2 * unbounded

    async def _update_bounds(
        self, settled: Sequence[UUID], unsettled: Sequence[UUID], as_of: datetime | None
    ) -> int:
        """Set and remove bounds. Returns the number of runs that were not locked."""
        updated = 0
        try:
            for sets_bounds, run_ids in ((True, settled), (False, unsettled)):
                for start in range(0, len(run_ids), BOUNDS_PER_TRANSACTION):
                    updated += await self._update(
                        run_ids[start : start + BOUNDS_PER_TRANSACTION], sets_bounds, as_of
                    )
        except FlowStoreError as error:
            # The next call finds the runs again.
            log.info("get_stalled_steps: bounds of runs were not updated: %s", error)
        return updated

    async def _update(self, run_ids: Sequence[UUID], sets_bounds: bool, as_of: datetime | None) -> int:
        async def work(transaction: Transaction) -> int:
            locked = [row[0] for row in await transaction.rows(LOCK_RUNS, run_ids)]
            await transaction.execute(DELETE_CHANGES, locked)
            if sets_bounds:
                await transaction.execute(NOTE_STEPS, locked)
                await transaction.execute(SET_BOUNDS, locked, as_of, transaction.now)
            else:
                await transaction.execute(REMOVE_BOUNDS, locked)
                await transaction.execute(DELETE_CHANGES_OF_DELETED_RUNS, run_ids)
            return len(locked)

        return await self._database.transaction("get_stalled_steps", work, index_only=True)
