"""Queues: the next steps, advances of runs, redispatches, statistics."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields, replace
from datetime import datetime, timedelta
from uuid import UUID

from flowstore_conformance.claim_tokens import ClaimToken
from flowstore_conformance.model.starts import Starts
from flowstore_conformance.model.state import Run, Step
from flowstore_conformance.model.steps import find_last_attempt
from flowstore_core import (
    ClaimedStep,
    EndedStep,
    FlowSignalWaiter,
    FlowStoreError,
    QueueStatistics,
    RunAdvance,
    RunStatus,
    StepAlreadyCompletedError,
    StepClaim,
    StepDispatch,
    StepRequest,
    StepStatus,
)
from flowstore_core.queues import ADVANCE_ERRORS


class Queues(Starts):
    """Handing out queued steps, advancing runs, and the statistics of queues."""

    def claim_next_steps(
        self,
        queues: Collection[str],
        *,
        lease: timedelta,
        limit: int = 1,
        worker: str | None = None,
        run_id: UUID | None = None,
        step_key: str | None = None,
    ) -> tuple[ClaimedStep, ...]:
        """Claim and start the first ready steps (QUE-1, QUE-2).

        ``run_id`` and ``step_key`` limit the call to one step: concurrent calls are judged step by step.
        """
        ready = [
            (-dispatch.priority, ready_at, run_id_.bytes, key, run_id_)
            for run_id_, run, key, step, dispatch in self._queued()
            if dispatch.queue in queues
            and run_id in (None, run_id_)
            and step_key in (None, key)
            and (ready_at := _ready_at(step, run.waiters.get(key))) is not None
            and ready_at <= self.now
        ]
        return tuple(
            self._claim_next(run_id_, key, lease, worker) for *_, key, run_id_ in sorted(ready)[:limit]
        )

    def _claim_next(self, run_id: UUID, step_key: str, lease: timedelta, worker: str | None) -> ClaimedStep:
        run, record = self.require(run_id)
        step = run.steps[step_key]
        dispatch = step.dispatch
        assert dispatch is not None
        assert dispatch.queue is not None
        assert dispatch.step_type is not None
        number = len(step.attempts) + 1
        expires_at = self._end_of(lease)
        claim = StepClaim(
            run_id=run_id,
            step_key=step_key,
            owner=ClaimToken.of(run_id, step_key),
            claimed_at=self.now,
            expires_at=expires_at,
        )
        opened = replace(
            self._attempt(run_id, step_key, step, dispatch.step_type, StepStatus.RUNNING),
            input_json=dispatch.input_json,
            job_id=worker,
        )
        run.steps[step_key] = replace(
            step,
            status=StepStatus.RUNNING,
            attempts=(*self._closed(step), opened),
            reopened=False,
            rescheduled=False,
            claim=claim,
            started_under=claim,
        )
        control = run.control
        return ClaimedStep(
            run_id=run_id,
            flow_id=record.flow_id,
            flow_name=record.flow_name,
            step_key=step_key,
            step_type=dispatch.step_type,
            input_json=dispatch.input_json,
            attempt=number,
            owner=ClaimToken.of(run_id, step_key),
            queue=dispatch.queue,
            priority=dispatch.priority,
            dispatched_at=dispatch.dispatched_at,
            due_at=dispatch.due_at,
            claimed_at=self.now,
            expires_at=expires_at,
            cancel_requested=control is not None and bool(control.cancelled or control.timed_out),
        )

    def advance_run(
        self,
        run_id: UUID,
        step_key: str,
        status: StepStatus,
        *,
        attempt: int,
        owner: str | None = None,
        output_json: str | None = None,
        error_message: str | None = None,
        dispatch: Sequence[StepRequest] = (),
        complete_as: RunStatus | None = None,
        failed_as: RunStatus | None = RunStatus.FAILED,
    ) -> RunAdvance:
        """Record an outcome, settle the requests and complete a finished run (QUE-4, QUE-6)."""
        run, record = self.require(run_id)
        _, last = find_last_attempt(run_id, run, step_key, attempt, owner)
        if last.completed_at is None:
            self.record_step_complete(
                run_id,
                step_key,
                status,
                output_json=output_json,
                error_message=error_message,
                attempt=attempt,
            )
        elif (last.status, last.output_json, last.error_message) != (status, output_json, error_message):
            raise StepAlreadyCompletedError(run_id, step_key, attempt)
        if record.status.is_terminal:
            return RunAdvance(dispatched=(), run_completed=False)
        dispatched, stayed_behind = self.settle(run_id, run, dispatch)
        completed = complete_as is not None and self._is_finished(run)
        if completed:
            assert complete_as is not None
            failed = stayed_behind or any(one.status is StepStatus.FAILED for one in run.steps.values())
            end = failed_as if failed and failed_as is not None else complete_as
            run.record = replace(record, status=RunStatus(end), completed_at=self.now)
        return RunAdvance(dispatched=tuple(dispatched), run_completed=completed)

    def advance_runs(self, steps: Sequence[EndedStep]) -> tuple[RunAdvance | FlowStoreError, ...]:
        """End each step as advance_run does; an error is the result of its step (QUE-4)."""
        results: list[RunAdvance | FlowStoreError] = []
        for step in steps:
            arguments = {each.name: getattr(step, each.name) for each in fields(step)}
            try:
                results.append(self.advance_run(**arguments))
            except ADVANCE_ERRORS as error:
                results.append(error)
        return tuple(results)

    def _is_finished(self, run: Run) -> bool:
        """Whether every step is terminal and no other key has a live claim or a dispatch (QUE-6)."""
        unstarted = [step for step in run.steps.values() if step.status is None]
        pending = any(step.dispatch is not None or step.held(self.now) for step in unstarted)
        return not pending and all(step.is_terminal for step in run.steps.values() if step.status)

    def redispatch_step(
        self,
        run_id: UUID,
        step_key: str,
        *,
        queue: str | None = None,
        priority: int | None = None,
        due_at: datetime | None = None,
    ) -> bool:
        """Replace the dispatch of a queued step that nobody has claimed (QUE-7)."""
        for of, run, key, step, dispatch in list(self._queued()):
            if (of, key) == (run_id, step_key) and not step.held(self.now):
                replaced = replace(
                    dispatch,
                    dispatched_at=self.now,
                    due_at=dispatch.due_at if due_at is None else due_at,
                    job_id=None,
                    queue=dispatch.queue if queue is None else queue,
                    priority=dispatch.priority if priority is None else priority,
                )
                run.steps[step_key] = replace(step, dispatch=replaced)
                return True
        return False

    def get_queues(self) -> tuple[QueueStatistics, ...]:
        """Count the queued steps of each queue (QUE-8)."""
        counts: dict[str, dict[str, int]] = {}
        ready: dict[str, list[datetime]] = {}
        for _, run, key, step, dispatch in self._queued():
            assert dispatch.queue is not None
            waiter = run.waiters.get(key)
            ready_at = _ready_at(step, waiter)
            if step.held(self.now):
                kind = "running"
            elif _is_open(waiter, self.now):
                kind = "waiting"
            elif ready_at is None or ready_at > self.now:
                kind = "scheduled"
            else:
                kind = "ready"
                ready.setdefault(dispatch.queue, []).append(ready_at)
            none = dict.fromkeys(("ready", "scheduled", "waiting", "running"), 0)
            counts.setdefault(dispatch.queue, none)[kind] += 1
        return tuple(
            QueueStatistics(queue=queue, **counted, oldest_ready_at=min(ready.get(queue, ()), default=None))
            for queue, counted in sorted(counts.items())
        )

    def _queued(self) -> Iterator[tuple[UUID, Run, str, Step, StepDispatch]]:
        """The queued steps of Running runs that are not terminal (QUE-1)."""
        for run_id, run in self.state.runs.items():
            if run.record is None or run.record.status.is_terminal:
                continue
            for key, step in run.steps.items():
                if step.dispatch is not None and step.dispatch.queue is not None and not step.is_terminal:
                    yield run_id, run, key, step, step.dispatch


def _ready_at(step: Step, waiter: FlowSignalWaiter | None) -> datetime | None:
    """The time from which a dispatched step is ready; None if no time makes it ready (QUE-1)."""
    assert step.dispatch is not None
    times: list[datetime | None] = [step.dispatch.due_at or step.dispatch.dispatched_at]
    if step.claim is not None:
        times.append(step.claim.expires_at)
    if waiter is not None and waiter.delivered_at is None:
        times.append(waiter.expires_at)
    known = [time for time in times if time is not None]
    return max(known) if len(known) == len(times) else None


def _is_open(waiter: FlowSignalWaiter | None, now: datetime) -> bool:
    """Whether the waiter is undelivered, neither expired nor past its expires_at."""
    if waiter is None or waiter.delivered_at is not None or waiter.expired_at is not None:
        return False
    return waiter.expires_at is None or now < waiter.expires_at
