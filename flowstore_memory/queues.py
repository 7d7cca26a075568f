"""Queues: claim the next steps, advance runs, statistics (QUE)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from itertools import groupby, islice
from typing import Any
from uuid import UUID

from flowstore_core import (
    ClaimedStep,
    EndedStep,
    FlowStoreError,
    QueueStatistics,
    RunAdvance,
    RunStatus,
    StepStatus,
    new_claim_token,
)
from flowstore_core.claims import lease_end
from flowstore_core.queues import ADVANCE_ERRORS
from flowstore_core.status import TERMINAL_STEP_STATUSES
from flowstore_memory.attempts import start_attempt
from flowstore_memory.queue_index import index_step, ready_at, take_ready_steps
from flowstore_memory.requests import settle_requests
from flowstore_memory.runs import has_unstarted_work
from flowstore_memory.state import OpenNamespace, QueuedDispatch, RunState, StepState
from flowstore_memory.steps import check_attempt, check_outcome, started_step


class Queues(OpenNamespace):
    async def claim_next_steps(
        self,
        queues: Sequence[str],
        *,
        lease: timedelta,
        limit: int = 1,
        worker: str | None = None,
    ) -> Sequence[ClaimedStep]:
        now = self._now()
        expires_at = lease_end(now, lease)
        ready = take_ready_steps(self._namespace, queues, now)
        return tuple(
            self._claim(run, key, step, expires_at, worker, now)
            for run, key, step in list(islice(ready, limit))
        )

    def _claim(
        self,
        run: RunState,
        step_key: str,
        step: StepState,
        expires_at: datetime,
        worker: str | None,
        now: datetime,
    ) -> ClaimedStep:
        queued, dispatched_at = step.queued, step.dispatched_at
        assert queued is not None
        assert dispatched_at is not None
        owner = new_claim_token()
        step.claim(owner, now, expires_at)
        start_attempt(run, step_key, step, queued.step_type, queued.input_json, worker, owner, now)
        index_step(self._namespace, run, step_key, step)
        control = self._namespace.controls.get(run.run_id)
        return ClaimedStep(
            run_id=run.run_id,
            flow_id=run.flow_id,
            flow_name=run.flow_name,
            step_key=step_key,
            step_type=queued.step_type,
            input_json=queued.input_json,
            attempt=step.attempt,
            owner=owner,
            queue=queued.queue,
            priority=queued.priority,
            dispatched_at=dispatched_at,
            due_at=step.due_at,
            claimed_at=now,
            expires_at=expires_at,
            cancel_requested=control is not None and control.is_stopped,
        )

    async def advance_run(self, **arguments: Any) -> RunAdvance:
        return self._advance(EndedStep(**arguments))

    async def advance_runs(self, steps: Sequence[EndedStep]) -> Sequence[RunAdvance | FlowStoreError]:
        results: list[RunAdvance | FlowStoreError] = []
        for step in steps:
            try:
                results.append(self._advance(step))
            except ADVANCE_ERRORS as error:
                results.append(error)
        return tuple(results)

    def _advance(self, ended: EndedStep) -> RunAdvance:
        run = self._runs[ended.run_id.int]
        step = started_step(run, ended.step_key)
        check_attempt(ended.run_id, ended.step_key, step, ended.attempt, ended.owner)
        now = self._now()
        outcome = (ended.status, ended.output_json, ended.error_message)
        if step.completed_at is None:
            step.close(*outcome, now)
        else:
            check_outcome(ended.run_id, ended.step_key, step, outcome)
        if run.status is not RunStatus.RUNNING:
            return RunAdvance(dispatched=(), run_completed=False)
        settlement = settle_requests(self._namespace, run, ended.dispatch, now)
        if ended.complete_as is None or not _is_finished(run, now):
            return RunAdvance(dispatched=settlement.dispatched, run_completed=False)
        failed = settlement.stayed_behind or any(
            other.status is StepStatus.FAILED for other in run.steps.values()
        )
        run.status = ended.failed_as if failed and ended.failed_as is not None else ended.complete_as
        run.completed_at = now
        self._namespace.wake()
        return RunAdvance(dispatched=settlement.dispatched, run_completed=True)

    async def redispatch_step(
        self,
        run_id: UUID,
        step_key: str,
        *,
        queue: str | None = None,
        priority: int | None = None,
        due_at: datetime | None = None,
    ) -> bool:
        run = self._runs.get(run_id.int)
        step = None if run is None else run.steps.get(step_key)
        if run is None or step is None or step.queued is None:
            return False
        now = self._now()
        if run.status is not RunStatus.RUNNING or step.status in TERMINAL_STEP_STATUSES:
            return False
        if step.has_live_claim(now):
            return False
        old = step.queued
        replaced = QueuedDispatch(
            old.queue if queue is None else queue,
            old.priority if priority is None else priority,
            old.step_type,
            old.input_json,
        )
        step.dispatch(now, due_at or step.due_at, replaced)
        index_step(self._namespace, run, step_key, step)
        return True

    async def get_queues(self) -> Sequence[QueueStatistics]:
        queued = sorted(self._queued_steps(), key=lambda found: found[0])
        now = self._now()
        return tuple(
            _statistics(queue, [(run, key, step) for _, run, key, step in steps], now)
            for queue, steps in groupby(queued, key=lambda found: found[0])
        )

    def _queued_steps(self) -> Iterator[tuple[str, RunState, str, StepState]]:
        for run in self._runs.values():
            if run.status is RunStatus.RUNNING:
                for key, step in run.steps.items():
                    if step.queued is not None and step.status not in TERMINAL_STEP_STATUSES:
                        yield step.queued.queue, run, key, step


def _statistics(
    queue: str, steps: Sequence[tuple[RunState, str, StepState]], now: datetime
) -> QueueStatistics:
    running = waiting = scheduled = 0
    ready: list[datetime] = []
    for run, key, step in steps:
        waiter = run.waiters.get(key)
        if step.has_live_claim(now):
            running += 1
        elif waiter is not None and waiter.is_open(now):
            waiting += 1
        elif (moment := ready_at(step, waiter)) is None or moment > now:
            scheduled += 1
        else:
            ready.append(moment)
    return QueueStatistics(
        queue=queue,
        ready=len(ready),
        scheduled=scheduled,
        waiting=waiting,
        running=running,
        oldest_ready_at=min(ready, default=None),
    )


def _is_finished(run: RunState, now: datetime) -> bool:
    """Whether every step is terminal and no other key has a live claim or a dispatch (QUE-6)."""
    return all(
        step.status is None or step.status in TERMINAL_STEP_STATUSES for step in run.steps.values()
    ) and not has_unstarted_work(run, now)
