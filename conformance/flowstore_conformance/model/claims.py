"""Claims and the dispatch ledger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

from flowstore_conformance.model.state import Base, Step
from flowstore_core import StepClaim, StepDispatch

LATEST = datetime(9999, 12, 30, tzinfo=UTC)


class Claims(Base):
    """Claims, leases and the dispatch ledger."""

    def try_claim_step(
        self, run_id: UUID, step_key: str, *, owner: str | None = None, lease: timedelta | None = None
    ) -> bool:
        """Claim a free step; the live owner gets True again (CLM-1, CLM-5, CLM-6, RUN-4)."""
        run, record = self.require(run_id)
        step = run.steps.get(step_key, Step())
        if record.status.is_terminal or step.is_terminal:
            return False
        if step.held(self.now):
            return owner is not None and step.claim is not None and step.claim.owner == owner
        claim = StepClaim(
            run_id=run_id,
            step_key=step_key,
            owner=owner,
            claimed_at=self.now,
            expires_at=None if lease is None else self._end_of(lease),
        )
        run.steps[step_key] = replace(step, claim=claim, started_under=None)
        return True

    def release_step_claim(self, run_id: UUID, step_key: str, *, owner: str | None = None) -> None:
        """Remove the claim; with ``owner``, only that owner's claim (CLM-3)."""
        run = self.get(run_id)
        step = run.steps.get(step_key)
        if step is not None and step.claim is not None and owner in (None, step.claim.owner):
            run.steps[step_key] = replace(step, claim=None)

    def renew_step_claim(self, run_id: UUID, step_key: str, owner: str, lease: timedelta) -> bool:
        """Extend the owner's unexpired lease, never shortening it (CLM-6)."""
        run = self.get(run_id)
        step = run.steps.get(step_key)
        claim = None if step is None else step.claim
        if step is None or claim is None or claim.owner != owner:
            return False
        if claim.expires_at is None or claim.expires_at <= self.now:
            return False
        renewed = replace(claim, expires_at=max(claim.expires_at, self._end_of(lease)))
        run.steps[step_key] = replace(step, claim=renewed)
        return True

    def renew_step_claims(
        self, claims: Sequence[tuple[UUID, str, str]], lease: timedelta
    ) -> tuple[bool, ...]:
        """Renew each claim as renew_step_claim does (CLM-6)."""
        return tuple(self.renew_step_claim(*claim, lease) for claim in claims)

    def get_claimed_step_keys(self, run_id: UUID) -> frozenset[str]:
        """Return the keys with a live claim, without terminal steps (CLM-4)."""
        steps = self.get(run_id).steps
        return frozenset(key for key, step in steps.items() if step.held(self.now) and not step.is_terminal)

    def get_step_claims(self, run_id: UUID) -> tuple[StepClaim, ...]:
        """List every claim by step_key, expired claims and terminal steps included (CLM-4, QRY-1)."""
        steps = self.get(run_id).steps
        return tuple(step.claim for _, step in sorted(steps.items(), key=_by_key) if step.claim is not None)

    def try_record_dispatch(
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
        """Record the dispatch of a key that has none (CLM-1, RUN-4, QUE-7)."""
        run, record = self.require(run_id)
        step = run.steps.get(step_key, Step())
        if record.status.is_terminal or step.is_terminal or step.dispatch is not None:
            return False
        dispatch = StepDispatch(
            run_id=run_id,
            step_key=step_key,
            dispatched_at=self.now,
            due_at=due_at,
            job_id=None,
            queue=queue,
            priority=priority,
            step_type=step_type,
            input_json=input_json,
        )
        run.steps[step_key] = replace(step, dispatch=dispatch)
        return True

    def annotate_dispatch(self, run_id: UUID, step_key: str, job_id: str) -> None:
        """Store job_id on an existing dispatch; never create one (CLM-7)."""
        run = self.get(run_id)
        step = run.steps.get(step_key)
        if step is not None and step.dispatch is not None:
            run.steps[step_key] = replace(step, dispatch=replace(step.dispatch, job_id=job_id))

    def release_dispatch(self, run_id: UUID, step_key: str) -> None:
        """Remove the dispatch (CLM-3)."""
        run = self.get(run_id)
        if step_key in run.steps:
            run.steps[step_key] = replace(run.steps[step_key], dispatch=None)

    def get_dispatched_step_keys(self, run_id: UUID) -> frozenset[str]:
        """Return the keys with a dispatch, whatever the status of their steps (CLM-3)."""
        return frozenset(dispatch.step_key for dispatch in self.get_dispatches(run_id))

    def get_dispatches(self, run_id: UUID) -> tuple[StepDispatch, ...]:
        """List every dispatch by step_key (CLM-3, QRY-1)."""
        steps = self.get(run_id).steps
        return tuple(
            step.dispatch for _, step in sorted(steps.items(), key=_by_key) if step.dispatch is not None
        )

    def _end_of(self, lease: timedelta) -> datetime:
        """The end of a lease that begins now, capped at the latest legal datetime (INP-3, CLM-6)."""
        return LATEST if lease >= LATEST - self.now else self.now + lease


def _by_key(item: tuple[str, Step]) -> str:
    return item[0]
