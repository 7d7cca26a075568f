"""The command's standard streams: closed, full, or a pipe without a reader."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import flowstore_conformance.suite
import pytest

from flowstore_cli.main import main
from flowstore_core import FlowStore, RunStatus, SignalDeliveryStatus, open_store
from flowstore_core.validation import MAX_TEXT_BYTES
from tests.conformance_reports import breaks, example_check, passes

WRITE_ERROR = "flowstore: standard output cannot be written: No space left on device\n"
FULL = Path("/dev/full")

needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
StoreWithRun = tuple[str, UUID]


@pytest.fixture
def store_with_run(tmp_path: Path) -> StoreWithRun:
    """The URL of a store, and a run in it with a step that waits for signal ``go``."""
    url, run_id = f"sqlite:///{tmp_path}/flows.db", uuid4()

    async def fill() -> None:
        async with open_store(url) as store:
            await store.start_run(uuid4(), "flow", run_id, "manual")
            await store.record_step_start(run_id, "wait", "signal")
            await store.register_waiter(run_id, "wait", "go")

    asyncio.run(fill())
    return url, run_id


def call_store(url: str, function: Callable[[FlowStore], Any]) -> Any:
    async def run() -> Any:
        async with open_store(url) as store:
            return await function(store)

    return asyncio.run(run())


def shell(
    redirections: str, *arguments: str, piped: bytes = b"", environment: Mapping[str, str] | None = None
) -> tuple[int, str, str]:
    """Run the command with these redirections: exit code, stdout, stderr."""
    command = ["sh", "-c", f'"$@" {redirections}', "sh", sys.executable, "-m", "flowstore_cli.main"]
    done = subprocess.run(
        [*command, *arguments],
        input=piped,
        capture_output=True,
        timeout=60,
        env={**os.environ, **(environment or {})},
        check=False,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


COMMANDS = (
    ["--help"],
    ["runs", "list", "--help"],
    ["--version"],
    ["backends"],
    ["backends", "--json"],
    ["migrate", "sql", "--url", "postgresql://host/db"],
)


@needs_full
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_full_output_is_a_one_line_error(command: list[str]) -> None:
    assert shell("> /dev/full", *command) == (4, "", WRITE_ERROR)


@needs_full
def test_a_full_unbuffered_output_is_a_one_line_error() -> None:
    assert shell("> /dev/full", "backends", environment={"PYTHONUNBUFFERED": "1"}) == (4, "", WRITE_ERROR)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_closed_output_is_no_error(command: list[str]) -> None:
    assert shell(">&-", *command) == (0, "", "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_is_no_error(unbuffered: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "flowstore_cli.main", "migrate", "sql", "--url", "postgresql://host/db"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    assert process.communicate(timeout=60) == (None, b"")
    assert process.returncode == 0


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_slow_reader_of_a_non_blocking_pipe_gets_the_whole_output(unbuffered: str) -> None:
    command = [sys.executable, "-m", "flowstore_cli.main", "migrate", "sql", "--url", "postgresql://host/db"]
    expected = subprocess.run(command, capture_output=True, timeout=60, check=True).stdout
    assert len(expected) > 4096
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    # The pipe is full, so the first write blocks.
    filled = 0
    while True:
        try:
            filled += os.write(writing, b"\0" * 4096)
        except BlockingIOError:
            break
    process = subprocess.Popen(
        command,
        stdout=writing,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    os.close(writing)
    with open(reading, "rb") as pipe:
        assert pipe.read()[filled:] == expected
    assert process.communicate(timeout=60)[1] == b""
    assert process.returncode == 0


def test_a_signal_is_delivered_although_output_is_closed(store_with_run: StoreWithRun) -> None:
    url, run_id = store_with_run
    assert shell(">&-", "signal", "deliver", str(run_id), "go", "1", "--url", url) == (0, "", "")
    second = call_store(url, lambda store: store.deliver_signal(run_id, "go", "1"))
    assert second.status is SignalDeliveryStatus.ALREADY_DELIVERED


@needs_full
def test_a_signal_is_delivered_although_output_is_full(store_with_run: StoreWithRun) -> None:
    url, run_id = store_with_run
    arguments = ["signal", "deliver", str(run_id), "go", "1", "--url", url]
    assert shell("> /dev/full", *arguments) == (4, "", WRITE_ERROR)
    # A negative result keeps its exit code.
    assert shell("> /dev/full", *arguments) == (1, "", WRITE_ERROR)


@pytest.mark.parametrize("redirection", ["2>&-", "2> /dev/full", ">&- 2>&-", "<&- >&- 2>&-"])
def test_the_exit_code_is_correct_without_stderr(redirection: str, store_with_run: StoreWithRun) -> None:
    if "/dev/full" in redirection and not FULL.exists():
        pytest.skip("needs /dev/full")
    url, run_id = store_with_run
    code, out, _ = shell(redirection, "runs", "show", str(run_id), "--url", url)
    assert (code, str(run_id) in out) == (0, ">&- " not in redirection)
    assert shell(redirection, "runs", "show", str(uuid4()), "--url", url) == (1, "", "")
    assert shell(redirection, "runs", "nonsense") == (2, "", "")


NULL_DEVICE = """
import os, subprocess, sys
from flowstore_cli.streams import guarded_streams

check = "import os; null = os.stat(os.devnull).st_rdev; [os.fstat(fd) for fd in range(3)]; "
check += "raise SystemExit(any(os.fstat(fd).st_rdev != null for fd in range(3)))"
with guarded_streams():
    code = subprocess.run([sys.executable, "-c", check]).returncode
    exec(check if code == 0 else "raise SystemExit(2)")
"""


def test_closed_streams_are_the_null_device_for_child_processes() -> None:
    command = ["sh", "-c", '"$@" <&- >&- 2>&-', "sh", sys.executable, "-c", NULL_DEVICE]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0


def test_the_streams_of_the_caller_are_restored() -> None:
    before = sys.stdin, sys.stdout, sys.stderr
    assert main(["--version"]) == 0
    assert (sys.stdin, sys.stdout, sys.stderr) == before


@pytest.mark.parametrize(
    ("redirection", "piped", "locale", "message"),
    [
        ("<&-", b"", "C", "standard input is empty or closed"),
        ("< /dev/null", b"", "C", "standard input is empty or closed"),
        ("0> file", b"", "C", "standard input cannot be read: Bad file descriptor"),
        ("", b'"\xff"', "C", "standard input must be UTF-8, and its byte 1 is not"),
        ("", b'"\xff"', "C.UTF-8", "standard input must be UTF-8, and its byte 1 is not"),
        ("", b"not json", "C", "the payload is not JSON"),
    ],
)
def test_an_unreadable_payload_is_a_one_line_error(
    redirection: str,
    piped: bytes,
    locale: str,
    message: str,
    store_with_run: StoreWithRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    url, run_id = store_with_run
    arguments = ["signal", "deliver", str(run_id), "go", "-", "--url", url]
    code, out, err = shell(redirection, *arguments, piped=piped, environment={"LC_ALL": locale})
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"flowstore: {message}" in err


def test_a_payload_that_is_too_long_is_a_one_line_error(store_with_run: StoreWithRun) -> None:
    url, run_id = store_with_run
    arguments = ["signal", "deliver", str(run_id), "go", "-", "--url", url]
    limit = f"flowstore: standard input must have at most {MAX_TEXT_BYTES:,} bytes\n"
    assert shell("", *arguments, piped="é".encode() * MAX_TEXT_BYTES) == (2, "", limit)


def test_an_argument_that_is_not_utf_8_is_a_one_line_error(store_with_run: StoreWithRun) -> None:
    url, run_id = store_with_run
    payload = os.fsdecode(b'"\xff"')
    code, out, err = shell("", "signal", "deliver", str(run_id), "go", payload, "--url", url)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert "bug" not in err


REPLAY = ("replay", "--speed", "1000", "--workers", "2")


@pytest.mark.parametrize("fails", [False, True])
def test_a_replay_continues_when_its_reader_exits(fails: bool, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/flows.db"
    more = ["--fail-rate", "1", "--max-attempts", "1"] if fails else []
    process = subprocess.Popen(
        [sys.executable, "-m", "flowstore_cli.main", *REPLAY, *more, "--url", url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"replaying 'market-day'")
    process.stdout.close()
    process.stdout = None
    err = process.communicate(timeout=60)[1]
    assert process.returncode == (1 if fails else 0)
    assert err.startswith(b"created the schema of ")
    assert err.count(b"\n") == 1
    (run,) = call_store(url, lambda store: store.get_runs())
    assert run.status is (RunStatus.FAILED if fails else RunStatus.SUCCEEDED)


def test_an_interrupted_replay_exits_cleanly(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "flowstore_cli.main", "replay", "--speed", "1", "--workers", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.endswith(" of 1 runs\n"):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    created, hint, last = err.splitlines()
    assert created.startswith("created the schema of ")
    assert hint.startswith("the runs stay in the store; continue them with: flowstore replay --key ")
    assert last == "flowstore: interrupted"


INTERRUPTED_IMPORT = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "flowstore_cli.app":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Finder())
from flowstore_cli.main import main
sys.exit(main(["backends"]))
"""


INTERRUPTED_LOOP = """
import asyncio.selector_events, os, signal, sys
loop = asyncio.selector_events.BaseSelectorEventLoop
create = loop.__init__
def interrupt(*arguments):
    os.kill(os.getpid(), signal.SIGINT)
    create(*arguments)
loop.__init__ = interrupt
from flowstore_cli.main import main
sys.exit(main(["ping", "--url", "memory://"]))
"""


@pytest.mark.parametrize("program", [INTERRUPTED_IMPORT, INTERRUPTED_LOOP], ids=["import", "loop"])
def test_an_interrupt_during_startup_prints_one_line(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "flowstore: interrupted\n")


@needs_full
@pytest.mark.parametrize(("run_of", "code"), [(passes, 4), (breaks, 1)])
def test_other_reports_are_written_if_one_cannot_be_written(
    run_of: Any,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    checks = (example_check("CLM-1", "one_wins", run_of),)
    monkeypatch.setattr(flowstore_conformance.suite, "all_checks", lambda: checks)
    (tmp_path / "file").write_text("no folder")
    options = ["--json", "/dev/full", "--badge", "badge.json", "--programs", "file/programs"]
    assert main(["conformance", "memory://", "--clause", "CLM-1", *options]) == code
    output = capsys.readouterr()
    last = output.err.splitlines()[-1]
    assert last.startswith("flowstore: ")
    assert "/dev/full cannot be written: No space left on device" in last
    assert ("file/programs cannot be written: Not a directory" in last) is (run_of is breaks)
    assert "CLM-1" in output.out
    assert json.loads((tmp_path / "badge.json").read_text())["message"]
