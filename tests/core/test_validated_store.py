"""The validated store: the arguments that a backend gets, and the order of errors."""

from __future__ import annotations

import asyncio
import importlib
import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

import pytest
from flowstore_conformance.checks.operations import (
    ARGUMENT_KINDS,
    HOSTILE,
    hostile_arguments,
    legal_arguments,
    offered_arguments,
)

from flowstore_core import (
    PROPERTIES,
    Capability,
    FlowStore,
    InvalidArgumentError,
    NotSupportedError,
    RunStatus,
    RunTimeseriesGranularity,
    StepStatus,
    StoreClosedError,
    open_store,
)
from flowstore_core.operations import CAPABILITY_METHODS, KEYWORD_CAPABILITIES
from tests.core.conftest import RECORDING, Install

EXTENSIONS = {method: capability for capability, methods in CAPABILITY_METHODS.items() for method in methods}


def test_the_table_of_operations_is_complete() -> None:
    parameters = {
        name: list(inspect.signature(member).parameters)[1:]
        for name, member in inspect.getmembers(FlowStore, inspect.isfunction)
        if not name.startswith("_") and name not in ("ping", "aclose")
    }
    assert parameters == {name: list(kinds) for name, kinds in ARGUMENT_KINDS.items()}


def test_every_extension_has_a_capability() -> None:
    assert set(EXTENSIONS.values()) == set(Capability) - PROPERTIES
    assert set(EXTENSIONS) <= set(ARGUMENT_KINDS)


@pytest.mark.parametrize("operation", ARGUMENT_KINDS)
async def test_a_backend_gets_every_parameter_by_keyword(install: Install, operation: str) -> None:
    install("mine", RECORDING)
    legal = legal_arguments(operation)
    required = {
        name: value for name, value in legal.items() if not ARGUMENT_KINDS[operation][name].endswith("?")
    }
    async with open_store("mine://x") as store:
        await getattr(store, operation)(**legal)
        for name in ("skip", "take", "after", "reset", "limit", *KEYWORD_CAPABILITIES.get(operation, ())):
            required.pop(name, None)
        await getattr(store, operation)(**required)
    (_, called, full), (_, _, least) = importlib.import_module("plugin_of_mine").calls
    assert called == operation
    assert set(full) == set(ARGUMENT_KINDS[operation])
    # A keyword of another capability is passed on only if it was given.
    assert set(full) - set(least) == set(KEYWORD_CAPABILITIES.get(operation, ())) - {"lease"}
    assert {name: least[name] for name in required} == {name: full[name] for name in required}


async def test_a_backend_gets_normalised_arguments(install: Install) -> None:
    class Key(str):
        __slots__ = ()

    install("mine", RECORDING)
    run_id = uuid4()
    noon = datetime(2026, 3, 14, 14, tzinfo=timezone(timedelta(hours=2)))
    async with open_store("mine://x") as store:
        await store.complete_run(run_id, "Failed", expected={Key("a"): "Skipped"})
        await store.record_step_complete(run_id, Key("a"), "Pending")
        await store.try_record_dispatch(run_id, "a", due_at=noon)
        await store.retry_step(run_id, "a", reset=["b", "b"])
        await store.get_runs_page(status="Running", search="")
        await store.get_run_timeseries("hour", noon + timedelta(minutes=1), noon + timedelta(minutes=61))
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
    # An empty search becomes None, and a window whole buckets.
    assert page["search"] is None
    assert series["granularity"] is RunTimeseriesGranularity.HOUR
    assert (series["since"], series["until"]) == (
        datetime(2026, 3, 14, 12, tzinfo=UTC),
        datetime(2026, 3, 14, 14, tzinfo=UTC),
    )


async def test_a_backend_gets_values_of_plain_types(install: Install) -> None:
    class Key(str):
        __slots__ = ()

    class Id(UUID):
        pass

    install("mine", RECORDING)
    async with open_store("mine://x") as store:
        await store.start_run(Id(int=1), Key("orders"), Id(int=2), Key("manual"), trigger_data=Key("data"))
    ((_, _, given),) = importlib.import_module("plugin_of_mine").calls
    assert (given["run_id"], given["flow_name"], given["trigger_data"]) == (UUID(int=2), "orders", "data")
    assert {type(value) for value in given.values()} == {UUID, str, type(None)}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # Local times that occur twice when clocks are set back, or are skipped when clocks are set forward.
        (datetime(2026, 10, 25, 2, 30, fold=0, tzinfo=ZoneInfo("Europe/Berlin")), (2026, 10, 25, 0, 30)),
        (datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin")), (2026, 10, 25, 1, 30)),
        (datetime(2026, 3, 29, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin")), (2026, 3, 29, 0, 30)),
        (datetime(2026, 7, 14, 1, 2, 3, 4, ZoneInfo("America/St_Johns")), (2026, 7, 14, 3, 32, 3, 4)),
        (
            datetime(2026, 7, 14, tzinfo=timezone(timedelta(microseconds=7))),
            (2026, 7, 13, 23, 59, 59, 999993),
        ),
        # The local date may be outside the limits.
        (datetime(9999, 12, 30, 14, tzinfo=timezone(timedelta(hours=14))), (9999, 12, 30)),
        (datetime(1, 1, 1, 12, tzinfo=timezone(timedelta(hours=-12))), (1, 1, 2)),
    ],
    ids=str,
)
async def test_a_backend_gets_datetimes_in_utc(
    install: Install, given: datetime, expected: tuple[int, ...]
) -> None:
    install("mine", RECORDING)
    async with open_store("mine://x", clock=lambda: given) as store:
        await store.try_record_dispatch(uuid4(), "a", due_at=given)
    plugin = importlib.import_module("plugin_of_mine")
    for received in (plugin.calls[0][2]["due_at"], plugin.opened[0].clock()):
        assert (received, received.tzinfo, type(received)) == (datetime(*expected, tzinfo=UTC), UTC, datetime)  # type: ignore[misc, arg-type]


async def test_an_argument_error_does_not_show_the_value(install: Install) -> None:
    install("mine", RECORDING)
    secret = "hunter2"
    async with open_store("mine://x") as store:
        for bad in ({"job_id": secret * 200}, {"trigger_data": secret + "\0"}, {"flow_name": secret * 40}):
            with pytest.raises(InvalidArgumentError) as caught:
                await store.start_run(**{**legal_arguments("start_run"), **bad})
            assert secret not in f"{caught.value} {caught.value!r} {caught.value.__dict__}"
            assert caught.value.argument in str(caught.value)
            assert caught.value.limit in str(caught.value)


async def test_the_clock_of_a_backend_is_validated(install: Install) -> None:
    readings: list[Any] = [
        datetime(2026, 3, 14, 14, tzinfo=timezone(timedelta(hours=2))),
        datetime(2026, 3, 14),  # noqa: DTZ001 - the test needs a naive datetime
    ]
    install("mine", RECORDING)
    async with open_store("mine://x", clock=lambda: readings.pop(0)):
        (config,) = importlib.import_module("plugin_of_mine").opened
        assert config.clock() == datetime(2026, 3, 14, 12, tzinfo=UTC)
        with pytest.raises(InvalidArgumentError) as caught:
            config.clock()
        assert caught.value.argument == "clock"


@pytest.mark.parametrize("operation", ARGUMENT_KINDS)
async def test_argument_errors_precede_closed_and_not_supported(install: Install, operation: str) -> None:
    code = RECORDING.replace("frozenset(fs.Capability)", "frozenset()")
    if operation not in EXTENSIONS:
        # A base operation that the backend's store lacks.
        code = code.replace('operation.startswith("_")', "True")
    install("mine", code)
    legal = offered_arguments(operation, ())
    name, hostile = next(hostile_arguments(operation, HOSTILE), (None, legal))
    hostile = {key: value for key, value in hostile.items() if key in legal}
    async with open_store("mine://x") as store:
        if name is not None:
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
        if name is not None:
            with pytest.raises(InvalidArgumentError):
                await getattr(store, operation)(**hostile)
        with pytest.raises(StoreClosedError):
            await getattr(store, operation)(**legal)
    assert importlib.import_module("plugin_of_mine").calls == []


async def test_only_a_claim_with_a_lease_needs_the_leases_capability(install: Install) -> None:
    install("mine", RECORDING.replace("frozenset(fs.Capability)", "frozenset()"))
    async with open_store("mine://x") as store:
        assert await store.try_claim_step(uuid4(), "charge", owner="me")
        with pytest.raises(NotSupportedError) as refused:
            await store.try_claim_step(uuid4(), "charge", owner="me", lease=timedelta(seconds=1))
        assert refused.value.capability == "leases"
        with pytest.raises(InvalidArgumentError):
            await store.try_claim_step(uuid4(), "charge", owner="me", lease=timedelta(0))


async def test_only_a_signal_with_buffer_needs_the_mailbox_capability(install: Install) -> None:
    install("mine", RECORDING.replace("frozenset(fs.Capability)", "frozenset()"))
    async with open_store("mine://x") as store:
        for given in ({}, {"buffer": False}):
            await store.deliver_signal(uuid4(), "go", "{}", **given)
        for _, _, arguments in importlib.import_module("plugin_of_mine").calls:
            assert "buffer" not in arguments
        with pytest.raises(NotSupportedError) as refused:
            await store.deliver_signal(uuid4(), "go", "{}", buffer=True)
        assert (refused.value.capability, refused.value.operation) == ("mailbox", "deliver_signal")
        with pytest.raises(InvalidArgumentError):
            await store.deliver_signal(uuid4(), "go", "{}", buffer=1)  # type: ignore[arg-type]


async def test_a_closed_store_refuses_calls(install: Install) -> None:
    install("mine", RECORDING)
    async with open_store("mine://x") as store:
        assert "closed" not in repr(store)
        await store.aclose()
        assert "closed" in repr(store)
        # Its properties still work.
        assert store.backend == "mine"
        assert Capability.EVENTS in store.capabilities
        with pytest.raises(StoreClosedError):
            await store.ping()


async def test_the_backend_is_closed_once(install: Install) -> None:
    install("mine", RECORDING)
    async with open_store("mine://x") as store:
        await asyncio.gather(*(store.aclose() for _ in range(5)))
        await store.aclose()
    assert len(importlib.import_module("plugin_of_mine").closed) == 1


async def test_a_second_aclose_waits_for_the_first(install: Install) -> None:
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


async def test_an_error_while_closing_is_raised_and_the_store_is_closed(install: Install) -> None:
    install("mine", RECORDING.replace("closed.append(config)", "closed.append(1 / 0)"))
    async with open_store("mine://x") as store:
        with pytest.raises(ZeroDivisionError):
            await store.aclose()
        with pytest.raises(StoreClosedError):
            await store.ping()
        await store.aclose()


async def test_a_store_is_closed_when_its_task_is_cancelled(install: Install) -> None:
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


async def test_open_store_works_inside_another_context_manager(install: Install) -> None:
    install("mine", RECORDING)

    @asynccontextmanager
    async def mine() -> AsyncIterator[Any]:
        async with open_store("mine://x") as store:
            yield store

    async with mine() as store:
        assert await store.get_runs() == "get_runs of innermost"
