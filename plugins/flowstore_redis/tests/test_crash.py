"""A server that is killed under load: nothing acknowledged is lost, nothing happens twice.

It prints its figures: ``python -m pytest -n 0 -s tests/test_crash.py``. FLOWSTORE_CHAOS_CYCLES is the
number of kills.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack

import pytest
import redis_server
from load import Load, verify

from flowstore_core import Capability, new_run_id, open_store

CYCLES = int(os.environ.get("FLOWSTORE_CHAOS_CYCLES", "3"))
CALLS = 300
"""Acknowledged calls between two faults."""

pytestmark = [
    pytest.mark.skipif(redis_server.BINARY is None, reason=redis_server.MISSING),
]


async def test_a_killed_server_loses_nothing_and_does_nothing_twice() -> None:
    with redis_server.running_server() as server:
        async with AsyncExitStack() as stack:
            stores = [await stack.enter_async_context(open_store(server.url())) for _ in range(3)]
            assert all(Capability.DURABLE in store.capabilities for store in stores)
            load = Load(stores, workers=18)
            for _ in range(CYCLES):
                await load.progress(CALLS)
                await asyncio.to_thread(server.kill)
                await asyncio.to_thread(server.start)
            await load.progress(CALLS)
            ledger = await load.stop()
            verdict = await verify(stores[0], ledger)
    print(  # noqa: T201
        f"\nserver killed: kills {CYCLES}, runs {verdict.runs}, acknowledged {ledger.acknowledged}, unknown "
        f"{ledger.unknown}, unavailable {ledger.unavailable}, lost {len(verdict.lost)}, twice "
        f"{len(verdict.twice)}, longest pause {ledger.longest_gap:.1f} s"
    )
    assert not verdict.lost, verdict.lost[:5]
    assert not verdict.twice, verdict.twice[:5]


async def test_a_commit_that_is_cut_off_in_the_log_is_dropped_whole() -> None:
    """As after a power cut in the middle of a write, before the call has returned."""
    with redis_server.running_server() as server:
        async with open_store(server.url()) as store:
            runs = [new_run_id(), new_run_id()]
            for run_id in runs:
                await store.start_run(new_run_id(), "flow", run_id, "manual")
            server.kill()
            (log,) = server.folder.glob("appendonlydir/*.incr.aof")
            os.truncate(log, log.stat().st_size - 5)
            server.start()
            assert [run.run_id for run in await store.get_runs()] == runs[:1]
            # The call that was dropped can be made again, so no part of it is left.
            await store.start_run(new_run_id(), "flow", runs[1], "manual")
            assert {run.run_id for run in await store.get_runs()} == set(runs)
