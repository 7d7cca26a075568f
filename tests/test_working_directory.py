"""A deleted or inaccessible working directory affects only relative paths."""

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
def deleted_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a deleted working directory. Returns its parent."""
    monkeypatch.delenv("FLOWSTORE_URL", raising=False)
    deleted = tmp_path / "deleted"
    deleted.mkdir()
    monkeypatch.chdir(deleted)
    deleted.rmdir()
    return tmp_path


async def _open_and_ping(url: str | None) -> None:
    async with open_store(url) as store:
        await store.ping()


@pytest.mark.parametrize("by_variable", [False, True])
async def test_absolute_urls_open_in_a_deleted_directory(
    by_variable: bool, deleted_directory: Path, postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with find_backend("postgresql")[1].scratch(postgresql_url) as fresh:
        for url in ("memory://", f"sqlite:///{deleted_directory}/flows.db", fresh):
            if by_variable:
                monkeypatch.setenv("FLOWSTORE_URL", url)
            await _open_and_ping(None if by_variable else url)


@pytest.mark.parametrize("url", ["sqlite:///flows.db", "sqlite:///../flows.db", None])
async def test_a_relative_path_in_a_deleted_directory_is_a_configuration_error(
    url: str | None, deleted_directory: Path
) -> None:
    with pytest.raises(ConfigurationError, match=r"working directory no longer exists.*sqlite:////"):
        await _open_and_ping(url)
    with pytest.raises(ConfigurationError, match="working directory"):
        async with find_backend("sqlite")[1].scratch(url or "sqlite:///flowstore.db"):
            pytest.fail("scratch succeeded")


def test_commands_run_in_a_deleted_directory(
    deleted_directory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{deleted_directory}/flows.db"
    for command in (
        ["migrate", "up", "--url", url],
        ["ping", "--url", url],
        ["doctor", "--url", url],
        ["replay", "--speed", "1000", "--workers", "2", "--url", url],
        ["backends"],
    ):
        assert main(command) == 0, capfd.readouterr()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["ping", "--url", "sqlite:///flows.db"], "absolute path"),
        (["doctor", "--url", "sqlite:///flows.db"], "absolute path"),
        (["migrate", "up"], "absolute path"),
        (["replay"], "absolute path"),
        (["conformance", "memory://", "--json", "report.json"], "change to another directory"),
        (["replay", "workflow.json", "--url", "memory://"], "workflow.json cannot be read"),
    ],
)
def test_commands_that_need_the_deleted_directory_report_it(
    command: list[str], message: str, deleted_directory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if command[0] == "conformance":
        # Run in a new process, because other tests of this process have imported Hypothesis.
        ran = subprocess.run(
            [sys.executable, "-P", "-m", "flowstore_cli.main", *command], capture_output=True, text=True
        )
        code, output = ran.returncode, ran.stderr
    else:
        code, output = main(command), capfd.readouterr().err
    assert code == 2, output
    assert message in output
    assert "bug" not in output


INACCESSIBLE = """
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
# Import everything as the owner: the other user may be unable to read the files of the interpreter.
asyncio.run(try_open(sys.argv[3] + "-first"))
if os.geteuid() == 0:
    os.setuid(65534)
for url in sys.argv[3:]:
    asyncio.run(try_open(url or None))
"""


@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_an_inaccessible_directory_has_no_configuration_files(mode: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        inaccessible = Path(folder) / "inaccessible"
        inaccessible.mkdir()
        (inaccessible / "flowstore.toml").write_text("url = 'memory://'\n")
        environment = {name: value for name, value in os.environ.items() if name != "FLOWSTORE_URL"}
        urls = (f"sqlite:///{folder}/flows.db", "memory://", "sqlite:///flows.db", "")
        ran = subprocess.run(
            [sys.executable, "-P", "-c", INACCESSIBLE, str(inaccessible), str(mode), *urls],
            env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        inaccessible.chmod(0o700)
    output = ran.stdout.splitlines()
    assert output[1:3] == ["opened", "opened"], ran
    # Only relative paths need the working directory.
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
