"""Claims and the dispatch ledger (CLM)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from datetime import datetime, timedelta
from uuid import UUID

from msgspec.structs import replace

from flowstore_core import (
    OutcomeUnknownError,
    StepClaim,
    StepDispatch,
    StepStatus,
    StoreUnavailableError,
    new_claim_token,
)
from flowstore_core.backend import lease_end
from flowstore_documents import keys
from flowstore_documents.access import Access
from flowstore_documents.documents import Claim, Dispatch
from flowstore_documents.run_state import RunState, change_run, read_run
from flowstore_documents.texts import ReadText
from flowstore_documents.transactions import Transaction

_log = logging.getLogger("flowstore_documents")


class Claims(Access):
    async def try_claim_step(
        self,
        run_id: UUID,
        step_key: str,
        *,
        owner: str | None = None,
        lease: timedelta | None = None,
    ) -> bool:
        token = new_claim_token()

        async def claim(tx: Transaction) -> bool:
            run = await change_run(tx, run_id, [step_key])
            return _claim(run, step_key, Claim(token, await tx.now(), owner), lease)

        async def undo(_: bool | OutcomeUnknownError) -> None:
            await self._release_claim(run_id, step_key, token=token)

        return await self._write("try_claim_step", claim, undo if owner is None else None)

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
        token = new_claim_token()

        async def start(tx: Transaction) -> int | None:
            run = await change_run(tx, run_id, [step_key])
            now = await tx.now()
            if not _claim(run, step_key, Claim(token, now, owner), lease):
                return None
            step = run.step(step_key)
            if step.status is not StepStatus.RUNNING or step.started_owner != owner:
                run.start_step(step_key, step_type, tx.text(input_json), job_id, now)
                step.started_owner = owner
            return step.attempt

        return await self._write("try_start_step", start)

    async def release_step_claim(self, run_id: UUID, step_key: str, *, owner: str | None = None) -> None:
        await self._release_claim(run_id, step_key, owner=owner)

    async def _release_claim(
        self, run_id: UUID, step_key: str, *, owner: str | None = None, token: str | None = None
    ) -> None:
        """Release a claim: any, only one of an owner, or only the one that a call made."""

        async def release(tx: Transaction) -> None:
            run = await change_run(tx, run_id, [step_key])
            claim = run.step(step_key).claim
            if claim is not None and owner in (None, claim.owner) and token in (None, claim.token):
                run.step(step_key).claim = None

        await self._write("release_step_claim", release)

    async def renew_step_claim(self, run_id: UUID, step_key: str, owner: str, lease: timedelta) -> bool:
        async def renew(tx: Transaction) -> bool:
            run = await change_run(tx, run_id, [step_key])
            run.is_renewal = True
            step = run.step(step_key)
            claim = step.claim
            if claim is None or claim.owner != owner or claim.expires_at is None:
                return False
            now = await tx.now()
            if claim.expires_at <= now:
                return False
            step.claim = replace(claim, expires_at=max(claim.expires_at, lease_end(now, lease)))
            return True

        return await self._write("renew_step_claim", renew)

    async def renew_step_claims(
        self, claims: Sequence[tuple[UUID, str, str]], lease: timedelta
    ) -> Sequence[bool]:
        # The committer sends those of different runs in one commit.
        calls = [self.renew_step_claim(*claim, lease) for claim in claims]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return tuple(answer is True for answer in answers)

    async def get_claimed_step_keys(self, run_id: UUID) -> frozenset[str]:
        async def read(tx: Transaction) -> frozenset[str]:
            run = await self._all_steps(tx, run_id)
            now = await tx.now()
            return frozenset(
                key for key, step in run.steps.items() if not step.is_terminal and step.has_live_claim(now)
            )

        return await self._read("get_claimed_step_keys", read)

    async def get_step_claims(self, run_id: UUID) -> Sequence[StepClaim]:
        async def read(tx: Transaction) -> Sequence[StepClaim]:
            run = await self._all_steps(tx, run_id)
            return tuple(
                claim_record(run_id, key, step.claim)
                for key, step in sorted(run.steps.items())
                if step.claim is not None
            )

        return await self._read("get_step_claims", read)

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
        token = new_claim_token()

        async def record(tx: Transaction) -> bool:
            run = await change_run(tx, run_id, [step_key])
            step = run.step(step_key)
            if run.is_terminal or step.is_terminal or step.dispatch is not None:
                return False
            step.dispatch = Dispatch(
                token=token,
                dispatched_at=await tx.now(),
                due_at=due_at,
                queue=queue,
                priority=priority,
                step_type=step_type,
                input_json=tx.text(input_json),
            )
            return True

        async def undo(_: bool | OutcomeUnknownError) -> None:
            await self._release_dispatch(run_id, step_key, token=token)

        return await self._write("try_record_dispatch", record, undo)

    async def annotate_dispatch(self, run_id: UUID, step_key: str, job_id: str) -> None:
        async def annotate(tx: Transaction) -> None:
            run = await change_run(tx, run_id, [step_key])
            run.is_renewal = True
            step = run.step(step_key)
            if step.dispatch is not None:
                step.dispatch = replace(step.dispatch, job_id=job_id)

        try:
            await self._write("annotate_dispatch", annotate)
        except StoreUnavailableError as error:
            # Best effort (CLM-7).
            _log.warning("a dispatch was not annotated: %s", error)

    async def release_dispatch(self, run_id: UUID, step_key: str) -> None:
        await self._release_dispatch(run_id, step_key)

    async def _release_dispatch(self, run_id: UUID, step_key: str, *, token: str | None = None) -> None:
        """Remove a dispatch: any, or only the one that a call made."""

        async def release(tx: Transaction) -> None:
            run = await change_run(tx, run_id, [step_key])
            dispatch = run.step(step_key).dispatch
            if dispatch is not None and token in (None, dispatch.token):
                run.step(step_key).dispatch = None

        await self._write("release_dispatch", release)

    async def get_dispatched_step_keys(self, run_id: UUID) -> frozenset[str]:
        async def read(tx: Transaction) -> frozenset[str]:
            run = await self._all_steps(tx, run_id)
            return frozenset(key for key, step in run.steps.items() if step.dispatch is not None)

        return await self._read("get_dispatched_step_keys", read)

    async def get_dispatches(self, run_id: UUID) -> Sequence[StepDispatch]:
        async def read(tx: Transaction) -> Sequence[StepDispatch]:
            run = await self._all_steps(tx, run_id)
            found = [(key, step.dispatch) for key, step in sorted(run.steps.items()) if step.dispatch]
            text = await tx.read_texts(run_id, [dispatch.input_json for _, dispatch in found])
            return tuple(dispatch_record(run_id, key, dispatch, text) for key, dispatch in found)

        return await self._read("get_dispatches", read)

    async def _all_steps(self, tx: Transaction, run_id: UUID) -> RunState:
        run = await read_run(tx, run_id, ahead=[keys.prefix_range(keys.steps(run_id))])
        await run.load_all_steps()
        return run


def _claim(run: RunState, step_key: str, claim: Claim, lease: timedelta | None) -> bool:
    """Take a step that is free; True for the owner of a live claim too (CLM-1, CLM-5)."""
    step = run.step(step_key)
    if run.is_terminal or step.is_terminal:
        return False
    if step.claim is not None and step.has_live_claim(claim.claimed_at):
        return claim.owner is not None and step.claim.owner == claim.owner
    expires_at = None if lease is None else lease_end(claim.claimed_at, lease)
    step.set_claim(replace(claim, expires_at=expires_at))
    return True


def claim_record(run_id: UUID, step_key: str, claim: Claim) -> StepClaim:
    return StepClaim(
        run_id=run_id,
        step_key=step_key,
        owner=claim.owner,
        claimed_at=claim.claimed_at,
        expires_at=claim.expires_at,
    )


def dispatch_record(run_id: UUID, step_key: str, dispatch: Dispatch, text: ReadText) -> StepDispatch:
    return StepDispatch(
        run_id=run_id,
        step_key=step_key,
        dispatched_at=dispatch.dispatched_at,
        due_at=dispatch.due_at,
        job_id=dispatch.job_id,
        queue=dispatch.queue,
        priority=dispatch.priority,
        step_type=dispatch.step_type,
        input_json=text(dispatch.input_json),
    )
