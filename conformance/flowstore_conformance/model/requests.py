"""Attempts and requests: the parts that several operations of the model share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from uuid import UUID

from flowstore_conformance.model.state import Base, Run, Step
from flowstore_core import FlowStepAttemptRecord, StepDispatch, StepRequest, StepStatus


class Requests(Base):
    """The next attempt of a step, skips, and the settling of requests."""

    def settle(self, run_id: UUID, run: Run, requests: Sequence[StepRequest]) -> tuple[list[str], bool]:
        """Settle the requests in their order (QUE-4).

        Returns the dispatched keys, and whether a request stayed behind.
        """
        dispatched: list[str] = []
        stayed_behind = False
        for request in requests:
            key = request.step_key
            step = run.steps.get(key, Step())
            if step.dispatch is not None or step.held(self.now) or step.is_open or step.is_terminal:
                continue
            ends = [(other, run.steps.get(other, Step())) for other in request.after]
            if not all(end.is_terminal for _, end in ends):
                stayed_behind = True
                continue
            refused = [(other, end.status) for other, end in ends if end.status not in request.accept]
            if refused:
                other, status = refused[0]
                self._skip(run_id, run, key, request.step_type, f"not run: {other} is {status}")
                continue
            run.steps[key] = replace(
                step,
                dispatch=StepDispatch(
                    run_id=run_id,
                    step_key=key,
                    dispatched_at=self.now,
                    due_at=request.due_at,
                    job_id=None,
                    queue=request.queue,
                    priority=request.priority,
                    step_type=request.step_type,
                    input_json=request.input_json,
                ),
            )
            dispatched.append(key)
        return dispatched, stayed_behind

    def _skip(self, run_id: UUID, run: Run, step_key: str, step_type: str, reason: str | None) -> None:
        """Record one attempt that starts and ends Skipped (STP-5)."""
        step = run.steps.get(step_key, Step())
        skipped = replace(
            self._attempt(run_id, step_key, step, step_type, StepStatus.SKIPPED),
            error_message=reason,
            completed_at=self.now,
        )
        run.steps[step_key] = replace(
            step,
            status=StepStatus.SKIPPED,
            attempts=(*self._closed(step), skipped),
            reopened=False,
            rescheduled=False,
            started_under=None,
        )

    def _attempt(
        self, run_id: UUID, step_key: str, step: Step, step_type: str, status: StepStatus
    ) -> FlowStepAttemptRecord:
        """The next attempt of a step, started now (STP-1)."""
        return FlowStepAttemptRecord(
            run_id=run_id,
            step_key=step_key,
            attempt=len(step.attempts) + 1,
            step_type=step_type,
            status=status,
            input_json=None,
            output_json=None,
            error_message=None,
            job_id=None,
            started_at=self.now,
            completed_at=None,
        )

    def _closed(self, step: Step) -> tuple[FlowStepAttemptRecord, ...]:
        """The attempts of a step; an open last attempt is closed as superseded (STP-1)."""
        if not step.attempts or step.attempts[-1].completed_at is not None:
            return step.attempts
        message = f"superseded by attempt {len(step.attempts) + 1}"
        last = replace(
            step.attempts[-1], status=StepStatus.FAILED, error_message=message, completed_at=self.now
        )
        return (*step.attempts[:-1], last)
