"""Checks that two processes share: the same results, whatever happens to the other process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flowstore_conformance import CheckResult, Report, Status, run_suite, suite
from flowstore_conformance.context import CheckContext
from flowstore_conformance.guard import Refused
from flowstore_conformance.lane_pool import MODULE, LaneOrder, read_processes
from flowstore_conformance.registry import Check, all_checks

from flowstore_core import ConfigurationError
from flowstore_core.plugins import Plugin, find_backend
from flowstore_sqlite.plugin import SqliteBackend
from tests import faulty
from tests.conformance_reports import example_check
from tests.mutants import run_mutants

ROOT = Path(__file__).parents[1]

SHORT = [
    "examples_of_run_4",
    "examples_of_stp_2",
    "examples_of_clm_1",
    "examples_of_clm_2",
    "examples_of_sig_1",
    "examples_of_evt_2",
    "examples_of_tag_2",
    "examples_of_idm_2",
]
"""Checks that take a moment each, more than there are lanes."""


class SharedRun:
    """A run of the short checks in two processes.

    Once this process has taken a check for each of its lanes, it waits for a result of the other process,
    which therefore runs some of the checks.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
        self._monkeypatch = monkeypatch
        self._url = url
        self._result_from_other = asyncio.Event()
        self.ran_here: set[str] = set()
        self.names = list(SHORT)
        self.on_result_from_other: Callable[[], None] = lambda: None
        self.waits = True

    async def run(self, **options: Any) -> Report:
        known = {one.name: one for one in all_checks()}
        checks = [self._follow(known[name]) for name in self.names]
        self._monkeypatch.setattr(suite, "all_checks", lambda: checks)
        return await run_suite(
            self._url,
            **{"profile": "quick", "seed": 7, "processes": 2, "progress": self._progress, **options},
        )

    async def go_on_when_the_other_process_ends(self) -> None:
        """Wait for the start and the end of the other process, which reports no result."""
        for number in (1, 0):
            while len(lane_workers_of(os.getpid())) != number:  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.05)
        self._result_from_other.set()

    def _follow(self, check: Check) -> Check:
        loop = asyncio.get_running_loop()

        async def run(context: CheckContext) -> None:
            self.ran_here.add(check.name)
            if self.waits:
                waiting = asyncio.run_coroutine_threadsafe(self._result_from_other.wait(), loop)
                await asyncio.wrap_future(waiting)
            await check.run(context)

        return replace(check, run=run)

    def _progress(self, result: CheckResult, number: int, count: int) -> None:
        if result.check.name not in self.ran_here and not self._result_from_other.is_set():
            self.on_result_from_other()
            self._result_from_other.set()


def url_in(folder: Path) -> str:
    return f"sqlite:///{folder}/flows.db"


def results_of(report: Report) -> list[tuple[Any, ...]]:
    return [
        (one.check.name, one.status, one.assertions, one.variant, one.failure and one.failure.clause)
        for one in report.results
    ]


def passed_or_unsupported(report: Report) -> bool:
    return {one.status for one in report.results} <= {Status.PASS, Status.UNSUPPORTED}


def names_in(folder: Path) -> set[str]:
    """The names of all files and folders in a folder."""
    return {one.name for one in folder.rglob("*")}


def folders_of(urls: Iterable[str]) -> set[str]:
    """The folders of SQLite's namespaces."""
    return {Path(url.partition("://")[2]).parent.name for url in urls}


def lane_workers_of(parent: int) -> list[int]:
    """The processes with lanes that a process has started."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            # The command in parentheses may contain spaces.
            status = (entry / "stat").read_text().rpartition(")")[2].split()
            command = (entry / "cmdline").read_text().split("\0")
        except (OSError, ValueError):
            continue
        if MODULE in command and int(status[1]) == parent and status[0] != "Z":
            found.append(int(entry.name))
    return found


def wait_until(condition: Callable[[], bool], said: str) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until, said
        time.sleep(0.05)


@pytest.mark.parametrize("options", [{}, {"faults": True}, {"variant": "one reader"}], ids=str)
async def test_two_processes_find_the_same_results_as_one(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, memory_path: Path
) -> None:
    shared = SharedRun(monkeypatch, url_in(memory_path))
    by_two = await shared.run(**options)
    assert shared.ran_here < set(SHORT)
    alone = SharedRun(monkeypatch, url_in(memory_path))
    alone.waits = False
    by_one = await alone.run(processes=1, **options)
    assert alone.ran_here == set(SHORT)
    assert results_of(by_two) == results_of(by_one)
    assert passed_or_unsupported(by_two)
    assert by_two.left_behind == ()
    assert names_in(memory_path) == set()


async def test_a_fault_is_reported_whichever_process_meets_it(
    monkeypatch: pytest.MonkeyPatch, memory_path: Path
) -> None:
    monkeypatch.syspath_prepend(run_mutants.DIST)
    url = f"mutant-first-output-wins://{url_in(memory_path).partition('://')[2]}"
    # All checks that the other process takes, and all that this one takes, find the fault.
    reports = []
    for processes in (2, 1):
        shared = SharedRun(monkeypatch, url)
        shared.waits = processes == 2
        reports.append(await shared.run(processes=processes, repeats=0))
    assert results_of(reports[0]) == results_of(reports[1])
    failed = {one.check.name for one in reports[0].results if one.status is Status.FAIL}
    assert "examples_of_evt_2" in failed


async def test_a_hang_is_reported_whichever_process_meets_it(
    monkeypatch: pytest.MonkeyPatch, memory_path: Path
) -> None:
    monkeypatch.syspath_prepend(faulty.DIST)
    url = f"faulty-waits-sqlite://{url_in(memory_path).partition('://')[2]}"
    reports = []
    for processes in (2, 1):
        shared = SharedRun(monkeypatch, url)
        shared.waits = processes == 2
        shared.names = [name for name in SHORT if "_clm_" not in name] + ["claims_by_stores"]
        # The other process takes the check that hangs, and may end before it has reported a result.
        ending = asyncio.create_task(shared.go_on_when_the_other_process_ends())
        reports.append(await shared.run(processes=processes, repeats=0, check_timeout=8.0))
        ending.cancel()
    assert results_of(reports[0]) == results_of(reports[1])
    hung = {one.check.name for one in reports[0].results if one.failure is not None and one.failure.hung}
    assert "claims_by_stores" in hung


async def test_no_check_is_lost_if_the_other_process_is_killed(
    monkeypatch: pytest.MonkeyPatch, memory_path: Path
) -> None:
    shared = SharedRun(monkeypatch, url_in(memory_path))

    def kill() -> None:
        (worker,) = lane_workers_of(os.getpid())
        os.kill(worker, signal.SIGKILL)

    shared.on_result_from_other = kill
    report = await shared.run()
    assert [one.check.name for one in report.results] == SHORT
    assert passed_or_unsupported(report)
    # The namespaces of the killed process are still there.
    assert report.left_behind
    assert folders_of(report.left_behind) <= names_in(memory_path)


class Elsewhere(SqliteBackend):
    """A backend that only this process has: another one finds SQLite under its URL."""


async def test_a_backend_of_this_process_alone_is_checked_here(
    monkeypatch: pytest.MonkeyPatch, memory_path: Path
) -> None:
    def find(scheme: str) -> tuple[Plugin, Any]:
        return find_backend(scheme)[0], Elsewhere()

    monkeypatch.setattr(suite, "find_backend", find)
    shared = SharedRun(monkeypatch, url_in(memory_path))
    shared.waits = False
    report = await shared.run()
    assert shared.ran_here == set(SHORT)
    assert passed_or_unsupported(report)


async def test_checks_of_this_process_alone_run_here(
    monkeypatch: pytest.MonkeyPatch, memory_path: Path
) -> None:
    ran: set[str] = set()

    def recorded(name: str) -> Check:
        async def run(context: CheckContext) -> None:
            ran.add(name)
            context.assertions += 1

        return example_check("RUN-1", name, run)

    checks = [recorded(f"check {number}") for number in range(suite.LANES + 4)]
    monkeypatch.setattr(suite, "all_checks", lambda: checks)
    report = await run_suite(url_in(memory_path), profile="quick", seed=7, processes=2)
    assert ran == {check.name for check in checks}
    assert passed_or_unsupported(report)


async def run_failing_at(
    failing: set[int], monkeypatch: pytest.MonkeyPatch, url: str, *, hangs: bool = False, **options: Any
) -> CheckResult:
    """Run checks of which one fails, or waits for ever, in the given ones of its runs; return its result.

    The first run is beside other checks.
    """
    runs = 0

    async def fail(context: CheckContext) -> None:
        nonlocal runs
        runs += 1
        if runs in failing and hangs:
            await asyncio.Event().wait()
        context.expect_that(runs not in failing, f"run {runs} fails")

    async def succeed(context: CheckContext) -> None:
        context.assertions += 1

    checks = [example_check("RUN-1", f"check {number}", succeed) for number in range(suite.LANES)]
    checks.insert(1, example_check("RUN-2", "a check that fails", fail))
    monkeypatch.setattr(suite, "all_checks", lambda: checks)
    report = await run_suite(url, profile="quick", seed=7, processes=1, **options)
    return next(one for one in report.results if one.check is checks[1])


async def test_a_failure_beside_other_checks_is_told_although_the_check_passes_alone(
    monkeypatch: pytest.MonkeyPatch, memory_path: Path
) -> None:
    result = await run_failing_at({1}, monkeypatch, url_in(memory_path))
    assert result.status is Status.PASS
    assert result.notes == (
        "passed 5 times when it ran alone, after a failure beside other checks: run 1 fails",
    )


async def test_a_check_that_failed_beside_others_gets_several_chances_to_fail_alone(
    monkeypatch: pytest.MonkeyPatch, memory_path: Path
) -> None:
    result = await run_failing_at({1, 4, 5}, monkeypatch, url_in(memory_path))
    assert result.status is Status.FAIL
    assert result.failure is not None
    assert "run 4 fails" in result.failure.message


async def test_a_hang_beside_other_checks_is_told_although_the_check_passes_alone(
    monkeypatch: pytest.MonkeyPatch, memory_path: Path
) -> None:
    result = await run_failing_at({1}, monkeypatch, url_in(memory_path), hangs=True, check_timeout=1.0)
    assert result.status is Status.PASS
    (note,) = result.notes
    assert "did not end" in note


async def test_a_check_that_runs_alone_meets_no_other(
    monkeypatch: pytest.MonkeyPatch, memory_path: Path
) -> None:
    running: set[str] = set()
    most: dict[str, int] = {}

    def recorded(name: str, *, alone: bool) -> Check:
        async def run(context: CheckContext) -> None:
            running.add(name)
            for _ in range(5):
                most[name] = max(most.get(name, 0), len(running))
                await asyncio.sleep(0.01)
            running.remove(name)
            context.assertions += 1

        return replace(example_check("RUN-1", name, run), alone=alone)

    checks = [recorded(f"check {number}", alone=number % 3 == 1) for number in range(suite.LANES + 6)]
    monkeypatch.setattr(suite, "all_checks", lambda: checks)
    assert passed_or_unsupported(await run_suite(url_in(memory_path), profile="quick", seed=7, processes=1))
    assert {most[check.name] for check in checks if check.alone} == {1}
    assert max(most.values()) > 1


@pytest.mark.parametrize("url", ["nowhere://x", "memory://"])
def test_a_process_without_the_backend_ends_at_once(url: str) -> None:
    read, write = os.pipe()
    order = LaneOrder(
        url=url,
        origin="another class",
        capabilities=[],
        profile="quick",
        seed=7,
        variant=None,
        faults=False,
        findings=[],
        limits={},
        lanes=1,
        checks=[],
        queue=read,
    )
    message = json.dumps({name: getattr(order, name) for name in LaneOrder.__slots__})
    done = subprocess.run(
        [sys.executable, "-m", MODULE],
        input=f"{message}\n",
        pass_fds=[read],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    os.close(read)
    os.close(write)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


TREACHEROUS = '''\
import dataclasses
import sys
from contextlib import asynccontextmanager

from flowstore_core import hookimpl
from flowstore_sqlite.plugin import SqliteBackend

sqlite = SqliteBackend()


class Treacherous:
    """SQLite, but in another process than that of the suite scratch() returns the URL that it was given."""

    name = "treacherous"
    schemes = frozenset({name})
    capabilities = sqlite.capabilities
    options = sqlite.options
    contract_version = 1

    def open(self, config):
        url = config.url.replace("treacherous", "sqlite", 1)
        return sqlite.open(dataclasses.replace(config, url=url, scheme="sqlite"))

    @asynccontextmanager
    async def scratch(self, url):
        if "lane_worker" in sys.argv[0]:
            yield url
        else:
            async with sqlite.scratch(url.replace("treacherous", "sqlite", 1)) as fresh:
                yield fresh.replace("sqlite", "treacherous", 1)


@hookimpl
def flowstore_backends():
    return [Treacherous()]
'''


async def test_a_refused_namespace_in_the_other_process_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, memory_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "flowstore_treacherous.py").write_text(TREACHEROUS)
    info = tmp_path / "flowstore_treacherous-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flowstore-treacherous\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[flowstore]\ntreacherous = flowstore_treacherous\n")
    monkeypatch.syspath_prepend(tmp_path)
    shared = SharedRun(monkeypatch, f"treacherous:///{memory_path}/flows.db")
    ending = asyncio.create_task(shared.go_on_when_the_other_process_ends())
    with pytest.raises(Refused, match="returned the URL that it was given"):
        await shared.run()
    await ending
    assert names_in(memory_path) == set()


async def test_a_stop_ends_the_other_process_and_drops_its_namespaces(
    monkeypatch: pytest.MonkeyPatch, memory_path: Path
) -> None:
    stop = asyncio.Event()
    shared = SharedRun(monkeypatch, url_in(memory_path))
    shared.on_result_from_other = stop.set
    report = await shared.run(stop=stop)
    assert report.incomplete is not None
    assert lane_workers_of(os.getpid()) == []
    assert (report.left_behind, names_in(memory_path)) == ((), set())


@pytest.fixture
def command(memory_path: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The command with two processes, which have begun to run checks."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "flowstore_cli.main", "conformance", url_in(memory_path)),
            *(
                "--profile",
                "quick",
                "--seed",
                "7",
                "--processes",
                "2",
                "--json",
                str(tmp_path / "report.json"),
            ),
        ],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: bool(lane_workers_of(process.pid)), "no other process started")
        yield process
    finally:
        process.kill()
        process.communicate()


def test_an_interrupt_leaves_no_process_and_reports_each_namespace_that_is_left(
    command: subprocess.Popen[str], memory_path: Path, tmp_path: Path
) -> None:
    (worker,) = lane_workers_of(command.pid)
    wait_until(lambda: has_namespace_of(worker, memory_path), "the other process made no namespace")
    command.send_signal(signal.SIGINT)
    _, said = command.communicate(timeout=100)
    assert command.returncode == 130, said
    assert "KeyboardInterrupt" not in said
    assert not is_running(worker)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["verdict"] == "INCOMPLETE"
    # On a busy machine the suite may give up an event loop that does not answer.
    assert {one.name for one in memory_path.iterdir()} <= folders_of(report["left_behind"])


def test_the_other_process_ends_and_cleans_up_after_a_killed_suite(
    command: subprocess.Popen[str], memory_path: Path
) -> None:
    (worker,) = lane_workers_of(command.pid)
    wait_until(lambda: has_namespace_of(worker, memory_path), "the other process made no namespace")
    made = open_files(worker, memory_path)
    command.kill()
    command.wait()
    wait_until(lambda: not is_running(worker), "the other process still runs")
    assert not [path for path in made if Path(path).exists()]


def open_files(process: int, folder: Path) -> set[str]:
    """The files in a folder that a process has open."""
    found = set()
    for entry in Path(f"/proc/{process}/fd").iterdir():
        try:
            path = os.readlink(entry)
        except OSError:
            continue
        if path.startswith(str(folder)) and not path.endswith(" (deleted)"):
            found.add(path)
    return found


def has_namespace_of(process: int, folder: Path) -> bool:
    return bool(open_files(process, folder))


def is_running(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return status[0] != "Z"


ABANDONS = """\
import asyncio
import time

from flowstore_conformance.supervisor import Supervisor
from flowstore_conformance.watchdog import Hung, Limits, Watchdog
from flowstore_conformance.worker_pool import WorkerProcesses


async def main():
    supervisor, processes = Supervisor(Watchdog(Limits(call=2.0))), WorkerProcesses()

    async def use():
        async with processes.use(1) as workers:
            await workers[0].request({"open": "memory://", "clock": True, "limit": 30.0})

    async def block():
        while True:
            time.sleep(0.01)

    await supervisor.run(use)
    try:
        await supervisor.run(block)
    except Hung:
        await supervisor.run(processes.aclose)
        await supervisor.aclose()
        print("closed")


asyncio.run(main())
"""


def test_worker_processes_of_an_abandoned_loop_can_be_closed() -> None:
    # In a process of its own, because the pipes of an abandoned loop stay open.
    done = subprocess.run(
        [sys.executable, "-c", ABANDONS], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stdout) == (0, "closed\n"), done.stderr


def test_the_number_of_processes_depends_on_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, wanted in ((1, 1), (2, 2), (8, 2)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, cores=cores: set(range(cores)))
        assert read_processes(None) == wanted
    assert read_processes(3) == 3
    with pytest.raises(ConfigurationError, match="processes must be at least 1, not 0"):
        read_processes(0)
