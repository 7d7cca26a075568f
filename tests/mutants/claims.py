"""Mutants of claims and of the dispatch ledger."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from weakref import WeakKeyDictionary

import asyncpg

from flowstore_core import ConflictError, StepStatus
from flowstore_core.claims import lease_end
from flowstore_sqlite.codecs import from_us
from tests.mutants import mutant
from tests.mutants.sql_patching import PatchedSqlite, SqlPatch


async def claim_of(store: Any, given: Any) -> Any:
    """Return the stored claim of the step, if any."""
    claims = await store.get_step_claims(run_id=given["run_id"])
    return next((claim for claim in claims if claim.step_key == given["step_key"]), None)


async def _overwrite_claim(store: Any, claim: Any, given: Any) -> bool:
    """Overwrite the stored claim."""
    await store.release_step_claim(run_id=given["run_id"], step_key=given["step_key"], owner=None)
    return bool(await claim(**given))


@mutant("postgresql", "CLM-1", concurrent=True)
class ClaimCheckThenWrite:
    """Checks that the claim is free, then overwrites any claim made in between."""

    async def try_claim_step(self, **given: Any) -> bool:
        held = await claim_of(self, given)
        if held is not None:
            return bool(await super().try_claim_step(**given))
        return await _overwrite_claim(self, super().try_claim_step, given)


@mutant("sqlite", "CLM-1", concurrent=True)
class ClaimCheckInSeparateTransaction:
    """Checks in one transaction and inserts in the next, replacing any existing claim."""

    async def try_claim_step(self, **given: Any) -> bool:
        held = await claim_of(self, given)
        if held is not None:
            return bool(await super().try_claim_step(**given))
        return await _overwrite_claim(self, super().try_claim_step, given)


_locks: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


@mutant("postgresql", "CLM-1", concurrent=True)
class ClaimProcessLocalLock:
    """Checks and then writes under a lock that covers only this process."""

    async def try_claim_step(self, **given: Any) -> bool:
        async with _locks.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
            if await claim_of(self, given) is not None:
                return bool(await super().try_claim_step(**given))
            return await _overwrite_claim(self, super().try_claim_step, given)


@mutant("postgresql", "CON-2", concurrent=True, more_clauses=("CLM-1",))
class ClaimRaceLeaksDriverError:
    """Inserts without ON CONFLICT: the loser of a race gets the driver's unique violation."""

    async def try_claim_step(self, **given: Any) -> bool:
        held = await claim_of(self, given)
        won = await super().try_claim_step(**given)
        if held is None and not won and (await claim_of(self, given)) is not None:
            status = (await super().get_step_statuses(run_id=given["run_id"])).get(given["step_key"])
            if status is None:
                raise asyncpg.UniqueViolationError("duplicate key value violates unique constraint")
        return bool(won)


@mutant("memory", "CON-2", more_clauses=("CLM-3",))
class ReleaseFailsInCallback:
    """A release leaves a callback that raises; no caller sees the error."""

    async def release_step_claim(self, **given: Any) -> None:
        await super().release_step_claim(**given)
        asyncio.get_running_loop().call_soon([].pop)


@mutant("memory", "CLM-1")
class ClaimLoserRaises:
    """A losing claim raises ConflictError instead of returning False."""

    async def try_claim_step(self, **given: Any) -> bool:
        if not await super().try_claim_step(**given):
            raise ConflictError(
                "another owner holds the claim", run_id=given["run_id"], step_key=given["step_key"]
            )
        return True


@mutant("sqlite", "CLM-1", concurrent=True)
class DispatchCheckThenWrite:
    """Checks that the step is not dispatched, then overwrites any dispatch made in between."""

    async def try_record_dispatch(self, **given: Any) -> bool:
        keys = await super().get_dispatched_step_keys(run_id=given["run_id"])
        if given["step_key"] in keys:
            return False
        await super().release_dispatch(run_id=given["run_id"], step_key=given["step_key"])
        return bool(await super().try_record_dispatch(**given))


@mutant("memory", "CLM-1", concurrent=True)
class DispatchTrueForEveryRacer:
    """Returns True to every caller that found the step not dispatched."""

    async def try_record_dispatch(self, **given: Any) -> bool:
        keys = await super().get_dispatched_step_keys(run_id=given["run_id"])
        await asyncio.sleep(0)
        won = await super().try_record_dispatch(**given)
        run = await super().get_run_status(run_id=given["run_id"])
        statuses = await super().get_step_statuses(run_id=given["run_id"])
        ended = run != "Running" or StepStatus(statuses.get(given["step_key"], "Pending")).is_terminal
        return bool(won or (given["step_key"] not in keys and not ended))


@mutant("sqlite", "CLM-2")
class ClaimedKeysFromStaleCache:
    """Caches claimed keys and invalidates the cache only on its own writes, so other stores' claims are
    missed."""

    def begin(self) -> None:
        self._known: dict[Any, Any] = {}
        write = self._database.write

        def invalidate_and_write(*given: Any) -> Any:
            self._known.clear()
            return write(*given)

        self._database.write = invalidate_and_write

    async def get_claimed_step_keys(self, **given: Any) -> Any:
        if given["run_id"] not in self._known:
            self._known[given["run_id"]] = await super().get_claimed_step_keys(**given)
        return self._known[given["run_id"]]


@mutant("sqlite", "CLM-3")
class ReleaseFreesEveryKey:
    """Releases every claim of the run."""

    async def release_step_claim(self, **given: Any) -> None:
        for claim in await super().get_step_claims(run_id=given["run_id"]):
            if given["owner"] in (None, claim.owner):
                await super().release_step_claim(**{**given, "step_key": claim.step_key})


@mutant("postgresql", "CLM-3")
class ReleaseIgnoresOwner:
    """Releases the claim whoever owns it."""

    async def release_step_claim(self, **given: Any) -> None:
        await super().release_step_claim(**{**given, "owner": None})


@mutant("memory", "CLM-3", concurrent=True, more_clauses=("CLM-6", "STP-3"))
class ReleaseCheckThenDelete:
    """Checks the owner, then releases the claim, although another caller may have won it in between."""

    async def release_step_claim(self, **given: Any) -> None:
        held = await claim_of(self, given)
        if held is None or given["owner"] not in (None, held.owner):
            return
        await asyncio.sleep(0)
        await super().release_step_claim(**{**given, "owner": None})


@mutant("sqlite", "CLM-4")
class CompletionReleasesClaim:
    """Releases the claim of a completed step, so that a redelivered message can claim it."""

    async def record_step_complete(self, **given: Any) -> None:
        await super().record_step_complete(**given)
        if StepStatus(given["status"]).is_terminal:
            await super().release_step_claim(run_id=given["run_id"], step_key=given["step_key"], owner=None)


@mutant("memory", "CLM-4")
class ClaimedKeysIncludeTerminalSteps:
    """get_claimed_step_keys includes terminal steps."""

    async def get_claimed_step_keys(self, **given: Any) -> frozenset[str]:
        return frozenset(claim.step_key for claim in await super().get_step_claims(**given))


@mutant("memory", "CLM-4")
class TerminalStepCanBeClaimed:
    """After the lease of a terminal step has ended, a redelivered message can claim it."""

    async def try_claim_step(self, **given: Any) -> bool:
        won = await super().try_claim_step(**given)
        step = self._find_step(given["run_id"], given["step_key"])
        if won or step is None or step.status is None or not step.status.is_terminal:
            return bool(won)
        return step.expires_at is not None and step.expires_at <= self._now()


@mutant("postgresql", "CLM-5")
class RepeatedClaimRefused:
    """Returns False when the owner of a live claim repeats its claim."""

    async def try_claim_step(self, **given: Any) -> bool:
        held = await claim_of(self, given)
        if held is not None and held.expires_at is None:
            return False
        return bool(await super().try_claim_step(**given))


@mutant("memory", "CLM-5")
class OwnerlessCallsShareOneOwner:
    """Treats all callers without owner as one owner."""

    async def try_claim_step(self, **given: Any) -> bool:
        if given["owner"] is None:
            given["owner"] = "nobody"
        return bool(await super().try_claim_step(**given))


@mutant("memory", "CLM-6")
class LeaseNotStored:
    """Does not store the lease."""

    async def try_claim_step(self, **given: Any) -> bool:
        return bool(await super().try_claim_step(**{**given, "lease": None}))


@mutant("memory", "CLM-6")
class LeaseAddedToLocalTime:
    """Adds the lease to local time, in which a day may have 23 or 25 hours."""

    async def try_claim_step(self, **given: Any) -> bool:
        if given.get("lease") is not None:
            now = self._now()
            end = (now.astimezone().replace(tzinfo=None) + given["lease"]).astimezone()
            given["lease"] = end - now
        return bool(await super().try_claim_step(**given))


@mutant("sqlite", "CLM-6")
class LeaseTruncatedToMinutes:
    """Truncates the lease to whole minutes."""

    async def try_claim_step(self, **given: Any) -> bool:
        lease = given.get("lease")
        if lease is not None:
            given["lease"] = max(lease // timedelta(minutes=1), 0) * timedelta(minutes=1)
        return bool(await super().try_claim_step(**given))


@mutant("postgresql", "CLM-6")
class LeaseInclusiveOfItsEnd:
    """Treats a lease as live at the exact time of its end, when the next claimant should win."""

    async def try_claim_step(self, **given: Any) -> bool:
        held = await claim_of(self, given)
        clock = self._database.now() or datetime.now(UTC)
        if held is not None and held.expires_at == clock:
            return bool(held.owner == given["owner"])
        return bool(await super().try_claim_step(**given))


@mutant("sqlite", "CLM-6", concurrent=True)
class ExpiredLeaseClaimedTwice:
    """Finds a lease expired, deletes the claim, then claims: two concurrent callers both win."""

    async def try_claim_step(self, **given: Any) -> bool:
        held = await claim_of(self, given)
        now = from_us(self._database.now())
        status = (await super().get_step_statuses(run_id=given["run_id"])).get(given["step_key"])
        ended = status is not None and status.is_terminal
        if held is not None and not ended and held.expires_at is not None and held.expires_at <= now:
            return await _overwrite_claim(self, super().try_claim_step, given)
        return bool(await super().try_claim_step(**given))


@mutant("memory", "CLM-6")
class RenewalShortensLease:
    """Sets the lease's end to now + lease even if it ends later already."""

    async def renew_step_claim(self, **given: Any) -> bool:
        renewed = await super().renew_step_claim(**given)
        if renewed:
            step = self._find_step(given["run_id"], given["step_key"])
            step.expires_at = lease_end(self._now(), given["lease"])
        return bool(renewed)


@mutant("sqlite", "CLM-6")
class RenewalRevivesExpiredLease(PatchedSqlite):
    """Renews an expired lease if no other caller has claimed the step."""

    patch_sql = SqlPatch((r"AND expires_at > :now", "AND expires_at IS NOT NULL"))


@mutant("memory", "CLM-6")
class RenewalsEndAtFirstRefusal:
    """Renews no claim after the first one that is refused."""

    async def renew_step_claims(self, **given: Any) -> tuple[bool, ...]:
        answers: list[bool] = []
        for run_id, step_key, owner in given["claims"]:
            renewed = not answers or answers[-1]
            renewed = renewed and await super().renew_step_claim(
                run_id=run_id, step_key=step_key, owner=owner, lease=given["lease"]
            )
            answers.append(renewed)
        return tuple(answers)


@mutant("memory", "CLM-6")
class RenewalAddsLease:
    """Adds a lease when it renews a claim that has none."""

    async def renew_step_claim(self, **given: Any) -> bool:
        step = self._find_step(given["run_id"], given["step_key"])
        if step is not None and step.owner == given["owner"] and step.expires_at is None:
            step.expires_at = lease_end(self._now(), given["lease"])
            return True
        return bool(await super().renew_step_claim(**given))


@mutant("sqlite", "CLM-7")
class AnnotationCreatesDispatch:
    """Creates the dispatch record that it should only annotate."""

    async def annotate_dispatch(self, **given: Any) -> None:
        if await super().get_run_status(run_id=given["run_id"]) == "Running":
            await super().try_record_dispatch(run_id=given["run_id"], step_key=given["step_key"], due_at=None)
        await super().annotate_dispatch(**given)


@mutant("memory", "CLM-7")
class AnnotationRaisesWithoutRecord:
    """Raises if there is no dispatch record."""

    async def annotate_dispatch(self, **given: Any) -> None:
        if given["step_key"] not in await super().get_dispatched_step_keys(run_id=given["run_id"]):
            raise ConflictError("no dispatch", run_id=given["run_id"], step_key=given["step_key"])
        await super().annotate_dispatch(**given)
