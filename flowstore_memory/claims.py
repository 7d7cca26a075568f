"""Claims and the dispatch ledger (CLM)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from uuid import UUID

from flowstore_core import StepClaim, StepDispatch
from flowstore_core.claims import lease_end
from flowstore_core.status import TERMINAL_RUN_STATUSES, TERMINAL_STEP_STATUSES
from flowstore_memory.attempts import start_attempt
from flowstore_memory.queue_index import index_step
from flowstore_memory.state import OpenNamespace, QueuedDispatch, RunState, StepState


class Claims(OpenNamespace):
    async def try_claim_step(
        self,
        run_id: UUID,
        step_key: str,
        *,
        owner: str | None = None,
        lease: timedelta | None = None,
    ) -> bool:
        return _take_claim(self._runs[run_id.int], step_key, owner, lease, self._now())

    async def try_start_step(
        self,
        run_id: UUID,
        step_key: str,
        step_type: str,
        *,
        owner: str,
        lease: timedelta,
        input_json: str | None = None,
        job_id: str | None = None,
    ) -> int | None:
        run, now = self._runs[run_id.int], self._now()
        if not _take_claim(run, step_key, owner, lease, now):
            return None
        step = run.steps[step_key]
        if not step.is_started_by(owner):
            start_attempt(run, step_key, step, step_type, input_json, job_id, owner, now)
        return step.attempt

    async def release_step_claim(self, run_id: UUID, step_key: str, *, owner: str | None = None) -> None:
        step = self._find_step(run_id, step_key)
        if step is not None and (owner is None or step.owner == owner):
            step.clear_claim()
            index_step(self._namespace, self._runs[run_id.int], step_key, step)

    async def renew_step_claim(self, run_id: UUID, step_key: str, owner: str, lease: timedelta) -> bool:
        return self._renew(run_id, step_key, owner, lease)

    async def renew_step_claims(
        self, claims: Sequence[tuple[UUID, str, str]], lease: timedelta
    ) -> Sequence[bool]:
        return tuple(self._renew(*claim, lease) for claim in claims)

    def _renew(self, run_id: UUID, step_key: str, owner: str, lease: timedelta) -> bool:
        step = self._find_step(run_id, step_key)
        if step is None or step.owner != owner or step.expires_at is None:
            return False
        now = self._now()
        if step.expires_at <= now:
            return False
        step.expires_at = max(step.expires_at, lease_end(now, lease))
        return True

    async def get_claimed_step_keys(self, run_id: UUID) -> frozenset[str]:
        now = self._now()
        return frozenset(
            key
            for key, step in self._step_items(run_id)
            if step.status not in TERMINAL_STEP_STATUSES and step.has_live_claim(now)
        )

    async def get_step_claims(self, run_id: UUID) -> Sequence[StepClaim]:
        return tuple(
            StepClaim(
                run_id=run_id,
                step_key=key,
                owner=step.owner,
                claimed_at=step.claimed_at,
                expires_at=step.expires_at,
            )
            for key, step in sorted(self._step_items(run_id))
            if step.claimed_at is not None
        )

    async def try_record_dispatch(
        self,
        run_id: UUID,
        step_key: str,
        *,
        due_at: datetime | None = None,
        queue: str | None = None,
        priority: int = 0,
        step_type: str | None = None,
        input_json: str | None = None,
    ) -> bool:
        run = self._runs[run_id.int]
        if run.status in TERMINAL_RUN_STATUSES:
            return False
        now = self._now()
        step = run.steps.get(step_key)
        if step is None:
            step = run.steps[step_key] = StepState()
        elif step.status in TERMINAL_STEP_STATUSES or step.dispatched_at is not None:
            return False
        if queue is None or step_type is None:
            step.dispatch(now, due_at, None)
        else:
            step.dispatch(now, due_at, QueuedDispatch(queue, priority, step_type, input_json))
            index_step(self._namespace, run, step_key, step)
        return True

    async def annotate_dispatch(self, run_id: UUID, step_key: str, job_id: str) -> None:
        step = self._find_step(run_id, step_key)
        if step is not None and step.dispatched_at is not None:
            step.queue_job_id = job_id

    async def release_dispatch(self, run_id: UUID, step_key: str) -> None:
        step = self._find_step(run_id, step_key)
        if step is not None:
            step.clear_dispatch()

    async def get_dispatched_step_keys(self, run_id: UUID) -> frozenset[str]:
        return frozenset(key for key, step in self._step_items(run_id) if step.dispatched_at is not None)

    async def get_dispatches(self, run_id: UUID) -> Sequence[StepDispatch]:
        return tuple(
            _dispatch_record(run_id, key, step, step.dispatched_at)
            for key, step in sorted(self._step_items(run_id))
            if step.dispatched_at is not None
        )

    def _find_step(self, run_id: UUID, step_key: str) -> StepState | None:
        run = self._runs.get(run_id.int)
        return None if run is None else run.steps.get(step_key)

    def _step_items(self, run_id: UUID) -> Iterable[tuple[str, StepState]]:
        run = self._runs.get(run_id.int)
        return () if run is None else run.steps.items()


def _take_claim(
    run: RunState, step_key: str, owner: str | None, lease: timedelta | None, now: datetime
) -> bool:
    """Claim a free step; True for the owner of a live claim too (CLM-1, CLM-5)."""
    if run.status in TERMINAL_RUN_STATUSES:
        return False
    step = run.steps.get(step_key)
    if step is None:
        step = run.steps[step_key] = StepState()
    elif step.status in TERMINAL_STEP_STATUSES:
        return False
    elif step.has_live_claim(now):
        return owner is not None and step.owner == owner
    step.claim(owner, now, None if lease is None else lease_end(now, lease))
    return True


def _dispatch_record(run_id: UUID, step_key: str, step: StepState, dispatched_at: datetime) -> StepDispatch:
    queued = step.queued
    return StepDispatch(
        run_id=run_id,
        step_key=step_key,
        dispatched_at=dispatched_at,
        due_at=step.due_at,
        job_id=step.queue_job_id,
        queue=None if queued is None else queued.queue,
        priority=0 if queued is None else queued.priority,
        step_type=None if queued is None else queued.step_type,
        input_json=None if queued is None else queued.input_json,
    )
