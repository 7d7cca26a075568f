"""Steps: start, complete, skip, retry, reschedule (STP)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from uuid import UUID

from msgspec.structs import replace

from flowstore_core import (
    ClaimLostError,
    FlowStepRecord,
    RunCompletedError,
    RunStatus,
    StaleAttemptError,
    StepAlreadyCompletedError,
    StepRequest,
    StepStatus,
    new_claim_token,
)
from flowstore_documents import keys
from flowstore_documents.access import Access
from flowstore_documents.attempts import read_attempts, step_records
from flowstore_documents.documents import Claim, Dispatch
from flowstore_documents.requests import keys_of_requests, settle_requests
from flowstore_documents.run_state import RunState, change_run, read_run
from flowstore_documents.texts import Text, same_text
from flowstore_documents.transactions import Transaction

_FINAL = frozenset({StepStatus.SUCCEEDED, StepStatus.SKIPPED})
"""Statuses that only retry_step reopens; a failed step may be started again (STP-2)."""


class Steps(Access):
    async def record_step_start(
        self,
        run_id: UUID,
        step_key: str,
        step_type: str,
        *,
        input_json: str | None = None,
        job_id: str | None = None,
        owner: str | None = None,
    ) -> int:
        async def start(tx: Transaction) -> int:
            run = await change_run(tx, run_id, [step_key])
            if run.is_terminal:
                raise RunCompletedError(run_id, step_key)
            step = run.step(step_key)
            if step.status in _FINAL:
                raise StepAlreadyCompletedError(run_id, step_key)
            now = await tx.now()
            if owner is not None:
                if step.claim is None or step.claim.owner != owner or not step.has_live_claim(now):
                    raise ClaimLostError(run_id, step_key)
                if step.started_owner == owner and step.status is StepStatus.RUNNING:
                    return step.attempt
            run.start_step(step_key, step_type, tx.text(input_json), job_id, now)
            step.started_owner = owner
            return step.attempt

        return await self._write("record_step_start", start, hot_key=keys.step(run_id, step_key))

    async def record_step_complete(
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
        async def complete(tx: Transaction) -> None:
            run = await change_run(tx, run_id, [step_key])
            check_attempt(run, step_key, attempt, owner)
            await close_attempt(tx, run, step_key, status, output_json, error_message)

        await self._write("record_step_complete", complete)

    async def record_skipped_step(
        self,
        run_id: UUID,
        step_key: str,
        step_type: str,
        reason: str | None = None,
        *,
        owner: str | None = None,
    ) -> None:
        token = new_claim_token()

        async def skip(tx: Transaction) -> None:
            run = await change_run(tx, run_id, [step_key])
            run.check_stored()
            step = run.step(step_key)
            if step.is_terminal:
                is_repeated = (
                    owner is not None
                    and step.status is StepStatus.SKIPPED
                    and step.started_owner == owner
                    and same_text(step.error_message, tx.text(reason))
                )
                if is_repeated:
                    return
                raise StepAlreadyCompletedError(run_id, step_key)
            now = await tx.now()
            if owner is not None:
                if not step.has_live_claim(now):
                    step.set_claim(Claim(token, now, owner))
                elif step.claim is not None and step.claim.owner != owner:
                    raise ClaimLostError(run_id, step_key)
            run.skip_step(step_key, step_type, reason, now)
            step.started_owner = owner

        await self._write("record_skipped_step", skip)

    async def retry_step(
        self,
        run_id: UUID,
        step_key: str,
        *,
        attempt: int | None = None,
        reset: Collection[str] = (),
        dispatch: Sequence[StepRequest] = (),
    ) -> None:
        async def retry(tx: Transaction) -> None:
            wanted = [step_key, *reset, *keys_of_requests(dispatch)]
            marks = keys.prefix_range(keys.open_marks(run_id), keys_only=True)
            run = await change_run(tx, run_id, wanted, control=True, ahead=[marks])
            step = run.started_step(step_key)
            if attempt is not None and attempt != step.attempt:
                raise StaleAttemptError(run_id, step_key, attempt, step.attempt)
            if run.is_terminal:
                # They come back into the queues (QUE-5).
                await run.load_open_steps()
            now = await tx.now()
            if not step.reopened:
                _reopen(run, step_key, now)
                for key in reset:
                    # The key of the retried step has no effect here: its status is Pending.
                    other = run.step(key)
                    if other.status is StepStatus.SKIPPED:
                        run.archive_attempt(key, now)
                        other.status = None
                        other.clear()
            if run.is_terminal:
                run.stored.status = RunStatus.RUNNING
                run.stored.completed_at = None
                if run.control is not None:
                    # Otherwise the run would be stopped again at once.
                    run.control.clear_stops(now)
            settle_requests(tx, run, dispatch, now)

        await self._write("retry_step", retry)

    async def get_step(self, run_id: UUID, step_key: str) -> FlowStepRecord | None:
        async def read(tx: Transaction) -> FlowStepRecord | None:
            attempts_range = keys.prefix_range(keys.attempts(run_id, step_key))
            run = await read_run(tx, run_id, [step_key], ahead=[attempts_range])
            if run.run is None or run.step(step_key).status is None:
                return None
            attempts = await read_attempts(tx, run_id, step_key)
            (record,) = await step_records(tx, run_id, {step_key: run.step(step_key)}, attempts)
            return record

        return await self._read("get_step", read)

    async def get_step_statuses(self, run_id: UUID) -> Mapping[str, StepStatus]:
        async def read(tx: Transaction) -> Mapping[str, StepStatus]:
            run = await read_run(tx, run_id, ahead=[keys.prefix_range(keys.steps(run_id))])
            await run.load_all_steps()
            return MappingProxyType(
                {key: step.status for key, step in sorted(run.steps.items()) if step.status is not None}
            )

        return await self._read("get_step_statuses", read)

    async def reschedule_step(
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
        has_failed = error_message is not None
        token = new_claim_token()

        async def reschedule(tx: Transaction) -> None:
            run = await change_run(tx, run_id, [step_key])
            step = run.started_step(step_key)
            was_failed = step.rescheduled_as is StepStatus.FAILED
            if has_failed and step.attempt == attempt and step.reopened and was_failed:
                return
            check_attempt(run, step_key, attempt, owner)
            now = await tx.now()
            if step.completed_at is None:
                status = StepStatus.FAILED if has_failed else StepStatus.PENDING
                step.close(status, tx.text(output_json), tx.text(error_message), now)
            elif has_failed:
                if step.status is StepStatus.FAILED and was_failed:
                    return
                check_outcome(run, step_key, StepStatus.FAILED, tx.text(output_json), tx.text(error_message))
            elif step.status is not StepStatus.PENDING:
                raise StepAlreadyCompletedError(run_id, step_key, attempt)
            elif step.rescheduled_as is not None:
                return
            step.rescheduled_as = step.status
            old = step.dispatch
            if has_failed and run.is_running:
                _reopen(run, step_key, now)
            step.claim = step.dispatch = None
            if run.is_running:
                dispatch = Dispatch(token, now, due_at)
                if old is not None and old.queue is not None:
                    dispatch = replace(old, token=token, dispatched_at=now, due_at=due_at, job_id=None)
                step.dispatch = dispatch

        await self._write("reschedule_step", reschedule)


def check_attempt(run: RunState, step_key: str, attempt: int | None, owner: str | None) -> None:
    """Check that ``attempt`` is the newest, that the step is not reopened, and who started it (STP-4)."""
    step = run.started_step(step_key)
    if step.reopened or (attempt is not None and attempt != step.attempt):
        raise StaleAttemptError(run.run_id, step_key, attempt, step.attempt)
    if owner is not None and step.started_owner != owner:
        raise ClaimLostError(run.run_id, step_key)


async def close_attempt(
    tx: Transaction,
    run: RunState,
    step_key: str,
    status: StepStatus,
    output_json: str | None,
    error_message: str | None,
) -> None:
    """Close the newest attempt once; the same outcome again changes nothing (STP-4)."""
    step = run.step(step_key)
    output, error = tx.text(output_json), tx.text(error_message)
    if step.completed_at is None:
        step.close(status, output, error, await tx.now())
    else:
        check_outcome(run, step_key, status, output, error)


def check_outcome(
    run: RunState, step_key: str, status: StepStatus, output: Text | None, error: Text | None
) -> None:
    """Raise StepAlreadyCompletedError if the newest attempt was closed with another outcome (STP-4)."""
    step = run.step(step_key)
    is_same = same_text(step.output_json, output) and same_text(step.error_message, error)
    if step.status is not status or not is_same:
        raise StepAlreadyCompletedError(run.run_id, step_key, step.attempt)


def _reopen(run: RunState, step_key: str, now: datetime) -> None:
    """Make a step Pending and remove its claim, dispatch and undelivered waiter (STP-6)."""
    step = run.step(step_key)
    run.archive_attempt(step_key, now)
    step.status = StepStatus.PENDING
    step.reopened = True
    step.clear()
