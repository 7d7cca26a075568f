"""Claims and the dispatch ledger (CLM)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from uuid import UUID

from flowstore_core import StepClaim, StepDispatch

from flowstore_yourdb.data import OpenData, Step


class Claims(OpenData):
    async def try_claim_step(self, run_id: UUID, step_key: str, *, owner: str | None = None) -> bool:
        step = self._open_step(run_id, step_key)
        if step is None:
            return False
        if step.claim is not None:
            return owner is not None and step.claim.owner == owner
        step.claim = StepClaim(
            run_id=run_id, step_key=step_key, owner=owner, claimed_at=self._now(), expires_at=None
        )
        step.started_owner = None
        return True

    async def release_step_claim(self, run_id: UUID, step_key: str, *, owner: str | None = None) -> None:
        step = self._steps(run_id).get(step_key)
        if step is not None and step.claim is not None and owner in (None, step.claim.owner):
            step.claim = None

    async def get_claimed_step_keys(self, run_id: UUID) -> frozenset[str]:
        steps = self._steps(run_id).items()
        return frozenset(key for key, step in steps if step.claim is not None and not step.is_terminal)

    async def get_step_claims(self, run_id: UUID) -> Sequence[StepClaim]:
        return tuple(step.claim for step in self._steps(run_id).values() if step.claim is not None)

    async def try_record_dispatch(
        self, run_id: UUID, step_key: str, *, due_at: datetime | None = None
    ) -> bool:
        step = self._open_step(run_id, step_key)
        if step is None or step.dispatch is not None:
            return False
        step.dispatch = StepDispatch(
            run_id=run_id, step_key=step_key, dispatched_at=self._now(), due_at=due_at, job_id=None
        )
        return True

    async def annotate_dispatch(self, run_id: UUID, step_key: str, job_id: str) -> None:
        step = self._steps(run_id).get(step_key)
        if step is not None and step.dispatch is not None:
            step.dispatch = replace(step.dispatch, job_id=job_id)

    async def release_dispatch(self, run_id: UUID, step_key: str) -> None:
        step = self._steps(run_id).get(step_key)
        if step is not None:
            step.dispatch = None

    async def get_dispatched_step_keys(self, run_id: UUID) -> frozenset[str]:
        return frozenset(key for key, step in self._steps(run_id).items() if step.dispatch is not None)

    async def get_dispatches(self, run_id: UUID) -> Sequence[StepDispatch]:
        return tuple(step.dispatch for step in self._steps(run_id).values() if step.dispatch is not None)

    def _open_step(self, run_id: UUID, step_key: str) -> Step | None:
        """The step, new if it is unknown; None if it or its run is terminal (RUN-4)."""
        run = self._run(run_id)
        if run.record.status.is_terminal:
            return None
        step = run.steps.setdefault(step_key, Step())
        return None if step.is_terminal else step
