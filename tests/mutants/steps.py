"""Broken steps and attempts."""

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
from tests.mutants import broken
from tests.mutants.sql_patching import Cut, PostgresSurgery, SqliteSurgery


@broken("sqlite", "STP-1", concurrent=True)
class AttemptNumberCountedBefore:
    """Counts the attempts, then opens one: two who count at once get the same number."""

    async def record_step_start(self, **given: Any) -> int:
        row = (given["run_id"].bytes, given["step_key"])
        count = "SELECT COALESCE(MAX(last_attempt), 0) FROM steps WHERE run_id = ? AND step_key = ?"
        counted = await self.read(lambda db: db.execute(count, row).fetchone()[0])
        number = await super().record_step_start(**given)
        return int(number) if given["owner"] is not None else int(counted) + 1


@broken("memory", "STP-1")
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


@broken("postgresql", "STP-1")
class StartKeepsTheError(PostgresSurgery):
    """Leaves the last attempt's error on the step that starts again."""

    cut = Cut((r"output_json = NULL,\s+error_message = NULL, completed_at = NULL", "completed_at = NULL"))


@broken("postgresql", "STP-2")
class FailedStepStaysFailed:
    """Refuses to start a Failed step again."""

    async def record_step_start(self, **given: Any) -> int:
        statuses = await super().get_step_statuses(run_id=given["run_id"])
        if statuses.get(given["step_key"]) is StepStatus.FAILED:
            raise StepAlreadyCompletedError(given["run_id"], given["step_key"])
        return int(await super().record_step_start(**given))


@broken("sqlite", "STP-2")
class SucceededStepRunsAgain:
    """Starts a Succeeded step again, as if it had been retried."""

    async def record_step_start(self, **given: Any) -> int:
        try:
            return int(await super().record_step_start(**given))
        except StepAlreadyCompletedError:
            await super().retry_step(
                run_id=given["run_id"], step_key=given["step_key"], attempt=None, reset=frozenset()
            )
            return int(await super().record_step_start(**{**given, "owner": None}))


@broken("memory", "STP-2", concurrent=True, look_at=("STP-4", "STP-5"))
class StartLooksAtStepBefore:
    """Looks whether the step is finished, and starts it a moment later, when it may be."""

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


@broken("memory", "STP-3")
class StartNeedsNoClaim:
    """Starts the step for anybody, whatever the owner."""

    async def record_step_start(self, **given: Any) -> int:
        return int(await super().record_step_start(**{**given, "owner": None}))


@broken("postgresql", "STP-3")
class StartIsNotRepeatable:
    """Opens another attempt when the owner says it again because the answer was lost."""

    async def record_step_start(self, **given: Any) -> int:
        if await super().get_run_status(run_id=given["run_id"]) is RunStatus.RUNNING:
            statuses = await super().get_step_statuses(run_id=given["run_id"])
            number = await super().record_step_start(**given)
            if given["owner"] is None or statuses.get(given["step_key"]) is not StepStatus.RUNNING:
                return int(number)
            return int(await super().record_step_start(**{**given, "owner": None}))
        return int(await super().record_step_start(**given))


@broken("sqlite", "STP-3", concurrent=True)
class StartChecksClaimBefore:
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


@broken("memory", "STP-4")
class StaleResultAccepted:
    """Closes the last attempt with the result of an older one."""

    async def record_step_complete(self, **given: Any) -> None:
        await super().record_step_complete(**{**given, "attempt": None})


@broken("sqlite", "STP-4")
class ResultAfterRetryAccepted(SqliteSurgery):
    """Closes an attempt although retry_step has reopened its step."""

    cut = Cut((r"COALESCE\(reopened, 0\)", "0"), (r"status = \?, output_json = \?", r"\g<0>, reopened = 0"))


@broken("postgresql", "STP-4")
class OtherOutcomeSwallowed:
    """Says nothing when an attempt is closed with another outcome than it has."""

    async def record_step_complete(self, **given: Any) -> None:
        try:
            await super().record_step_complete(**given)
        except StepAlreadyCompletedError:
            return


@broken("sqlite", "STP-4")
class SameOutcomeRefused:
    """Refuses the same outcome said again, which should be a no-op."""

    async def record_step_complete(self, **given: Any) -> None:
        statuses = await super().get_step_statuses(run_id=given["run_id"])
        await super().record_step_complete(**given)
        now = statuses.get(given["step_key"])
        if now is not None and now.is_terminal:
            raise StepAlreadyCompletedError(given["run_id"], given["step_key"])


@broken("memory", "STP-4")
class PollIsTakenForTheEnd:
    """Gives a step whose attempt closed as Pending a completed_at."""

    async def get_run_detail(self, **given: Any) -> Any:
        detail = await super().get_run_detail(**given)
        if detail is None:
            return None
        steps = tuple(
            replace(step, completed_at=step.attempts[-1].completed_at) if step.attempts else step
            for step in detail.steps
        )
        return replace(detail, steps=steps)


@broken("memory", "STP-4", concurrent=True)
class CompletionDecidedBefore:
    """Looks which attempt is the last, and closes that which is the last a moment later."""

    async def record_step_complete(self, **given: Any) -> None:
        step = self._runs[given["run_id"].int].steps.get(given["step_key"])
        last = step.attempt if step is not None else 0
        await asyncio.sleep(0)
        if given["attempt"] == last and step is not None and not step.reopened:
            given["attempt"] = None
        await super().record_step_complete(**given)


@broken("memory", "STP-5")
class SkipIgnoresClaim:
    """Skips a step that another holds."""

    async def record_skipped_step(self, **given: Any) -> None:
        try:
            await super().record_skipped_step(**given)
        except ClaimLostError:
            await super().record_skipped_step(**{**given, "owner": None})


@broken("sqlite", "STP-5")
class SkipTakesNoClaim(SqliteSurgery):
    """Skips with an owner, but does not take the claim for it."""

    cut = Cut(
        (r"UPDATE steps SET claimed_at = \?, claim_owner = \?[\s\S]*", "SELECT ?, ?, ?, ?"),
    )


@broken("postgresql", "STP-5")
class SkipOverwritesOutcome:
    """Skips a step that is finished already."""

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


@broken("sqlite", "STP-7")
class RescheduleLeavesClaim(SqliteSurgery):
    """Keeps the claim, so that nobody can take the rescheduled step."""

    cut = Cut(
        (
            r"rescheduled = 1,\s+claimed_at = NULL, [^?]*claim_token = NULL,",
            "rescheduled = 1,",
        )
    )


@broken("memory", "STP-7")
class RescheduleDispatchesTwice:
    """Said again for the attempt that it closed, it dispatches anew."""

    async def reschedule_step(self, **given: Any) -> None:
        run = self._runs[given["run_id"].int]
        step = run.steps.get(given["step_key"])
        if step is not None:
            step.rescheduled = False
        await super().reschedule_step(**given)


@broken("postgresql", "STP-7")
class RescheduleDispatchesOnOverRun(PostgresSurgery):
    """Dispatches the step of a run that is over."""

    cut = Cut(
        (r"CASE WHEN \$6 THEN \$5::timestamptz END", "CASE WHEN $6 IS NOT NULL THEN $5::timestamptz END")
    )


@broken("postgresql", "STP-7")
class RescheduleDropsOutput:
    """Forgets the output of the attempt that it closes."""

    async def reschedule_step(self, **given: Any) -> None:
        await super().reschedule_step(**{**given, "output_json": None})


@broken("memory", "STP-8")
class StalledForgetsUnstarted:
    """Lists only steps that have started, not keys that were claimed or dispatched and never were."""

    async def get_stalled_steps(self, **given: Any) -> Any:
        found = await super().get_stalled_steps(**given)
        return tuple(
            one for one in found if self._runs[one.run_id.int].steps[one.step_key].status is not None
        )


@broken("sqlite", "STP-8")
class StalledListsWaiting(SqliteSurgery):
    """Lists steps that wait for a signal."""

    cut = Cut(
        (r"AND delivered_at IS NULL AND expired_at IS NULL\s+AND \(waiters.expires_at", r"AND FALSE \g<0>"),
    )


@broken("postgresql", "STP-8")
class StalledIgnoresGrace:
    """Compares with the store's time, whatever as_of says."""

    async def get_stalled_steps(self, **given: Any) -> Any:
        return await super().get_stalled_steps(**{**given, "as_of": None})


@broken("sqlite", "STP-8")
class StalledIgnoresLeases(SqliteSurgery):
    """Overlooks claims whose lease is over."""

    cut = Cut((r"THEN steps\.expires_at", "THEN NULL"))


@broken("memory", "STP-8")
class StalledCountsFromClaim:
    """Says since when a step was claimed, instead of since when its lease is over."""

    async def get_stalled_steps(self, **given: Any) -> Any:
        found = await super().get_stalled_steps(**given)
        return tuple(
            replace(one, since=one.since - timedelta(seconds=1)) if one.reason == "LeaseExpired" else one
            for one in found
        )
