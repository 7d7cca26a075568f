"""SIGKILL of workers that claim steps from a queue of the store and advance their runs (QUE-1, QUE-4).

The flow has a fan-out and a fan-in: one step, then PARTS steps, then a step after all of them. Each worker
appends its claims and the acknowledged advances to a file outside of the store.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter, defaultdict
from contextlib import suppress
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

from flowstore_chaos.context import RunContext
from flowstore_chaos.scenario import FaultScenario
from flowstore_chaos.worker_pool import WorkerPool, is_mutant, send_to_parent
from flowstore_core import (
    ClaimedStep,
    ConflictError,
    FlowRunDetail,
    FlowStore,
    RunAdvance,
    RunStatus,
    StepRequest,
    StepStatus,
    new_run_id,
    open_store,
)

FLOW = UUID(int=17)
QUEUE = "chaos"
WORKERS = 4
PARTS = 3
FIRST, LAST = "split", "join"
PART_KEYS = tuple(f"part-{number}" for number in range(PARTS))
KEYS = frozenset({FIRST, *PART_KEYS, LAST})
ACTIVE_RUNS = 10
"""Number of active runs, until all planned kills have happened."""
LEASE = timedelta(seconds=1)
LIMIT = 3
STEP_SECONDS = 0.1
GAP_SECONDS = (0.0, 0.3)
"""Seconds between two kills: minimum and maximum."""
WAIT = timedelta(seconds=5)
STUCK_SECONDS = 60.0
"""Seconds without an ended step after which runs count as stuck."""
BROKEN_STUCK_SECONDS = 5.0
BROKEN_GAP_SECONDS = 0.5
"""Seconds between the two transactions of the mutant."""
LEDGER_VARIABLE = "FLOWSTORE_CHAOS_LEDGER"


class _Ledger:
    """A file outside of the store to which every worker appends."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def append(self, *entry: Any) -> None:
        os.write(self._file, (json.dumps(entry) + "\n").encode())


class TwoStepAdvanceMutant:
    """A store that records the outcome of a step in one transaction, and dispatches in another.

    It notes in the ledger that it is between the two, so that it can be killed there.
    """

    def __init__(self, store: FlowStore, ledger: _Ledger) -> None:
        self._store = store
        self._ledger = ledger

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def advance_run(
        self, run_id: UUID, step_key: str, status: StepStatus, *, attempt: int, **more: Any
    ) -> RunAdvance:
        await self._store.record_step_complete(run_id, step_key, status, attempt=attempt)
        self._ledger.append("gap", os.getpid())
        await asyncio.sleep(BROKEN_GAP_SECONDS)
        return await self._store.advance_run(run_id, step_key, status, attempt=attempt, **more)


# The workers


def _request(key: str) -> StepRequest:
    return StepRequest(step_key=key, step_type="test", queue=QUEUE, after=PART_KEYS if key == LAST else ())


def _next_requests(key: str) -> list[StepRequest]:
    """The requests that the end of a step carries: each part may be the last one."""
    keys = {FIRST: (*PART_KEYS, LAST), LAST: ()}.get(key, (LAST,))
    return [_request(one) for one in keys]


class _Worker:
    """Executes steps of the queue until its parent closes standard input."""

    def __init__(self, store: Any, ledger: _Ledger) -> None:
        self._store = store
        self._append = ledger.append

    async def run(self) -> None:
        try:
            await self._work()
        except Exception as error:  # noqa: BLE001 - no error is expected, so each one is a finding
            self._append("error", f"{type(error).__name__}: {error}")

    async def _work(self) -> None:
        while True:
            claimed = await self._store.claim_next_steps(
                [QUEUE], lease=LEASE, limit=LIMIT, worker=str(os.getpid())
            )
            await asyncio.gather(*(self._execute(step) for step in claimed))
            if not claimed:
                await self._store.wait_for_steps([QUEUE], timeout=WAIT)

    async def _execute(self, step: ClaimedStep) -> None:
        key = [str(step.run_id), step.step_key, step.attempt]
        self._append("claim", *key, step.claimed_at.timestamp(), step.expires_at.timestamp())
        await asyncio.sleep(STEP_SECONDS)
        # The lease of a slow worker ends, and another worker takes the step over.
        with suppress(ConflictError):
            advance = await self._store.advance_run(
                step.run_id,
                step.step_key,
                StepStatus.SUCCEEDED,
                attempt=step.attempt,
                owner=step.owner,
                dispatch=_next_requests(step.step_key),
                complete_as=RunStatus.SUCCEEDED,
            )
            self._append("advance", *key, advance.dispatched, advance.run_completed)


async def _work(url: str) -> None:
    async with open_store(url) as opened:
        ledger = _Ledger(os.environ[LEDGER_VARIABLE])
        store: Any = TwoStepAdvanceMutant(opened, ledger) if is_mutant() else opened
        working = asyncio.create_task(_Worker(store, ledger).run())
        send_to_parent("ready")
        await asyncio.to_thread(sys.stdin.readline)
        working.cancel()
        await asyncio.wait({working})


# The parent


async def run(context: RunContext) -> None:
    ledger = context.folder / "ledger"
    ledger.touch()
    async with (
        context.store_url() as url,
        open_store(url) as store,
        WorkerPool(
            __name__,
            WORKERS,
            url=url,
            mutant=context.is_mutant,
            environment={**os.environ, LEDGER_VARIABLE: str(ledger)},
        ) as pool,
    ):
        supervisor = _Supervisor(context, store, pool, ledger)
        await supervisor.kill_workers()
        await supervisor.finish_runs()
        await _verify(context, store, supervisor.run_ids, ledger)


class _Supervisor:
    """Starts runs and kills workers."""

    def __init__(self, context: RunContext, store: FlowStore, pool: WorkerPool, ledger: Path) -> None:
        self._context = context
        self._store = store
        self._pool = pool
        self._ledger = ledger
        self.run_ids: list[UUID] = []
        self._ended = (-1, 0.0)
        """Number of ended steps, and the time of its last change."""

    async def kill_workers(self) -> None:
        """Kill workers that hold steps, until all planned kills have happened or runs are stuck."""
        rng = self._context.rng
        while not self._context.done:
            details = await self._active_runs()
            for _ in range(ACTIVE_RUNS - len(details)):
                await self._start_run()
            if await self._is_stuck():
                return
            await asyncio.sleep(rng.uniform(*GAP_SECONDS))
            if self._context.is_mutant:
                await self._kill_in_gap()
                continue
            holders = {one for detail in await self._active_runs() for one in _holders(detail)}
            if held := [worker for worker in self._pool.workers if str(worker.pid) in holders]:
                await self._kill(rng.choice(held))

    async def _kill(self, worker: asyncio.subprocess.Process) -> None:
        """Kill a worker. It counts if the store shows an open attempt of the dead worker."""
        # At a random moment of the step: during the work, or while its outcome is recorded.
        await asyncio.sleep(self._context.rng.uniform(0, 2 * STEP_SECONDS))
        worker.kill()
        await worker.wait()
        holders = {one for detail in await self._active_runs() for one in _holders(detail)}
        if str(worker.pid) in holders:
            self._context.record_faults()
        await self._pool.replace(worker)

    async def _kill_in_gap(self) -> None:
        """Kill the next mutant that is between its two transactions, if there is one within a second."""
        position = self._ledger.stat().st_size
        for _ in range(100):
            await asyncio.sleep(0.01)
            new = (await asyncio.to_thread(self._ledger.read_bytes))[position:]
            # A line that is being written may be incomplete.
            lines = new[: new.rfind(b"\n") + 1].splitlines()
            pids = {entry[1] for entry in map(json.loads, lines) if entry[0] == "gap"}
            if in_gap := [worker for worker in self._pool.workers if worker.pid in pids]:
                in_gap[0].kill()
                await in_gap[0].wait()
                self._context.record_faults()
                await self._pool.replace(in_gap[0])
                return

    async def finish_runs(self) -> None:
        while not await self._is_stuck():
            if not await self._store.get_active_runs():
                return
            await asyncio.sleep(0.1)

    async def _start_run(self) -> None:
        run_id = new_run_id()
        await self._store.trigger_run(FLOW, "queue", run_id, "chaos", dispatch=[_request(FIRST)])
        self.run_ids.append(run_id)

    async def _active_runs(self) -> list[FlowRunDetail]:
        runs = await self._store.get_active_runs()
        details = [await self._store.get_run_detail(run.run_id) for run in runs]
        return [detail for detail in details if detail is not None]

    async def _is_stuck(self) -> bool:
        page = await self._store.get_runs_page(take=1, status=RunStatus.RUNNING)
        ended = len(self.run_ids) * len(KEYS) - page.total_count * len(KEYS)
        for detail in await self._active_runs():
            ended += sum(step.status.is_terminal for step in detail.steps)
        if ended != self._ended[0]:
            self._ended = (ended, time.monotonic())
        limit = BROKEN_STUCK_SECONDS if self._context.is_mutant else STUCK_SECONDS
        return time.monotonic() - self._ended[1] > limit


def _holders(detail: FlowRunDetail) -> set[str]:
    """The job_id, and so the worker, of each open attempt."""
    attempts = [step.attempts[-1] for step in detail.steps if step.attempts]
    return {one.job_id for one in attempts if one.completed_at is None and one.job_id is not None}


async def _verify(context: RunContext, store: FlowStore, run_ids: list[UUID], ledger: Path) -> None:
    """Compare the store with the workers' ledger."""
    counts = context.counts
    entries = [json.loads(line) for line in (await asyncio.to_thread(ledger.read_text)).splitlines()]
    succeeded: set[tuple[str, str, int]] = set()
    for run_id in run_ids:
        detail = await store.get_run_detail(run_id)
        if detail is None or detail.status is not RunStatus.SUCCEEDED:
            counts.count_lost(f"run {run_id} did not complete")
            continue
        for key in KEYS.symmetric_difference(step.step_key for step in detail.steps):
            counts.count_wrong(f"run {run_id} has no step {key!r}, or should not have it")
        for step in detail.steps:
            winners = [one.attempt for one in step.attempts if one.status is StepStatus.SUCCEEDED]
            succeeded.update((str(run_id), step.step_key, attempt) for attempt in winners)
            if not winners:
                counts.count_lost(f"step {step.step_key!r} of run {run_id} did not succeed")
            for _ in winners[1:]:
                counts.count_duplicate(f"step {step.step_key!r} of run {run_id} succeeded again")
            counts.add_detail("steps")
            counts.add_detail("leases taken over", len(step.attempts) - 1)
    for _, error in [entry for entry in entries if entry[0] == "error"]:
        counts.count_wrong(f"a worker got {error}")
    _verify_advances(context, [entry[1:] for entry in entries if entry[0] == "advance"], succeeded)
    _verify_claims(context, [entry[1:] for entry in entries if entry[0] == "claim"])


def _verify_advances(
    context: RunContext, advances: list[list[Any]], succeeded: set[tuple[str, str, int]]
) -> None:
    """Each acknowledged outcome is in the store, and each effect was acknowledged at most once."""
    counts = context.counts
    counts.operations += len(advances)
    effects: Counter[str] = Counter()
    for run_id, key, attempt, dispatched, completed in advances:
        if (run_id, key, attempt) not in succeeded:
            counts.count_lost(f"attempt {attempt} of {key!r} of run {run_id} was acknowledged, and is lost")
        effects[f"step {key!r} of run {run_id} was advanced"] += 1
        effects.update(f"step {one!r} of run {run_id} was dispatched" for one in dispatched)
        effects[f"run {run_id} was completed"] += completed
    for effect, times in effects.items():
        for _ in range(times - 1):
            counts.count_duplicate(f"{effect} {times} times")


def _verify_claims(context: RunContext, claims: list[list[Any]]) -> None:
    """A step is claimed again only after the lease of its earlier claim."""
    counts = context.counts
    counts.operations += len(claims)
    leases: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for run_id, key, _, claimed_at, expires_at in claims:
        leases[run_id, key].append((claimed_at, expires_at))
    for (run_id, key), held in leases.items():
        held.sort()
        for (_, expires_at), (claimed_at, _) in pairwise(held):
            if claimed_at < expires_at:
                counts.count_duplicate(f"step {key!r} of run {run_id} was claimed during another lease")


SCENARIO = FaultScenario(
    number=17,
    name="queue-worker-kills",
    fault=f"SIGKILL of {WORKERS} workers that claim steps from a queue and advance runs, at random moments",
    unit="kills",
    planned=50,
    min_faults=8,
    backends=("sqlite", "postgresql"),
    pass_criterion="every step succeeds exactly once, every run completes, no claim overlaps another",
    mutant="advance_run records the outcome and dispatches in two transactions",
    minutes=20,
    run=run,
)

if __name__ == "__main__":
    asyncio.run(_work(sys.argv[1]))
