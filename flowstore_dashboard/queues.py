"""The queues, and what runs now on which worker."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from starlette.requests import Request
from starlette.responses import Response

from flowstore_core import Capability, FlowRunRecord, FlowStepRecord, FlowStore, StepClaim, StepStatus
from flowstore_core.validation import MAX_QUEUES
from flowstore_dashboard.site import Site

RUNS = 50
"""Number of newest Running runs whose steps are listed."""
STEPS_OF_RUN = 20
"""Maximum number of listed steps of one run."""
MIN_PAUSE = 0.5
"""Seconds between two reads of a queue that always has ready steps."""


@dataclass(frozen=True, slots=True)
class RunningStep:
    run: FlowRunRecord
    step: FlowStepRecord
    claim: StepClaim | None
    queue: str | None

    @property
    def worker(self) -> str | None:
        return self.step.job_id


async def running_steps(store: FlowStore) -> list[RunningStep]:
    """The steps in progress of the newest Running runs, the longest-running first."""
    runs = await store.get_active_runs(take=RUNS)
    found = await asyncio.gather(*(_running_steps_of(store, run) for run in runs))
    return sorted(
        (step for steps in found for step in steps), key=lambda one: one.step.attempts[-1].started_at
    )


async def _running_steps_of(store: FlowStore, run: FlowRunRecord) -> list[RunningStep]:
    statuses = await store.get_step_statuses(run.run_id)
    keys = [key for key, status in statuses.items() if status is StepStatus.RUNNING][:STEPS_OF_RUN]
    if not keys:
        return []
    claims = {claim.step_key: claim for claim in await store.get_step_claims(run.run_id)}
    queues = {one.step_key: one.queue for one in await store.get_dispatches(run.run_id)}
    steps = [await store.get_step(run.run_id, key) for key in keys]
    return [
        RunningStep(run, step, claims.get(step.step_key), queues.get(step.step_key))
        for step in steps
        # It may have ended since.
        if step is not None and step.status is StepStatus.RUNNING and step.attempts
    ]


class QueuesPage:
    path = "/queues"

    def __init__(self, site: Site) -> None:
        self._site = site

    async def show(self, request: Request) -> Response:
        site = self._site
        queues = await site.store.get_queues() if site.has(Capability.QUEUES) else None
        return site.render(
            request,
            "queues.html",
            queues=queues,
            most=max(
                (one.ready + one.scheduled + one.waiting + one.running for one in queues or ()), default=0
            ),
            running=await running_steps(site.store),
            max_runs=RUNS,
        )

    async def version(self, request: Request) -> object:
        site = self._site
        queues: Sequence[object] = await site.store.get_queues() if site.has(Capability.QUEUES) else ()
        running = await running_steps(site.store)
        steps = tuple((one.run.run_id, one.step.step_key, one.step.attempt_count) for one in running)
        # The ages on the page grow.
        return tuple(queues), steps, datetime.now(UTC).replace(microsecond=0).second // 10

    async def wait(self, request: Request, seconds: float) -> None:
        """Wait until a step may be ready, where the store can watch its queues."""
        site = self._site
        if not (site.has(Capability.WATCH) and site.has(Capability.QUEUES)):
            await asyncio.sleep(seconds)
            return
        names = [one.queue for one in await site.store.get_queues()][:MAX_QUEUES]
        if not names:
            await asyncio.sleep(seconds)
            return
        await asyncio.sleep(MIN_PAUSE)
        await site.store.wait_for_steps(names, timeout=timedelta(seconds=seconds))
