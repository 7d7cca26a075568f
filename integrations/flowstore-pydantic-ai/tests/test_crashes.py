"""Processes that are killed (SIGKILL) before every call of the store, and runs that others resume."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path
from uuid import uuid5

import dying
import pytest
from agents import ORDER, ORDER_OUTPUT, Log, ask_in_file, asked, order_agent, refund_agent, until
from flowstore_pydantic_ai import DurableRunner
from flowstore_pydantic_ai.runner import NAMESPACE

from flowstore import FlowRunDetail, FlowStore, StepStatus, open_store

EXAMPLE = Path(__file__).parents[1] / "examples" / "survive_a_crash.py"
PROCESSES = ThreadPoolExecutor(4)
"""Limits how many processes run at once; the waits for the leases of killed ones overlap."""
ORDER_CALLS = 15
"""Writing calls of the order: trigger and start; start and record of six steps; the end."""

pytestmark = [
    pytest.mark.parametrize("url", ["sqlite", "postgresql"], indirect=True),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> None:
    """Start a server that forks processes in which Pydantic AI is imported: that takes a second."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dying", "flowstore_postgres.open", "flowstore_sqlite.open"])
    with pytest.MonkeyPatch.context() as patch:
        # The server does not get the sys.path of this process, and ignores modules that it does not find.
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()


async def _die(url: str, path: Path, kind: str, last: int) -> int:
    def run() -> int:
        context = multiprocessing.get_context("forkserver")
        process = context.Process(target=dying.run, args=(url, str(path), kind, last))
        process.start()
        process.join(120)
        assert process.exitcode is not None
        return process.exitcode

    return await asyncio.get_running_loop().run_in_executor(PROCESSES, run)


def _recorded(run: FlowRunDetail | None) -> Counter[str]:
    """The lines of the log that belong to steps whose results are recorded."""
    lines: Counter[str] = Counter()
    for step in run.steps if run is not None else ():
        if step.status is not StepStatus.SUCCEEDED:
            continue
        if "model.request #" in step.step_key:
            lines[f"model request {step.step_key[-1]}"] += 1
        elif ":charge" in step.step_key:
            lines["charge 20"] += 1
        elif ":pack" in step.step_key:
            lines["pack"] += 1
    return lines


def _executed(lines: Sequence[str]) -> Counter[str]:
    requests = {"model 0": "model request 1", "model 1": "model request 2", "model 3": "model request 3"}
    return Counter("pack" if line.startswith("pack") else requests.get(line, line) for line in lines)


async def _die_and_resume(url: str, store: FlowStore, folder: Path, last: int) -> int:
    """Kill a process before one call, resume its run here, and return how many results were recorded."""
    log = Log(folder / str(last))
    run_id = f"order {last}"
    assert await _die(url, folder / str(last), "order", last) == -9
    run = await store.get_run_detail(uuid5(NAMESPACE, run_id))
    recorded, before = _recorded(run), _executed(log.lines)
    assert recorded <= before
    result = await DurableRunner(store, lease=dying.LEASE).run(order_agent(log), "go", run_id=run_id)
    assert result.output == ORDER_OUTPUT
    after = _executed(log.lines)
    # Everything was executed, and nothing again whose result had been recorded.
    assert after >= _executed(ORDER)
    again = after - before
    assert again + recorded == _executed(ORDER), (last, log.lines)
    return sum(recorded.values())


async def test_killed_before_every_call(url: str, tmp_path: Path) -> None:
    async with open_store(url) as store:
        kills = [_die_and_resume(url, store, tmp_path, last) for last in range(1, ORDER_CALLS + 1)]
        left = await asyncio.gather(*kills)
    # The kills hit every stage of the run; a parallel call may end between two of them.
    assert set(left) >= {0, 1, 2, 3, 5, 6}
    assert await _die(url, tmp_path / "end", "order", ORDER_CALLS + 1) == 0


async def test_an_approval_survives_every_restart(url: str, tmp_path: Path) -> None:
    """Killed before a call around the question; answered while no process runs, if it was asked."""
    # Each in its own store, because a worker takes any run of its agents.
    runs = [_die_and_approve(f"{url}_{last}", tmp_path / str(last), last) for last in range(3, 11)]
    await asyncio.gather(*runs)


async def _die_and_approve(url: str, path: Path, last: int) -> None:
    log = Log(path)
    assert await _die(url, path, "refund", last) == -9
    async with open_store(url) as store:
        runner = DurableRunner(store, lease=dying.LEASE)
        worker = asyncio.create_task(runner.work([refund_agent(log, ask_in_file(log))]))
        await until(lambda: asked(log))
        # A question that is asked again, because it was not recorded, has the same token.
        assert len({token for token, _ in asked(log)}) == 1
        token, call = asked(log)[0]
        await runner.resolve(token, {"approvals": {call: True}})
        result = await runner.run(refund_agent(log, ask_in_file(log)), "go", run_id=f"refund {last}")
        worker.cancel()
        with suppress(asyncio.CancelledError):
            await worker
    assert result.output == "approved: refunded 20"
    assert log.lines.count("refund 20") == 1
    assert log.lines.count("model 1") == 1


def test_the_example(url: str, tmp_path: Path) -> None:
    def run() -> tuple[int, list[str]]:
        command = [sys.executable, EXAMPLE, url]
        done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, timeout=300)
        return done.returncode, done.stdout.splitlines()

    killed = ["model: charge the card", "charging 20 euros", "model: pack a parcel", "packing ... killed"]
    assert run() == (-9, killed)
    assert run() == (0, ["packing", "model: done", "charged 20 euros, packed one parcel"])
    # The result of a run that has ended is rebuilt.
    assert run() == (0, ["charged 20 euros, packed one parcel"])
