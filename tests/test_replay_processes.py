"""Replays with real worker processes and kills, on every multi-process backend."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from flowstore_core import Capability, RunStatus, StepRequest, new_run_id, open_store
from flowstore_replay import (
    Options,
    Replay,
    ReplayError,
    ReplayProgress,
    Summary,
    Task,
    Workflow,
    load_workflow,
    shipped_workflow,
)
from flowstore_replay.worker_pool import WorkerPool
from tests.test_replay_wfcommons import INSTANCES

shared = pytest.mark.needs(Capability.MULTI_PROCESS)


class Recorder:
    """An observer that records notes and progress."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.progress_reports: list[ReplayProgress] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def show(self, progress: ReplayProgress) -> None:
        self.progress_reports.append(progress)


async def replay_with_kills(workflow: Workflow, options: Options, url: str) -> tuple[Summary, Recorder]:
    """Replay until all kills were made, each time at half the speed.

    On a loaded machine the parent may see a step only when it has ended. A replay with fewer kills must
    succeed too.
    """
    while True:
        recorder = Recorder()
        summary = await Replay(workflow, options, recorder, url=url).run()
        assert summary.ok, [check for check in summary.checks if not check.ok]
        if len(summary.kills) == options.kill:
            return summary, recorder
        options = replace(options, speed=options.speed / 2)


@shared
async def test_steps_of_killed_workers_are_taken_over(namespace: str) -> None:
    options = Options(kill=2, lease=0.8, speed=200, timeout=100)
    summary, recorder = await replay_with_kills(shipped_workflow(), options, namespace)
    assert (summary.runs_succeeded, summary.steps_succeeded) == (1, 10)
    assert len({kill.worker for kill in summary.kills}) == 2
    assert 1 <= summary.steps_recovered <= summary.attempts_by_outcome["taken_over"]
    killed = [note for note in recorder.notes if note.startswith("killed worker-")]
    assert len(killed) == 2
    assert all(re.search(r"\(pid \d+\) .*; started worker-\d+ \(pid \d+\)", note) for note in killed)
    assert any("took over" in note for note in recorder.notes)
    assert recorder.progress_reports[-1].steps_done == recorder.progress_reports[-1].steps == 10


@shared
async def test_several_runs_with_failures_and_approvals_succeed(namespace: str) -> None:
    recorder = Recorder()
    options = Options(
        runs=3, fail_rate=0.2, seed=7, speed=2000, approval_steps=("clean-stalls",), timeout=100
    )
    summary = await Replay(shipped_workflow(), options, recorder, url=namespace).run()
    assert summary.ok, [check for check in summary.checks if not check.ok]
    assert (summary.runs_succeeded, summary.steps_succeeded) == (3, 30)
    outcomes = summary.attempts_by_outcome
    assert outcomes["succeeded"] == 30
    assert outcomes["failed"] > 0
    assert outcomes["waiting"] >= 3
    assert sum("approved step 'clean-stalls'" in note for note in recorder.notes) == 3


@pytest.mark.parametrize("name", ["epigenomics", "helloworld", "sarek", "scrnaseq"])
async def test_recorded_instances_survive_kills(name: str, tmp_path: Path) -> None:
    instances = sorted(INSTANCES.glob(f"{name}*.json"))
    if not instances:
        pytest.skip(f"no recorded instances at {INSTANCES} (FLOWSTORE_WFINSTANCES overrides the folder)")
    workflow = load_workflow(instances[0])
    options = Options(kill=2, lease=0.8, speed=workflow.seconds / 4, timeout=100)
    summary, _ = await replay_with_kills(workflow, options, f"sqlite:///{tmp_path}/flows.db")
    assert summary.steps_recovered >= 1


async def test_a_replay_succeeds_with_more_kills_than_workers(tmp_path: Path) -> None:
    workflow = Workflow(
        name="wide", tasks=tuple(Task(key=f"t{n}", name="t", parents=(), seconds=40) for n in range(6))
    )
    options = Options(workers=2, kill=4, lease=0.5, speed=100, timeout=100)
    await replay_with_kills(workflow, options, f"sqlite:///{tmp_path}/flows.db")


async def test_an_aborted_replay_continues_under_its_key(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/flows.db"
    slow = Options(speed=20, timeout=2, key="one", workers=2)
    summary = await Replay(shipped_workflow(), slow, Recorder(), url=url).run()
    assert not summary.ok
    assert summary.checks[0].name == "finished in time"
    assert "--key one" in summary.checks[0].findings[0]
    recorder = Recorder()
    quick = Options(speed=2000, timeout=100, key="one", workers=2)
    summary = await Replay(shipped_workflow(), quick, recorder, url=url).run()
    assert summary.ok, [check for check in summary.checks if not check.ok]
    assert recorder.notes[0].startswith("continuing run ")
    async with open_store(url) as store:
        assert len(await store.get_runs()) == 1


async def test_a_step_that_keeps_failing_fails_its_run(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/flows.db"
    options = Options(speed=5000, fail_rate=1.0, max_attempts=2, timeout=100, workers=2)
    replay = Replay(shipped_workflow(), options, Recorder(), url=url)
    summary = await replay.run()
    assert [check.name for check in summary.checks if not check.ok] == [
        "every run succeeded",
        "every step succeeded exactly once, in its last attempt",
    ]
    async with open_store(url) as store:
        assert await store.get_run_status(replay.run_ids[0]) is RunStatus.FAILED


async def test_a_cancelled_run_is_completed_as_cancelled(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/flows.db"
    replay = Replay(shipped_workflow(), Options(speed=4, timeout=100, lease=1.0), Recorder(), url=url)
    running = asyncio.create_task(replay.run())
    async with open_store(url) as store:
        async with asyncio.timeout(60):
            active = await store.get_active_runs()
            while not active or not await store.get_step_statuses(active[0].run_id):
                await asyncio.sleep(0.05)
                active = await store.get_active_runs()
        await store.request_cancel(replay.run_ids[0], "changed my mind")
        summary = await asyncio.wait_for(running, 60)
        assert await store.get_run_status(replay.run_ids[0]) is RunStatus.CANCELLED
    assert "is Cancelled: changed my mind" in summary.checks[0].findings[0]


async def test_a_single_process_store_is_refused() -> None:
    with pytest.raises(ReplayError, match="several processes") as caught:
        await Replay(shipped_workflow(), Options(), Recorder(), url="memory://").run()
    assert caught.value.usage


def test_an_unknown_approval_step_is_refused() -> None:
    with pytest.raises(ReplayError, match="no step 'nope' to approve") as caught:
        Replay(shipped_workflow(), Options(approval_steps=("nope",)), Recorder())
    assert caught.value.usage


async def test_failing_workers_abort_the_replay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent's store is open; the workers' URL is invalid."""
    url = f"sqlite:///{tmp_path}/flows.db"
    original = WorkerPool.start

    async def start(pool: WorkerPool) -> object:
        pool._config["url"] = "nonsense://"
        return await original(pool)

    monkeypatch.setattr(WorkerPool, "start", start)
    with pytest.raises(
        ReplayError, match="workers keep exiting unexpectedly; last line of standard error: no installed"
    ):
        await Replay(shipped_workflow(), Options(workers=2), Recorder(), url=url).run()


def start_command(url: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flowstore_cli.main", "replay", "--speed", "3", "--url", url, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Background jobs of a shell and their children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def worker_pids(url: str) -> set[int]:
    """The process ids of workers that have started a step, from the store."""

    async def read() -> set[int]:
        async with open_store(url) as store:
            details = [await store.get_run_detail(run.run_id) for run in await store.get_runs()]
        names = [a.job_id or "" for d in details if d for step in d.steps for a in step.attempts]
        return {int(match[1]) for name in names if (match := re.search(r"pid (\d+)", name))}

    return asyncio.run(read())


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_do_not_outlive_the_replay(signal_number: signal.Signals, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/flows.db"
    parent = start_command(url, "--workers", "2", "--key", "mine")
    try:
        deadline = time.monotonic() + 100
        while not (tmp_path / "flows.db").exists() or len(pids := worker_pids(url)) < 2:
            assert time.monotonic() < deadline
            assert parent.poll() is None
            time.sleep(0.1)
        parent.send_signal(signal_number)
        _, errors = parent.communicate(timeout=100)
    finally:
        parent.kill()
        parent.communicate()
    deadline = time.monotonic() + 60
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, "a worker is still running"
        time.sleep(0.05)
    if signal_number is signal.SIGKILL:
        return
    assert parent.returncode == 130
    assert "the runs stay in the store; continue them with: flowstore replay --key mine" in errors
    assert "Traceback" not in errors


def test_a_worker_without_config_exits_cleanly() -> None:
    command = [sys.executable, "-m", "flowstore_replay.worker"]
    done = subprocess.run(command, input="", capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


async def test_other_runs_are_ignored(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/flows.db"
    workflow = shipped_workflow()
    async with open_store(url) as store:
        other = new_run_id()
        first = StepRequest(step_key="collect-stalls", step_type="other", queue="other")
        await store.trigger_run(workflow.flow_id, "other", other, "replay", dispatch=[first])
        summary = await Replay(workflow, Options(speed=5000, workers=2), Recorder(), url=url).run()
        assert summary.ok
        assert not await store.get_step_statuses(other)
