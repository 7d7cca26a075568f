"""Step claims and the dispatch ledger in SQLite: columns of the step's row.

The write lock makes each check atomic with the change that follows. A call without an owner stores a random
token with its claim or dispatch. When the call is cancelled, the compensation removes the claim or dispatch
only if it still has this token.
"""

from __future__ import annotations

import itertools
import logging
import os
import secrets
import sqlite3
from collections.abc import Coroutine, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

from flowstore_core import OutcomeUnknownError, StepClaim, StepDispatch, StoreUnavailableError
from flowstore_core.claims import lease_end
from flowstore_sqlite.codecs import from_optional_us, from_us, to_optional_us, to_us
from flowstore_sqlite.database import Database
from flowstore_sqlite.requests import QUEUE_STEP
from flowstore_sqlite.steps import load_step, start_step

_log = logging.getLogger("flowstore_sqlite")

# Unique among all stores: each process counts from a random start.
_tokens = itertools.count(secrets.randbits(62))


def _reseed_tokens() -> None:
    global _tokens
    _tokens = itertools.count(secrets.randbits(62))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reseed_tokens)

# Fast path of try_claim_step: one statement, without reading the step.
# A new claim resets started_owner: its owner has not started the open attempt, even if the owner held an
# earlier claim. For a run that is not Running the run_id is NULL, and OR IGNORE skips the row; INSERT ...
# SELECT would take half as long again.
TRY_CLAIM_STEP = """
INSERT OR IGNORE INTO steps (run_id, step_key, claimed_at, expires_at, claim_owner, claim_token)
VALUES ((SELECT run_id FROM runs WHERE run_id = ? AND status = 'Running'), ?, ?, ?, ?, ?)
ON CONFLICT (run_id, step_key) DO UPDATE SET
    claimed_at = excluded.claimed_at, expires_at = excluded.expires_at, claim_owner = excluded.claim_owner,
    claim_token = excluded.claim_token, started_owner = NULL
WHERE (claimed_at IS NULL OR expires_at <= excluded.claimed_at)
    AND (status IS NULL OR status IN ('Pending', 'Running'))
"""

RELEASE_STEP_CLAIM = """
UPDATE steps SET claimed_at = NULL, expires_at = NULL, claim_owner = NULL, claim_token = NULL
WHERE run_id = ? AND step_key = ? AND claimed_at IS NOT NULL
"""
RELEASE_OWNED_CLAIM = """
UPDATE steps SET claimed_at = NULL, expires_at = NULL, claim_owner = NULL, claim_token = NULL
WHERE run_id = ? AND step_key = ? AND claim_owner = ?
"""
COMPENSATE_CLAIM = """
UPDATE steps SET claimed_at = NULL, expires_at = NULL, claim_owner = NULL, claim_token = NULL
WHERE run_id = ? AND step_key = ? AND claim_token = ?
"""

RENEW_STEP_CLAIM = """
UPDATE steps SET expires_at = MAX(expires_at, :until)
WHERE run_id = :run_id AND step_key = :step_key AND claim_owner = :owner AND expires_at > :now
"""

GET_CLAIMED_STEP_KEYS = """
SELECT step_key FROM steps
WHERE run_id = ? AND claimed_at IS NOT NULL AND (expires_at IS NULL OR expires_at > ?)
    AND (status IS NULL OR status IN ('Pending', 'Running'))
"""

GET_STEP_CLAIMS = """
SELECT step_key, claim_owner, claimed_at, expires_at FROM steps
WHERE run_id = ? AND claimed_at IS NOT NULL ORDER BY step_key
"""

TRY_RECORD_DISPATCH = """
INSERT OR IGNORE INTO steps (run_id, step_key, dispatched_at, due_at, dispatch_token)
VALUES ((SELECT run_id FROM runs WHERE run_id = ? AND status = 'Running'), ?, ?, ?, ?)
ON CONFLICT (run_id, step_key) DO UPDATE SET
    dispatched_at = excluded.dispatched_at, due_at = excluded.due_at, dispatch_job_id = NULL,
    dispatch_token = excluded.dispatch_token
WHERE dispatched_at IS NULL AND (status IS NULL OR status IN ('Pending', 'Running'))
"""

ANNOTATE_DISPATCH = """
UPDATE steps SET dispatch_job_id = ? WHERE run_id = ? AND step_key = ? AND dispatched_at IS NOT NULL
"""

RELEASE_DISPATCH = """
UPDATE steps SET dispatched_at = NULL, due_at = NULL, dispatch_job_id = NULL, dispatch_token = NULL
WHERE run_id = ? AND step_key = ? AND dispatched_at IS NOT NULL
"""
COMPENSATE_DISPATCH = """
UPDATE steps SET dispatched_at = NULL, due_at = NULL, dispatch_job_id = NULL, dispatch_token = NULL
WHERE run_id = ? AND step_key = ? AND dispatch_token = ?
"""

GET_DISPATCHED_STEP_KEYS = "SELECT step_key FROM steps WHERE run_id = ? AND dispatched_at IS NOT NULL"

GET_DISPATCHES = """
SELECT steps.step_key, dispatched_at, due_at, dispatch_job_id, queue, COALESCE(priority, 0),
    queued_steps.step_type, queued_steps.input_json
FROM steps LEFT JOIN queued_steps USING (run_id, step_key)
WHERE run_id = ? AND dispatched_at IS NOT NULL ORDER BY step_key
"""


class Claims:
    """See flowstore_core.claims for the contract."""

    _database: Database

    # Not ``async``, like other frequent operations: saves one coroutine per call.
    def try_claim_step(
        self, run_id: UUID, step_key: str, *, owner: str | None, lease: timedelta | None = None
    ) -> Coroutine[Any, Any, bool]:
        if owner is not None:
            # No compensation: the owner can call again and gets True for its own claim.
            return self._database.write(partial(_try_claim_step, run_id, step_key, owner, lease))
        claim = _ClaimWrite(self._database, run_id, step_key, None)
        return self._database.write(claim, claim.compensate)

    def try_start_step(
        self,
        run_id: UUID,
        step_key: str,
        step_type: str,
        *,
        owner: str,
        lease: timedelta,
        input_json: str | None,
        job_id: str | None,
    ) -> Coroutine[Any, Any, int | None]:
        values = (step_type, job_id, input_json)

        def start(db: sqlite3.Connection, now: int) -> int | None:
            if not _try_claim_step(run_id, step_key, owner, lease, db, now):
                return None
            return start_step(run_id, step_key, owner, values, db, now)

        return self._database.write(start)

    async def release_step_claim(self, run_id: UUID, step_key: str, *, owner: str | None) -> None:
        row: tuple[object, ...] = (run_id.bytes, step_key)
        if owner is None:
            await self._database.write(partial(_execute, RELEASE_STEP_CLAIM, row))
        else:
            await self._database.write(partial(_execute, RELEASE_OWNED_CLAIM, (*row, owner)))

    async def renew_step_claim(self, run_id: UUID, step_key: str, owner: str, lease: timedelta) -> bool:
        return await self._database.write(partial(_renew, (run_id, step_key, owner), lease))

    async def renew_step_claims(
        self, claims: Sequence[tuple[UUID, str, str]], lease: timedelta
    ) -> tuple[bool, ...]:
        return await self._database.write(
            lambda db, now: tuple(_renew(claim, lease, db, now) for claim in claims)
        )

    async def get_claimed_step_keys(self, run_id: UUID) -> frozenset[str]:
        def keys(db: sqlite3.Connection) -> frozenset[str]:
            rows = db.execute(GET_CLAIMED_STEP_KEYS, (run_id.bytes, self._database.now()))
            return frozenset(step_key for (step_key,) in rows)

        return await self._database.read(keys)

    async def get_step_claims(self, run_id: UUID) -> tuple[StepClaim, ...]:
        rows = await self._database.read(lambda db: db.execute(GET_STEP_CLAIMS, (run_id.bytes,)).fetchall())
        return tuple(
            StepClaim(
                run_id=run_id,
                step_key=step_key,
                owner=owner,
                claimed_at=from_us(claimed_at),
                expires_at=from_optional_us(expires_at),
            )
            for step_key, owner, claimed_at, expires_at in rows
        )

    def try_record_dispatch(
        self,
        run_id: UUID,
        step_key: str,
        *,
        due_at: datetime | None,
        queue: str | None = None,
        priority: int = 0,
        step_type: str | None = None,
        input_json: str | None = None,
    ) -> Coroutine[Any, Any, bool]:
        if queue is None:
            dispatch = _DispatchWrite(self._database, run_id, step_key, due_at)
        else:
            dispatch = _QueuedDispatchWrite(self._database, run_id, step_key, due_at)
            dispatch.queued = (queue, priority, step_type, input_json)
        return self._database.write(dispatch, dispatch.compensate)

    async def annotate_dispatch(self, run_id: UUID, step_key: str, job_id: str) -> None:
        try:
            await self._database.write(partial(_execute, ANNOTATE_DISPATCH, (job_id, run_id.bytes, step_key)))
        except StoreUnavailableError as error:
            _log.warning("the job id of a dispatch of run %s was not stored: %s", run_id, error)

    async def release_dispatch(self, run_id: UUID, step_key: str) -> None:
        await self._database.write(partial(_execute, RELEASE_DISPATCH, (run_id.bytes, step_key)))

    async def get_dispatched_step_keys(self, run_id: UUID) -> frozenset[str]:
        rows = await self._database.read(
            lambda db: db.execute(GET_DISPATCHED_STEP_KEYS, (run_id.bytes,)).fetchall()
        )
        return frozenset(step_key for (step_key,) in rows)

    async def get_dispatches(self, run_id: UUID) -> tuple[StepDispatch, ...]:
        rows = await self._database.read(lambda db: db.execute(GET_DISPATCHES, (run_id.bytes,)).fetchall())
        return tuple(
            StepDispatch(
                run_id=run_id,
                step_key=step_key,
                dispatched_at=from_us(dispatched_at),
                due_at=from_optional_us(due_at),
                job_id=job_id,
                queue=queue,
                priority=priority,
                step_type=step_type,
                input_json=input_json,
            )
            for step_key, dispatched_at, due_at, job_id, queue, priority, step_type, input_json in rows
        )


def _try_claim_step(
    run_id: UUID,
    step_key: str,
    owner: str,
    lease: timedelta | None,
    db: sqlite3.Connection,
    now: int,
) -> bool:
    expires_at = None if lease is None else lease_end_us(lease, now)
    row = (run_id.bytes, step_key, now, expires_at, owner, None)
    if db.execute(TRY_CLAIM_STEP, row).rowcount == 1:
        return True
    # Slow path: raise for an unknown run, and return True for a claim that this owner already holds.
    step = load_step(db, run_id, step_key)
    return not step.run_is_terminal and not step.is_terminal and step.claim_owner == owner


class _Write:
    """A write that stores a random token, so that its compensation undoes only this write (CON-4)."""

    __slots__ = ("database", "due_at", "run_id", "step_key", "token")

    def __init__(self, database: Database, run_id: UUID, step_key: str, due_at: datetime | None) -> None:
        self.database = database
        self.run_id = run_id
        self.step_key = step_key
        self.due_at = due_at
        self.token = next(_tokens)

    async def _remove_own(self, statement: str) -> None:
        row = (self.run_id.bytes, self.step_key, self.token)
        await self.database.write_while_closing(partial(_execute, statement, row))


class _ClaimWrite(_Write):
    __slots__ = ()

    def __call__(self, db: sqlite3.Connection, now: int) -> bool:
        row = (self.run_id.bytes, self.step_key, now, None, None, self.token)
        if db.execute(TRY_CLAIM_STEP, row).rowcount == 1:
            return True
        # Raises for an unknown run.
        load_step(db, self.run_id, self.step_key)
        return False

    async def compensate(self, won: bool | OutcomeUnknownError) -> None:
        if won is not False:
            await self._remove_own(COMPENSATE_CLAIM)


class _DispatchWrite(_Write):
    __slots__ = ()

    def __call__(self, db: sqlite3.Connection, now: int) -> bool:
        row = (self.run_id.bytes, self.step_key, now, to_optional_us(self.due_at), self.token)
        if db.execute(TRY_RECORD_DISPATCH, row).rowcount == 1:
            return True
        # Raises for an unknown run.
        load_step(db, self.run_id, self.step_key)
        return False

    async def compensate(self, won: bool | OutcomeUnknownError) -> None:
        if won is not False:
            await self._remove_own(COMPENSATE_DISPATCH)


class _QueuedDispatchWrite(_DispatchWrite):
    """A dispatch to a queue. Removing it removes it from the queue too, by trigger."""

    __slots__ = ("queued",)

    queued: tuple[str, int, str | None, str | None]
    """The queue, priority, step_type and input_json."""

    def __call__(self, db: sqlite3.Connection, now: int) -> bool:
        if not super().__call__(db, now):
            return False
        db.execute(QUEUE_STEP, (*self.queued, self.run_id.bytes, self.step_key))
        return True


def _renew(claim: tuple[UUID, str, str], lease: timedelta, db: sqlite3.Connection, now: int) -> bool:
    run_id, step_key, owner = claim
    row = {
        "run_id": run_id.bytes,
        "step_key": step_key,
        "owner": owner,
        "now": now,
        "until": lease_end_us(lease, now),
    }
    return db.execute(RENEW_STEP_CLAIM, row).rowcount == 1


def _execute(statement: str, row: tuple[object, ...], db: sqlite3.Connection, now: int) -> None:
    db.execute(statement, row)


def lease_end_us(lease: timedelta, now: int) -> int:
    return to_us(lease_end(from_us(now), lease))
