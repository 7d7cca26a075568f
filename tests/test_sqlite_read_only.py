"""SQLite: a process without write permission opens a store with migrate=False and creates no file."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flowstore_core import RunStatus, StepStatus, open_store
from tests.calls import FLOW, new_run

OTHER_USER = 54321
CAPABILITIES = "-dac_override,-dac_read_search,-fowner"

READER = """
import asyncio, json, os, sys
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4
from flowstore_core import FlowStoreError, open_store
from flowstore_core.open import resolve_store

async def read(url):
    async with open_store(url, migrate=False) as store:
        now = datetime.now(UTC)
        report = {"runs": sorted(str(run.run_id) for run in await store.get_runs())}
        await store.ping()
        report["found"] = (await store.get_runs_page(search="needle")).total_count
        report["flows"] = (await store.get_statistics()).total_flows
        report["buckets"] = len(await store.get_run_timeseries("day", now - timedelta(days=2), now))
        try:
            await store.start_run(uuid4(), "f", uuid4(), "t")
            report["write"] = "succeeded"
        except FlowStoreError as error:
            report["write"] = f"{type(error).__name__}: {error}"
        print("ready", flush=True)
        if sys.stdin.readline() == "read\\n":
            try:
                await store.get_runs()
                report["second_read"] = "succeeded"
            except FlowStoreError as error:
                report["second_read"] = f"{type(error).__name__}: {error}"
    _, backend, config = resolve_store(url, migrate=False)
    report["version"] = await backend.schema_version(config)
    report["search"] = (await backend.describe(config))["search"]
    report["findings"] = [finding.code for finding in await backend.diagnose(config, thorough=True)]
    return report

async def main(url):
    try:
        return await read(url)
    except FlowStoreError as error:
        return {"error": f"{type(error).__name__}: {error}"}

result = asyncio.run(main(sys.argv[1]))
print("" if "error" not in result else "ready")
print(json.dumps(result), flush=True)
"""

WRITER = """
import asyncio, sys
from uuid import UUID, uuid4
from flowstore_core import open_store

async def main(url):
    async with open_store(url) as store:
        while (line := await asyncio.to_thread(sys.stdin.readline)) == "write\\n":
            run = await store.start_run(UUID(sys.argv[2]), "needle", uuid4(), "t")
            print(run.run_id, flush=True)

asyncio.run(main(sys.argv[1]))
"""


class Process:
    """A subprocess with a line protocol."""

    def __init__(self, *command: str) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def receive(self) -> str:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.strip():
                return line.strip()
        raise AssertionError("the process exited")

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate()


@contextmanager
def _process(*command: str) -> Iterator[Process]:
    process = Process(*command)
    try:
        yield process
    finally:
        process.kill()


@contextmanager
def _writer(path: Path) -> Iterator[Process]:
    with _process(sys.executable, "-c", WRITER, f"sqlite:///{path}", str(FLOW)) as process:
        yield process


def _write(writer: Process) -> str:
    writer.send("write")
    return writer.receive()


def _read(path: Path, before_second_read: Callable[[], object] | None = None) -> dict[str, Any]:
    """Return the report of a reader process that cannot override permissions as root does."""
    command = [sys.executable, "-c", READER, f"sqlite:///{path}"]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root needs setpriv to obey permissions")
        for one in (path.parent, *path.parent.iterdir()):
            os.chown(one, OTHER_USER, OTHER_USER)
        command = ["setpriv", "--bounding-set", CAPABILITIES, "--inh-caps", CAPABILITIES, *command]
    with _process(*command) as reader:
        assert reader.receive() == "ready"
        if before_second_read is not None:
            before_second_read()
        reader.send("read" if before_second_read is not None else "")
        result: dict[str, Any] = json.loads(reader.receive())
        return result


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    data = tmp_path / "data"
    data.mkdir(mode=0o755)
    yield data
    data.chmod(0o755)


@pytest.fixture
def path(folder: Path) -> Path:
    """A store with three runs, in a file that every user may read."""
    path = folder / "flows.db"
    asyncio.run(_fill(f"sqlite:///{path}"))
    (folder / "flows.db-turn").unlink()
    path.chmod(0o444)
    folder.chmod(0o555)
    return path


async def _fill(url: str) -> None:
    async with open_store(url) as store:
        for number in range(3):
            run_id = await new_run(store, flow_name="needle" if number else "hay")
            await store.record_step_start(run_id, "a", "http")
            await store.record_step_complete(run_id, "a", StepStatus.SUCCEEDED)
            await store.complete_run(run_id, RunStatus.SUCCEEDED)


def _listing(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def _assert_read(result: dict[str, Any], runs: int = 3, needles: int = 2) -> None:
    assert "error" not in result, result
    assert len(result["runs"]) == runs
    assert (result["found"], result["flows"], result["buckets"]) == (needles, 1, 3)
    assert result["version"] > 0
    assert result["search"]
    assert result["write"].startswith("StoreUnavailableError: ")
    assert "can only be read" in result["write"]
    assert "change the permissions" in result["write"]
    assert not {"damaged", "log-missing", "log-foreign", "journal-mode"} & set(result["findings"])


@pytest.mark.parametrize(
    ("file_mode", "folder_mode"), [(0o444, 0o777), (0o666, 0o555), (0o444, 0o555)], ids=str
)
def test_a_store_can_be_read_without_write_permission(
    file_mode: int, folder_mode: int, path: Path, folder: Path
) -> None:
    path.chmod(file_mode)
    folder.chmod(folder_mode)
    before = _listing(folder)
    _assert_read(_read(path))
    assert _listing(folder) == before


def test_a_store_can_be_read_on_a_read_only_mount(path: Path, folder: Path) -> None:
    # The user has write permission; only the mount is read-only.
    script = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && exec "$2" -c "$3" "$4"'
    command = ["unshare", "-m", "sh", "-c", script, "sh", str(folder), sys.executable]
    if shutil.which("unshare") is None or subprocess.run([*command, "pass", ""], check=False).returncode:
        pytest.skip("this user may not mount")
    path.chmod(0o600)
    folder.chmod(0o755)
    before = _listing(folder)
    done = subprocess.run(
        [*command, READER, f"sqlite:///{path}"], input="\n", capture_output=True, text=True, check=True
    )
    _assert_read(json.loads(done.stdout.splitlines()[-1]))
    assert _listing(folder) == before


@pytest.mark.parametrize("end", ["alive", "killed"])
def test_the_log_of_a_writer_can_be_read(end: str, path: Path, folder: Path) -> None:
    folder.chmod(0o755)
    path.chmod(0o644)
    with _writer(path) as writer:
        run_id = _write(writer)
        folder.chmod(0o555)
        for file in folder.iterdir():
            file.chmod(0o444)
        if end == "killed":
            writer.kill()
        before = _listing(folder)
        result = _read(path)
        _assert_read(result, 4, 3)
        assert run_id in result["runs"]
        assert _listing(folder) == before


def test_reads_fail_after_a_concurrent_write(path: Path, folder: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can write to the file while it is read")
    with _writer(path) as writer:
        result = _read(path, lambda: _write(writer))
        assert len(result["runs"]) == 3
        assert result["second_read"].startswith("StoreUnavailableError: ")
        assert "changed by another process" in result["second_read"]
        assert len(_read(path)["runs"]) == 4


def test_an_unreadable_log_is_reported(path: Path, folder: Path) -> None:
    folder.chmod(0o755)
    path.chmod(0o644)
    with _writer(path) as writer:
        _write(writer)
        writer.kill()
    (folder / "flows.db-shm").unlink()
    folder.chmod(0o555)
    before = _listing(folder)
    result = _read(path)
    assert result["error"].startswith("StoreUnavailableError: ")
    assert "flows.db-wal holds the newest commits" in result["error"]
    assert _listing(folder) == before


def test_an_older_schema_is_not_migrated(path: Path, folder: Path) -> None:
    folder.chmod(0o755)
    path.chmod(0o644)
    db = sqlite3.connect(path)
    db.execute("PRAGMA journal_mode = DELETE")
    db.execute("DELETE FROM flowstore_schema WHERE version > 1")
    db.commit()
    db.close()
    folder.chmod(0o555)
    before = _listing(folder)
    assert _read(path)["error"].startswith("SchemaVersionError: the database has schema version 1")
    assert _read(folder / "missing.db")["error"].startswith(
        "SchemaVersionError: the database has schema version 0"
    )
    assert _listing(folder) == before
