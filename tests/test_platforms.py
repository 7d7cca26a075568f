"""Systems without POSIX: which parts work there, and the errors of the others.

The tests simulate such a system in a subprocess: os.name is not "posix", and functions and modules that
Windows lacks are removed.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from flowstore_conformance.guard import guard

from flowstore_core import ConfigurationError
from flowstore_core.plugins import find_backend

ROOT = Path(__file__).parents[1]

WITHOUT_POSIX = """
import asyncio, logging, multiprocessing, os, pathlib, shutil, signal, socket, ssl
import subprocess, sys, tempfile, uuid

def missing(*arguments, **keywords):
    raise NotImplementedError

for name in ("add_signal_handler", "remove_signal_handler", "add_reader", "add_writer"):
    setattr(asyncio.SelectorEventLoop, name, missing)
for name in ("O_NONBLOCK", "O_NOFOLLOW", "O_CLOEXEC", "fchmod", "fchown", "eventfd", "fork",
             "register_at_fork", "geteuid", "getuid", "killpg", "setsid", "uname", "pread", "pwrite",
             "statvfs"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIG_BLOCK", "SIG_SETMASK", "pthread_sigmask"):
    delattr(signal, name)
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None
os.name = "other"
"""

LIFECYCLE = """
from datetime import timedelta
from flowstore_core import RunStatus, StepStatus, new_claim_token, new_run_id, open_store

async def main(url):
    async with open_store(url) as store:
        async def one():
            run_id, token = new_run_id(), new_claim_token()
            await store.start_run(new_run_id(), "orders", run_id, "manual")
            assert await store.try_claim_step(run_id, "a", owner=token, lease=timedelta(seconds=9))
            attempt = await store.record_step_start(run_id, "a", "http", owner=token)
            await store.record_step_complete(run_id, "a", StepStatus.SUCCEEDED, attempt=attempt)
            assert await store.complete_run(run_id, RunStatus.SUCCEEDED, expected={"a": "Succeeded"})
        await asyncio.gather(*(one() for _ in range(20)))
        print((await store.get_runs_page(status=RunStatus.SUCCEEDED)).total_count)

asyncio.run(main(sys.argv[1]))
"""

COMMAND = "from flowstore_cli.main import main; sys.exit(main(sys.argv[1:]))"

REQUIRES = " requires a POSIX system, such as Linux or macOS; on Windows run it in WSL"


def run_without_posix(program: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_POSIX + program, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_memory_backend_works_without_posix(tmp_path: Path) -> None:
    done = run_without_posix(LIFECYCLE, "memory://", folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, "20\n"), done.stderr


def test_the_postgresql_backend_works_without_posix(fresh: str, tmp_path: Path) -> None:
    done = run_without_posix(LIFECYCLE, fresh, folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, "20\n"), done.stderr


def test_the_sqlite_backend_requires_posix(tmp_path: Path) -> None:
    done = run_without_posix(LIFECYCLE, "sqlite:///flows.db", folder=tmp_path)
    assert done.stderr.splitlines()[-1].startswith(
        f"flowstore_core.errors.ConfigurationError: the SQLite backend{REQUIRES}"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--help"], ["backends"], ["ping", "--url", "memory://"], ["replay"]])
def test_the_command_line_requires_posix(arguments: list[str], tmp_path: Path) -> None:
    done = run_without_posix(COMMAND, *arguments, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"flowstore: the command line{REQUIRES}")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_suite_requires_posix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowstore_core.platforms.os.name", "other")
    with pytest.raises(ConfigurationError, match=f"^the conformance suite{REQUIRES}"):
        asyncio.run(guard(find_backend("memory")[1], "memory://"))


def test_the_classifiers_and_the_readme_name_only_posix() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    systems = [one for one in settings["project"]["classifiers"] if one.startswith("Operating System")]
    assert systems == ["Operating System :: POSIX"]
    assert "on a POSIX system, such as Linux or macOS" in (ROOT / "README.md").read_text(encoding="utf-8")
