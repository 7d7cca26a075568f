"""Workers with clocks that differ by up to two days and jump: only the store's clock counts.

The clock of a PostgreSQL store is the server's. The clock of a SQLite store is the machine's, shared by all
processes; there this one clock jumps by up to a day in both directions.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from flowstore_chaos.context import RunContext
from flowstore_chaos.process_clocks import CLOCKS, ProcessClocks
from flowstore_chaos.scenario import FaultScenario
from flowstore_chaos.worker_pool import WorkerPool, is_mutant, serve_requests
from flowstore_core import FlowStore, RunStatus, new_claim_token, new_run_id, open_store
from flowstore_replay import Options, Replay, ReplayProgress, shipped_workflow

WORKERS = 4
DAY = timedelta(days=1)
OFFSETS = (-DAY, timedelta(hours=-2), timedelta(hours=2), DAY)
MIN_OFFSET = timedelta(hours=1)
LONG = timedelta(hours=1)
SHORT = timedelta(milliseconds=40)
SLACK = timedelta(seconds=1)
"""Tolerance between two readings of the same clock."""
OBSERVATIONS_PER_REPLAY = 50
JUMP_SECONDS = 0.3
STEP_SECONDS = 0.05
LEASE_SECONDS = 30.0
"""Lease of the replay; long, so that no lease expires because the machine is busy."""


class _ClockChecker:
    """Checks results against the store's clock."""

    def __init__(self, context: RunContext) -> None:
        self._tally = context.counts

    def expect(self, holds: bool, what: str) -> None:
        if not holds:
            self._tally.count_wrong(what)

    def check_time(self, value: str | None, earliest: datetime, latest: datetime, what: str) -> None:
        found = None if value is None else datetime.fromisoformat(value)
        if found is None or not earliest - SLACK <= found <= latest + SLACK:
            off = "missing" if found is None else f"{(found - earliest).total_seconds():.0f} s off"
            self._tally.count_wrong(f"{what} does not follow the store's clock: {off}")


async def run(context: RunContext) -> None:
    # No server crashes in this scenario.
    async with _clocks(context) as clocks, context.store_url({"fsync": "off"}) as url:
        pool = WorkerPool(
            __name__, WORKERS, url=url, mutant=context.is_mutant, environment=clocks.environment
        )
        async with pool:
            while not context.done:
                offset = _jump(context, clocks, [worker.pid for worker in pool.workers])
                await _round(context, pool, clocks, offset)
        if not context.is_mutant:
            await _replay(context, clocks, url)


@asynccontextmanager
async def _clocks(context: RunContext) -> AsyncIterator[ProcessClocks]:
    clocks = ProcessClocks(context.folder)
    try:
        yield clocks
    finally:
        clocks.close()


def _clock_is_shared(context: RunContext) -> bool:
    """Whether the store's clock itself jumps; the mutant uses each worker's clock."""
    return context.backend == "sqlite" and not context.is_mutant


def _jump(context: RunContext, clocks: ProcessClocks, pids: list[int]) -> timedelta:
    """Let the clocks jump. Returns the offset of the store's clock from the true time."""
    if _clock_is_shared(context):
        offset = context.rng.choice(OFFSETS) + timedelta(seconds=context.rng.uniform(-1800, 1800))
        clocks.set_all(offset)
        return offset
    for pid, offset in zip(pids, context.rng.sample(OFFSETS, len(pids)), strict=True):
        clocks.set(pid, offset)
    return timedelta(0)


async def _round(context: RunContext, pool: WorkerPool, clocks: ProcessClocks, offset: timedelta) -> None:
    """One worker sets short and long leases and deadlines; all workers read them after the short ones end."""
    run_id, late_id, orphan_id = new_run_id(), new_run_id(), new_run_id()
    checker = _ClockChecker(context)

    def now() -> datetime:
        return datetime.now(UTC) + offset

    started_at = now()
    ids = {"run_id": str(run_id), "late_id": str(late_id), "orphan_id": str(orphan_id)}
    ends = {"soon": (started_at + SHORT).isoformat(), "later": (started_at + LONG).isoformat()}
    first = context.rng.choice(pool.workers)
    pool.send(first, {"what": "begin", **ids, **ends})
    made = await pool.receive(first)
    checker.check_time(made["started_at"], started_at, now(), "the start of a run")
    checker.check_time(made["claimed_at"], started_at, now(), "a claim")
    checker.check_time(made["expires_at"], started_at + LONG, now() + LONG, "the end of a lease")
    await asyncio.sleep(2 * SHORT.total_seconds())
    if not _clock_is_shared(context):
        # One worker's clock jumps during its work.
        clocks.set(context.rng.choice(pool.workers).pid, context.rng.choice(OFFSETS))
    observed_at = now()
    answers = await pool.request({"what": "observe", **ids, "hour_ahead": (observed_at + LONG).isoformat()})
    won = 0
    for answer in answers:
        context.counts.operations += answer["operations"]
        off = datetime.fromtimestamp(answer["clock"], UTC) - datetime.now(UTC)
        won += answer["won_short"]
        _check_observation(checker, answer, observed_at)
        if abs(off) >= MIN_OFFSET:
            context.record_faults()
    if won > 1:
        context.counts.count_duplicate(f"an expired lease was claimed by {won} workers")
    checker.expect(won > 0, "an expired lease was claimed by no worker")
    pool.send(first, {"what": "end", **ids, "hour_ahead": (observed_at + LONG).isoformat()})
    ended = await pool.receive(first)
    checker.expect(ended["orphan"], "cleanup deleted an idempotency key younger than an hour")


def _check_observation(checker: _ClockChecker, answer: dict[str, Any], observed_at: datetime) -> None:
    checker.expect(not answer["won_long"], "a worker took over a lease an hour before its end")
    checker.expect("long" in answer["claimed"], "a lease an hour before its end is not listed as live")
    checker.expect(answer["late_stops"], "a past deadline is not listed by get_runs_to_stop")
    checker.expect(not answer["run_stops"], "a deadline an hour ahead is listed by get_runs_to_stop")
    checker.expect("due" in answer["stalled"], "a due dispatch is not listed by get_stalled_steps")
    checker.expect("not due" not in answer["stalled"], "a dispatch due in an hour is listed as stalled")
    checker.expect("long" not in answer["stalled"], "a lease an hour before its end is listed as stalled")
    checker.expect(answer["short_waiter"], "an expired waiter was not closed")
    checker.expect(not answer["long_waiter"], "a waiter was closed an hour before its expiry")
    # Around midnight both days are valid.
    if (observed_at + timedelta(minutes=1)).day == (observed_at - timedelta(minutes=1)).day:
        checker.expect(answer["completed_today"] > 0, "a run completed just now does not count for today")


async def _replay(context: RunContext, clocks: ProcessClocks, url: str) -> None:
    """Replay a workflow with wrong clocks and verify the result."""
    workflow = shipped_workflow()
    speed = max(1e-9, workflow.seconds) / len(workflow.tasks) / STEP_SECONDS
    runs = max(1, context.planned // OBSERVATIONS_PER_REPLAY)
    options = Options(
        workers=WORKERS, runs=runs, speed=speed, lease=LEASE_SECONDS, seed=context.seed, timeout=180.0
    )

    async def keep_jumping() -> None:
        while True:
            # Includes workers that are not started yet.
            if _clock_is_shared(context):
                # Without a random part: a step that was dispatched at the largest offset is ready when the
                # clock has that offset again.
                clocks.set_all(context.rng.choice(OFFSETS))
            else:
                for pid in range(CLOCKS):
                    clocks.set(pid, context.rng.choice(OFFSETS))
            await asyncio.sleep(JUMP_SECONDS)

    jumping = asyncio.ensure_future(keep_jumping())
    try:
        with clocks.inherited():
            summary = await Replay(workflow, options, _SilentObserver(), url=url).run()
    finally:
        jumping.cancel()
        with suppress(asyncio.CancelledError):
            await jumping
    context.counts.add_detail("steps replayed", summary.steps_succeeded)
    for check in summary.checks:
        # The order of steps cannot be verified with a store clock that jumps back.
        if not (_clock_is_shared(context) and check.name.startswith("no step started before")):
            for finding in check.findings:
                context.counts.count_wrong(f"replay with wrong clocks: {finding}")
    if not _clock_is_shared(context):
        for taken in summary.takeovers:
            context.counts.count_wrong(f"step {taken.step_key!r} was taken over from a live worker")


class _SilentObserver:
    """An observer that ignores all events."""

    def note(self, text: str) -> None:
        pass

    def show(self, progress: ReplayProgress) -> None:
        pass


async def _handle(store: FlowStore, request: dict[str, Any]) -> dict[str, Any]:
    """Handle one request, with this worker's clock."""
    run_id, late_id, orphan_id = (UUID(request[name]) for name in ("run_id", "late_id", "orphan_id"))
    if request["what"] == "begin":
        soon, later = datetime.fromisoformat(request["soon"]), datetime.fromisoformat(request["later"])
        return await _set_up(store, run_id, late_id, orphan_id, soon, later)
    if request["what"] == "observe":
        return await _observe(store, run_id, late_id)
    # Completed runs leave the lists that later rounds read.
    for ended_id in (run_id, late_id):
        await store.complete_run(ended_id, RunStatus.CANCELLED)
    await store.cleanup(datetime.fromisoformat(request["hour_ahead"]))
    found = await store.find_run_id_by_idempotency_key(orphan_id, "manual", "orphan")
    return {"orphan": found == orphan_id}


async def _set_up(
    store: FlowStore, run_id: UUID, late_id: UUID, orphan_id: UUID, soon: datetime, later: datetime
) -> dict[str, Any]:
    run = await store.start_run(run_id, "clocks", run_id, "manual")
    await store.start_run(late_id, "clocks", late_id, "manual")
    await store.configure_run(run_id, run_id, "manual", timeout_at=later)
    await store.configure_run(late_id, late_id, "manual", timeout_at=soon)
    await store.try_register_idempotency_key(orphan_id, "manual", "orphan", orphan_id)
    await store.register_waiter(run_id, "long", "go", expires_at=later)
    await store.register_waiter(run_id, "short", "go", expires_at=soon)
    await store.try_record_dispatch(run_id, "due", due_at=soon)
    await store.try_record_dispatch(run_id, "not due", due_at=later)
    await store.try_claim_step(run_id, "long", owner=new_claim_token(), lease=LONG)
    await store.try_claim_step(run_id, "short", owner=new_claim_token(), lease=SHORT)
    done_id = new_run_id()
    await store.start_run(done_id, "clocks", done_id, "manual")
    await store.complete_run(done_id, RunStatus.SUCCEEDED)
    [claim] = [claim for claim in await store.get_step_claims(run_id) if claim.step_key == "long"]
    return {
        "started_at": run.started_at.isoformat(),
        "claimed_at": claim.claimed_at.isoformat(),
        "expires_at": claim.expires_at and claim.expires_at.isoformat(),
    }


async def _observe(store: FlowStore, run_id: UUID, late_id: UUID) -> dict[str, Any]:
    stops = {run.run_id for run in await store.get_runs_to_stop(take=1000)}
    stalled = [one.step_key for one in await store.get_stalled_steps(take=1000) if one.run_id == run_id]
    short, long = await store.expire_waiter(run_id, "short"), await store.expire_waiter(run_id, "long")
    token = new_claim_token()
    return {
        "clock": time.time(),
        "operations": 8,
        "late_stops": late_id in stops,
        "run_stops": run_id in stops,
        "stalled": stalled,
        "short_waiter": short is not None and short.expired_at is not None,
        "long_waiter": long is not None and long.expired_at is not None,
        "claimed": sorted(await store.get_claimed_step_keys(run_id)),
        "completed_today": (await store.get_statistics()).completed_today,
        "won_long": await store.try_claim_step(run_id, "long", owner=token, lease=LONG),
        "won_short": await store.try_claim_step(run_id, "short", owner=token, lease=LONG),
    }


async def _serve(url: str) -> None:
    own: Any = {"clock": lambda: datetime.now(UTC)} if is_mutant() else {}
    async with open_store(url, **own) as store:
        await serve_requests(lambda request: _handle(store, request))


SCENARIO = FaultScenario(
    number=14,
    name="clock-skew",
    fault="clocks of workers differ by up to two days and jump; with SQLite the machine's clock jumps",
    unit="observations with a wrong clock",
    planned=1_000,
    min_faults=16,
    backends=("sqlite", "postgresql"),
    pass_criterion="leases, deadlines and retention follow only the store's clock; workflows replay exactly",
    mutant="each worker's clock is used as the store's",
    minutes=8,
    run=run,
)

if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
