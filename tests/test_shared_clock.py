"""SHARED_CLOCK on machines whose clocks differ: the clock of a process is shifted below Python (CLK-1)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from flowstore_conformance.checks import clocks as clock_checks
from flowstore_conformance.child_processes import start_module
from flowstore_conformance.context import CheckContext, Profile
from flowstore_conformance.status import Status
from flowstore_conformance.suite import run_check, select_checks
from flowstore_conformance.worker_pool import ProcessRunner, open_process

from flowstore_chaos.context import SkippedError
from flowstore_chaos.process_clocks import ProcessClocks
from flowstore_core import Capability
from flowstore_core.plugins import find_backend
from flowstore_sqlite.plugin import SqliteBackend
from flowstore_sqlite.store import SqliteStore
from tests.test_conformance_builtins import SEED


@pytest.fixture
def machine_clocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the check shift the clocks of its processes with a preloaded library, in place of Python's."""
    try:
        clocks = ProcessClocks(tmp_path)
    except SkippedError as error:
        pytest.skip(str(error))

    @asynccontextmanager
    async def open_skewed_process(context: CheckContext, skew: timedelta) -> AsyncIterator[ProcessRunner]:
        with clocks.inherited():
            process = await start_module("flowstore_conformance.worker")
        clocks.set(process.pid, skew)
        async with open_process(context, process) as runner:
            yield runner

    monkeypatch.setattr(clock_checks, "open_skewed_process", open_skewed_process)
    yield
    clocks.close()


@pytest.mark.usefixtures("machine_clocks")
async def test_postgresql_serves_machines_whose_clocks_differ(postgresql_url: str) -> None:
    (check,) = select_checks(["CLK-1"])
    result = await run_check(check, postgresql_url, find_backend("postgresql")[1], Profile.STANDARD, SEED)
    said = result.failure.message if result.failure is not None else result.reason
    assert result.status is Status.PASS, said
    assert [note.endswith("went by the clock of the store") for note in result.notes] == [True, True]


@pytest.mark.usefixtures("machine_clocks")
async def test_sqlite_would_not_if_it_declared_a_shared_clock(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = SqliteStore.capabilities | {Capability.SHARED_CLOCK}
    for owner in (SqliteStore, SqliteBackend):
        monkeypatch.setattr(owner, "capabilities", shared)
        monkeypatch.setattr(owner, "max_skew", timedelta(0), raising=False)
    (check,) = select_checks(["CLK-1"])
    url = f"sqlite:///{memory_path}/flows.db"
    result = await run_check(check, url, SqliteBackend(), Profile.QUICK, SEED)
    assert result.status is Status.FAIL
    assert result.failure is not None
    assert "360 minutes ahead" in result.failure.message
