"""RET-3 with several batches: the suite's checks of cleanup with a batch size of one."""

from __future__ import annotations

import asyncio
from importlib import import_module

import pytest
from flowstore_conformance.context import Profile
from flowstore_conformance.registry import Check
from flowstore_conformance.status import Status
from flowstore_conformance.suite import run_check, select_checks

from flowstore_core import RunStatus
from flowstore_core.plugins import find_backend
from tests.calls import new_run, together
from tests.conftest import OpenSecondStore
from tests.virtual_clock import VirtualClock

PACKAGES = {"memory": "flowstore_memory", "sqlite": "flowstore_sqlite", "postgresql": "flowstore_postgres"}
CHECKS = (
    "one_cleanup_deletes_more_runs_than_a_batch",
    "old_keys_and_controls_without_run_are_deleted",
    "a_cancelled_cleanup_deletes_whole_runs",
    "cleanup_pairs_by_stores",
    "cleanups_by_stores",
    "cleanups_by_tasks",
)


@pytest.fixture
def batches_of_one(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module(f"{PACKAGES[backend]}.retention")
    assert module.BATCH > 1
    monkeypatch.setattr(module, "BATCH", 1)


@pytest.mark.parametrize(
    "check", [one for one in select_checks() if one.name in CHECKS], ids=lambda check: check.name
)
@pytest.mark.usefixtures("batches_of_one")
async def test_ret_3_conforms_with_batches_of_one(check: Check, backend: str, namespace: str) -> None:
    result = await run_check(check, namespace, find_backend(backend)[1], Profile.QUICK, 3)
    assert result.status is Status.PASS, result.failure or result.reason


def test_ret_3_the_checks_exist() -> None:
    assert {one.name for one in select_checks()} >= set(CHECKS)


@pytest.mark.usefixtures("batches_of_one")
async def test_ret_3_concurrent_cleanups_and_retries_count_each_run_once(
    open_second_store: OpenSecondStore, clock: VirtualClock
) -> None:
    stores = [await open_second_store() for _ in range(3)]
    runs = [await new_run(stores[0]) for _ in range(24)]
    for run_id in runs:
        await stores[0].record_skipped_step(run_id, "charge", "http")
        await stores[0].complete_run(run_id, RunStatus.FAILED)
    cutoff = clock.advance(days=1)

    async def retry() -> int:
        retried = 0
        for run_id in runs[::-4]:
            try:
                await stores[2].retry_step(run_id, "charge")
            except LookupError:
                continue
            retried += 1
            await asyncio.sleep(0)
        return retried

    first, second, retried = await together([stores[0].cleanup(cutoff), stores[1].cleanup(cutoff), retry()])
    assert first + second + retried == len(runs)
    remaining = await stores[0].get_active_runs()
    assert len(remaining) == len(await stores[0].get_runs()) == retried


@pytest.mark.usefixtures("batches_of_one")
async def test_ret_3_other_tasks_run_between_batches(
    open_second_store: OpenSecondStore, clock: VirtualClock
) -> None:
    store = await open_second_store()
    for _ in range(12):
        await store.complete_run(await new_run(store), RunStatus.SUCCEEDED)
    cleaning = asyncio.ensure_future(store.cleanup(clock.advance(seconds=1)))
    switches = 0
    while not cleaning.done():
        await asyncio.sleep(0)
        switches += 1
    assert await cleaning == 12
    # Also in a backend that does not wait for I/O.
    assert switches > 6
