"""SIGKILL of the workers of replayed workflows: others take the leases over, and every step succeeds once."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from flowstore_chaos.line import Line
from flowstore_chaos.trial import Trial
from flowstore_core import FlowRunDetail, FlowStore, StepStatus, new_run_id, open_store
from flowstore_replay import Workflow, load_workflow, shipped_workflow, verify
from flowstore_replay.worker import main as work
from flowstore_replay.worker_pool import Worker, WorkerPool

RECORDED = "FLOWSTORE_WFINSTANCES"
"""Names a folder of recorded workflows in WfFormat; without it those beside the project, if there are any."""
WORKERS = 4
LEASE_SECONDS = 1.0
STEP_SECONDS = 0.15
"""How long a step takes on average; recorded times are divided until it is so."""
GAP_SECONDS = (0.05, 0.5)
"""A kill follows another after a time between these, wherever the worker is then."""
KILLS_PER_ROUND = 20
STUCK_SECONDS = 60.0
"""Runs in which no step succeeds for so long will never complete."""
BROKEN_STUCK_SECONDS = 3.0


class Diary:
    """A worker's store that writes down, outside of the store, every success that was acknowledged."""

    def __init__(self, store: FlowStore, path: str) -> None:
        self._store = store
        self._path = path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def record_step_complete(
        self, run_id: UUID, step_key: str, status: StepStatus, **arguments: Any
    ) -> None:
        await self._store.record_step_complete(run_id, step_key, status, **arguments)
        if status is StepStatus.SUCCEEDED:
            line = json.dumps([str(run_id), step_key, arguments["attempt"]]) + "\n"
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(file, line.encode())
            finally:
                os.close(file)


class ForgetsLeases(Diary):
    """A store whose claims never run out."""

    async def try_claim_step(self, run_id: UUID, step_key: str, **arguments: Any) -> bool:
        return await self._store.try_claim_step(run_id, step_key, **{**arguments, "lease": None})


async def run(trial: Trial) -> None:
    workflows = _workflows()
    async with trial.store_url() as url, open_store(url) as store:
        number = 0
        while not trial.done:
            # The shipped one first; small rows use no other.
            if not await _Round(trial, store, url, workflows[number % len(workflows)], number).run():
                break
            number += 1
        trial.tally.details["rounds"] = number
        trial.tally.details["workflows"] = min(number, len(workflows))


def _workflows() -> list[Workflow]:
    folder = Path(os.environ.get(RECORDED) or Path(__file__).parents[3] / "shared" / "data" / "wfinstances")
    return [shipped_workflow(), *(load_workflow(path) for path in sorted(folder.glob("*.json")))]


class _Round:
    """Some runs of one workflow, from their triggers to the verdict."""

    def __init__(self, trial: Trial, store: FlowStore, url: str, workflow: Workflow, number: int) -> None:
        self._trial = trial
        self._store = store
        self._workflow = workflow
        self._kills = min(KILLS_PER_ROUND, trial.planned - trial.tally.landed)
        seconds = self._kills * sum(GAP_SECONDS) / 2 * WORKERS / 2
        runs = max(2, round(seconds / (STEP_SECONDS * len(workflow.tasks))))
        self._run_ids = [new_run_id() for _ in range(runs)]
        self._diary = trial.folder / f"diary-{number}"
        self._diary.touch()
        config = {
            "url": url,
            "run_ids": [str(run_id) for run_id in self._run_ids],
            "workflow": workflow.to_json(),
            "speed": max(1e-9, workflow.seconds) / len(workflow.tasks) / STEP_SECONDS,
            "fail_rate": 0.0,
            "seed": trial.seed,
            "lease": LEASE_SECONDS,
            "max_attempts": 5,
            "approval_steps": (),
        }
        program = ["-m", __name__, str(self._diary), *["broken"] * trial.broken]
        self._pool = WorkerPool(config, program=program)
        self._succeeded = (-1, 0.0)
        """How many steps have, and since when."""

    async def run(self) -> bool:
        """False where the runs will never complete."""
        for run_id in self._run_ids:
            await self._store.trigger_run(
                self._workflow.flow_id,
                self._workflow.name,
                run_id,
                "chaos",
                idempotency_key=str(run_id),
            )
        try:
            for _ in range(WORKERS):
                await self._pool.start()
            completes = await self._watch()
        finally:
            await self._pool.shutdown()
        await self._judge()
        return completes

    async def _watch(self) -> bool:
        rng, trial = self._trial.rng, self._trial
        left = self._kills
        stuck_seconds = BROKEN_STUCK_SECONDS if trial.broken else STUCK_SECONDS
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
                    trial.tally.mistrust(f"a worker ended by itself: {worker.last_line}")
                    await self._pool.start()
            # One of those that hold a step; at which of its calls it is then, only chance knows.
            holding = {job_id for one in details for job_id in _holders(one)}
            if left and (at_work := [one for one in self._pool.workers if one.name in holding]):
                left -= await self._kill(rng.choice(at_work))

    async def _kill(self, worker: Worker) -> bool:
        """Kill a worker; whether it left a step half done, which the store tells after its death."""
        await self._pool.kill(worker)
        await self._pool.start()
        if landed := any(worker.name in _holders(detail) for detail in await self._details()):
            self._trial.landed()
        return landed

    async def _details(self) -> list[FlowRunDetail]:
        found = [await self._store.get_run_detail(run_id) for run_id in self._run_ids]
        return [detail for detail in found if detail is not None]

    async def _judge(self) -> None:
        tally, store = self._trial.tally, self._store
        summary = await verify(store, self._workflow, self._run_ids)
        for check in summary.checks:
            # These two are about what should have happened, the others about how it is recorded.
            count = (
                tally.lose if check.name.startswith(("every run", "every step succeeded")) else tally.mistrust
            )
            for finding in check.findings:
                count(finding)
            for _ in range(check.count - len(check.findings)):
                count(f"another where it does not hold: {check.name}")
        tally.operations += summary.attempts
        tally.add("steps", summary.steps)
        tally.add("leases taken over", len(summary.takeovers))
        winners: Counter[tuple[str, str]] = Counter()
        told = {tuple(json.loads(line)) for line in self._diary.read_text().splitlines()}
        for detail in await self._details():
            for step in detail.steps:
                for attempt in step.attempts:
                    if attempt.status is StepStatus.SUCCEEDED:
                        winners[str(detail.run_id), step.step_key] += 1
                        told.discard((str(detail.run_id), step.step_key, attempt.attempt))
        for (run_id, key), exact_times in winners.items():
            for _ in range(exact_times - 1):
                tally.repeat(f"step {key!r} of run {run_id} succeeded {exact_times} times")
        for run_id, key, attempt in sorted(told):
            tally.lose(
                f"attempt {attempt} of step {key!r} of run {run_id} was acknowledged, and is not there"
            )


def _holders(detail: FlowRunDetail) -> Sequence[str]:
    """The workers of open attempts, by the name that the engine gives as job_id."""
    attempts = [step.attempts[-1] for step in detail.steps]
    return [one.job_id for one in attempts if one.completed_at is None and one.job_id is not None]


LINE = Line(
    number=4,
    name="worker-kills",
    fault=f"SIGKILL of {WORKERS} workers in the middle of replayed workflows, at any moment",
    unit="kills",
    planned=200,
    least=3,
    backends=("sqlite", "postgresql"),
    passes_when="others take the leases over, every step succeeded exactly once, all runs complete",
    broken="claims never run out",
    minutes=10,
    run=run,
)

if __name__ == "__main__":
    kind = ForgetsLeases if "broken" in sys.argv[2:] else Diary
    sys.exit(work(lambda store: kind(store, sys.argv[1])))
