"""Mutants of try_start_step."""

from __future__ import annotations

import asyncio
from typing import Any

from flowstore_core import RunStatus, StepStatus
from flowstore_core.claims import lease_end
from tests.mutants import mutant
from tests.mutants.claims import claim_of
from tests.mutants.sql_patching import PatchedPostgres, SqlPatch


def _key(given: Any) -> dict[str, Any]:
    return {"run_id": given["run_id"], "step_key": given["step_key"]}


async def _start_attempt(store: Any, given: Any, owner: str | None) -> int:
    """Start an attempt in a second transaction."""
    started = {name: given[name] for name in ("run_id", "step_key", "step_type", "input_json", "job_id")}
    return int(await store.record_step_start(**started, owner=owner))


@mutant("sqlite", "CLM-8")
class RepeatedStartOpensAttempt:
    """A repeated call by the owner opens the next attempt."""

    async def try_start_step(self, **given: Any) -> int | None:
        held = await claim_of(self, given)
        attempt = await super().try_start_step(**given)
        if attempt is not None and held is not None and held.owner == given["owner"]:
            await super().release_step_claim(**_key(given), owner=None)
            return await super().try_start_step(**given)
        return attempt


@mutant("memory", "CLM-8")
class RepeatedStartExtendsLease:
    """A repeated call by the owner renews its claim."""

    async def try_start_step(self, **given: Any) -> int | None:
        attempt = await super().try_start_step(**given)
        if attempt is not None:
            step = self._find_step(given["run_id"], given["step_key"])
            step.expires_at = lease_end(self._now(), given["lease"])
        return attempt


@mutant("memory", "CLM-8")
class StartIgnoresLease:
    """The claim has no lease: a step whose worker died stays claimed."""

    async def try_start_step(self, **given: Any) -> int | None:
        attempt = await super().try_start_step(**given)
        if attempt is not None:
            self._find_step(given["run_id"], given["step_key"]).expires_at = None
        return attempt


@mutant("postgresql", "CLM-8", concurrent=True)
class StartCheckThenWrite:
    """Checks that the step is free, then replaces any claim made in between."""

    async def try_start_step(self, **given: Any) -> int | None:
        held = await claim_of(self, given)
        ended = given["step_key"] in await super().get_step_statuses(run_id=given["run_id"])
        if held is None and not ended:
            await super().release_step_claim(**_key(given), owner=None)
        return await super().try_start_step(**given)


@mutant("sqlite", "CLM-8", concurrent=True)
class StartAfterClaimInSeparateTransaction:
    """Claims in one transaction and starts in the next, where the claim may belong to another owner."""

    async def try_start_step(self, **given: Any) -> int | None:
        held = await claim_of(self, given)
        if held is not None and held.owner == given["owner"]:
            return await super().try_start_step(**given)
        if not await super().try_claim_step(**_key(given), owner=given["owner"], lease=given["lease"]):
            return None
        await asyncio.sleep(0)
        return await _start_attempt(super(), given, given["owner"])


@mutant("sqlite", "CLM-8")
class RefusedStartReturnsAttempt:
    """A call that another owner's claim refuses returns the number of that owner's attempt."""

    async def try_start_step(self, **given: Any) -> int | None:
        attempt = await super().try_start_step(**given)
        if attempt is None:
            step = await super().get_step(**_key(given))
            if step is not None and step.status is StepStatus.RUNNING:
                return int(step.attempt_count)
        return attempt


@mutant("postgresql", "CLM-8")
class ExpiredOwnerKeepsAttempt:
    """After its lease the former owner gets its old attempt again, without a claim."""

    async def try_start_step(self, **given: Any) -> int | None:
        held = await claim_of(self, given)
        status = await super().get_run_status(run_id=given["run_id"])
        if held is not None and held.owner == given["owner"] and status is RunStatus.RUNNING:
            step = await super().get_step(**_key(given))
            if step is not None and step.status is StepStatus.RUNNING:
                return int(step.attempt_count)
        return await super().try_start_step(**given)


@mutant("memory", "CLM-8")
class StartTakesInputOfDispatch:
    """A queued step starts with the step_type and the input of its dispatch."""

    async def try_start_step(self, **given: Any) -> int | None:
        step = self._find_step(given["run_id"], given["step_key"])
        if step is not None and step.queued is not None:
            given["step_type"], given["input_json"] = step.queued.step_type, step.queued.input_json
        return await super().try_start_step(**given)


@mutant("postgresql", "CLM-8")
class StartForgetsOwner(PatchedPostgres):
    """The step does not remember who started its attempt."""

    patch_sql = SqlPatch((r"started_owner = excluded\.started_owner", "started_owner = NULL"))


@mutant("memory", "CLM-8")
class FailedStepStartsAtOnce:
    """Starts a Failed step again, without retry_step."""

    async def try_start_step(self, **given: Any) -> int | None:
        attempt = await super().try_start_step(**given)
        step = self._find_step(given["run_id"], given["step_key"])
        if attempt is None and step is not None and step.status is StepStatus.FAILED:
            if await super().get_run_status(run_id=given["run_id"]) is not RunStatus.RUNNING:
                return None
            return await _start_attempt(super(), given, None)
        return attempt


@mutant("postgresql", "CLM-8")
class TakeoverKeepsOldLease(PatchedPostgres):
    """A start after the end of a lease leaves the end of the old claim, so that the new one has ended too."""

    patch_sql = SqlPatch((r"claim_expires_at = CASE WHEN v\.owned", "claim_expires_at = CASE WHEN true"))
