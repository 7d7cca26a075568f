"""Mutants of retry_step."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from flowstore_core import RunStatus, StepStatus
from flowstore_memory.steps import archive_attempt
from tests.mutants import mutant
from tests.mutants.sql_patching import PatchedPostgres, PatchedSqlite, SqlPatch


@mutant("sqlite", "STP-6")
class RetryKeepsDispatch(PatchedSqlite):
    """Keeps the dispatch, so that the retried step can never be dispatched again."""

    patch_sql = SqlPatch(
        (
            r"(reopened = 1[\s\S]*?)dispatched_at = NULL, due_at = NULL, dispatch_job_id = NULL, "
            r"dispatch_token = NULL,",
            r"\1",
        )
    )


@mutant("sqlite", "STP-6")
class RetryKeepsClaim(PatchedSqlite):
    """Keeps the claim, so that no other caller can claim the retried step."""

    patch_sql = SqlPatch(
        (
            r"(reopened = 1[\s\S]*?)claimed_at = NULL, claim_owner = NULL, expires_at = NULL, "
            r"claim_token = NULL,",
            r"\1",
        )
    )


@mutant("postgresql", "STP-6")
class RetryKeepsWaiter(PatchedPostgres):
    """Keeps the undelivered waiter, which then consumes the signal of the next attempt."""

    patch_sql = SqlPatch((r"AND delivered_at IS NULL\s*\Z", "AND delivered_at IS NULL AND false"))


@mutant("sqlite", "STP-6")
class RetryKeepsLatches(PatchedSqlite):
    """Keeps the latches and the elapsed deadline, so that the retry is stopped at once."""

    patch_sql = SqlPatch((r"UPDATE controls SET cancelled_at = NULL[\s\S]*", "SELECT ?, ?"))


@mutant("postgresql", "STP-6")
class RetryKeepsDeadline(PatchedPostgres):
    """Clears the latches but keeps the elapsed deadline."""

    patch_sql = SqlPatch(
        (
            r"timeout_at = CASE WHEN timeout_at <= \$2 THEN NULL ELSE timeout_at END",
            "created_at = created_at + ($2::timestamptz - $2)",
        )
    )


@mutant("postgresql", "STP-6")
class RetryKeepsRunTerminal(PatchedPostgres):
    """Reopens the step but not the run."""

    patch_sql = SqlPatch(
        (r"SET status = 'Running', completed_at = NULL WHERE run_id", "SET status = status WHERE run_id")
    )


@mutant("memory", "STP-6")
class RetryKeepsAttemptCount:
    """Does not raise attempt_count to the number of the next attempt."""

    async def get_run_detail(self, **given: Any) -> Any:
        detail = await super().get_run_detail(**given)
        if detail is None:
            return None
        return replace(
            detail, steps=tuple(replace(step, attempt_count=len(step.attempts)) for step in detail.steps)
        )


@mutant("memory", "STP-6")
class RetryLeavesStepRunning:
    """Leaves the step Running, as if its next attempt had started."""

    async def retry_step(self, **given: Any) -> None:
        await super().retry_step(**given)
        self._runs[given["run_id"].int].steps[given["step_key"]].status = StepStatus.RUNNING


@mutant("sqlite", "STP-6")
class RetryIgnoresAttempt:
    """Ignores ``attempt``, so that a double click retries twice."""

    async def retry_step(self, **given: Any) -> None:
        await super().retry_step(**{**given, "attempt": None})


@mutant("postgresql", "STP-6")
class ResetIgnored:
    """Ignores the keys in ``reset``."""

    async def retry_step(self, **given: Any) -> None:
        await super().retry_step(**{**given, "reset": frozenset()})


@mutant("memory", "STP-6")
class ResetDeletesAttempts:
    """Deletes the attempts of a reset step and restarts their numbering."""

    async def retry_step(self, **given: Any) -> None:
        await super().retry_step(**given)
        run = self._runs[given["run_id"].int]
        for key in given["reset"]:
            if key in run.steps and run.steps[key].status is None:
                run.steps[key].attempt = 0
                run.earlier.pop(key, None)


@mutant("memory", "STP-6")
class ResetIgnoresStatus:
    """Resets keys that are not Skipped, too."""

    async def retry_step(self, **given: Any) -> None:
        await super().retry_step(**given)
        run = self._runs[given["run_id"].int]
        for key in given["reset"]:
            if key in run.steps and key != given["step_key"]:
                step = run.steps[key]
                archive_attempt(run, key, step, self._now())
                step.status = None
                step.clear_claim()
                step.clear_dispatch()


@mutant("memory", "STP-6")
class RepeatedRetryDropsClaim:
    """A repeated retry before the next start removes a claim made in between."""

    async def retry_step(self, **given: Any) -> None:
        await super().retry_step(**given)
        step = self._runs[given["run_id"].int].steps[given["step_key"]]
        step.clear_claim()
        step.clear_dispatch()


@mutant("memory", "STP-6", concurrent=True)
class RetryInTwoSteps:
    """Reopens the run, and the step in a second step: the run can be completed in between."""

    async def retry_step(self, **given: Any) -> None:
        run = self._runs[given["run_id"].int]
        step = run.steps.get(given["step_key"])
        meant = step is not None and given["attempt"] in (None, step.attempt)
        if run.status is not RunStatus.RUNNING and meant and step.status is not None:
            run.status, run.completed_at = RunStatus.RUNNING, None
            control = self._namespace.controls.get(given["run_id"])
            if control is not None:
                control.clear_stops(self._now())
            await asyncio.sleep(0)
        await super().retry_step(**given)
