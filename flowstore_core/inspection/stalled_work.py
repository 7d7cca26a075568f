"""Detection of stalled work in any store, through the protocols.

The number of listed steps and of examined runs is bounded, however large the store is.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TypeVar
from uuid import UUID

from flowstore_core.diagnostics import Diagnostic, Severity
from flowstore_core.inspection.wording import count
from flowstore_core.queues import QueueStatistics
from flowstore_core.runs import FlowRunRecord
from flowstore_core.status import Capability, RunStatus, StallReason, StepStatus
from flowstore_core.steps import StalledStep
from flowstore_core.store import FlowStore

T = TypeVar("T")
R = TypeVar("R")

WALKED = 100_000
"""Maximum number of Running runs that are read to find the oldest."""
PAGE = 1000
"""Maximum number of runs of one read."""
AT_ONCE = 8
"""Number of runs that are examined concurrently."""
RECHECK_SECONDS = 2.0
"""Seconds until a run without work in flight is examined again: an active run has none between two
steps."""
SHOWN = 3


@dataclass(frozen=True, slots=True)
class Examination:
    """The findings of an examination, and its extent."""

    findings: list[Diagnostic] = field(default_factory=list)
    running: int = 0
    """Number of Running runs in the store."""
    examined: int = 0
    """Number of Running runs that were examined."""


async def examine(store: FlowStore, *, grace: timedelta, limit: int) -> Examination:
    """Find work that has stalled for longer than ``grace``, in the ``limit`` oldest Running runs."""
    as_of = datetime.now(UTC) - grace
    found: list[Diagnostic] = []
    runs, running = await _oldest_runs(store, limit)
    if Capability.RECOVERY in store.capabilities:
        stalled = await store.get_stalled_steps(as_of=as_of, take=store.limits.page_size)
        found += _stalled_findings(await _without_queued(store, stalled), grace, store.limits.page_size)
    else:
        found += _stalled_findings(await _expired(store, runs, as_of), grace, store.limits.page_size)
    found += await _idle(store, [run for run in runs if run.started_at <= as_of])
    if Capability.QUEUES in store.capabilities:
        found += _late_findings(await store.get_queues(), as_of, grace)
    if Capability.DEADLINES in store.capabilities:
        found += await _overdue(store, as_of)
    return Examination(found, running, len(runs))


async def _oldest_runs(store: FlowStore, limit: int) -> tuple[Sequence[FlowRunRecord], int]:
    """The oldest Running runs, which are most likely to be stalled, and the number of all."""
    if Capability.DASHBOARD not in store.capabilities:
        runs = await store.get_active_runs()
        return runs[-limit:], len(runs)
    kept: deque[FlowRunRecord] = deque(maxlen=limit)
    take = min(PAGE, store.limits.page_size)
    page = await store.get_runs_page(status=RunStatus.RUNNING, take=take)
    running, walked = page.total_count, 0
    while page.runs:
        kept.extend(page.runs)
        walked += len(page.runs)
        if len(page.runs) < take or walked >= WALKED:
            break
        page = await store.get_runs_page(status=RunStatus.RUNNING, after=page.runs[-1].position, take=take)
    return kept, max(running, walked)


# Steps


_STALLED = {
    StallReason.LEASE_EXPIRED: (
        "leases-expired",
        "a worker's lease expired, and no worker has taken over",
        "The worker died or lost its connection. Any other worker may claim the step; none has.",
    ),
    StallReason.DISPATCH_DUE: (
        "dispatches-due",
        "dispatched, and no worker has claimed the step",
        "The message was lost, or the queue is slow. No worker holds the step.",
    ),
    StallReason.NOT_DISPATCHED: (
        "steps-not-dispatched",
        "open, and neither dispatched nor claimed",
        "The process that should have dispatched the step died before it did. No message was sent.",
    ),
}


def _stalled_findings(stalled: Sequence[StalledStep], grace: timedelta, take: int) -> list[Diagnostic]:
    found = []
    for reason, (code, what, meaning) in _STALLED.items():
        steps = [step for step in stalled if step.reason is reason]
        if not steps:
            continue
        more = " or more" if len(stalled) == take else ""
        found.append(
            Diagnostic(
                code=code,
                severity=Severity.WARNING,
                summary=f"{count(len(steps), 'step')}{more}: {what}, for over {_length(grace)}",
                meaning=f"{meaning} Engines find such steps with get_stalled_steps; either none is "
                "running, or it does not call it.",
                remedy=f"start the engine's workers; for details: flowstore runs show {steps[0].run_id}",
                count=len(steps),
                examples=tuple(f"{step.run_id} {step.step_key}" for step in steps[:SHOWN]),
            )
        )
    return found


async def _without_queued(store: FlowStore, stalled: Sequence[StalledStep]) -> Sequence[StalledStep]:
    """The steps that no queue of the store hands out; the finding of an unserved queue covers the others."""
    if Capability.QUEUES not in store.capabilities:
        return stalled
    dispatches = await _each(sorted({step.run_id for step in stalled}), store.get_dispatches)
    queued = {(one.run_id, one.step_key) for found in dispatches for one in found if one.queue is not None}
    return [step for step in stalled if (step.run_id, step.step_key) not in queued]


async def _expired(store: FlowStore, runs: Sequence[FlowRunRecord], as_of: datetime) -> list[StalledStep]:
    """Expired leases of each run, for a store that cannot list stalled steps."""

    async def examine_run(run: FlowRunRecord) -> list[StalledStep]:
        claims = await store.get_step_claims(run.run_id)
        ended = [claim for claim in claims if claim.expires_at is not None and claim.expires_at <= as_of]
        statuses = await store.get_step_statuses(run.run_id) if ended else {}
        return [
            StalledStep(
                run_id=run.run_id,
                step_key=claim.step_key,
                status=statuses.get(claim.step_key, StepStatus.PENDING),
                reason=StallReason.LEASE_EXPIRED,
                since=claim.expires_at or as_of,
            )
            for claim in ended
            if not statuses.get(claim.step_key, StepStatus.PENDING).is_terminal
        ]

    return [step for steps in await _each(runs, examine_run) for step in steps]


# Queues


def _late_findings(queues: Sequence[QueueStatistics], as_of: datetime, grace: timedelta) -> list[Diagnostic]:
    """Queues whose oldest ready step was ready before ``as_of``, without a claimed step or with some."""
    late = [one for one in queues if one.oldest_ready_at is not None and one.oldest_ready_at <= as_of]
    found = []
    if unserved := [one for one in late if not one.running]:
        found.append(
            Diagnostic(
                code="queues-not-served",
                severity=Severity.WARNING,
                summary=_late_steps(unserved, grace),
                meaning="No step of the queue is claimed: no worker serves it, or none can reach the store.",
                remedy="start workers that claim from this queue; for all queues: flowstore queues",
                count=sum(one.ready for one in unserved),
                examples=tuple(one.queue for one in unserved[:SHOWN]),
            )
        )
    if behind := [one for one in late if one.running]:
        found.append(
            Diagnostic(
                code="queues-behind",
                severity=Severity.WARNING,
                summary=_late_steps(behind, grace),
                meaning="Workers claim steps of the queue, but steps arrive faster, or steps of a higher "
                "priority always come first.",
                remedy="start more workers that claim from this queue; for all queues: flowstore queues",
                count=sum(one.ready for one in behind),
                examples=tuple(one.queue for one in behind[:SHOWN]),
            )
        )
    return found


def _late_steps(queues: Sequence[QueueStatistics], grace: timedelta) -> str:
    ready = sum(one.ready for one in queues)
    return (
        f"{count(ready, 'ready step')} in {count(len(queues), 'queue')}: the oldest has been ready for over "
        f"{_length(grace)}"
    )


# Runs


async def _idle(store: FlowStore, runs: Sequence[FlowRunRecord]) -> list[Diagnostic]:
    """Running runs in which nothing is open, claimed, dispatched or waited for."""

    async def examine_run(run: FlowRunRecord) -> tuple[UUID, Mapping[str, StepStatus]] | None:
        statuses = await store.get_step_statuses(run.run_id)
        return None if await _in_flight(store, run.run_id, statuses) else (run.run_id, dict(statuses))

    first = {seen[0]: seen[1] for seen in await _each(runs, examine_run) if seen is not None}
    if not first:
        return []
    await asyncio.sleep(RECHECK_SECONDS)
    again = await _each([run for run in runs if run.run_id in first], examine_run)
    # A run that changed since the first examination is active.
    still = [seen[0] for seen in again if seen is not None and first[seen[0]] == seen[1]]
    statuses = await _each(still, store.get_run_status)
    idle = [run_id for run_id, status in zip(still, statuses, strict=True) if status is RunStatus.RUNNING]
    if not idle:
        return []
    return [
        Diagnostic(
            code="runs-idle",
            severity=Severity.WARNING,
            summary=f"{count(len(idle), 'run')} Running with nothing in flight",
            meaning="No step of theirs is open, claimed, dispatched or waiting: the process that should have "
            "dispatched the next step, or completed the run, died. get_stalled_steps does not list them.",
            remedy="have the engine advance the runs of get_active_runs; to end one instead: "
            f"flowstore runs cancel {idle[0]}",
            count=len(idle),
            examples=tuple(str(run_id) for run_id in idle[:SHOWN]),
        )
    ]


async def _in_flight(store: FlowStore, run_id: UUID, statuses: Mapping[str, StepStatus]) -> bool:
    if any(not status.is_terminal for status in statuses.values()):
        return True
    # A terminal step keeps its dispatch; the dispatch of an unstarted key is pending work.
    if await store.get_dispatched_step_keys(run_id) - statuses.keys():
        return True
    if any(claim.step_key not in statuses for claim in await store.get_step_claims(run_id)):
        return True
    if Capability.WAITERS not in store.capabilities:
        return False
    waiters = await store.get_waiters(run_id)
    return any(waiter.delivered_at is None and waiter.expired_at is None for waiter in waiters)


async def _overdue(store: FlowStore, as_of: datetime) -> list[Diagnostic]:
    """Running runs that should have been stopped before ``as_of``."""
    runs = await store.get_runs_to_stop(as_of=as_of, take=store.limits.page_size)
    controls = await store.get_run_controls([run.run_id for run in runs])
    late = [
        control.run_id
        for control in controls.values()
        if any(
            moment is not None and moment <= as_of
            for moment in (control.timeout_at, control.cancel_requested_at)
        )
    ]
    if not late:
        return []
    more = " or more" if len(runs) == store.limits.page_size else ""
    return [
        Diagnostic(
            code="runs-to-stop",
            severity=Severity.WARNING,
            summary=f"{count(len(late), 'run')}{more} past the deadline or asked to cancel, still Running",
            meaning="The store does not end runs by itself. The engine that should call get_runs_to_stop "
            "does not, or cannot.",
            remedy=f"start the engine; for details: flowstore runs show {late[0]}",
            count=len(late),
            examples=tuple(str(run_id) for run_id in late[:SHOWN]),
        )
    ]


async def _each(items: Iterable[T], work: Callable[[T], Awaitable[R]]) -> list[R]:
    """The results of ``work`` for all items, a few at a time."""
    found: list[R] = []
    waiting = list(items)
    for start in range(0, len(waiting), AT_ONCE):
        found += await asyncio.gather(*(work(item) for item in waiting[start : start + AT_ONCE]))
    return found


def _length(grace: timedelta) -> str:
    seconds = int(grace.total_seconds())
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size and seconds % size == 0:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
