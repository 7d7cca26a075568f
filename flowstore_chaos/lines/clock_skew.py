"""Workers whose clocks are a day apart, and jump: leases and deadlines go by the store's clock only.

The clock of a PostgreSQL store is the server's. That of an SQLite store is the machine's, which all of its
processes share; there it is this one clock that jumps, by up to a day, forth and back.
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

from flowstore_chaos.clocks import CLOCKS, Clocks
from flowstore_chaos.line import Line
from flowstore_chaos.processes import Crew, is_broken, serve_requests
from flowstore_chaos.trial import Trial
from flowstore_core import FlowStore, RunStatus, new_claim_token, new_run_id, open_store
from flowstore_replay import Options, Replay, ReplayProgress, shipped_workflow

WORKERS = 4
DAY = timedelta(days=1)
SHIFTS = (-DAY, timedelta(hours=-2), timedelta(hours=2), DAY)
NOTABLE = timedelta(hours=1)
LONG = timedelta(hours=1)
SHORT = timedelta(milliseconds=40)
SLACK = timedelta(seconds=1)
"""A moment between two readings of clocks that are the same may be off by so much."""
LOOKS_PER_REPLAY = 50
JUMP_SECONDS = 0.3
STEP_SECONDS = 0.05
LEASE_SECONDS = 30.0
"""Of the replay: long, because on a busy machine nobody may lose a lease for any other reason."""


class _Judge:
    """What the clock of the store allows, and what was answered."""

    def __init__(self, trial: Trial) -> None:
        self._tally = trial.tally

    def expect(self, holds: bool, what: str) -> None:
        if not holds:
            self._tally.mistrust(what)

    def moment(self, told: str | None, earliest: datetime, latest: datetime, what: str) -> None:
        found = None if told is None else datetime.fromisoformat(told)
        if found is None or not earliest - SLACK <= found <= latest + SLACK:
            off = "missing" if found is None else f"{(found - earliest).total_seconds():.0f} s off"
            self._tally.mistrust(f"{what} is not by the store's clock: {off}")


async def run(trial: Trial) -> None:
    # No server crashes here.
    async with _clocks(trial) as clocks, trial.store_url({"fsync": "off"}) as url:
        crew = Crew(__name__, WORKERS, url=url, broken=trial.broken, environment=clocks.environment)
        async with crew:
            while not trial.done:
                shift = _jump(trial, clocks, [member.pid for member in crew.members])
                await _round(trial, crew, clocks, shift)
        if not trial.broken:
            await _replay(trial, clocks, url)


@asynccontextmanager
async def _clocks(trial: Trial) -> AsyncIterator[Clocks]:
    clocks = Clocks(trial.folder)
    try:
        yield clocks
    finally:
        clocks.close()


def _shared(trial: Trial) -> bool:
    """Whether the store's clock is the one that jumps; the broken variant takes each worker's own."""
    return trial.backend == "sqlite" and not trial.broken


def _jump(trial: Trial, clocks: Clocks, pids: list[int]) -> timedelta:
    """Let the clocks jump; how far the store's is from the true time then."""
    if _shared(trial):
        shift = trial.rng.choice(SHIFTS) + timedelta(seconds=trial.rng.uniform(-1800, 1800))
        clocks.set_all(shift)
        return shift
    for pid, shift in zip(pids, trial.rng.sample(SHIFTS, len(pids)), strict=True):
        clocks.set(pid, shift)
    return timedelta(0)


async def _round(trial: Trial, crew: Crew, clocks: Clocks, shift: timedelta) -> None:
    """One worker claims and sets deadlines, short and long; all look at them when the short are over."""
    run_id, late_id, orphan_id = new_run_id(), new_run_id(), new_run_id()
    judge = _Judge(trial)

    def now() -> datetime:
        return datetime.now(UTC) + shift

    began = now()
    ids = {"run_id": str(run_id), "late_id": str(late_id), "orphan_id": str(orphan_id)}
    ends = {"soon": (began + SHORT).isoformat(), "later": (began + LONG).isoformat()}
    first = trial.rng.choice(crew.members)
    crew.tell(first, {"what": "begin", **ids, **ends})
    made = await crew.answer(first)
    judge.moment(made["started_at"], began, now(), "the start of a run")
    judge.moment(made["claimed_at"], began, now(), "a claim")
    judge.moment(made["expires_at"], began + LONG, now() + LONG, "the end of a lease")
    await asyncio.sleep(2 * SHORT.total_seconds())
    if not _shared(trial):
        # One of them while it works.
        clocks.set(trial.rng.choice(crew.members).pid, trial.rng.choice(SHIFTS))
    looked = now()
    answers = await crew.ask({"what": "look", **ids, "hour_ahead": (looked + LONG).isoformat()})
    won = 0
    for answer in answers:
        trial.tally.operations += answer["operations"]
        off = datetime.fromtimestamp(answer["clock"], UTC) - datetime.now(UTC)
        won += answer["won_short"]
        _judge_look(judge, answer, looked)
        if abs(off) >= NOTABLE:
            trial.landed()
    if won > 1:
        trial.tally.repeat(f"a lease that had run out was given to {won} workers")
    judge.expect(won > 0, "a lease that had run out was given to none of the workers")
    crew.tell(first, {"what": "end", **ids, "hour_ahead": (looked + LONG).isoformat()})
    ended = await crew.answer(first)
    judge.expect(ended["orphan"], "a cleanup took an idempotency key that was not an hour old")


def _judge_look(judge: _Judge, answer: dict[str, Any], looked: datetime) -> None:
    judge.expect(not answer["won_long"], "a worker took over a lease that had an hour to go")
    judge.expect("long" in answer["claimed"], "a lease that has an hour to go is not listed as live")
    judge.expect(answer["late_stops"], "a deadline that has passed is not listed by get_runs_to_stop")
    judge.expect(not answer["run_stops"], "a deadline an hour ahead is listed by get_runs_to_stop")
    judge.expect("due" in answer["stalled"], "a dispatch that is due is not listed by get_stalled_steps")
    judge.expect("not due" not in answer["stalled"], "a dispatch due in an hour is listed as stalled")
    judge.expect("long" not in answer["stalled"], "a lease that has an hour to go is listed as stalled")
    judge.expect(answer["short_waiter"], "a waiter whose time was over could not be closed")
    judge.expect(not answer["long_waiter"], "a waiter was closed an hour before its time")
    # Around midnight both days are right.
    if (looked + timedelta(minutes=1)).day == (looked - timedelta(minutes=1)).day:
        judge.expect(answer["completed_today"] > 0, "a run that has just completed does not count today")


async def _replay(trial: Trial, clocks: Clocks, url: str) -> None:
    """A whole workflow by workers with wrong clocks, and what the store says became of it."""
    workflow = shipped_workflow()
    speed = max(1e-9, workflow.seconds) / len(workflow.tasks) / STEP_SECONDS
    runs = max(1, trial.planned // LOOKS_PER_REPLAY)
    options = Options(
        workers=WORKERS, runs=runs, speed=speed, lease=LEASE_SECONDS, seed=trial.seed, timeout=180.0
    )

    async def keep_jumping() -> None:
        while True:
            # Whoever will be started gets a clock too.
            if _shared(trial):
                _jump(trial, clocks, [])
            else:
                for pid in range(CLOCKS):
                    clocks.set(pid, trial.rng.choice(SHIFTS))
            await asyncio.sleep(JUMP_SECONDS)

    jumping = asyncio.ensure_future(keep_jumping())
    try:
        with clocks.inherited():
            summary = await Replay(workflow, options, _Quiet(), url=url).run()
    finally:
        jumping.cancel()
        with suppress(asyncio.CancelledError):
            await jumping
    trial.tally.add("steps replayed", summary.steps_succeeded)
    for check in summary.checks:
        # Which step was first cannot be told from the times of a clock that jumps back.
        if not (_shared(trial) and check.name.startswith("no step started before")):
            for finding in check.findings:
                trial.tally.mistrust(f"replayed by workers with wrong clocks: {finding}")
    if not _shared(trial):
        for taken in summary.takeovers:
            trial.tally.mistrust(f"step {taken.step_key!r} was taken over from a worker that was alive")


class _Quiet:
    """Nobody watches the replay."""

    def note(self, text: str) -> None:
        pass

    def show(self, progress: ReplayProgress) -> None:
        pass


async def _answer(store: FlowStore, asked: dict[str, Any]) -> dict[str, Any]:
    """A worker's part, by whatever it takes for the time."""
    run_id, late_id, orphan_id = (UUID(asked[name]) for name in ("run_id", "late_id", "orphan_id"))
    if asked["what"] == "begin":
        soon, later = datetime.fromisoformat(asked["soon"]), datetime.fromisoformat(asked["later"])
        return await _begin(store, run_id, late_id, orphan_id, soon, later)
    if asked["what"] == "look":
        return await _look(store, run_id, late_id)
    # What is over is not to be listed for ever.
    for ended_id in (run_id, late_id):
        await store.complete_run(ended_id, RunStatus.CANCELLED)
    await store.cleanup(datetime.fromisoformat(asked["hour_ahead"]))
    found = await store.find_run_id_by_idempotency_key(orphan_id, "manual", "orphan")
    return {"orphan": found == orphan_id}


async def _begin(
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


async def _look(store: FlowStore, run_id: UUID, late_id: UUID) -> dict[str, Any]:
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
    own: Any = {"clock": lambda: datetime.now(UTC)} if is_broken() else {}
    async with open_store(url, **own) as store:
        await serve_requests(lambda asked: _answer(store, asked))


LINE = Line(
    number=14,
    name="clock-skew",
    fault="workers have clocks up to two days apart, which jump; with SQLite the machine's one clock does",
    unit="looks by a wrong clock",
    planned=1_000,
    least=16,
    backends=("sqlite", "postgresql"),
    passes_when="leases, deadlines and retention go by the store's clock only, and workflows replay exactly",
    broken="each worker's own clock is the store's",
    minutes=8,
    run=run,
)

if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
