"""SIGKILL of the workers of a replay: other workers take over, and every step succeeds exactly once."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from flowstore_chaos.context import RunContext
from flowstore_chaos.scenario import FaultScenario
from flowstore_core import (
    ClaimedStep,
    EndedStep,
    FlowRunDetail,
    FlowStore,
    FlowStoreError,
    RunAdvance,
    StepStatus,
    new_run_id,
    open_store,
)
from flowstore_replay import Requests, Workflow, load_workflow, shipped_workflow, verify
from flowstore_replay.worker import main as work
from flowstore_replay.worker_pool import Worker, WorkerPool

WORKFLOWS_VARIABLE = "FLOWSTORE_WFINSTANCES"
"""Environment variable with a folder of recorded workflows; default: a folder beside the project."""
WORKERS = 4
LEASE_SECONDS = 1.0
STEP_SECONDS = 0.15
"""Average duration of a step in seconds; recorded times are scaled to it."""
GAP_SECONDS = (0.05, 0.5)
"""Seconds between two kills: minimum and maximum."""
KILLS_PER_ROUND = 20
STUCK_SECONDS = 60.0
"""Seconds without a succeeded step after which runs count as stuck."""
BROKEN_STUCK_SECONDS = 3.0
NO_LEASE = timedelta(days=1)


class AckLog:
    """A store that appends every acknowledged success to a file outside of the store."""

    def __init__(self, store: FlowStore, path: str) -> None:
        self._store = store
        self._path = path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def advance_runs(self, steps: Sequence[EndedStep]) -> Sequence[RunAdvance | FlowStoreError]:
        results = await self._store.advance_runs(steps)
        lines = [
            json.dumps([str(step.run_id), step.step_key, step.attempt]) + "\n"
            for step, result in zip(steps, results, strict=True)
            if step.status is StepStatus.SUCCEEDED and isinstance(result, RunAdvance)
        ]
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(file, "".join(lines).encode())
        finally:
            os.close(file)
        return results


class IgnoreLeasesMutant(AckLog):
    """A store whose claims never expire."""

    async def claim_next_steps(self, queues: Sequence[str], **arguments: Any) -> Sequence[ClaimedStep]:
        return await self._store.claim_next_steps(queues, **{**arguments, "lease": NO_LEASE})


async def run(context: RunContext) -> None:
    workflows = _workflows()
    async with context.store_url() as url, open_store(url) as store:
        number = 0
        while not context.done:
            # The shipped workflow first; short rows use only this one.
            if not await _Round(context, store, url, workflows[number % len(workflows)], number).run():
                break
            number += 1
        context.counts.details["rounds"] = number
        context.counts.details["workflows"] = min(number, len(workflows))


def _workflows() -> list[Workflow]:
    folder = Path(
        os.environ.get(WORKFLOWS_VARIABLE) or Path(__file__).parents[3] / "shared" / "data" / "wfinstances"
    )
    return [shipped_workflow(), *(load_workflow(path) for path in sorted(folder.glob("*.json")))]


class _Round:
    """Some runs of one workflow, from trigger to verification."""

    def __init__(
        self, context: RunContext, store: FlowStore, url: str, workflow: Workflow, number: int
    ) -> None:
        self._context = context
        self._store = store
        self._workflow = workflow
        self._kills = min(KILLS_PER_ROUND, context.planned - context.counts.injected)
        seconds = self._kills * sum(GAP_SECONDS) / 2 * WORKERS / 2
        runs = max(2, round(seconds / (STEP_SECONDS * len(workflow.tasks))))
        self._run_ids = [new_run_id() for _ in range(runs)]
        self._ack_log = context.folder / f"diary-{number}"
        self._ack_log.touch()
        self._queue = f"round {number}"
        config = {
            "url": url,
            "queue": self._queue,
            "run_ids": [str(run_id) for run_id in self._run_ids],
            "workflow": workflow.to_json(),
            "speed": max(1e-9, workflow.seconds) / len(workflow.tasks) / STEP_SECONDS,
            "fail_rate": 0.0,
            "seed": context.seed,
            "lease": LEASE_SECONDS,
            "max_attempts": 5,
            "approval_steps": (),
        }
        program = ["-m", __name__, str(self._ack_log), *["mutant"] * context.is_mutant]
        self._pool = WorkerPool(config, program=program)
        self._succeeded = (-1, 0.0)
        """Number of succeeded steps, and the time of its last change."""

    async def run(self) -> bool:
        """Execute the runs. False if they are stuck."""
        for run_id in self._run_ids:
            await self._store.trigger_run(
                self._workflow.flow_id,
                self._workflow.name,
                run_id,
                "chaos",
                idempotency_key=str(run_id),
                dispatch=Requests(self._workflow, self._queue).roots,
            )
        try:
            for _ in range(WORKERS):
                await self._pool.start()
            completes = await self._supervise()
        finally:
            await self._pool.shutdown()
        await self._verify()
        return completes

    async def _supervise(self) -> bool:
        rng, context = self._context.rng, self._context
        remaining = self._kills
        stuck_seconds = BROKEN_STUCK_SECONDS if context.is_mutant else STUCK_SECONDS
        while True:
            await asyncio.sleep(rng.uniform(*GAP_SECONDS))
            active = {run.run_id for run in await self._store.get_active_runs()}
            details = await self._details()
            if not active & set(self._run_ids):
                return True
            succeeded = sum(step.status is StepStatus.SUCCEEDED for one in details for step in one.steps)
            now = time.monotonic()
            if succeeded != self._succeeded[0]:
                self._succeeded = (succeeded, now)
            elif now - self._succeeded[1] > stuck_seconds:
                return False
            for worker in await self._pool.reap_exited():
                if worker.process.returncode:
                    context.counts.count_wrong(f"a worker exited unexpectedly: {worker.last_line}")
                    await self._pool.start()
            # Kill a worker that holds a step, at a random point of its work.
            holding = {job_id for one in details for job_id in _holders(one)}
            if remaining and (at_work := [one for one in self._pool.workers if one.name in holding]):
                remaining -= await self._kill(rng.choice(at_work))

    async def _kill(self, worker: Worker) -> bool:
        """Kill a worker. True if the store shows an open attempt of the dead worker."""
        await self._pool.kill(worker)
        await self._pool.start()
        if injected := any(worker.name in _holders(detail) for detail in await self._details()):
            self._context.record_faults()
        return injected

    async def _details(self) -> list[FlowRunDetail]:
        found = [await self._store.get_run_detail(run_id) for run_id in self._run_ids]
        return [detail for detail in found if detail is not None]

    async def _verify(self) -> None:
        counts, store = self._context.counts, self._store
        summary = await verify(store, self._workflow, self._run_ids)
        for check in summary.checks:
            # These two checks find lost work, the others inconsistent records.
            count = (
                counts.count_lost
                if check.name.startswith(("every run", "every step succeeded"))
                else counts.count_wrong
            )
            for finding in check.findings:
                count(finding)
            for _ in range(check.count - len(check.findings)):
                count(f"another violation of: {check.name}")
        counts.operations += summary.attempts
        counts.add_detail("steps", summary.steps)
        counts.add_detail("leases taken over", len(summary.takeovers))
        winners: Counter[tuple[str, str]] = Counter()
        acknowledged = {tuple(json.loads(line)) for line in self._ack_log.read_text().splitlines()}
        for detail in await self._details():
            for step in detail.steps:
                for attempt in step.attempts:
                    if attempt.status is StepStatus.SUCCEEDED:
                        winners[str(detail.run_id), step.step_key] += 1
                        acknowledged.discard((str(detail.run_id), step.step_key, attempt.attempt))
        for (run_id, key), successes in winners.items():
            for _ in range(successes - 1):
                counts.count_duplicate(f"step {key!r} of run {run_id} succeeded {successes} times")
        for run_id, key, attempt in sorted(acknowledged):
            counts.count_lost(
                f"attempt {attempt} of step {key!r} of run {run_id} was acknowledged and does not exist"
            )


def _holders(detail: FlowRunDetail) -> Sequence[str]:
    """The job_id, and so the worker, of each open attempt."""
    attempts = [step.attempts[-1] for step in detail.steps]
    return [one.job_id for one in attempts if one.completed_at is None and one.job_id is not None]


SCENARIO = FaultScenario(
    number=4,
    name="worker-kills",
    fault=f"SIGKILL of {WORKERS} workers of replayed workflows, at random moments",
    unit="kills",
    planned=200,
    min_faults=3,
    backends=("sqlite", "postgresql"),
    pass_criterion="leases are taken over, every step succeeds exactly once, all runs complete",
    mutant="claims never expire",
    minutes=10,
    run=run,
)

if __name__ == "__main__":
    kind = IgnoreLeasesMutant if "mutant" in sys.argv[2:] else AckLog
    sys.exit(work(lambda store: kind(store, sys.argv[1])))
