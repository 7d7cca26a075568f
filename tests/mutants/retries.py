"""Broken retries."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from flowstore_core import RunStatus, StepStatus
from flowstore_memory.steps import archive_attempt
from tests.mutants import broken
from tests.mutants.sql_patching import Cut, PostgresSurgery, SqliteSurgery


@broken("sqlite", "STP-6")
class RetryLeavesDispatch(SqliteSurgery):
    """Keeps the dispatch, so that the retried step can never be dispatched again."""

    cut = Cut(
        (
            r"(reopened = 1[\s\S]*?)dispatched_at = NULL, due_at = NULL, dispatch_job_id = NULL, "
            r"dispatch_token = NULL,",
            r"\1",
        )
    )


@broken("sqlite", "STP-6")
class RetryLeavesClaim(SqliteSurgery):
    """Keeps the claim, so that nobody else can take the retried step."""

    cut = Cut(
        (
            r"(reopened = 1[\s\S]*?)claimed_at = NULL, claim_owner = NULL, expires_at = NULL, "
            r"claim_token = NULL,",
            r"\1",
        )
    )


@broken("postgresql", "STP-6")
class RetryLeavesWaiter(PostgresSurgery):
    """Keeps the undelivered waiter, which then swallows the signal of the next attempt."""

    cut = Cut((r"AND delivered_at IS NULL\s*\Z", "AND delivered_at IS NULL AND false"))


@broken("sqlite", "STP-6")
class RetryLeavesLatches(SqliteSurgery):
    """Keeps the latches and the elapsed deadline, so that the retry is stopped at once."""

    cut = Cut((r"UPDATE controls SET cancelled_at = NULL[\s\S]*", "SELECT ?, ?"))


@broken("postgresql", "STP-6")
class RetryLeavesDeadline(PostgresSurgery):
    """Clears the latches but keeps the elapsed deadline."""

    cut = Cut(
        (
            r"timeout_at = CASE WHEN timeout_at <= \$2 THEN NULL ELSE timeout_at END",
            "created_at = created_at + ($2::timestamptz - $2)",
        )
    )


@broken("postgresql", "STP-6")
class RetryLeavesRunOver(PostgresSurgery):
    """Reopens the step, not the run."""

    cut = Cut(
        (r"SET status = 'Running', completed_at = NULL WHERE run_id", "SET status = status WHERE run_id")
    )


@broken("memory", "STP-6")
class RetryCountsNothing:
    """Does not raise attempt_count to the number of the attempt to come."""

    async def get_run_detail(self, **given: Any) -> Any:
        detail = await super().get_run_detail(**given)
        if detail is None:
            return None
        return replace(
            detail, steps=tuple(replace(step, attempt_count=len(step.attempts)) for step in detail.steps)
        )


@broken("memory", "STP-6")
class RetryLeavesRunning:
    """Leaves the step Running, as if its next attempt had started."""

    async def retry_step(self, **given: Any) -> None:
        await super().retry_step(**given)
        self._runs[given["run_id"].int].steps[given["step_key"]].status = StepStatus.RUNNING


@broken("sqlite", "STP-6")
class RetryTakesDoubleClick:
    """Ignores which attempt was meant."""

    async def retry_step(self, **given: Any) -> None:
        await super().retry_step(**{**given, "attempt": None})


@broken("postgresql", "STP-6")
class ResetIgnored:
    """Ignores the keys to reset."""

    async def retry_step(self, **given: Any) -> None:
        await super().retry_step(**{**given, "reset": frozenset()})


@broken("memory", "STP-6")
class ResetLosesAttempts:
    """Deletes the attempts of a step that is reset, and begins their numbers anew."""

    async def retry_step(self, **given: Any) -> None:
        await super().retry_step(**given)
        run = self._runs[given["run_id"].int]
        for key in given["reset"]:
            if key in run.steps and run.steps[key].status is None:
                run.steps[key].attempt = 0
                run.earlier.pop(key, None)


@broken("memory", "STP-6")
class ResetTakesAnyStep:
    """Resets keys that are not Skipped too."""

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


@broken("memory", "STP-6")
class RetryAgainDropsNewClaim:
    """Said again before the next start, it takes the claim that was won since."""

    async def retry_step(self, **given: Any) -> None:
        await super().retry_step(**given)
        step = self._runs[given["run_id"].int].steps[given["step_key"]]
        step.clear_claim()
        step.clear_dispatch()


@broken("memory", "STP-6", concurrent=True)
class RetryInTwoActs:
    """Reopens the run, and the step a moment later: between the two it can be completed again."""

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
