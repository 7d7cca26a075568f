"""The fair queue of processes that write to one file, and its bypass when a process hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from flowstore_core import open_store
from flowstore_sqlite import writer_queue
from flowstore_sqlite.writer_queue import FairWriterLock

fcntl = pytest.importorskip("fcntl")

HOLDER = """
import sys
from flowstore_sqlite.writer_queue import FairWriterLock
lock = FairWriterLock(sys.argv[1])
assert lock._try_lock()
print("holding", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "flows.db"
    path.touch(mode=0o600)
    return path


@pytest.fixture
def queue(database: Path) -> Iterator[FairWriterLock]:
    lock = FairWriterLock(str(database))
    yield lock
    lock.close()


@pytest.fixture
def holder(database: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock."""
    command = [sys.executable, "-c", HOLDER, str(database)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holding\n"
        yield process
        process.kill()


def acquire(queue: FairWriterLock) -> None:
    """Acquire the lock, or fail after 30 seconds."""
    began = time.monotonic()
    assert queue.acquire(lambda: True, lambda: time.monotonic() - began > 30)


@pytest.fixture
def no_bypass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_queue, "LOCK_TIMEOUT", 3600.0)


def test_the_lock_is_a_private_file_beside_the_database(database: Path, queue: FairWriterLock) -> None:
    lock = Path(f"{database}-turn")
    assert Path(queue.path) == lock
    assert not lock.exists()
    acquire(queue)
    assert lock.stat().st_mode & 0o777 == 0o600
    assert lock.stat().st_size == 0


@pytest.mark.usefixtures("no_bypass")
def test_the_lock_is_released_after_acquire(queue: FairWriterLock, database: Path) -> None:
    other = FairWriterLock(str(database))
    for _ in range(3):
        acquire(queue)
        acquire(other)
    other.close()


@pytest.mark.usefixtures("no_bypass")
def test_a_killed_holder_loses_the_lock(queue: FairWriterLock, holder: subprocess.Popen[str]) -> None:
    threading.Timer(0.1, holder.kill).start()
    acquire(queue)


def test_a_hanging_holder_is_bypassed(
    queue: FairWriterLock, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_queue, "LOCK_TIMEOUT", 0.2)
    monkeypatch.setattr(writer_queue, "BYPASS_SECONDS", 60.0)
    holder.send_signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        acquire(queue)
        assert time.monotonic() - began > 0.2
        # The bypass is kept, so the next call does not wait.
        monkeypatch.setattr(writer_queue, "LOCK_TIMEOUT", 3600.0)
        acquire(queue)
    finally:
        holder.send_signal(signal.SIGCONT)


def test_acquire_returns_false_when_timed_out(queue: FairWriterLock, holder: subprocess.Popen[str]) -> None:
    calls = []
    assert not queue.acquire(lambda: bool(calls.append(1)), lambda: True)
    assert calls == []


def test_acquire_retries_until_begin_succeeds(queue: FairWriterLock) -> None:
    results = iter([False, False, True])
    assert queue.acquire(lambda: next(results), lambda: False)


@pytest.mark.usefixtures("no_bypass")
def test_an_error_releases_the_lock(queue: FairWriterLock, database: Path) -> None:
    def fail() -> bool:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        queue.acquire(fail, lambda: False)
    other = FairWriterLock(str(database))
    acquire(other)
    other.close()


@pytest.mark.usefixtures("no_bypass")
@pytest.mark.parametrize("obstacle", ["link", "folder", "pipe"])
def test_a_lock_that_is_not_a_regular_file_is_not_used(database: Path, tmp_path: Path, obstacle: str) -> None:
    lock = Path(f"{database}-turn")
    target = tmp_path / "precious"
    if obstacle == "link":
        lock.symlink_to(target)
    elif obstacle == "folder":
        lock.mkdir()
    else:
        os.mkfifo(lock)
    queue = FairWriterLock(str(database))
    acquire(queue)
    queue.close()
    assert not target.exists()


@pytest.mark.usefixtures("no_bypass")
def test_file_systems_may_lack_locks(queue: FairWriterLock, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(95, "Operation not supported")

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", refuse)
        acquire(queue)
    acquire(queue)


async def test_systems_may_lack_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_queue, "fcntl", None)
    async with open_store(f"sqlite:///{tmp_path}/flows.db") as store:
        run = await store.start_run(uuid4(), "flow", uuid4(), "manual")
        assert await store.try_claim_step(run.run_id, "one")
    assert not os.path.exists(f"{tmp_path}/flows.db-turn")  # noqa: ASYNC240 - nothing else runs


async def test_the_lock_file_may_be_removed(tmp_path: Path) -> None:
    """The lock file is optional, so a backup may omit it."""
    path = tmp_path / "flows.db"
    async with open_store(f"sqlite:///{path}") as store:
        run = await store.start_run(uuid4(), "flow", uuid4(), "manual")
        os.remove(f"{path}-turn")
        assert await store.try_claim_step(run.run_id, "one")
    async with open_store(f"sqlite:///{path}") as store:
        assert [claim.step_key for claim in await store.get_step_claims(run.run_id)] == ["one"]


@pytest.mark.parametrize("seconds", [60.0, 0.0])
def test_acquire_starts_a_time_slice(
    queue: FairWriterLock, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr(writer_queue, "TIME_SLICE", seconds)
    assert not queue.holds_slice()
    results = iter([False, True])
    assert queue.acquire(lambda: next(results), lambda: False)
    assert queue.holds_slice() == (seconds > 0)


def test_a_time_slice_ends(queue: FairWriterLock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_queue, "TIME_SLICE", 0.01)
    acquire(queue)
    time.sleep(0.02)
    assert not queue.holds_slice()


WRITER = """
import asyncio, sys, time
from uuid import uuid4
from flowstore_core import open_store

async def caller(store, run_id, end, number):
    done = 0
    while time.monotonic() < end:
        assert await store.try_claim_step(run_id, f"{number}-{done}")
        done += 1
    return done

async def main(url, seconds):
    async with open_store(url) as store:
        run = await store.start_run(uuid4(), "flow", uuid4(), "manual")
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        end = time.monotonic() + seconds
        done = await asyncio.gather(*(caller(store, run.run_id, end, number) for number in range(8)))
        print(sum(done), flush=True)

asyncio.run(main(sys.argv[1], float(sys.argv[2])))
"""


def test_no_writer_starves_and_a_killed_writer_blocks_no_other(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/flows.db"
    command = [sys.executable, "-c", WRITER, url]
    seconds = 2.0
    writers = [
        subprocess.Popen([*command, str(seconds)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write("go\n")
            writer.stdin.flush()
        time.sleep(seconds / 4)
        writers[0].kill()
        done = [int(writer.communicate(timeout=60)[0]) for writer in writers[1:]]
        assert [writer.returncode for writer in writers[1:]] == [0, 0, 0]
        # Each of the eight callers of a process has written at least once.
        assert min(done) >= 8
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
