"""Processes that share a file write in turn, and nobody waits for one that hangs or dies."""

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
from flowstore_sqlite import turnstile
from flowstore_sqlite.turnstile import PATIENCE_SECONDS, Turnstile

fcntl = pytest.importorskip("fcntl")

HOLDER = """
import sys
from flowstore_sqlite.turnstile import Turnstile
turnstile = Turnstile(sys.argv[1])
assert turnstile._take_turn()
print("holding", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "flows.db"
    path.touch(mode=0o600)
    return path


@pytest.fixture
def queue(database: Path) -> Iterator[Turnstile]:
    made = Turnstile(str(database))
    yield made
    made.close()


@pytest.fixture
def holder(database: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has the turn and keeps it."""
    command = [sys.executable, "-c", HOLDER, str(database)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holding\n"
        yield process
        process.kill()


def pass_through(queue: Turnstile, seconds: float = 30) -> float:
    """How long it took to get the turn."""
    began = time.monotonic()
    assert queue.pass_through(lambda: True, lambda: time.monotonic() - began > seconds)
    return time.monotonic() - began


def test_the_lock_is_a_private_file_beside_the_database(database: Path, queue: Turnstile) -> None:
    lock = Path(f"{database}-turn")
    assert Path(queue.path) == lock
    assert lock.stat().st_mode & 0o777 == 0o600
    assert lock.stat().st_size == 0


def test_a_turn_is_free_again_when_it_was_used(queue: Turnstile, database: Path) -> None:
    other = Turnstile(str(database))
    for _ in range(3):
        assert pass_through(queue) < PATIENCE_SECONDS
        assert pass_through(other) < PATIENCE_SECONDS
    other.close()


def test_a_killed_holder_gives_its_turn_free(queue: Turnstile, holder: subprocess.Popen[str]) -> None:
    threading.Timer(0.1, holder.kill).start()
    assert 0.05 < pass_through(queue) < PATIENCE_SECONDS


def test_nobody_waits_for_a_holder_that_hangs(queue: Turnstile, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGSTOP)
    try:
        assert pass_through(queue) > PATIENCE_SECONDS
        # And then not each time anew.
        assert pass_through(queue) < PATIENCE_SECONDS
    finally:
        holder.send_signal(signal.SIGCONT)


def test_who_cannot_wait_gives_up(queue: Turnstile, holder: subprocess.Popen[str]) -> None:
    asked = []
    assert not queue.pass_through(lambda: bool(asked.append(1)), lambda: True)
    assert asked == []


def test_it_asks_again_until_the_lock_is_free(queue: Turnstile) -> None:
    answers = iter([False, False, True])
    assert queue.pass_through(lambda: next(answers), lambda: False)


def test_an_error_gives_the_turn_free(queue: Turnstile, database: Path) -> None:
    def fail() -> bool:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        queue.pass_through(fail, lambda: False)
    other = Turnstile(str(database))
    assert pass_through(other) < PATIENCE_SECONDS
    other.close()


@pytest.mark.parametrize("obstacle", ["link", "folder", "pipe"])
def test_what_is_no_plain_file_is_left_alone(database: Path, tmp_path: Path, obstacle: str) -> None:
    lock = Path(f"{database}-turn")
    target = tmp_path / "precious"
    if obstacle == "link":
        lock.symlink_to(target)
    elif obstacle == "folder":
        lock.mkdir()
    else:
        os.mkfifo(lock)
    queue = Turnstile(str(database))
    assert pass_through(queue) < PATIENCE_SECONDS
    queue.close()
    assert not target.exists()


def test_file_systems_without_locks(queue: Turnstile, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert pass_through(queue) < PATIENCE_SECONDS
    monkeypatch.undo()
    assert pass_through(queue) < PATIENCE_SECONDS


async def test_systems_without_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turnstile, "fcntl", None)
    async with open_store(f"sqlite:///{tmp_path}/flows.db") as store:
        run = await store.start_run(uuid4(), "flow", uuid4(), "manual")
        assert await store.try_claim_step(run.run_id, "one")
    assert not os.path.exists(f"{tmp_path}/flows.db-turn")  # noqa: ASYNC240 - nothing else runs


async def test_the_lock_may_be_lost(tmp_path: Path) -> None:
    """A backup need not hold it, and who removes it hurts nobody."""
    path = tmp_path / "flows.db"
    async with open_store(f"sqlite:///{path}") as store:
        run = await store.start_run(uuid4(), "flow", uuid4(), "manual")
        os.remove(f"{path}-turn")
        assert await store.try_claim_step(run.run_id, "one")
    async with open_store(f"sqlite:///{path}") as store:
        assert [claim.step_key for claim in await store.get_step_claims(run.run_id)] == ["one"]
