"""Step claims and the dispatch ledger: at most one winner, visible to every client (CLM)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol
from uuid import UUID

from flowstore_core.redaction import redacted_repr
from flowstore_core.timeseries import LATEST


@dataclass(frozen=True, slots=True, kw_only=True)
class StepClaim:
    """The claim of a worker on a step."""

    run_id: UUID
    step_key: str
    owner: str | None
    claimed_at: datetime
    expires_at: datetime | None
    """None if the claim is held until its release. Ignored while the step is terminal (CLM-4)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDispatch:
    """The dispatch of a step to a queue."""

    __repr__ = redacted_repr

    run_id: UUID
    step_key: str
    dispatched_at: datetime
    due_at: datetime | None
    job_id: str | None
    queue: str | None = None
    """The queue of the store that hands out the step (QUE-1); None if the engine has its own queue."""
    priority: int = 0
    step_type: str | None = None
    """The step_type of the attempts to come; None without queue."""
    input_json: str | None = None
    """The input of the attempts to come; None without queue."""


class DispatchLedger(Protocol):
    """The record of dispatched steps: at most one dispatch per step until its release."""

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
        """Record a dispatch of the step; True for exactly one of all concurrent callers (CLM-1).

        With ``queue`` (capability QUEUES) claim_next_steps hands out the step from ``due_at`` on, with this
        ``step_type`` and ``input_json``; a higher ``priority``, 0 to 9, comes first (QUE-7).

        False on a terminal run or step (RUN-4), and while a dispatch is recorded; losing the race never
        raises. Atomic.

        Raises RunNotFoundError.
        """
        ...

    async def annotate_dispatch(self, run_id: UUID, step_key: str, job_id: str) -> None:
        """Store the queue's job id on an existing dispatch, on a best-effort basis (CLM-7).

        Never creates a dispatch. A missing dispatch or an unavailable store is logged, not raised.
        """
        ...

    async def release_dispatch(self, run_id: UUID, step_key: str) -> None:
        """Delete the dispatch of this key only; idempotent (CLM-3)."""
        ...

    async def get_dispatched_step_keys(self, run_id: UUID) -> frozenset[str]:
        """The keys of all dispatched steps of a run."""
        ...

    async def get_dispatches(self, run_id: UUID) -> Sequence[StepDispatch]:
        """The dispatches of a run, ordered by step_key."""
        ...


class StepClaims(Protocol):
    """Exclusive claims on steps: at most one worker per step."""

    async def try_claim_step(
        self,
        run_id: UUID,
        step_key: str,
        *,
        owner: str | None = None,
        lease: timedelta | None = None,
    ) -> bool:
        """Claim the step; True for exactly one of all concurrent distinct owners (CLM-1).

        ``owner`` is a token unique to one delivery (new_claim_token()). The owner of a live claim gets
        True again and nothing changes, so a retry of an unacknowledged claim gets the true result (CLM-5).
        Without ``owner`` every call counts as a distinct owner. With ``lease`` (capability LEASES) the
        claim is held while now < claimed_at + lease; afterwards exactly one of the next claimants wins
        (CLM-6). False on a terminal run or step, also for the owner of the claim (RUN-4).

        Losing the race never raises. Atomic. Raises RunNotFoundError.
        """
        ...

    async def release_step_claim(self, run_id: UUID, step_key: str, *, owner: str | None = None) -> None:
        """Release the claim on this key only; idempotent (CLM-3).

        With ``owner``, only a claim of that owner is released.
        """
        ...

    async def get_claimed_step_keys(self, run_id: UUID) -> frozenset[str]:
        """The keys that have a live claim and no terminal step (CLM-4)."""
        ...

    async def get_step_claims(self, run_id: UUID) -> Sequence[StepClaim]:
        """Every claim of a run, ordered by step_key, including expired claims and finished steps (CLM-4)."""
        ...


class Leases(Protocol):
    """Capability LEASES: claims that expire, so that a dead worker does not block a step."""

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
        """Claim the step and start its next attempt, in one atomic change (CLM-8).

        Does what try_claim_step and then record_step_start by ``owner`` would do. The number of the open
        attempt, for exactly one of all concurrent distinct owners (CLM-1); None, and nothing changes, if a
        different owner holds the claim, or the step or its run is terminal (RUN-4). get_step tells which.

        ``owner`` is a token unique to one delivery (new_claim_token()). Repeated by the owner while its claim
        is live and the attempt is open, it returns the same number and changes nothing. After the lease has
        ended, or the attempt was closed as Pending, it opens the next attempt.

        Losing the race never raises. Raises RunNotFoundError.
        """
        ...

    async def renew_step_claim(self, run_id: UUID, step_key: str, owner: str, lease: timedelta) -> bool:
        """Extend the owner's unexpired claim to now + lease; never shortens it (CLM-6).

        False if the claim has no lease, has expired or belongs to a different owner. The caller must then
        stop working on the step.
        """
        ...

    async def renew_step_claims(
        self, claims: Sequence[tuple[UUID, str, str]], lease: timedelta
    ) -> Sequence[bool]:
        """Renew several claims, of any runs; the answer of renew_step_claim for each, in their order (CLM-6).

        A claim is (run_id, step_key, owner); at most 1,000 in a call. Each is decided alone, in no common
        transaction: if the call raises StoreUnavailableError, some may have been renewed.
        """
        ...


def new_claim_token() -> str:
    """Create a token for one delivery of one step, to pass as ``owner`` (CLM-5)."""
    return os.urandom(16).hex()


def lease_end(now: datetime, lease: timedelta) -> datetime:
    """now + lease, capped at the latest datetime that a store can hold (INP-3)."""
    return now + lease if LATEST - now > lease else LATEST
