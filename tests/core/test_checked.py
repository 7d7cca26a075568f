"""The checked store: what a backend is called with, and in what order things are refused."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import uuid4

import pytest

from flowstore_core import (
    Capability,
    InvalidArgumentError,
    NotSupportedError,
    RunStatus,
    RunTimeseriesGranularity,
    StepStatus,
    StoreClosedError,
    open_store,
)
from flowstore_core.store import CAPABILITY_METHODS
from tests.contract.operations import OPERATIONS, hostile_arguments, legal_arguments
from tests.core.conftest import RECORDING, Install

EXTENSIONS = {method: capability for capability, methods in CAPABILITY_METHODS.items() for method in methods}


def test_checked_every_extension_has_its_capability() -> None:
    facts = {Capability.DURABLE, Capability.MULTI_PROCESS, Capability.VIRTUAL_CLOCK}
    assert set(EXTENSIONS.values()) == set(Capability) - facts
    assert set(EXTENSIONS) <= set(OPERATIONS)


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_checked_a_backend_gets_every_parameter_by_keyword(install: Install, operation: str) -> None:
    install("mine", RECORDING)
    legal = legal_arguments(operation)
    required = {name: value for name, value in legal.items() if not OPERATIONS[operation][name].endswith("?")}
    async with open_store("mine://x") as store:
        await getattr(store, operation)(**legal)
        for name in ("skip", "take", "after", "reset"):
            required.pop(name, None)
        await getattr(store, operation)(**required)
    (_, called, full), (_, _, least) = importlib.import_module("plugin_of_mine").calls
    assert called == operation
    assert set(full) == set(least) == set(OPERATIONS[operation])
    assert {name: least[name] for name in required} == {name: full[name] for name in required}


async def test_checked_a_backend_gets_normalised_arguments(install: Install) -> None:
    class Key(str):
        __slots__ = ()

    install("mine", RECORDING)
    run_id = uuid4()
    noon = datetime(2026, 3, 14, 14, tzinfo=timezone(timedelta(hours=2)))
    async with open_store("mine://x") as store:
        await store.complete_run(run_id, "Failed", expected={Key("a"): "Skipped"})  # type: ignore[arg-type, dict-item]
        await store.record_step_complete(run_id, Key("a"), "Pending")  # type: ignore[arg-type]
        await store.try_record_dispatch(run_id, "a", due_at=noon)
        await store.retry_step(run_id, "a", reset=["b", "b"])
        await store.get_runs_page(status="Running", search="")  # type: ignore[arg-type]
        await store.get_run_timeseries("hour", noon + timedelta(minutes=1), noon + timedelta(minutes=61))  # type: ignore[arg-type]
    calls = [arguments for _, _, arguments in importlib.import_module("plugin_of_mine").calls]
    complete, outcome, dispatch, retry, page, series = calls
    assert complete["status"] is RunStatus.FAILED
    assert complete["expected"] == {"a": StepStatus.SKIPPED}
    assert [type(key) for key in complete["expected"]] == [str]
    assert [type(status) for status in complete["expected"].values()] == [StepStatus]
    assert outcome["status"] is StepStatus.PENDING
    assert type(outcome["step_key"]) is str
    assert (dispatch["due_at"], dispatch["due_at"].tzinfo) == (datetime(2026, 3, 14, 12, tzinfo=UTC), UTC)
    assert retry["reset"] == frozenset({"b"})
    assert page["status"] is RunStatus.RUNNING
    # An empty search is none, and a window is whole buckets.
    assert page["search"] is None
    assert series["granularity"] is RunTimeseriesGranularity.HOUR
    assert (series["since"], series["until"]) == (
        datetime(2026, 3, 14, 12, tzinfo=UTC),
        datetime(2026, 3, 14, 14, tzinfo=UTC),
    )


async def test_checked_the_clock_a_backend_gets_is_checked(install: Install) -> None:
    readings: list[Any] = [
        datetime(2026, 3, 14, 14, tzinfo=timezone(timedelta(hours=2))),
        datetime(2026, 3, 14),  # noqa: DTZ001 - naive is what it is about
    ]
    install("mine", RECORDING)
    async with open_store("mine://x", clock=lambda: readings.pop(0)):
        (config,) = importlib.import_module("plugin_of_mine").opened
        assert config.clock() == datetime(2026, 3, 14, 12, tzinfo=UTC)
        with pytest.raises(InvalidArgumentError) as caught:
            config.clock()
        assert caught.value.argument == "clock"


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_checked_argument_then_closed_then_not_supported(install: Install, operation: str) -> None:
    code = RECORDING.replace("frozenset(fs.Capability)", "frozenset()")
    if operation not in EXTENSIONS:
        # A base operation that the backend's store has not got.
        code = code.replace('operation.startswith("_")', "True")
    install("mine", code)
    legal = legal_arguments(operation)
    legal.pop("lease", None) if operation == "try_claim_step" else None
    name, hostile = hostile_arguments(operation)[0]
    if operation == "try_claim_step":
        hostile.pop("lease")
    async with open_store("mine://x") as store:
        with pytest.raises(InvalidArgumentError) as caught:
            await getattr(store, operation)(**hostile)
        assert caught.value.argument == name
        with pytest.raises(NotSupportedError) as refused:
            await getattr(store, operation)(**legal)
        capability = EXTENSIONS.get(operation)
        assert refused.value.backend == "mine"
        assert refused.value.operation == operation
        assert refused.value.capability == ("base" if capability is None else capability.value)
        assert operation in str(refused.value)
        await store.aclose()
        with pytest.raises(InvalidArgumentError):
            await getattr(store, operation)(**hostile)
        with pytest.raises(StoreClosedError):
            await getattr(store, operation)(**legal)
    assert importlib.import_module("plugin_of_mine").calls == []


async def test_checked_a_lease_needs_the_capability_a_claim_does_not(install: Install) -> None:
    install("mine", RECORDING.replace("frozenset(fs.Capability)", "frozenset()"))
    async with open_store("mine://x") as store:
        assert await store.try_claim_step(uuid4(), "charge", owner="me")
        with pytest.raises(NotSupportedError) as refused:
            await store.try_claim_step(uuid4(), "charge", owner="me", lease=timedelta(seconds=1))
        assert refused.value.capability == "leases"
        with pytest.raises(InvalidArgumentError):
            await store.try_claim_step(uuid4(), "charge", owner="me", lease=timedelta(0))


async def test_checked_a_closed_store_says_so(install: Install) -> None:
    install("mine", RECORDING)
    async with open_store("mine://x") as store:
        assert "closed" not in repr(store)
        await store.aclose()
        assert "closed" in repr(store)
        # What it is can still be asked.
        assert store.backend == "mine"
        assert Capability.EVENTS in store.capabilities
        with pytest.raises(StoreClosedError):
            await store.ping()


async def test_checked_the_backend_is_closed_once(install: Install) -> None:
    install("mine", RECORDING)
    async with open_store("mine://x") as store:
        await asyncio.gather(*(store.aclose() for _ in range(5)))
        await store.aclose()
    assert len(importlib.import_module("plugin_of_mine").closed) == 1


async def test_checked_a_second_aclose_waits_for_the_first(install: Install) -> None:
    code = RECORDING.replace("closed.append(config)", "await gate.wait(); closed.append(config)")
    install("mine", code + "\n\nimport asyncio\n\ngate = asyncio.Event()\n")
    async with open_store("mine://x") as store:
        plugin = importlib.import_module("plugin_of_mine")
        closing = [asyncio.create_task(store.aclose()) for _ in range(3)]
        for _ in range(5):
            await asyncio.sleep(0)
        assert not any(task.done() for task in closing)
        plugin.gate.set()
        await asyncio.gather(*closing)
        assert len(plugin.closed) == 1


async def test_checked_an_error_on_closing_surfaces_and_the_store_is_closed(install: Install) -> None:
    install("mine", RECORDING.replace("closed.append(config)", "closed.append(1 / 0)"))
    async with open_store("mine://x") as store:
        with pytest.raises(ZeroDivisionError):
            await store.aclose()
        with pytest.raises(StoreClosedError):
            await store.ping()
        await store.aclose()


async def test_checked_a_store_is_closed_when_its_user_is_cancelled(install: Install) -> None:
    install("mine", RECORDING)
    entered = asyncio.Event()

    async def use() -> None:
        async with open_store("mine://x"):
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(use())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(importlib.import_module("plugin_of_mine").closed) == 1


async def test_checked_open_store_may_be_kept_by_hand(install: Install) -> None:
    install("mine", RECORDING)

    @asynccontextmanager
    async def mine() -> AsyncIterator[Any]:
        async with open_store("mine://x") as store:
            yield store

    async with mine() as store:
        assert await store.get_runs() == "get_runs of innermost"
