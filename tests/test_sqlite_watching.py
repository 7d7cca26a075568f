"""How a SQLite store notices the commits of others, with and without reports of writes to the log."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import pytest

from flowstore_core import RunStatus, StepRequest, new_run_id, open_store
from flowstore_sqlite import log_writes, watching
from flowstore_sqlite.file_access import WAL_SUFFIX
from flowstore_sqlite.log_writes import UnknownWrites, watch_log

LONG = timedelta(minutes=30)
SECONDS = 60.0
linux = pytest.mark.skipif(sys.platform != "linux", reason="inotify belongs to Linux")


@pytest.fixture(params=[pytest.param("inotify", marks=linux), "polling"])
def reports(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """The objects that watch the log in the test."""
    made: list[object] = []

    def watch(path: str) -> log_writes.LogWrites:
        made.append(watch_log(path) if request.param == "inotify" else UnknownWrites())
        assert isinstance(made[-1], UnknownWrites) is (request.param == "polling")
        return made[-1]  # type: ignore[return-value]

    monkeypatch.setattr(watching, "watch_log", watch)
    yield made
    assert made


async def test_commits_of_another_store_wake_waiting_calls(reports: list[object], tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'flows.db'}"
    async with open_store(url) as waiting, open_store(url) as other:
        for _ in range(20):
            run_id = new_run_id()
            steps = asyncio.create_task(waiting.wait_for_steps(["mail"], timeout=LONG))
            await asyncio.sleep(0.01)
            request = StepRequest(step_key="a", step_type="test", queue="mail")
            await other.trigger_run(UUID(int=1), "flow", run_id, "test", dispatch=[request])
            assert await asyncio.wait_for(steps, SECONDS)
            run = asyncio.create_task(waiting.wait_for_run(run_id, timeout=LONG))
            await asyncio.sleep(0.01)
            await other.complete_run(run_id, RunStatus.CANCELLED)
            assert await asyncio.wait_for(run, SECONDS) is RunStatus.CANCELLED
    # Also for calls that wait again and again.
    assert len(reports) == 1


async def test_a_store_that_is_closed_at_any_moment_leaves_no_open_file(
    reports: list[object], tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'flows.db'}"

    def open_files() -> set[str]:
        folder = Path("/proc/self/fd")
        return set(os.listdir(folder)) if folder.exists() else set()

    async with open_store(url):
        pass
    before = open_files()
    for moment in range(40):
        async with open_store(url) as store:
            calls = [asyncio.create_task(store.wait_for_steps([name], timeout=LONG)) for name in "abc"]
            await asyncio.sleep(moment / 5_000)
            if moment % 2:
                calls[0].cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        # What an earlier test left for the garbage collection may be closed meanwhile.
        assert open_files() <= before


@linux
async def test_a_write_and_an_interrupt_end_a_wait(tmp_path: Path) -> None:
    log = tmp_path / f"flows.db{WAL_SUFFIX}"
    log.touch()
    writes = watch_log(str(tmp_path / "flows.db"))
    try:
        for _ in range(3):
            waiting = asyncio.create_task(asyncio.to_thread(writes.wait, SECONDS, until_write=True))
            await asyncio.sleep(0.01)
            with log.open("ab") as file:
                file.write(b"frame")
            assert await waiting
            waiting = asyncio.create_task(asyncio.to_thread(writes.wait, SECONDS, until_write=True))
            await asyncio.sleep(0.01)
            writes.interrupt()
            assert not await waiting
    finally:
        writes.close()


def test_without_a_log_a_store_polls(tmp_path: Path) -> None:
    assert isinstance(watch_log(str(tmp_path / "flows.db")), UnknownWrites)
