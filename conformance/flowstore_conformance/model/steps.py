"""Steps: start, complete, skip, retry, reschedule, stalled steps."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import datetime
from uuid import UUID

from flowstore_conformance.model.requests import Requests
from flowstore_conformance.model.state import Run, Step
from flowstore_core import (
    ClaimLostError,
    FlowSignalWaiter,
    FlowStepAttemptRecord,
    RunCompletedError,
    RunStatus,
    StaleAttemptError,
    StalledStep,
    StallReason,
    StepAlreadyCompletedError,
    StepClaim,
    StepDispatch,
    StepNotFoundError,
    StepRequest,
    StepStatus,
)


class Steps(Requests):
    """Starting, closing, skipping, retrying and rescheduling step attempts."""

    def record_step_start(
        self,
        run_id: UUID,
        step_key: str,
        step_type: str,
        *,
        input_json: str | None = None,
        job_id: str | None = None,
        owner: str | None = None,
    ) -> int:
        """Open the next attempt (STP-1).

        Refused on a terminal run (RUN-4), on a Succeeded or Skipped step (STP-2) and, with ``owner``,
        without a live claim of that owner. A repeated start under the same claim returns the open attempt
        (STP-3).
        """
        run, record = self.require(run_id)
        if record.status.is_terminal:
            raise RunCompletedError(run_id, step_key)
        step = run.steps.get(step_key, Step())
        if step.status in (StepStatus.SUCCEEDED, StepStatus.SKIPPED):
            raise StepAlreadyCompletedError(run_id, step_key)
        claim = None
        if owner is not None:
            claim = step.claim if step.held(self.now) else None
            if claim is None or claim.owner != owner:
                raise ClaimLostError(run_id, step_key)
            if step.is_open and _same_claim(step.started_under, claim):
                return len(step.attempts)
        opened = self._attempt(run_id, step_key, step, step_type, StepStatus.RUNNING)
        opened = replace(opened, input_json=input_json, job_id=job_id)
        run.steps[step_key] = replace(
            step,
            status=StepStatus.RUNNING,
            attempts=(*self._closed(step), opened),
            reopened=False,
            rescheduled=False,
            started_under=claim,
        )
        return opened.attempt

    def record_step_complete(
        self,
        run_id: UUID,
        step_key: str,
        status: StepStatus,
        *,
        output_json: str | None = None,
        error_message: str | None = None,
        attempt: int | None = None,
        owner: str | None = None,
    ) -> None:
        """Close the last attempt; the same outcome again is a no-op (STP-4)."""
        run, _ = self.require(run_id)
        step, last = find_last_attempt(run_id, run, step_key, attempt, owner)
        if last.completed_at is not None:
            if (last.status, last.output_json, last.error_message) != (status, output_json, error_message):
                raise StepAlreadyCompletedError(run_id, step_key, last.attempt)
            return
        closed = replace(
            last,
            status=StepStatus(status),
            output_json=output_json,
            error_message=error_message,
            completed_at=self.now,
        )
        run.steps[step_key] = replace(step, status=closed.status, attempts=(*step.attempts[:-1], closed))

    def record_skipped_step(
        self,
        run_id: UUID,
        step_key: str,
        step_type: str,
        reason: str | None = None,
        *,
        owner: str | None = None,
    ) -> None:
        """Record one attempt that starts and ends Skipped; with ``owner``, take the claim too (STP-5)."""
        run, _ = self.require(run_id)
        step = run.steps.get(step_key, Step())
        if step.is_terminal:
            own_skip = (
                owner is not None and step.started_under is not None and step.started_under.owner == owner
            )
            last = step.attempts[-1]
            if own_skip and step.status is StepStatus.SKIPPED and last.error_message == reason:
                return
            raise StepAlreadyCompletedError(run_id, step_key)
        claim = step.claim
        if owner is not None:
            if not step.held(self.now):
                claim = StepClaim(
                    run_id=run_id, step_key=step_key, owner=owner, claimed_at=self.now, expires_at=None
                )
            elif claim is not None and claim.owner != owner:
                raise ClaimLostError(run_id, step_key)
        self._skip(run_id, run, step_key, step_type, reason)
        skipped = run.steps[step_key]
        run.steps[step_key] = replace(
            skipped, claim=claim, started_under=claim if owner is not None else None
        )

    def retry_step(
        self,
        run_id: UUID,
        step_key: str,
        *,
        attempt: int | None = None,
        reset: Collection[str] = (),
        dispatch: Sequence[StepRequest] = (),
    ) -> None:
        """Reopen a step and its run, and settle requests; a repeated call changes no other step (STP-6)."""
        run, record = self.require(run_id)
        step = run.steps.get(step_key)
        if step is None or step.status is None:
            raise StepNotFoundError(run_id, step_key)
        if attempt not in (None, len(step.attempts)):
            raise StaleAttemptError(run_id, step_key, attempt, len(step.attempts))
        if not step.reopened:
            self._reopen(run, step_key, step, reset)
        if record.status.is_terminal:
            run.record = replace(record, status=RunStatus.RUNNING, completed_at=None)
            if run.control is not None:
                timeout_at = run.control.timeout_at
                elapsed = timeout_at is not None and timeout_at <= self.now
                run.control = replace(
                    run.control, cancelled=None, timed_out=None, timeout_at=None if elapsed else timeout_at
                )
        self.settle(run_id, run, dispatch)

    def _reopen(self, run: Run, step_key: str, step: Step, reset: Collection[str]) -> None:
        """Make the step Pending without claim, dispatch and undelivered waiter; reset keys (STP-6)."""
        attempts = self._closed(step)
        run.steps[step_key] = Step(
            status=StepStatus.PENDING,
            attempts=attempts,
            reopened=True,
            # reschedule_step with an error, repeated for this attempt, is still a no-op (STP-7).
            rescheduled=step.rescheduled and attempts[-1].status is StepStatus.FAILED,
        )
        gone = {step_key}
        for key in set(reset) - {step_key}:
            other = run.steps.get(key)
            if other is not None and other.status is StepStatus.SKIPPED:
                run.steps[key] = Step(attempts=other.attempts)
                gone.add(key)
        for key in gone:
            if key in run.waiters and run.waiters[key].delivered_at is None:
                del run.waiters[key]

    def reschedule_step(
        self,
        run_id: UUID,
        step_key: str,
        *,
        attempt: int,
        output_json: str | None = None,
        error_message: str | None = None,
        due_at: datetime | None = None,
        owner: str | None = None,
    ) -> None:
        """Close the attempt as Pending, remove the claim and replace the dispatch (STP-7).

        With ``error_message`` the attempt is closed as Failed, and the step reopened for the new dispatch.
        """
        run, record = self.require(run_id)
        failed = error_message is not None
        before = run.steps.get(step_key, Step())
        if failed and before.reopened and before.rescheduled and attempt == len(before.attempts):
            return
        step, last = find_last_attempt(run_id, run, step_key, attempt, owner)
        closed = StepStatus.FAILED if failed else StepStatus.PENDING
        if step.rescheduled and step.status is closed:
            return
        if last.completed_at is None:
            last = replace(
                last,
                status=closed,
                output_json=output_json,
                error_message=error_message,
                completed_at=self.now,
            )
        elif last.status is not closed or (
            failed and (last.output_json, last.error_message) != (output_json, error_message)
        ):
            raise StepAlreadyCompletedError(run_id, step_key, attempt)
        step = replace(
            step,
            status=closed,
            attempts=(*step.attempts[:-1], last),
            rescheduled=True,
            claim=None,
            dispatch=None,
        )
        run.steps[step_key] = step
        if record.status.is_terminal:
            return
        if failed:
            self._reopen(run, step_key, step, ())
        # The queue, priority, step_type and input_json stay.
        old = before.dispatch or StepDispatch(
            run_id=run_id, step_key=step_key, dispatched_at=self.now, due_at=None, job_id=None
        )
        new = replace(old, dispatched_at=self.now, due_at=due_at, job_id=None)
        run.steps[step_key] = replace(run.steps[step_key], dispatch=new)

    def get_stalled_steps(self, *, as_of: datetime | None = None, take: int = 100) -> tuple[StalledStep, ...]:
        """List the steps of Running runs that need a new dispatch or claim (STP-8)."""
        as_of = self.now if as_of is None else as_of
        found = []
        for run_id, run in self.state.runs.items():
            if run.record is None or run.record.status.is_terminal:
                continue
            for key, step in run.steps.items():
                waiter = run.waiters.get(key)
                waiting = (
                    waiter is not None
                    and waiter.delivered_at is None
                    and waiter.expired_at is None
                    and (waiter.expires_at is None or waiter.expires_at > as_of)
                )
                stall = None if step.is_terminal or waiting else _stall(step, waiter)
                if stall is not None and stall[1] <= as_of:
                    found.append(
                        StalledStep(
                            run_id=run_id,
                            step_key=key,
                            status=step.status or StepStatus.PENDING,
                            reason=stall[0],
                            since=stall[1],
                        )
                    )
        found.sort(key=lambda stalled: (stalled.since, stalled.run_id.bytes, stalled.step_key))
        return tuple(found[:take])


def _same_claim(one: StepClaim | None, other: StepClaim) -> bool:
    """Whether both are the same claim: renewing keeps claimed_at, a new claim does not (STP-3)."""
    return one is not None and (one.owner, one.claimed_at) == (other.owner, other.claimed_at)


def find_last_attempt(
    run_id: UUID, run: Run, step_key: str, attempt: int | None, owner: str | None
) -> tuple[Step, FlowStepAttemptRecord]:
    """The step and its last attempt, if ``attempt`` names it and ``owner`` started it (UNK, STP-4)."""
    step = run.steps.get(step_key)
    if step is None or step.status is None:
        raise StepNotFoundError(run_id, step_key)
    if step.reopened or attempt not in (None, len(step.attempts)):
        raise StaleAttemptError(run_id, step_key, attempt, len(step.attempts))
    if owner is not None and (step.started_under is None or step.started_under.owner != owner):
        raise ClaimLostError(run_id, step_key)
    return step, step.attempts[-1]


def _stall(step: Step, waiter: FlowSignalWaiter | None) -> tuple[StallReason, datetime] | None:
    """The reason and the start of a stall, if the step has one (STP-8)."""
    due_at = None if step.dispatch is None else step.dispatch.due_at or step.dispatch.dispatched_at
    until = None if waiter is None or waiter.delivered_at is not None else waiter.expires_at
    if step.claim is not None:
        reason, since = StallReason.LEASE_EXPIRED, step.claim.expires_at
    elif due_at is not None:
        reason, since = StallReason.DISPATCH_DUE, due_at
    elif step.status is not None:
        last = step.attempts[-1]
        reason, since = StallReason.NOT_DISPATCHED, last.completed_at or last.started_at
    else:
        return None
    if since is None:
        # A claim without lease never stalls.
        return None
    return reason, max(time for time in (since, due_at, until) if time is not None)
