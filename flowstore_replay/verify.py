"""Verification of a replay from the state in the store alone."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from uuid import UUID

from flowstore_core import (
    FlowEventRecord,
    FlowRunControlRecord,
    FlowRunDetail,
    FlowStepAttemptRecord,
    FlowStepRecord,
    FlowStore,
    RunStatus,
    StepStatus,
)
from flowstore_replay.engine import FAILED
from flowstore_replay.wfcommons import Workflow
from flowstore_replay.work import output_of

KILLED = "worker.killed"
"""Event type: the parent killed a worker, which the message names."""

OUTCOMES = ("succeeded", "failed", "taken_over", "waiting", "skipped")
"""How an attempt may end: it succeeds; its work fails; its worker dies and the next attempt takes over; it
waits for a signal; a step before it failed."""

MAX_SHOWN = 5
"""Maximum number of findings kept for one check; a faulty store could cause thousands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """A killed worker and the step that it executed."""

    worker: str
    run_id: UUID
    step_key: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Takeover:
    """A step taken over after its worker had stopped renewing the lease."""

    run_id: UUID
    step_key: str
    attempt: int
    """The attempt that the take-over ended."""
    from_worker: str | None
    to_worker: str | None


@dataclass(slots=True, kw_only=True)
class Check:
    """One invariant and its violations."""

    name: str
    findings: list[str] = field(default_factory=list)
    count: int = 0

    @property
    def ok(self) -> bool:
        return not self.count

    def fail(self, finding: str) -> None:
        self.count += 1
        if len(self.findings) < MAX_SHOWN:
            self.findings.append(finding)


@dataclass(slots=True, kw_only=True)
class Summary:
    """The verified result of a replay."""

    workflow: str
    runs: int
    runs_succeeded: int = 0
    steps: int = 0
    steps_succeeded: int = 0
    attempts: int = 0
    attempts_by_outcome: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    """Number of attempts for each of OUTCOMES; any other attempt fails a check."""
    kills: list[Kill] = field(default_factory=list)
    takeovers: list[Takeover] = field(default_factory=list)
    started_at: datetime | None = None
    completed_at: datetime | None = None
    checks: list[Check] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    @property
    def steps_recovered(self) -> int:
        return len({(takeover.run_id, takeover.step_key) for takeover in self.takeovers})

    @property
    def seconds(self) -> float:
        """Duration from the first start to the last end, by the store's clock."""
        if self.started_at is None or self.completed_at is None:
            return 0.0
        return (self.completed_at - self.started_at).total_seconds()

    @property
    def steps_per_second(self) -> float:
        return self.steps_succeeded / self.seconds if self.seconds > 0 else 0.0


class _CheckList:
    """All invariants, in the order of the report."""

    def __init__(self) -> None:
        self.completed = Check(name="every run succeeded")
        self.once = Check(name="every step succeeded exactly once, in its last attempt")
        self.accounted = Check(name="every attempt is numbered, closed and accounted for")
        self.order = Check(name="no step started before its parents had succeeded")
        self.outputs = Check(name="every output exists and follows from its parents' outputs")
        self.ledger = Check(name="every step was dispatched and claimed, and no other step was")
        self.claims = Check(name="no live claim is left")


async def verify(
    store: FlowStore, workflow: Workflow, run_ids: Sequence[UUID], *, approval_steps: Collection[str] = ()
) -> Summary:
    """Read the complete state of these runs and check it. Read-only."""
    checks = _CheckList()
    summary = Summary(workflow=workflow.name, runs=len(run_ids), checks=list(vars(checks).values()))
    for run_id in run_ids:
        detail = await store.get_run_detail(run_id)
        if detail is None:
            checks.completed.fail(f"run {run_id} is not in the store")
            continue
        _check_run(checks.completed, summary, detail, await store.get_run_control(run_id))
        _check_steps(checks, summary, workflow, detail)
        await _check_outputs(checks.outputs, store, workflow, detail, frozenset(approval_steps))
        await _check_claims(checks, store, workflow, detail)
        summary.kills += [
            Kill(worker=event.message or "", run_id=run_id, step_key=event.step_key)
            async for event in _events(store, run_id)
            if event.event_type == KILLED
        ]
    return summary


def takeovers(step: FlowStepRecord) -> list[Takeover]:
    """The attempts of a step that another worker ended by taking over."""
    return [
        Takeover(
            run_id=step.run_id,
            step_key=step.step_key,
            attempt=attempt.attempt,
            from_worker=attempt.job_id,
            to_worker=successor.job_id,
        )
        for attempt, successor in pairwise(step.attempts)
        if _classify(attempt, successor) == "taken_over"
    ]


async def _events(store: FlowStore, run_id: UUID) -> AsyncIterator[FlowEventRecord]:
    after = 0
    while events := await store.get_run_events(run_id, after=after, take=store.limits.page_size):
        for event in events:
            yield event
        after = events[-1].sequence


def _check_run(
    check: Check, summary: Summary, run: FlowRunDetail, control: FlowRunControlRecord | None
) -> None:
    if run.status is RunStatus.SUCCEEDED:
        summary.runs_succeeded += 1
    else:
        failed = [step for step in run.steps if step.status is StepStatus.FAILED]
        why = f": step {failed[0].step_key!r} {failed[0].error_message}" if failed else ""
        if control is not None and control.cancel_requested:
            why = f": {control.cancel_reason or 'cancelled'}"
        check.fail(f"run {run.run_id} is {run.status}{why}")
    summary.started_at = min(summary.started_at or run.started_at, run.started_at)
    if run.completed_at is not None:
        summary.completed_at = max(summary.completed_at or run.completed_at, run.completed_at)


def _check_steps(checks: _CheckList, summary: Summary, workflow: Workflow, run: FlowRunDetail) -> None:
    summary.steps += len(workflow.tasks)
    steps = {step.step_key: step for step in run.steps}
    succeeded_at: dict[str, datetime] = {}
    for key in steps.keys() - workflow.by_key.keys():
        checks.once.fail(f"{_describe_step(run.run_id, key)} is no task of the workflow")
    for task in workflow.tasks:
        step_label, step = _describe_step(run.run_id, task.key), steps.get(task.key)
        if step is None:
            checks.once.fail(f"{step_label} never started")
            continue
        successes = [attempt for attempt in step.attempts if attempt.status is StepStatus.SUCCEEDED]
        if step.status is StepStatus.SUCCEEDED and successes == list(step.attempts[-1:]):
            summary.steps_succeeded += 1
            succeeded_at[task.key] = successes[0].completed_at or successes[0].started_at
        else:
            checks.once.fail(f"{step_label} is {step.status}, {len(successes)} of its attempts succeeded")
        _check_attempts(checks.accounted, summary, step, step_label)
        # A skipped step never started.
        for parent in task.parents if step.status is not StepStatus.SKIPPED else ():
            # Parents come first in workflow.tasks, so their ends are known.
            if parent not in succeeded_at or step.started_at < succeeded_at[parent]:
                checks.order.fail(f"{step_label} started before {parent!r} had succeeded")


def _check_attempts(check: Check, summary: Summary, step: FlowStepRecord, step_label: str) -> None:
    attempts = step.attempts
    summary.attempts += len(attempts)
    if [attempt.attempt for attempt in attempts] != list(range(1, step.attempt_count + 1)):
        check.fail(f"{step_label}: its attempts are not numbered 1 to {step.attempt_count}")
    for attempt, successor in zip(attempts, [*attempts[1:], None], strict=True):
        outcome = _classify(attempt, successor)
        if outcome is None:
            state = "open" if attempt.completed_at is None else f"{attempt.status}: {attempt.error_message}"
            check.fail(f"{step_label}: attempt {attempt.attempt} is {state}")
            continue
        summary.attempts_by_outcome[outcome] += 1
    summary.takeovers += takeovers(step)


def _classify(attempt: FlowStepAttemptRecord, successor: FlowStepAttemptRecord | None) -> str | None:
    """Classify the end of an attempt as one of OUTCOMES; None if the engine cannot have caused it."""
    if attempt.completed_at is None:
        return None
    message = attempt.error_message or ""
    match attempt.status:
        case StepStatus.SUCCEEDED if successor is None:
            return "succeeded"
        case StepStatus.PENDING:
            return "waiting"
        case StepStatus.SKIPPED:
            return "skipped"
        case StepStatus.FAILED if message.startswith(FAILED):
            return "failed"
        # STP-1: the message names the successor.
        case StepStatus.FAILED if successor is not None and str(successor.attempt) in message:
            return "taken_over"
    return None


async def _check_outputs(
    check: Check, store: FlowStore, workflow: Workflow, run: FlowRunDetail, approval_steps: Collection[str]
) -> None:
    succeeded = [step for step in run.steps if step.status is StepStatus.SUCCEEDED]
    outputs = {step.step_key: step.output_json for step in succeeded if step.output_json is not None}
    for step in succeeded:
        task = workflow.by_key.get(step.step_key)
        if task is None:
            continue  # Reported by another check.
        step_label, found = _describe_step(run.run_id, task.key), outputs.get(task.key)
        if found is None:
            check.fail(f"{step_label} has no output")
        elif found != step.attempts[-1].output_json:
            check.fail(f"{step_label}: its output differs from the output of its last attempt")
        elif task.key in approval_steps:
            waiter = await store.get_waiter(run.run_id, task.key)
            if waiter is None or found != waiter.payload_json:
                check.fail(f"{step_label}: its output is not the payload of its signal")
        elif all(parent in outputs for parent in task.parents) and found != output_of(task, outputs):
            check.fail(f"{step_label}: its output does not follow from its parents' outputs")


async def _check_claims(checks: _CheckList, store: FlowStore, workflow: Workflow, run: FlowRunDetail) -> None:
    for key in sorted(await store.get_claimed_step_keys(run.run_id)):
        checks.claims.fail(f"{_describe_step(run.run_id, key)} is claimed")
    claimed = {claim.step_key for claim in await store.get_step_claims(run.run_id)}
    dispatched = {dispatch.step_key for dispatch in await store.get_dispatches(run.run_id)}
    for keys, verb in ((dispatched, "dispatched"), (claimed, "claimed")):
        for key in sorted(keys - workflow.by_key.keys()):
            checks.ledger.fail(f"{_describe_step(run.run_id, key)} was {verb} but is no task of the workflow")
        # A finished step keeps both records, so that a late message for it is rejected.
        for step in run.steps:
            if step.status is StepStatus.SUCCEEDED and step.step_key not in keys:
                checks.ledger.fail(
                    f"{_describe_step(run.run_id, step.step_key)} succeeded but was never {verb}"
                )


def _describe_step(run_id: UUID, key: str) -> str:
    return f"step {key!r} of run {run_id}"
