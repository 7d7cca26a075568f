"""Step claims and the dispatch ledger: at most one winner, visible everywhere (CLM)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol
from uuid import UUID

from flowstore_core.timeseries import LATEST


@dataclass(frozen=True, slots=True, kw_only=True)
class StepClaim:
    """Who works on a step."""

    run_id: UUID
    step_key: str
    owner: str | None
    claimed_at: datetime
    expires_at: datetime | None
    """None: held until it is released. Ignored while the step is terminal (CLM-4)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDispatch:
    """That a step was handed to a queue, and when it is due."""

    run_id: UUID
    step_key: str
    dispatched_at: datetime
    due_at: datetime | None
    job_id: str | None


class DispatchLedger(Protocol):
    """At most one dispatch of a step until it is released."""

    async def try_record_dispatch(
        self, run_id: UUID, step_key: str, *, due_at: datetime | None = None
    ) -> bool:
        """Record that the step is dispatched; True for exactly one of all concurrent callers (CLM-1).

        False on a terminal run or step (RUN-4), and while a dispatch is recorded. Losing is never an
        exception. Raises RunNotFoundError. Atomic.
        """
        ...

    async def annotate_dispatch(self, run_id: UUID, step_key: str, job_id: str) -> None:
        """Store the queue's job id on an existing dispatch, best effort (CLM-7).

        Never creates one, and never raises for a missing record or an unavailable store: it logs.
        """
        ...

    async def release_dispatch(self, run_id: UUID, step_key: str) -> None:
        """Forget the dispatch of this key alone; idempotent (CLM-3)."""
        ...

    async def get_dispatched_step_keys(self, run_id: UUID) -> frozenset[str]:
        """Every key in the ledger of a run."""
        ...

    async def get_dispatches(self, run_id: UUID) -> Sequence[StepDispatch]:
        """The ledger of a run by step_key."""
        ...


class StepClaims(Protocol):
    """At most one worker on a step."""

    async def try_claim_step(
        self,
        run_id: UUID,
        step_key: str,
        *,
        owner: str | None = None,
        lease: timedelta | None = None,
    ) -> bool:
        """Claim the step; True for exactly one of all concurrent distinct owners (CLM-1).

        ``owner`` is a token unique to one delivery (new_claim_token()): the owner of a live claim gets
        True again and changes nothing, so a retry after a lost acknowledgement gets the true answer
        (CLM-5). Without owner every call is its own. With ``lease`` (capability LEASES) the claim is
        held while now < claimed_at + lease; after that the next claimant wins, exactly one of many
        (CLM-6). False on a terminal run or step, for the claim's own owner too (RUN-4).

        Losing is never an exception. Raises RunNotFoundError. Atomic.
        """
        ...

    async def release_step_claim(self, run_id: UUID, step_key: str, *, owner: str | None = None) -> None:
        """Release the claim, with ``owner`` only that owner's; idempotent; frees this key alone (CLM-3)."""
        ...

    async def get_claimed_step_keys(self, run_id: UUID) -> frozenset[str]:
        """The keys with a live claim whose step is not terminal (CLM-4)."""
        ...

    async def get_step_claims(self, run_id: UUID) -> Sequence[StepClaim]:
        """Every claim of a run by step_key, expired ones and those of finished steps too (CLM-4)."""
        ...


class Leases(Protocol):
    """Capability LEASES: a claim that a dead worker cannot hold for ever."""

    async def renew_step_claim(self, run_id: UUID, step_key: str, owner: str, lease: timedelta) -> bool:
        """Extend the owner's unexpired claim to now + lease, never shorten it (CLM-6).

        False for a claim without lease, past its lease, or another's; then stop working on the step.
        """
        ...


def new_claim_token() -> str:
    """A token for one delivery of one step, to pass as ``owner`` (CLM-5)."""
    return os.urandom(16).hex()


def lease_end(now: datetime, lease: timedelta) -> datetime:
    """now + lease, capped at the last moment a store can hold (INP-3)."""
    return now + lease if LATEST - now > lease else LATEST
