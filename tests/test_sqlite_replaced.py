"""SQLite: files that are removed, moved or replaced while a store has them open (CON-5)."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest

from flowstore_core import FlowStore, OutcomeUnknownError, StoreUnavailableError, open_store
from flowstore_sqlite import open_files
from flowstore_sqlite.database import Database
from tests.calls import new_run

SUFFIXES = ("", "-wal", "-shm")

SECOND_PROCESS = """
import asyncio, sys
from uuid import UUID
from flowstore_core import new_run_id, open_store

async def main(url, runs):
    async with open_store(url) as store:
        for run in runs:
            await store.start_run(new_run_id(), "other", UUID(run), "manual")
        print("acknowledged", flush=True)
        sys.stdin.readline()

asyncio.run(main(sys.argv[1], sys.argv[2:]))
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder / "flows.db"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[FlowStore]:
    async with open_store(f"sqlite:///{path}") as opened:
        await new_run(opened)
        yield opened


def _with_suffix(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _remove(*suffixes: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        for suffix in suffixes:
            _with_suffix(path, suffix).unlink()

    return change


def _replace(suffix: str) -> Callable[[Path], None]:
    """Replace the file with a copy, as a restore does."""

    def change(path: Path) -> None:
        copy = path.with_name("copy")
        shutil.copy(_with_suffix(path, suffix), copy)
        os.replace(copy, _with_suffix(path, suffix))

    return change


def _restore(path: Path) -> None:
    backup = path.with_name("backup.db")
    source, target = sqlite3.connect(path), sqlite3.connect(backup)
    source.backup(target)
    source.close()
    target.close()
    os.replace(backup, path)
    _remove("-wal", "-shm")(path)


def _replace_with_link(path: Path) -> None:
    path.rename(path.with_name("moved.db"))
    path.symlink_to("moved.db")


CHANGES: dict[str, Callable[[Path], Any]] = {
    "all-removed": _remove(*SUFFIXES),
    "database-removed": _remove(""),
    "database-replaced": _replace(""),
    "backup-restored": _restore,
    "database-moved": lambda path: path.rename(path.with_name("moved.db")),
    "replaced-with-link": _replace_with_link,
    "folder-moved": lambda path: path.parent.rename(path.parent.with_name("moved")),
    "log-removed": _remove("-wal"),
    "log-replaced": _replace("-wal"),
    "index-removed": _remove("-shm"),
    "index-replaced": _replace("-shm"),
    "log-and-index-removed": _remove("-wal", "-shm"),
}
RECOVERABLE = ("log-removed", "index-removed", "log-and-index-removed")


def _database(store: FlowStore) -> Database:
    inner: Any = store
    (backend_store,) = inner._store.values()
    assert isinstance(backend_store._database, Database)
    return backend_store._database


async def _assert_refused(store: FlowStore, run_id: UUID) -> None:
    for call in (
        lambda: store.try_claim_step(run_id, "a"),
        lambda: store.get_run_status(run_id),
        store.ping,
    ):
        with pytest.raises(StoreUnavailableError, match=r"then open (it|the store) again") as caught:
            await call()
        assert not isinstance(caught.value, OutcomeUnknownError)
        assert "flows.db" in caught.value.reason


def _wait_for_new_ctime(folder: Path) -> None:
    """Wait until a change of the folder would give it a new ctime."""
    other = folder.with_name("other")
    other.mkdir()
    while other.stat().st_ctime_ns <= folder.stat().st_ctime_ns:
        other.rmdir()
        other.mkdir()


class _ConstantCtime:
    """The module os, on a file system that gives every change the same ctime."""

    path = os.path

    @staticmethod
    def lstat(path: str) -> Any:
        status = os.lstat(path)
        return SimpleNamespace(st_dev=status.st_dev, st_ino=status.st_ino, st_ctime_ns=1)

    stat = lstat


def _trusts_directory(store: FlowStore) -> bool:
    """Return whether the next verification reads only an unchanged directory."""
    return _database(store)._writer.files._verified is not None


@pytest.mark.parametrize("change", CHANGES)
async def test_every_call_fails_after_a_change(change: str, path: Path) -> None:
    async with open_store(f"sqlite:///{path}") as store:
        run_id = await new_run(store)
        CHANGES[change](path)
        await _assert_refused(store, run_id)
    if change in RECOVERABLE:
        async with open_store(f"sqlite:///{path}") as store:
            assert await store.get_claimed_step_keys(run_id) == frozenset()


@pytest.mark.parametrize("is_written", [True, False])
@pytest.mark.parametrize("change", CHANGES)
async def test_every_call_fails_after_a_change_of_a_settled_directory(
    change: str, is_written: bool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_written:
        # Trust ctimes at once, as if the last change of the directory were old.
        monkeypatch.setattr(open_files, "CTIME_LAG_NS", 0)
    async with open_store(f"sqlite:///{path}") as store:
        run_id = await new_run(store)
        path.with_name("new").touch()
        await asyncio.to_thread(_wait_for_new_ctime, path.parent)
        await (new_run(store) if is_written else store.ping())
        assert _trusts_directory(store)
        CHANGES[change](path)
        await _assert_refused(store, run_id)


@pytest.mark.parametrize("change", CHANGES)
async def test_every_call_fails_after_a_change_without_a_new_ctime(
    change: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Time passes, but the clock of the file system does not advance.
    monkeypatch.setattr(open_files, "CTIME_LAG_NS", sys.maxsize)
    monkeypatch.setattr(open_files, "os", _ConstantCtime)
    async with open_store(f"sqlite:///{path}") as store:
        run_id = await new_run(store)
        await store.ping()
        CHANGES[change](path)
        await _assert_refused(store, run_id)


FIRST_CALLS: dict[str, Callable[[FlowStore], Awaitable[object]]] = {
    "read": lambda store: store.get_run_status(uuid4()),
    "ping": lambda store: store.ping(),
    "write": new_run,
}


@pytest.mark.parametrize("first", FIRST_CALLS)
async def test_calls_fail_even_if_the_file_is_moved_back(first: str, store: FlowStore, path: Path) -> None:
    os.rename(path, f"{path}-moved")
    with pytest.raises(StoreUnavailableError):
        await FIRST_CALLS[first](store)
    os.rename(f"{path}-moved", path)
    await _assert_refused(store, uuid4())
    async with open_store(f"sqlite:///{path}") as reopened:
        assert len(await reopened.get_runs()) == 1


async def test_a_hard_link_and_chdir_have_no_effect(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    async with open_store("sqlite:///flows.db") as store:
        run_id = await new_run(store)
        os.link(path, path.with_name("linked.db"))
        monkeypatch.chdir("/")
        assert await store.try_claim_step(run_id, "a")
        assert await store.get_claimed_step_keys(run_id) == {"a"}
        await store.ping()


async def test_a_changed_directory_link_is_detected(path: Path) -> None:
    link = path.parent.with_name("current")
    link.symlink_to(path.parent)
    async with open_store(f"sqlite:///{link}/flows.db") as store:
        run_id = await new_run(store)
        link.unlink()
        next_folder = path.parent.with_name("next")
        shutil.copytree(path.parent, next_folder)
        link.symlink_to(next_folder)
        await _assert_refused(store, run_id)
    assert _with_suffix(next_folder / "flows.db", "-wal").exists()


async def test_a_call_after_the_removal_is_not_acknowledged(store: FlowStore, path: Path) -> None:
    removed = asyncio.Event()
    refused: list[BaseException] = []

    async def write() -> None:
        while True:
            is_late = removed.is_set()
            try:
                await new_run(store)
            except StoreUnavailableError as error:
                refused.append(error)
                return
            assert not is_late

    writers = [asyncio.create_task(write()) for _ in range(32)]
    for _ in range(5):
        await new_run(store)
    # The writer thread may be at any point of a group.
    _remove("")(path)
    removed.set()
    await asyncio.gather(*writers)
    assert len(refused) == len(writers)


async def test_a_removal_during_commit_makes_the_outcome_unknown(store: FlowStore, path: Path) -> None:
    database = _database(store)

    def remove(statement: str) -> None:
        if statement == "COMMIT":
            path.unlink()

    with pytest.raises(OutcomeUnknownError, match="removed or replaced"):
        await database.write(lambda db, now: db.set_trace_callback(remove))
    await _assert_refused(store, uuid4())


@contextmanager
def _second_process(path: Path, runs: list[UUID]) -> Iterator[Callable[[], None]]:
    """Start a process that creates these runs. Yields a function that kills it."""
    command = [sys.executable, "-c", SECOND_PROCESS, f"sqlite:///{path}", *map(str, runs)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def kill() -> None:
            process.send_signal(signal.SIGKILL)
            process.wait()

        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "acknowledged\n"
            yield kill
        finally:
            kill()


@pytest.mark.parametrize("killed", ["before", "after"])
@pytest.mark.parametrize(
    "change", ["all-removed", "backup-restored", "log-and-index-removed", "index-removed"]
)
async def test_closing_does_not_change_the_log_of_a_new_process(change: str, killed: str, path: Path) -> None:
    runs = [uuid4() for _ in range(5)]
    async with open_store(f"sqlite:///{path}") as store:
        await new_run(store)
        if change == "log-and-index-removed":
            # A checkpoint, so that the new process finds all commits in the database.
            db = sqlite3.connect(path)
            db.execute("PRAGMA wal_checkpoint")
            db.close()
        CHANGES[change](path)
        with _second_process(path, runs) as kill:
            if killed == "before":
                kill()
            log = _with_suffix(path, "-wal").read_bytes()
            assert log
            await store.aclose()
            assert _with_suffix(path, "-wal").read_bytes() == log
            assert _with_suffix(path, "-shm").exists()
    async with open_store(f"sqlite:///{path}") as reopened:
        for run_id in runs:
            assert await reopened.get_run_status(run_id) is not None
        # The stores of one process share no state.
        assert await reopened.try_claim_step(runs[0], "a")


@pytest.mark.parametrize("change", RECOVERABLE)
async def test_closing_recovers_the_commits_of_a_removed_log(change: str, path: Path) -> None:
    async with open_store(f"sqlite:///{path}") as store:
        runs = [await new_run(store) for _ in range(5)]
        CHANGES[change](path)
    assert {file.name for file in path.parent.iterdir()} == {"flows.db", "flows.db-turn"}
    async with open_store(f"sqlite:///{path}") as reopened:
        assert {run.run_id for run in await reopened.get_runs()} == set(runs)


@pytest.mark.parametrize("change", ["all-removed", "backup-restored", "log-and-index-removed"])
async def test_the_store_reopens_in_the_same_process(change: str, store: FlowStore, path: Path) -> None:
    CHANGES[change](path)
    with pytest.raises(StoreUnavailableError):
        await store.ping()
    await store.aclose()
    async with open_store(f"sqlite:///{path}") as reopened:
        run_id = await new_run(reopened)
        assert await reopened.try_claim_step(run_id, "a")


async def test_the_lock_file_may_be_replaced(store: FlowStore, path: Path) -> None:
    run_id = await new_run(store)
    _replace("-turn")(path)
    assert await store.try_claim_step(run_id, "a")
    await store.ping()


async def test_a_file_replaced_while_it_is_opened_is_not_used(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_store(f"sqlite:///{path}") as store:
        await new_run(store)
    connect = sqlite3.connect

    def connect_and_replace(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = connect(*arguments, **options)
        _replace("")(path)
        return connection

    monkeypatch.setattr(sqlite3, "connect", connect_and_replace)
    with pytest.raises(StoreUnavailableError, match="no longer the file that was opened"):
        async with open_store(f"sqlite:///{path}"):
            pytest.fail("open_store succeeded")
