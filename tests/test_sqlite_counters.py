"""Wrong counters in a SQLite file are found, and corrected while a store writes."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from flowstore_core import RunStatus, new_run_id, open_store
from flowstore_core.open import resolve_store
from flowstore_sqlite import diagnosis
from tests.test_growth import FLOWS, NOON, _create_runs, _query_all, _query_without_counters
from tests.virtual_clock import VirtualClock

CORRUPTIONS = {
    "a count that is too high": "UPDATE run_counts SET amount = amount + 7",
    "counts that are missing": "DELETE FROM run_counts; DELETE FROM run_days",
    "counts of a flow without runs": "INSERT INTO run_counts VALUES (x'01', 'Running', 5)",
    "days that are wrong": "UPDATE run_days SET succeeded = 0, failed = 99",
    # REPLACE deletes rows without firing delete triggers.
    "runs that were replaced": "REPLACE INTO runs SELECT * FROM runs",
}


async def _codes(url: str) -> list[str]:
    findings = await diagnosis.diagnose(resolve_store(url)[2], thorough=True)
    return [finding.code for finding in findings if finding.code not in ("wal-reset-bug", "memory-disk")]


@pytest.mark.parametrize("fault", CORRUPTIONS)
async def test_wrong_counters_are_found_and_corrected_during_writes(fault: str, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'x.db'}"
    clock = VirtualClock()
    clock.now = NOON
    async with open_store(url, clock=clock) as store:
        await _create_runs(store, clock, random.Random(2), 60)
        await _query_all(store, clock.now)
        assert await _codes(url) == []
        with closing(sqlite3.connect(tmp_path / "x.db")) as other:
            other.executescript(CORRUPTIONS[fault])
        assert await _codes(url) == ["counters-wrong"]

        async def write_run() -> None:
            run_id = new_run_id()
            await store.start_run(FLOWS[0], "flow", run_id, "manual")
            await store.complete_run(run_id, RunStatus.FAILED)

        _, _, config = resolve_store(url)
        writing = asyncio.gather(*(write_run() for _ in range(200)))
        (done,) = await diagnosis.fix(config, await diagnosis.diagnose(config, thorough=True))
        await writing
        assert done.startswith("corrected the counters of ")
        assert await _codes(url) == []
        assert await _query_all(store, clock.now) == await _query_without_counters(store, clock.now)
