"""Broken claims and dispatch ledgers."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from weakref import WeakKeyDictionary

import asyncpg

from flowstore_core import ConflictError, StepStatus
from flowstore_core.claims import lease_end
from tests.mutants import broken
from tests.mutants.sql_patching import Cut, SqliteSurgery


async def _claim_of(store: Any, given: Any) -> Any:
    claims = await store.get_step_claims(run_id=given["run_id"])
    return next((claim for claim in claims if claim.step_key == given["step_key"]), None)


async def _force(store: Any, claim: Any, given: Any) -> bool:
    """Write the claim over whatever is there."""
    await store.release_step_claim(run_id=given["run_id"], step_key=given["step_key"], owner=None)
    return bool(await claim(**given))


@broken("postgresql", "CLM-1", concurrent=True)
class ClaimLooksThenWrites:
    """Looks whether the claim is free, then writes it over whatever came in between."""

    async def try_claim_step(self, **given: Any) -> bool:
        held = await _claim_of(self, given)
        if held is not None:
            return bool(await super().try_claim_step(**given))
        return await _force(self, super().try_claim_step, given)


@broken("sqlite", "CLM-1", concurrent=True)
class ClaimLooksInAnotherTransaction:
    """Looks in one transaction and inserts in the next, replacing what is there."""

    async def try_claim_step(self, **given: Any) -> bool:
        held = await _claim_of(self, given)
        if held is not None:
            return bool(await super().try_claim_step(**given))
        return await _force(self, super().try_claim_step, given)


_locks: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


@broken("postgresql", "CLM-1", concurrent=True)
class ClaimLockedInOneProcess:
    """Looks, then writes, under a lock that only this process knows."""

    async def try_claim_step(self, **given: Any) -> bool:
        async with _locks.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
            if await _claim_of(self, given) is not None:
                return bool(await super().try_claim_step(**given))
            return await _force(self, super().try_claim_step, given)


@broken("postgresql", "CON-2", concurrent=True, look_at=("CLM-1",))
class ClaimRaceLetsOutDriverError:
    """Inserts without ON CONFLICT: who loses a race gets the driver's unique violation."""

    async def try_claim_step(self, **given: Any) -> bool:
        held = await _claim_of(self, given)
        won = await super().try_claim_step(**given)
        if held is None and not won and (await _claim_of(self, given)) is not None:
            status = (await super().get_step_statuses(run_id=given["run_id"])).get(given["step_key"])
            if status is None:
                raise asyncpg.UniqueViolationError("duplicate key value violates unique constraint")
        return bool(won)


@broken("memory", "CON-2", look_at=("CLM-3",))
class ReleaseFailsInCallback:
    """A callback that a release leaves behind raises; no caller sees it."""

    async def release_step_claim(self, **given: Any) -> None:
        await super().release_step_claim(**given)
        asyncio.get_running_loop().call_soon([].pop)


@broken("memory", "CLM-1")
class ClaimLoserRaises:
    """Who loses gets a ConflictError."""

    async def try_claim_step(self, **given: Any) -> bool:
        if not await super().try_claim_step(**given):
            raise ConflictError("somebody else has it", run_id=given["run_id"], step_key=given["step_key"])
        return True


@broken("sqlite", "CLM-1", concurrent=True)
class DispatchLooksThenWrites:
    """Looks whether the step was dispatched, then records it over whatever came in between."""

    async def try_record_dispatch(self, **given: Any) -> bool:
        keys = await super().get_dispatched_step_keys(run_id=given["run_id"])
        if given["step_key"] in keys:
            return False
        await super().release_dispatch(run_id=given["run_id"], step_key=given["step_key"])
        return bool(await super().try_record_dispatch(**given))


@broken("memory", "CLM-1", concurrent=True)
class DispatchAlwaysToldTrue:
    """Answers True to all who found the step not dispatched, though one of them recorded it."""

    async def try_record_dispatch(self, **given: Any) -> bool:
        keys = await super().get_dispatched_step_keys(run_id=given["run_id"])
        await asyncio.sleep(0)
        won = await super().try_record_dispatch(**given)
        run = await super().get_run_status(run_id=given["run_id"])
        statuses = await super().get_step_statuses(run_id=given["run_id"])
        ended = run != "Running" or StepStatus(statuses.get(given["step_key"], "Pending")).is_terminal
        return bool(won or (given["step_key"] not in keys and not ended))


@broken("sqlite", "CLM-2")
class ClaimsReadFromOwnCache:
    """Keeps the claimed keys it has read, and forgets them only at its own writes: others' are not seen."""

    def begin(self) -> None:
        self._known: dict[Any, Any] = {}

    async def write(self, *given: Any) -> Any:
        self._known.clear()
        return await super().write(*given)

    async def get_claimed_step_keys(self, **given: Any) -> Any:
        if given["run_id"] not in self._known:
            self._known[given["run_id"]] = await super().get_claimed_step_keys(**given)
        return self._known[given["run_id"]]


@broken("sqlite", "CLM-3")
class ReleaseFreesEveryKey:
    """Frees all claims of the run."""

    async def release_step_claim(self, **given: Any) -> None:
        for claim in await super().get_step_claims(run_id=given["run_id"]):
            if given["owner"] in (None, claim.owner):
                await super().release_step_claim(**{**given, "step_key": claim.step_key})


@broken("postgresql", "CLM-3")
class ReleaseIgnoresOwner:
    """Frees the claim whoever holds it."""

    async def release_step_claim(self, **given: Any) -> None:
        await super().release_step_claim(**{**given, "owner": None})


@broken("memory", "CLM-3", concurrent=True, look_at=("CLM-6", "STP-3"))
class ReleaseChecksOwnerFirst:
    """Asks who holds the claim, then frees it, though another may have won it in between."""

    async def release_step_claim(self, **given: Any) -> None:
        held = await _claim_of(self, given)
        if held is None or given["owner"] not in (None, held.owner):
            return
        await asyncio.sleep(0)
        await super().release_step_claim(**{**given, "owner": None})


@broken("sqlite", "CLM-4")
class CompletionDropsClaim:
    """Removes the claim of a step that completes, so that a redelivered message finds it free."""

    async def record_step_complete(self, **given: Any) -> None:
        await super().record_step_complete(**given)
        if StepStatus(given["status"]).is_terminal:
            await super().release_step_claim(run_id=given["run_id"], step_key=given["step_key"], owner=None)


@broken("memory", "CLM-4")
class ClaimedKeysListFinishedSteps:
    """get_claimed_step_keys leaves finished steps in."""

    async def get_claimed_step_keys(self, **given: Any) -> frozenset[str]:
        return frozenset(claim.step_key for claim in await super().get_step_claims(**given))


@broken("memory", "CLM-4")
class FinishedStepCanBeClaimed:
    """Once the lease of a finished step is over, a redelivered message wins it."""

    async def try_claim_step(self, **given: Any) -> bool:
        won = await super().try_claim_step(**given)
        step = self._find_step(given["run_id"], given["step_key"])
        if won or step is None or step.status is None or not step.status.is_terminal:
            return bool(won)
        return step.expires_at is not None and step.expires_at <= self._now()


@broken("postgresql", "CLM-5")
class OwnerDoesNotWinAgain:
    """Says False to the owner of a live claim who asks again."""

    async def try_claim_step(self, **given: Any) -> bool:
        held = await _claim_of(self, given)
        if held is not None and held.expires_at is None:
            return False
        return bool(await super().try_claim_step(**given))


@broken("memory", "CLM-5")
class NobodyIsSomebody:
    """Takes two callers without owner for one and the same."""

    async def try_claim_step(self, **given: Any) -> bool:
        if given["owner"] is None:
            given["owner"] = "nobody"
        return bool(await super().try_claim_step(**given))


@broken("memory", "CLM-6")
class LeaseNeverEnds:
    """Stores no lease."""

    async def try_claim_step(self, **given: Any) -> bool:
        return bool(await super().try_claim_step(**{**given, "lease": None}))


@broken("memory", "CLM-6")
class LeaseAddedToLocalTime:
    """Adds a lease to the local time, where a day may have 23 or 25 hours."""

    async def try_claim_step(self, **given: Any) -> bool:
        if given["lease"] is not None:
            now = self._now()
            end = (now.astimezone().replace(tzinfo=None) + given["lease"]).astimezone()
            given["lease"] = end - now
        return bool(await super().try_claim_step(**given))


@broken("sqlite", "CLM-6")
class LeaseInWholeMinutes:
    """Cuts the lease to whole minutes."""

    async def try_claim_step(self, **given: Any) -> bool:
        lease = given["lease"]
        if lease is not None:
            given["lease"] = max(lease // timedelta(minutes=1), 0) * timedelta(minutes=1)
        return bool(await super().try_claim_step(**given))


@broken("postgresql", "CLM-6")
class LeaseHoldsAtItsEnd:
    """Holds a lease at the very moment of its end, when the next claimant should win."""

    async def try_claim_step(self, **given: Any) -> bool:
        held = await _claim_of(self, given)
        clock = self._database.now() or datetime.now(UTC)
        if held is not None and held.expires_at == clock:
            return bool(held.owner == given["owner"])
        return bool(await super().try_claim_step(**given))


@broken("sqlite", "CLM-6", concurrent=True)
class ExpiredLeaseTakenByTwo:
    """Finds a lease expired, removes the claim, then claims: two who find it so both win."""

    async def try_claim_step(self, **given: Any) -> bool:
        held = await _claim_of(self, given)
        now = self._clock() if self._clock is not None else datetime.now(UTC)
        status = (await super().get_step_statuses(run_id=given["run_id"])).get(given["step_key"])
        ended = status is not None and status.is_terminal
        if held is not None and not ended and held.expires_at is not None and held.expires_at <= now:
            return await _force(self, super().try_claim_step, given)
        return bool(await super().try_claim_step(**given))


@broken("memory", "CLM-6")
class RenewShortens:
    """Sets the lease's end to now and the new length, though it lay later."""

    async def renew_step_claim(self, **given: Any) -> bool:
        renewed = await super().renew_step_claim(**given)
        if renewed:
            step = self._find_step(given["run_id"], given["step_key"])
            step.expires_at = lease_end(self._now(), given["lease"])
        return bool(renewed)


@broken("sqlite", "CLM-6")
class RenewRaisesTheDead(SqliteSurgery):
    """Renews a lease that is over, if nobody has claimed since."""

    cut = Cut((r"AND expires_at > :now", "AND expires_at IS NOT NULL"))


@broken("memory", "CLM-6")
class RenewGivesLease:
    """Renews a claim without lease, and so gives it one."""

    async def renew_step_claim(self, **given: Any) -> bool:
        step = self._find_step(given["run_id"], given["step_key"])
        if step is not None and step.owner == given["owner"] and step.expires_at is None:
            step.expires_at = lease_end(self._now(), given["lease"])
            return True
        return bool(await super().renew_step_claim(**given))


@broken("sqlite", "CLM-7")
class AnnotateRecordsDispatch:
    """Creates the record that it should only annotate."""

    async def annotate_dispatch(self, **given: Any) -> None:
        if await super().get_run_status(run_id=given["run_id"]) == "Running":
            await super().try_record_dispatch(run_id=given["run_id"], step_key=given["step_key"], due_at=None)
        await super().annotate_dispatch(**given)


@broken("memory", "CLM-7")
class AnnotateMissesRecord:
    """Raises where there is no record."""

    async def annotate_dispatch(self, **given: Any) -> None:
        if given["step_key"] not in await super().get_dispatched_step_keys(run_id=given["run_id"]):
            raise ConflictError("no dispatch", run_id=given["run_id"], step_key=given["step_key"])
        await super().annotate_dispatch(**given)
