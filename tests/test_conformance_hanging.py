"""Hanging calls: the suite names the call, fails its check, continues, and writes its reports."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from flowstore_conformance import CheckResult, Failure, Report, Status, run_suite
from flowstore_conformance.context import CheckContext, ContractViolation
from flowstore_conformance.registry import all_checks
from flowstore_conformance.watchdog import Hang, Hung, Limits, Watchdog, await_chain

from flowstore_core import ConfigurationError, new_run_id
from tests import faulty
from tests.conformance_reports import example_check, passes
from tests.faulty import DIST

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(DIST)
    monkeypatch.setattr(faulty, "released", threading.Event())
    yield
    faulty.released.set()


async def claims(context: CheckContext) -> None:
    run_id = new_run_id()
    await context.store.start_run(new_run_id(), "orders", run_id, "manual")
    context.expect(
        await context.store.try_claim_step(run_id, "pay", owner="me"), True, "the first claim wins"
    )


async def run(name: str, *checks: Any, url: str = "", limit: float = 4.0, **options: Any) -> Report:
    """Run checks on a store that hangs. The limit of a check is in seconds; that of a call is half of it.

    On a busy machine an event loop may stand still for half a second, which the watchdog would report.
    """
    return await run_suite(
        f"faulty-{name}://{url}",
        profile="quick",
        seed=7,
        checks=checks or [example_check("CLM-1", "claims", claims), example_check("RUN-1", "passes")],
        check_timeout=limit,
        **options,
    )


def hang_of(result: CheckResult) -> Failure:
    assert result.status is Status.FAIL, result
    assert result.failure is not None
    assert result.failure.hung
    assert result.failure.clause == "CON-2"
    return result.failure


WAITING = {
    "waits": "_never",
    "waits-for-its-task": "_work",
    "waits-for-a-thread": "try_claim_step",
}


@pytest.mark.parametrize("name", WAITING)
async def test_a_hanging_call_is_named_and_the_suite_continues(name: str) -> None:
    report = await run(name)
    failure = hang_of(report.results[0])
    assert failure.operation == "try_claim_step"
    assert "step_key='pay', owner='me') did not return within 2 s" in failure.message
    assert "--check-timeout" in failure.message
    assert failure.place is not None
    assert failure.place.startswith("faulty/__init__.py:")
    assert failure.place.endswith(WAITING[name])
    assert failure.traceback is not None
    assert "in try_claim_step" in failure.traceback
    assert "flowstore_conformance" not in failure.traceback
    if name == "waits-for-a-thread":
        assert "released.wait(LONG)" in failure.traceback
    assert report.results[1].status is Status.PASS
    assert report.left_behind == ()


BLOCKING = {"sleeps": "_sleep_long", "locks": "try_claim_step", "loops": "try_claim_step"}


@pytest.mark.parametrize("name", BLOCKING)
async def test_a_call_that_blocks_the_loop_is_named_and_the_suite_continues(name: str) -> None:
    report = await run(name)
    failure = hang_of(report.results[0])
    assert failure.operation == "try_claim_step"
    assert "step_key='pay', owner='me') blocks the event loop at faulty/__init__.py:" in failure.message
    assert failure.place is not None
    assert failure.place.endswith(BLOCKING[name])
    assert report.results[1].status is Status.PASS
    if name == "loops" and not report.left_behind:
        # The endless loop was stopped in time to drop its namespace.
        return
    (left,) = report.left_behind
    assert left.startswith(f"faulty-{name}://scratch-")


async def test_an_endless_loop_is_stopped() -> None:
    await run("loops", example_check("CLM-1", "claims", claims))
    async with asyncio.timeout(60):
        while any(map(_spins, threading.enumerate())):  # noqa: ASYNC110
            await asyncio.sleep(0.05)


def _spins(thread: threading.Thread) -> bool:
    frame = sys._current_frames().get(thread.ident or 0)
    return frame is not None and frame.f_code is faulty.Loops.try_claim_step.__code__


async def test_a_call_that_ignores_its_cancellation_is_abandoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowstore_conformance.watchdog.CANCEL_SECONDS", 0.2)
    report = await run("ignores-cancellation")
    assert hang_of(report.results[0]).operation == "try_claim_step"
    assert report.results[1].status is Status.PASS
    assert len(report.left_behind) == 1


async def test_a_close_that_hangs_is_named() -> None:
    report = await run("hangs-on-close")
    for result in report.results:
        failure = hang_of(result)
        assert failure.operation == "aclose"
        assert failure.message.startswith("aclose() did not return within 2 s; it waits at faulty/__init__")
        assert failure.place is not None
        assert failure.place.endswith("_wait_for_writers")


async def test_a_store_that_hangs_before_the_first_check_is_a_refusal() -> None:
    with pytest.raises(
        ConfigurationError, match=r"^refused: .* open\(faulty-hangs-on-open://.* did not return"
    ):
        await run("hangs-on-open")


async def test_an_operation_that_hung_gets_a_shorter_limit() -> None:
    checks = [example_check("CLM-1", f"claims_{number}", claims) for number in range(3)]
    report = await run("waits", *checks, limit=10.0)
    first, second, third = (hang_of(one) for one in report.results)
    assert "within 5 s" in first.message
    for later in (second, third):
        assert "within 2 s" in later.message
        assert "it hung in an earlier check" in later.message
    (cause,) = report.causes
    assert cause.lead is report.results[0]


async def test_a_cancelled_error_of_the_backend_fails_only_its_check() -> None:
    report = await run("lets-cancellation-out")
    failure = report.results[0].failure
    assert failure is not None
    assert failure.message.startswith("the backend raised CancelledError")
    assert report.results[1].status is Status.PASS


@pytest.mark.parametrize("name", ["waits", "sleeps"])
async def test_a_hang_in_a_worker_process_is_named_and_the_process_is_killed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A check has much more time than a call, because processes start slowly on a busy machine.
    monkeypatch.setattr(Limits, "of", lambda profile, check_timeout: Limits(120.0, check_timeout))
    chosen = {one.name: one for one in all_checks()}
    racing, killed = chosen["claims_by_processes"], chosen["acknowledged_writes_survive_a_kill"]
    report = await run(f"{name}-sqlite", racing, killed, url=f"/{tmp_path}/x.db", limit=6.0)
    for result in report.results:
        failure = hang_of(result)
        assert failure.message.startswith("in another process, try_claim_step(")
        assert failure.operation == "try_claim_step"
        assert failure.traceback is not None
        assert "in try_claim_step" in failure.traceback
    assert _children_of(os.getpid()) == []
    assert os.listdir(tmp_path) == []


def _children_of(process: int) -> list[int]:
    """Return the child processes of the suite."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            words = (folder / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == process and "flowstore_conformance" in words:
            found.append(int(folder.name))
    return found


async def test_limits_are_scaled_and_validated() -> None:
    limits = Limits.of(select_profile("quick"))
    assert (limits.check, limits.call) == (120.0, 30.0)
    assert limits.scaled(3.0).call == 90.0
    assert (limits.failures, limits.retries, limits.scaled(3.0).failures) == (1200.0, 240.0, 3600.0)
    assert Limits.of(select_profile("quick"), 8.0).call == 4.0
    with pytest.raises(ConfigurationError, match="check timeout must be a positive number"):
        await run_suite("memory://", checks=[], check_timeout=0.0)


def select_profile(name: str) -> Any:
    from flowstore_conformance import Profile

    return Profile(name)


# The watchdog without the suite


async def test_the_watchdog_does_not_handle_other_cancellations() -> None:
    dog = Watchdog(Limits(60.0, 60.0))

    async def guarded() -> None:
        async with dog.watch():
            await asyncio.Event().wait()

    task = asyncio.create_task(guarded())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_the_watchdog_restores_the_state_of_the_task() -> None:
    dog = Watchdog(Limits(0.05, 60.0))
    with pytest.raises(Hung, match="no call of the store was in progress"):
        async with dog.watch():
            await asyncio.Event().wait()
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    async with asyncio.timeout(5):
        await asyncio.sleep(0)


async def test_a_hang_round_trips_through_json() -> None:
    hang = Hang(message="m", operation="ping", place="a.py:1 in f", stack="s\nt")
    assert Hang.from_json(hang.to_json()) == hang


async def test_a_stack_includes_tasks_and_context_managers() -> None:
    async def innermost() -> None:
        await asyncio.Event().wait()

    async def outer() -> None:
        await asyncio.create_task(innermost())

    task = asyncio.create_task(outer())
    for _ in range(3):
        await asyncio.sleep(0)
    names = [frame.f_code.co_name for _, frame in await_chain(task.get_coro())]
    task.cancel()
    assert names[:2] == ["outer", "innermost"]


# An interrupt


class Command:
    """The command in a separate process, which writes every format of the report."""

    FORMS = ("json", "html", "junit", "markdown", "badge")

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        path = os.pathsep.join([str(DIST), str(ROOT), *(each for each in sys.path if each)])
        forms = [word for form in self.FORMS for word in (f"--{form}", f"r.{form}")]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flowstore_cli.main", "conformance", *arguments, *forms],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.said = ""
        """What the command has written to stderr, after an interrupt."""

    def wait_for(self, text: str) -> None:
        """Read the progress until it contains a text."""
        assert self.process.stderr is not None
        while text not in (line := self.process.stderr.readline()):
            assert line, f"the command ended before {text}"

    def interrupt(self, number: int, *, group: bool = False) -> str:
        """Send a signal to the command, or to its process group as a terminal does; return its stdout."""
        (os.killpg if group else os.kill)(self.process.pid, number)
        try:
            printed, self.said = self.process.communicate(timeout=60)
        finally:
            self.process.kill()
        return printed

    def read(self, form: str) -> str:
        return (self.folder / f"r.{form}").read_text(encoding="utf-8")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", ["waits", "sleeps", "waits-for-a-thread"])
def test_an_interrupt_writes_every_report_of_the_completed_checks(
    name: str, number: int, tmp_path: Path
) -> None:
    checks = ("--check", "examples_of_run_1", "--check", "claims_by_tasks")
    command = Command(tmp_path, f"faulty-{name}://", "--profile", "quick", "--seed", "7", *checks)
    command.wait_for("[1/")
    # The next check hangs for 30 s; it may start before or after the signal.
    printed = command.interrupt(number)
    assert command.process.returncode == 130
    assert "INCOMPLETE: interrupted after 1 of " in printed
    told = json.loads(command.read("json"))
    assert told["verdict"] == "INCOMPLETE"
    assert told["incomplete"].startswith("interrupted after 1 of ")
    assert (told["conforms"], told["level"]) == (False, None)
    assert "interrupted after 1 of" in command.read("html")
    assert "interrupted after 1 of" in command.read("markdown")
    assert "incomplete" in json.loads(command.read("badge"))["message"]
    root = ET.fromstring(command.read("junit"))
    assert root.get("errors") == "1"
    assert root.find(".//error[@type='incomplete']") is not None


@pytest.mark.parametrize("group", [False, True], ids=["command", "terminal"])
def test_an_interrupt_kills_all_worker_processes(group: bool, tmp_path: Path) -> None:
    url = f"faulty-waits-sqlite:///{tmp_path}/x.db"
    command = Command(tmp_path, url, "--profile", "quick", "--check", "claims_by_processes")
    until = time.monotonic() + 60
    while not (children := _children_of(command.process.pid)):
        assert time.monotonic() < until
        time.sleep(0.05)
    command.interrupt(signal.SIGINT, group=group)
    assert command.process.returncode == 130
    assert "KeyboardInterrupt" not in command.said
    for child in children:
        assert not Path(f"/proc/{child}").exists()
    assert [name for name in os.listdir(tmp_path) if not name.startswith("r.")] == []


async def test_a_run_can_be_stopped_from_python() -> None:
    stop = asyncio.Event()
    report = await run_suite(
        "memory://",
        checks=[example_check("RUN-1", "one", passes), example_check("RUN-2", "two", passes)],
        progress=lambda result, number, count: stop.set(),
        stop=stop,
    )
    assert [one.status for one in report.results] == [Status.PASS, Status.NOT_RUN]
    assert report.incomplete == "interrupted after 1 of 2 checks"
    assert (report.conforms, report.verdict) == (False, "INCOMPLETE")


async def test_a_failure_before_the_stop_is_reported() -> None:
    stop, caller = asyncio.Event(), asyncio.get_running_loop()
    runs = 0

    async def fails(context: CheckContext) -> None:
        nonlocal runs
        runs += 1
        if runs > 1:
            # The suite reruns a failed check; the rerun is stopped.
            caller.call_soon_threadsafe(stop.set)
            await asyncio.Event().wait()
        raise ContractViolation("two winners")

    report = await run_suite("memory://", checks=[example_check("RUN-1", "one", fails)], stop=stop)
    assert [one.status for one in report.results] == [Status.FAIL]
    assert (report.conforms, report.verdict) == (False, "VIOLATES")


# Under pytest


def test_the_watchdog_works_together_with_pytest_timeout(tmp_path: Path) -> None:
    path = os.pathsep.join([str(DIST), str(ROOT), *(each for each in sys.path if each)])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-p",
                "no:cacheprovider",
                "-p",
                "no:asyncio",
                "--timeout=1",
            ),
            *("-p", "flowstore_conformance.pytest_plugin", "--pyargs", "flowstore_conformance"),
            *("--flowstore-url=faulty-waits-for-a-thread://", "--flowstore-clause=CLM-7"),
            *("--flowstore-profile=quick", "--flowstore-check-timeout=6"),
        ],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    # A check whose hook the backend lacks is skipped.
    assert re.search(r"^[1-9] failed(, \d skipped)? in ", done.stdout, re.M)
    # Where the lines of the message end depends on the arguments of the call.
    assert "did not return within 3 s" in " ".join(done.stdout.split())
    assert "released.wait(LONG)" in done.stdout
    assert "Timeout" not in done.stdout
