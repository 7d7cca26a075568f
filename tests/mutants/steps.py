"""Mutants of steps and attempts."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import Any

from flowstore_core import (
    ClaimLostError,
    RunStatus,
    StepAlreadyCompletedError,
    StepStatus,
)
from flowstore_memory.steps import archive_attempt
from tests.mutants import mutant
from tests.mutants.sql_patching import PatchedPostgres, PatchedSqlite, SqlPatch


@mutant("sqlite", "STP-1", concurrent=True)
class AttemptNumberReadEarlier:
    """Reads the last attempt number, then opens an attempt: concurrent starts get the same number."""

    async def record_step_start(self, **given: Any) -> int:
        row = (given["run_id"].bytes, given["step_key"])
        count = "SELECT COALESCE(MAX(last_attempt), 0) FROM steps WHERE run_id = ? AND step_key = ?"
        counted = await self._database.read(lambda db: db.execute(count, row).fetchone()[0])
        number = await super().record_step_start(**given)
        return int(number) if given["owner"] is not None else int(counted) + 1


@mutant("memory", "STP-1")
class OpenAttemptStaysOpen:
    """Opens an attempt beside one that is still open."""

    async def record_step_start(self, **given: Any) -> int:
        number = await super().record_step_start(**given)
        earlier = self._runs[given["run_id"].int].earlier.get(given["step_key"])
        if earlier and (earlier[-1].error_message or "").startswith("superseded"):
            earlier[-1] = replace(
                earlier[-1], status=StepStatus.RUNNING, completed_at=None, error_message=None
            )
        return int(number)


@mutant("postgresql", "STP-1")
class StartKeepsError(PatchedPostgres):
    """Keeps the last attempt's error on a step that starts again."""

    patch_sql = SqlPatch(
        (r"output_json = NULL,\s+error_message = NULL, completed_at = NULL", "completed_at = NULL")
    )


@mutant("postgresql", "STP-2")
class FailedStepCannotRestart:
    """Refuses to start a Failed step again."""

    async def record_step_start(self, **given: Any) -> int:
        statuses = await super().get_step_statuses(run_id=given["run_id"])
        if statuses.get(given["step_key"]) is StepStatus.FAILED:
            raise StepAlreadyCompletedError(given["run_id"], given["step_key"])
        return int(await super().record_step_start(**given))


@mutant("sqlite", "STP-2")
class SucceededStepCanRestart:
    """Starts a Succeeded step again without a retry."""

    async def record_step_start(self, **given: Any) -> int:
        try:
            return int(await super().record_step_start(**given))
        except StepAlreadyCompletedError:
            await super().retry_step(
                run_id=given["run_id"], step_key=given["step_key"], attempt=None, reset=frozenset()
            )
            return int(await super().record_step_start(**{**given, "owner": None}))


@mutant("memory", "STP-2", concurrent=True, more_clauses=("STP-4", "STP-5"))
class StartChecksStepEarlier:
    """Checks that the step is not finished, and starts it later, when it may be."""

    async def record_step_start(self, **given: Any) -> int:
        statuses = await super().get_step_statuses(run_id=given["run_id"])
        await asyncio.sleep(0)
        try:
            return int(await super().record_step_start(**given))
        except StepAlreadyCompletedError:
            if statuses.get(given["step_key"]) in (StepStatus.SUCCEEDED, StepStatus.SKIPPED):
                raise
            run = self._runs[given["run_id"].int]
            step = run.steps[given["step_key"]]
            archive_attempt(run, given["step_key"], step, self._now())
            step.status = None
            return int(await super().record_step_start(**given))


@mutant("memory", "STP-3")
class StartIgnoresOwner:
    """Starts the step for every owner, with or without claim."""

    async def record_step_start(self, **given: Any) -> int:
        return int(await super().record_step_start(**{**given, "owner": None}))


@mutant("postgresql", "STP-3")
class StartIsNotRepeatable:
    """Opens another attempt when the owner repeats its start after a lost reply."""

    async def record_step_start(self, **given: Any) -> int:
        if await super().get_run_status(run_id=given["run_id"]) is RunStatus.RUNNING:
            statuses = await super().get_step_statuses(run_id=given["run_id"])
            number = await super().record_step_start(**given)
            if given["owner"] is None or statuses.get(given["step_key"]) is not StepStatus.RUNNING:
                return int(number)
            return int(await super().record_step_start(**{**given, "owner": None}))
        return int(await super().record_step_start(**given))


@mutant("sqlite", "STP-3", concurrent=True)
class StartChecksClaimEarlier:
    """Checks the claim in one transaction and opens the attempt in the next."""

    async def record_step_start(self, **given: Any) -> int:
        held = given["step_key"] in await super().get_claimed_step_keys(run_id=given["run_id"])
        claims = await super().get_step_claims(run_id=given["run_id"])
        owners = {claim.owner for claim in claims if claim.step_key == given["step_key"]}
        try:
            return int(await super().record_step_start(**given))
        except ClaimLostError:
            if not held or given["owner"] not in owners:
                raise
            return int(await super().record_step_start(**{**given, "owner": None}))


@mutant("memory", "STP-4")
class StaleResultAccepted:
    """Closes the last attempt with the result of an older one."""

    async def record_step_complete(self, **given: Any) -> None:
        await super().record_step_complete(**{**given, "attempt": None})


@mutant("sqlite", "STP-4")
class ResultAfterRetryAccepted(PatchedSqlite):
    """Closes an attempt although retry_step has reopened its step."""

    patch_sql = SqlPatch(
        (r"COALESCE\(reopened, 0\)", "0"), (r"status = \?1, output_json = \?2", r"\g<0>, reopened = 0")
    )


@mutant("postgresql", "STP-4")
class DifferentOutcomeIgnored:
    """Ignores a different outcome for a closed attempt instead of raising."""

    async def record_step_complete(self, **given: Any) -> None:
        try:
            await super().record_step_complete(**given)
        except StepAlreadyCompletedError:
            return


@mutant("sqlite", "STP-4")
class RepeatedOutcomeRefused:
    """Refuses a repeated outcome, which should be a no-op."""

    async def record_step_complete(self, **given: Any) -> None:
        statuses = await super().get_step_statuses(run_id=given["run_id"])
        await super().record_step_complete(**given)
        now = statuses.get(given["step_key"])
        if now is not None and now.is_terminal:
            raise StepAlreadyCompletedError(given["run_id"], given["step_key"])


@mutant("memory", "STP-4")
class PendingOutcomeSetsCompletedAt:
    """Sets completed_at on a step whose attempt was closed as Pending."""

    async def get_run_detail(self, **given: Any) -> Any:
        detail = await super().get_run_detail(**given)
        if detail is None:
            return None
        steps = tuple(
            replace(step, completed_at=step.attempts[-1].completed_at) if step.attempts else step
            for step in detail.steps
        )
        return replace(detail, steps=steps)


@mutant("memory", "STP-4", concurrent=True)
class CompletionCheckThenWrite:
    """Checks that the attempt is the last, and later closes whichever is the last by then."""

    async def record_step_complete(self, **given: Any) -> None:
        step = self._runs[given["run_id"].int].steps.get(given["step_key"])
        last = step.attempt if step is not None else 0
        await asyncio.sleep(0)
        if given["attempt"] == last and step is not None and not step.reopened:
            given["attempt"] = None
        await super().record_step_complete(**given)


@mutant("postgresql", "STP-4")
class ResultOfAnyOwnerAccepted(PatchedPostgres):
    """Closes the attempt of another owner if it is open; only the slow path compares the owner."""

    patch_sql = SqlPatch(
        (r"\(a\.owner IS NULL OR s\.started_owner = a\.owner\)\s+RETURNING n", "a.n > 0 RETURNING n"),
        (r"\(\$10::text IS NULL OR started_owner = \$10\)", "($10::text IS NULL OR $10 <> '')"),
    )


@mutant("sqlite", "STP-4")
class HolderMayComplete:
    """Accepts the holder of the claim, although it has not started the attempt."""

    async def record_step_complete(self, **given: Any) -> None:
        claims = await self.get_step_claims(run_id=given["run_id"])
        if any((one.step_key, one.owner) == (given["step_key"], given["owner"]) for one in claims):
            given["owner"] = None
        await super().record_step_complete(**given)


@mutant("memory", "STP-5")
class SkipIgnoresClaim:
    """Skips a step that another owner has claimed."""

    async def record_skipped_step(self, **given: Any) -> None:
        try:
            await super().record_skipped_step(**given)
        except ClaimLostError:
            await super().record_skipped_step(**{**given, "owner": None})


@mutant("sqlite", "STP-5")
class SkipTakesNoClaim(PatchedSqlite):
    """Skips with an owner without taking the claim."""

    patch_sql = SqlPatch(
        (r"UPDATE steps SET claimed_at = \?, claim_owner = \?[\s\S]*", "SELECT ?, ?, ?, ?"),
    )


@mutant("postgresql", "STP-5")
class SkipOverwritesOutcome:
    """Skips a terminal step."""

    async def record_skipped_step(self, **given: Any) -> None:
        try:
            await super().record_skipped_step(**given)
        except StepAlreadyCompletedError:
            if given["owner"] is not None:
                raise
            await super().retry_step(
                run_id=given["run_id"], step_key=given["step_key"], attempt=None, reset=frozenset()
            )
            await super().record_skipped_step(**given)


@mutant("sqlite", "STP-7")
class RescheduleKeepsClaim(PatchedSqlite):
    """Keeps the claim, so that no caller can claim the rescheduled step."""

    patch_sql = SqlPatch(
        (
            r"rescheduled = 1,\s+claimed_at = NULL, [^?]*claim_token = NULL,",
            "rescheduled = 1,",
        )
    )


@mutant("sqlite", "STP-7")
class RescheduleIgnoresOwner:
    """Lets a worker that has lost its claim reschedule the attempt of another one."""

    async def reschedule_step(self, **given: Any) -> None:
        await super().reschedule_step(**{**given, "owner": None})


@mutant("memory", "STP-7")
class RepeatedRescheduleDispatches:
    """A repeated reschedule of the closed attempt replaces the dispatch again."""

    async def reschedule_step(self, **given: Any) -> None:
        run = self._runs[given["run_id"].int]
        step = run.steps.get(given["step_key"])
        if step is not None:
            step.rescheduled = False
        await super().reschedule_step(**given)


@mutant("postgresql", "STP-7")
class RescheduleDispatchesOnTerminalRun(PatchedPostgres):
    """Dispatches the step of a terminal run."""

    patch_sql = SqlPatch(
        (r"CASE WHEN \$6 THEN \$5::timestamptz END", "CASE WHEN $6 IS NOT NULL THEN $5::timestamptz END")
    )


@mutant("postgresql", "STP-7")
class RescheduleDropsOutput:
    """Drops the output of the attempt that it closes."""

    async def reschedule_step(self, **given: Any) -> None:
        await super().reschedule_step(**{**given, "output_json": None})


@mutant("memory", "STP-8")
class StalledOmitsUnstarted:
    """Lists only started steps and omits keys that were only claimed or dispatched."""

    async def get_stalled_steps(self, **given: Any) -> Any:
        found = await super().get_stalled_steps(**given)
        return tuple(
            one for one in found if self._runs[one.run_id.int].steps[one.step_key].status is not None
        )


@mutant("sqlite", "STP-8")
class StalledIncludesWaiting(PatchedSqlite):
    """Lists steps that wait for a signal."""

    patch_sql = SqlPatch((r"OR waiters\.expires_at IS NOT NULL(?=\s+THEN MAX)", "OR TRUE"))


@mutant("postgresql", "STP-8")
class StalledIgnoresAsOf:
    """Compares with the store's time instead of as_of."""

    async def get_stalled_steps(self, **given: Any) -> Any:
        return await super().get_stalled_steps(**{**given, "as_of": None})


@mutant("sqlite", "STP-8")
class StalledIgnoresLeases(PatchedSqlite):
    """Omits claims with an expired lease."""

    patch_sql = SqlPatch((r"THEN steps\.expires_at", "THEN NULL"))


@mutant("memory", "STP-8")
class StalledCountsFromClaim:
    """Returns the time of the claim instead of the end of its lease as ``since``."""

    async def get_stalled_steps(self, **given: Any) -> Any:
        found = await super().get_stalled_steps(**given)
        return tuple(
            replace(one, since=one.since - timedelta(seconds=1)) if one.reason == "LeaseExpired" else one
            for one in found
        )
