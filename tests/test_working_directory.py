"""A working directory that is deleted or not accessible affects only relative paths."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from flowstore_cli.main import main
from flowstore_core import ConfigurationError, StoreUnavailableError, open_store
from flowstore_core.config import resolve_url
from flowstore_core.plugins import find_backend


@pytest.fixture
def deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a deleted working directory. Returns its parent."""
    monkeypatch.delenv("FLOWSTORE_URL", raising=False)
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    return tmp_path


async def _opens(url: str | None) -> None:
    async with open_store(url) as store:
        await store.ping()


@pytest.mark.parametrize("by_variable", [False, True])
async def test_absolute_urls_open_in_a_deleted_directory(
    by_variable: bool, deleted: Path, postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with find_backend("postgresql")[1].scratch(postgresql_url) as fresh:
        for url in ("memory://", f"sqlite:///{deleted}/flows.db", fresh):
            if by_variable:
                monkeypatch.setenv("FLOWSTORE_URL", url)
            await _opens(None if by_variable else url)


@pytest.mark.parametrize("url", ["sqlite:///flows.db", "sqlite:///../flows.db", None])
async def test_a_relative_path_in_a_deleted_directory_is_a_configuration_error(
    url: str | None, deleted: Path
) -> None:
    with pytest.raises(ConfigurationError, match=r"working directory no longer exists.*sqlite:////"):
        await _opens(url)
    with pytest.raises(ConfigurationError, match="working directory"):
        async with find_backend("sqlite")[1].scratch(url or "sqlite:///flowstore.db"):
            pytest.fail("it was made")


def test_commands_work_in_a_deleted_directory(deleted: Path, capfd: pytest.CaptureFixture[str]) -> None:
    url = f"sqlite:///{deleted}/flows.db"
    for command in (
        ["migrate", "up", "--url", url],
        ["ping", "--url", url],
        ["doctor", "--url", url],
        ["replay", "--speed", "1000", "--workers", "2", "--url", url],
        ["backends"],
    ):
        assert main(command) == 0, capfd.readouterr()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["ping", "--url", "sqlite:///flows.db"], "absolute path"),
        (["doctor", "--url", "sqlite:///flows.db"], "absolute path"),
        (["migrate", "up"], "absolute path"),
        (["replay"], "absolute path"),
        (["conformance", "memory://", "--json", "report.json"], "change to another directory"),
        (["replay", "workflow.json", "--url", "memory://"], "workflow.json cannot be read"),
    ],
)
def test_commands_that_need_the_deleted_directory_say_so(
    command: list[str], says: str, deleted: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if command[0] == "conformance":
        # In a process without Hypothesis: other tests of this process have imported it.
        ran = subprocess.run(
            [sys.executable, "-P", "-m", "flowstore_cli.main", *command], capture_output=True, text=True
        )
        code, output = ran.returncode, ran.stderr
    else:
        code, output = main(command), capfd.readouterr().err
    assert code == 2, output
    assert says in output
    assert "bug" not in output


CLOSED = """
import asyncio, os, sys
from flowstore_core import FlowStoreError, open_store
import flowstore_sqlite.open

async def try_open(url):
    try:
        async with open_store(url) as store:
            await store.ping()
        print("opened")
    except FlowStoreError as error:
        print(type(error).__name__, error)

os.chdir(sys.argv[1])
os.chmod(sys.argv[1], int(sys.argv[2]))
# The first open, as the owner, imports everything: another user may be unable to read the interpreter.
asyncio.run(try_open(sys.argv[3] + "-first"))
if os.geteuid() == 0:
    os.setuid(65534)
for url in sys.argv[3:]:
    asyncio.run(try_open(url or None))
"""


@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_a_directory_that_the_user_may_not_enter_has_no_files_of_configuration(mode: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        closed = Path(folder) / "closed"
        closed.mkdir()
        (closed / "flowstore.toml").write_text("url = 'memory://'\n")
        environment = {name: value for name, value in os.environ.items() if name != "FLOWSTORE_URL"}
        urls = (f"sqlite:///{folder}/flows.db", "memory://", "sqlite:///flows.db", "")
        ran = subprocess.run(
            [sys.executable, "-P", "-c", CLOSED, str(closed), str(mode), *urls],
            env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        closed.chmod(0o700)
    output = ran.stdout.splitlines()
    assert output[1:3] == ["opened", "opened"], ran
    # Only relative paths need the directory.
    for line in output[3:]:
        assert line.startswith(StoreUnavailableError.__name__)
        assert "Permission denied" in line


def test_an_unreadable_configuration_file_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flowstore.toml").mkdir()
    with pytest.raises(ConfigurationError, match=r"flowstore\.toml cannot be read: Is a directory"):
        resolve_url("memory://", {})
