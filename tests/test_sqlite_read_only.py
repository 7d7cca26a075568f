"""SQLite: files that a process may only read open with migrate=False, and nothing is created beside them."""

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
from tests.scenes import FLOW, new_run

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
        told = {"runs": sorted(str(run.run_id) for run in await store.get_runs())}
        await store.ping()
        told["found"] = (await store.get_runs_page(search="needle")).total_count
        told["flows"] = (await store.get_statistics()).total_flows
        told["buckets"] = len(await store.get_run_timeseries("day", now - timedelta(days=2), now))
        try:
            await store.start_run(uuid4(), "f", uuid4(), "t")
            told["write"] = "happened"
        except FlowStoreError as error:
            told["write"] = f"{type(error).__name__}: {error}"
        print("ready", flush=True)
        if sys.stdin.readline() == "again\\n":
            try:
                await store.get_runs()
                told["again"] = "answered"
            except FlowStoreError as error:
                told["again"] = f"{type(error).__name__}: {error}"
    _, backend, config = resolve_store(url, migrate=False)
    told["version"] = await backend.schema_version(config)
    told["search"] = (await backend.describe(config))["search"]
    told["findings"] = [finding.code for finding in await backend.diagnose(config, thorough=True)]
    return told

async def main(url):
    try:
        return await read(url)
    except FlowStoreError as error:
        return {"error": f"{type(error).__name__}: {error}"}

answer = asyncio.run(main(sys.argv[1]))
print("" if "error" not in answer else "ready")
print(json.dumps(answer), flush=True)
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
    """A program that is talked to line by line."""

    def __init__(self, *command: str) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def hear(self) -> str:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.strip():
                return line.strip()
        raise AssertionError("it ended")

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
    writer.tell("write")
    return writer.hear()


def _read(path: Path, meanwhile: Callable[[], object] | None = None) -> dict[str, Any]:
    """What a process that obeys permissions can read."""
    command = [sys.executable, "-c", READER, f"sqlite:///{path}"]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root needs setpriv to obey permissions")
        for one in (path.parent, *path.parent.iterdir()):
            os.chown(one, OTHER_USER, OTHER_USER)
        command = ["setpriv", "--bounding-set", CAPABILITIES, "--inh-caps", CAPABILITIES, *command]
    with _process(*command) as reader:
        assert reader.hear() == "ready"
        if meanwhile is not None:
            meanwhile()
        reader.tell("again" if meanwhile is not None else "")
        answer: dict[str, Any] = json.loads(reader.hear())
        return answer


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    made = tmp_path / "data"
    made.mkdir(mode=0o755)
    yield made
    made.chmod(0o755)


@pytest.fixture
def path(folder: Path) -> Path:
    """A store with three runs in a file that everybody may read."""
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


def _is_read(answer: dict[str, Any], runs: int = 3, needles: int = 2) -> None:
    assert "error" not in answer, answer
    assert len(answer["runs"]) == runs
    assert (answer["found"], answer["flows"], answer["buckets"]) == (needles, 1, 3)
    assert answer["version"] > 0
    assert answer["search"]
    assert answer["write"].startswith("StoreUnavailableError: ")
    assert "can only be read" in answer["write"]
    assert "change the permissions" in answer["write"]
    assert not {"damaged", "log-missing", "log-foreign", "journal-mode"} & set(answer["findings"])


@pytest.mark.parametrize(
    ("file_mode", "folder_mode"), [(0o444, 0o777), (0o666, 0o555), (0o444, 0o555)], ids=str
)
def test_without_write_permission_a_store_can_be_read(
    file_mode: int, folder_mode: int, path: Path, folder: Path
) -> None:
    path.chmod(file_mode)
    folder.chmod(folder_mode)
    before = _listing(folder)
    _is_read(_read(path))
    assert _listing(folder) == before


def test_on_a_read_only_mount_a_store_can_be_read(path: Path, folder: Path) -> None:
    # As the user that could write to it elsewhere.
    script = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && exec "$2" -c "$3" "$4"'
    command = ["unshare", "-m", "sh", "-c", script, "sh", str(folder), sys.executable]
    if shutil.which("unshare") is None or subprocess.run([*command, "pass", ""], check=False).returncode:
        pytest.skip("this user may not mount anything")
    path.chmod(0o600)
    folder.chmod(0o755)
    before = _listing(folder)
    done = subprocess.run(
        [*command, READER, f"sqlite:///{path}"], input="\n", capture_output=True, text=True, check=True
    )
    _is_read(json.loads(done.stdout.splitlines()[-1]))
    assert _listing(folder) == before


@pytest.mark.parametrize("end", ["alive", "killed"])
def test_the_log_of_a_writer_is_read(end: str, path: Path, folder: Path) -> None:
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
        answer = _read(path)
        _is_read(answer, 4, 3)
        assert run_id in answer["runs"]
        assert _listing(folder) == before


def test_what_a_writer_does_meanwhile_is_never_missed(path: Path, folder: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can write to the file meanwhile")
    with _writer(path) as writer:
        answer = _read(path, lambda: _write(writer))
        assert len(answer["runs"]) == 3
        assert answer["again"].startswith("StoreUnavailableError: ")
        assert "changed by another process" in answer["again"]
        assert len(_read(path)["runs"]) == 4


def test_a_log_that_cannot_be_read_is_said_so(path: Path, folder: Path) -> None:
    folder.chmod(0o755)
    path.chmod(0o644)
    with _writer(path) as writer:
        _write(writer)
        writer.kill()
    (folder / "flows.db-shm").unlink()
    folder.chmod(0o555)
    before = _listing(folder)
    answer = _read(path)
    assert answer["error"].startswith("StoreUnavailableError: ")
    assert "flows.db-wal holds the newest commits" in answer["error"]
    assert _listing(folder) == before


def test_a_schema_that_is_not_current_is_left_alone(path: Path, folder: Path) -> None:
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
