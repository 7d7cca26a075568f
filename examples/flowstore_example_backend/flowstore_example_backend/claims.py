"""Step claims and the dispatch ledger (CLM)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from uuid import UUID

from flowstore_core import OutcomeUnknownError, StepClaim, StepDispatch, StoreUnavailableError
from flowstore_example_backend.document import Document
from flowstore_example_backend.folder import Folder

_log = logging.getLogger("flowstore_example_backend")


class Claims(Folder):
    async def try_claim_step(
        self,
        run_id: UUID,
        step_key: str,
        *,
        owner: str | None = None,
        lease: timedelta | None = None,
    ) -> bool:
        # lease is always None: core rejects leases, because the store does not declare LEASES.
        new_claim: StepClaim | None = None

        def claim(document: Document) -> bool:
            nonlocal new_claim
            if _is_over(document, run_id, step_key):
                return False
            held = document.claims.get(step_key)
            if held is not None:
                return owner is not None and held.owner == owner
            document.claims[step_key] = new_claim = StepClaim(
                run_id=run_id, step_key=step_key, owner=owner, claimed_at=self._now(), expires_at=None
            )
            if (step := document.steps.get(step_key)) is not None:
                # The claim is new: its owner has not started an attempt under it (STP-3).
                document.steps[step_key] = replace(step, started_owner=None)
            return True

        def remove_claim(document: Document) -> None:
            # Remove only the claim of this call: another call may have claimed the step since.
            if new_claim is not None and document.claims.get(step_key) is new_claim:
                del document.claims[step_key]

        async def compensate(outcome: bool | OutcomeUnknownError) -> None:
            await self._change(run_id, remove_claim)

        # Without an owner nobody knows of the claim, so cancellation compensates for it (CON-4). An owner can
        # call again and gets True for its own claim.
        return await self._change(run_id, claim, compensate if owner is None else None)

    async def release_step_claim(self, run_id: UUID, step_key: str, *, owner: str | None = None) -> None:
        def release(document: Document) -> None:
            held = document.claims.get(step_key)
            if held is not None and owner in (None, held.owner):
                del document.claims[step_key]

        await self._change(run_id, release)

    async def get_claimed_step_keys(self, run_id: UUID) -> frozenset[str]:
        document = self._documents.get(run_id) or Document()
        finished = {key for key, status in document.statuses().items() if status.is_terminal}
        return frozenset(document.claims.keys() - finished)

    async def get_step_claims(self, run_id: UUID) -> Sequence[StepClaim]:
        document = self._documents.get(run_id) or Document()
        return tuple(claim for _, claim in sorted(document.claims.items()))

    async def try_record_dispatch(
        self, run_id: UUID, step_key: str, *, due_at: datetime | None = None
    ) -> bool:
        new_dispatch: StepDispatch | None = None

        def dispatch(document: Document) -> bool:
            nonlocal new_dispatch
            if _is_over(document, run_id, step_key) or step_key in document.dispatches:
                return False
            document.dispatches[step_key] = new_dispatch = StepDispatch(
                run_id=run_id, step_key=step_key, dispatched_at=self._now(), due_at=due_at, job_id=None
            )
            return True

        def remove_dispatch(document: Document) -> None:
            if new_dispatch is not None and document.dispatches.get(step_key) is new_dispatch:
                del document.dispatches[step_key]

        async def compensate(outcome: bool | OutcomeUnknownError) -> None:
            await self._change(run_id, remove_dispatch)

        return await self._change(run_id, dispatch, compensate)

    async def annotate_dispatch(self, run_id: UUID, step_key: str, job_id: str) -> None:
        def annotate(document: Document) -> None:
            record = document.dispatches.get(step_key)
            if record is not None:
                document.dispatches[step_key] = replace(record, job_id=job_id)

        try:
            await self._change(run_id, annotate)
        except StoreUnavailableError as error:
            _log.warning("a dispatch was not annotated: %s", error)

    async def release_dispatch(self, run_id: UUID, step_key: str) -> None:
        def release(document: Document) -> None:
            document.dispatches.pop(step_key, None)

        await self._change(run_id, release)

    async def get_dispatched_step_keys(self, run_id: UUID) -> frozenset[str]:
        return frozenset((self._documents.get(run_id) or Document()).dispatches)

    async def get_dispatches(self, run_id: UUID) -> Sequence[StepDispatch]:
        document = self._documents.get(run_id) or Document()
        return tuple(dispatch for _, dispatch in sorted(document.dispatches.items()))


def _is_over(document: Document, run_id: UUID, step_key: str) -> bool:
    """Whether the run or the step is terminal: no claim or dispatch succeeds any more (RUN-4)."""
    status = document.statuses().get(step_key)
    return document.existing_run(run_id).status.is_terminal or (status is not None and status.is_terminal)
