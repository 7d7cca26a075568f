"""The worked example of docs/writing-a-backend.md, installed as a package and compared with memory.

Both receive the same random calls under one virtual clock, and every result and error must be equal.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from flowstore_core import (
    Capability,
    FlowStore,
    FlowStoreError,
    RunStatus,
    StepStatus,
    StoreUnavailableError,
    new_claim_token,
    new_run_id,
    open_store,
)
from flowstore_core.plugins import find_backend
from tests.virtual_clock import VirtualClock

EXAMPLE = Path(__file__).parents[1] / "examples" / "flowstore_example_backend"
FLOW = UUID(int=7)
RUNS = [UUID(int=n) for n in (1, 2, 3)]  # the last run is never started
KEYS = ["a", "b", "ü"]
OWNERS = [None, "one", "two"]

pytestmark = pytest.mark.xdist_group("example backend")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example installed by pip, including its entry point."""
    target = tmp_path_factory.mktemp("site")
    options = "--quiet --disable-pip-version-check --no-input --no-index --no-deps --no-build-isolation"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options.split(), "--target", str(target), str(EXAMPLE)],
        check=True,
    )
    return target


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(site))


@pytest.mark.usefixtures("installed")
async def test_a_run_is_kept_when_the_store_is_reopened(tmp_path: Path) -> None:
    url = f"folder:///{tmp_path}/runs"
    run_id, token = new_run_id(), new_claim_token()
    async with open_store(url) as store:
        assert store.backend == "folder"
        assert Capability.DURABLE in store.capabilities
        await store.start_run(FLOW, "orders", run_id, "manual")
        assert await store.try_claim_step(run_id, "charge", owner=token)
        attempt = await store.record_step_start(run_id, "charge", "http", owner=token)
        await store.record_step_complete(run_id, "charge", StepStatus.SUCCEEDED, attempt=attempt)
        await store.save_output(run_id, "total", "1.50")
        assert await store.complete_run(
            run_id, RunStatus.SUCCEEDED, expected={"charge": StepStatus.SUCCEEDED}
        )
        before = await store.get_run_detail(run_id)
    async with open_store(url, fsync=False) as store:
        assert Capability.DURABLE not in store.capabilities
        assert before == await store.get_run_detail(run_id)
        assert await store.get_output(run_id, "total") == "1.50"


@pytest.mark.usefixtures("installed")
async def test_a_folder_can_be_opened_only_once(tmp_path: Path) -> None:
    url = f"folder:///{tmp_path}/runs"
    async with open_store(url):
        with pytest.raises(StoreUnavailableError, match="open already"):
            async with open_store(url):
                pass
    async with open_store(url):
        pass


@pytest.mark.usefixtures("installed")
async def test_scratch_does_not_change_the_named_folder(tmp_path: Path) -> None:
    url = f"folder:///{tmp_path}/runs"
    backend = find_backend("folder")[1]
    async with open_store(url) as store:
        await store.start_run(FLOW, "orders", RUNS[0], "manual")
    before = _files(tmp_path)
    async with backend.scratch(url) as fresh, open_store(fresh) as store:
        assert await store.get_runs() == ()
        await store.start_run(FLOW, "orders", RUNS[1], "manual")
    assert _files(tmp_path) == before


def _files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.mark.usefixtures("installed")
async def test_cancelled_calls_are_compensated(tmp_path: Path) -> None:
    async with open_store(f"folder:///{tmp_path}/runs") as store:
        await store.start_run(FLOW, "orders", RUNS[0], "manual")
        for yields in range(8):
            calls = [
                asyncio.create_task(store.try_claim_step(RUNS[0], f"c{yields}")),
                asyncio.create_task(store.try_record_dispatch(RUNS[0], f"d{yields}")),
            ]
            for _ in range(yields):
                await asyncio.sleep(0)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
    async with open_store(f"folder:///{tmp_path}/runs") as store:
        assert await store.get_step_claims(RUNS[0]) == ()
        assert await store.get_dispatches(RUNS[0]) == ()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("seed", range(8))
async def test_the_example_behaves_like_the_memory_backend(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    clock = VirtualClock()
    url = f"folder:///{tmp_path}/runs?fsync=false"
    async with open_store("memory://", clock=clock) as memory:
        for _ in range(6):
            # Reopen the folder, so that later calls use documents read from disk.
            async with AsyncExitStack() as stack:
                folder = await stack.enter_async_context(open_store(url, clock=clock))
                for _ in range(150):
                    clock.advance(seconds=rng.choice([0, 0, 1, 1800]))
                    call, arguments = _random_call(rng, clock)
                    results = [await _result(store, call, arguments) for store in (memory, folder)]
                    assert results[0] == results[1], (call, arguments)
                states = [await _state(store) for store in (memory, folder)]
                assert states[0] == states[1]


async def _result(store: FlowStore, call: str, arguments: dict[str, Any]) -> object:
    try:
        return await getattr(store, call)(**arguments)
    except FlowStoreError as error:
        return type(error), vars(error)


async def _state(store: FlowStore) -> list[object]:
    state: list[object] = [await store.get_runs(), await store.get_active_runs()]
    for run_id in RUNS:
        state += [
            await store.get_run_detail(run_id),
            await store.get_run(run_id),
            await store.get_run_status(run_id),
            await store.get_step_statuses(run_id),
            await store.get_step_claims(run_id),
            await store.get_claimed_step_keys(run_id),
            await store.get_dispatches(run_id),
            await store.get_dispatched_step_keys(run_id),
            await store.get_run_control(run_id),
            await store.get_outputs(run_id),
            await store.get_derived_runs(run_id),
            *[await store.get_waiter(run_id, key) for key in KEYS],
            *[await store.get_step(run_id, key) for key in KEYS],
        ]
    return state


def _random_call(rng: random.Random, clock: VirtualClock) -> tuple[str, dict[str, Any]]:
    run_id, key, owner = rng.choice(RUNS), rng.choice(KEYS), rng.choice(OWNERS)
    reason, soon = rng.choice([None, "why"]), clock.now + timedelta(hours=rng.choice([-1, 1]))
    attempt, time = rng.choice([None, 1, 2, 3]), rng.choice([None, soon])
    step = {"run_id": run_id, "step_key": key}
    scope = {"flow_id": FLOW, "trigger_key": "manual", "idempotency_key": key}
    done = rng.choice([s for s in StepStatus if s is not StepStatus.RUNNING])
    text = rng.choice([None, "", '{"a": 1}'])
    calls: dict[str, Callable[[], dict[str, Any]]] = {
        "start_run": lambda: {
            "flow_id": FLOW,
            "flow_name": "orders",
            "run_id": rng.choice(RUNS[:2]),
            "trigger_key": "manual",
            "source_run_id": rng.choice([None, RUNS[0]]),
        },
        "record_step_start": lambda: {**step, "step_type": "http", "input_json": text, "owner": owner},
        "record_step_complete": lambda: {**step, "status": done, "output_json": text, "attempt": attempt},
        "record_skipped_step": lambda: {**step, "step_type": "x", "reason": reason, "owner": owner},
        "retry_step": lambda: {**step, "attempt": attempt, "reset": rng.sample(KEYS, 2)},
        "complete_run": lambda: {
            "run_id": run_id,
            "status": RunStatus.FAILED,
            "expected": rng.choice([None, {}, {key: done}, dict.fromkeys(KEYS, StepStatus.SKIPPED)]),
        },
        "try_claim_step": lambda: {**step, "owner": owner},
        "release_step_claim": lambda: {**step, "owner": owner},
        "try_record_dispatch": lambda: {**step, "due_at": time},
        "annotate_dispatch": lambda: {**step, "job_id": "job"},
        "release_dispatch": lambda: step,
        "configure_run": lambda: {
            "run_id": run_id,
            "flow_id": FLOW,
            "trigger_key": "manual",
            "idempotency_key": reason,
            "timeout_at": time,
        },
        "request_cancel": lambda: {"run_id": run_id, "reason": reason},
        "mark_timed_out": lambda: {"run_id": run_id, "reason": reason, "as_of": time},
        "find_run_id_by_idempotency_key": lambda: scope,
        "try_register_idempotency_key": lambda: {**scope, "run_id": run_id},
        "register_waiter": lambda: {**step, "signal_name": rng.choice("st"), "expires_at": time},
        "deliver_signal": lambda: {
            "run_id": run_id,
            "signal_name": rng.choice("st"),
            "payload_json": "1",
            "delivery_id": reason,
        },
        "remove_waiter": lambda: step,
        "save_output": lambda: {"run_id": run_id, "key": key, "value_json": text or "1"},
        "cleanup": lambda: {"cutoff": clock.now - timedelta(hours=rng.choice([0, 3]))},
    }
    # Calls that create and use steps are more frequent than the rest.
    common = [
        "start_run",
        "record_step_start",
        "record_step_complete",
        "try_claim_step",
        "release_step_claim",
    ]
    call = rng.choice([*calls, *common, *common])
    return call, calls[call]()
