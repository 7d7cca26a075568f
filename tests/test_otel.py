"""Spans and metrics of stores, as exported by OpenTelemetry's SDK."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from flowstore_chaos.proxy import Fault, proxy_before
from flowstore_core import (
    ConfigurationError,
    FlowStore,
    RunNotFoundError,
    StepStatus,
    StoreConfig,
    open_store,
    open_store_sync,
)
from flowstore_core.open import resolve_store
from flowstore_core.plugins import find_backend, load_wrappers
from flowstore_otel import metrics as instruments
from flowstore_otel.attributes import describe_store
from flowstore_otel.plugin import flowstore_wrap_store
from flowstore_otel.tracing import NOUNS
from tests.calls import new_run, together
from tests.virtual_clock import VirtualClock

CANARY = "canary-51c0"


@dataclass
class Telemetry:
    """The spans and metrics that an application exports."""

    spans_exported: InMemorySpanExporter
    reader: InMemoryMetricReader

    def spans(self) -> list[ReadableSpan]:
        return list(self.spans_exported.get_finished_spans())

    def points(self, name: str) -> list[Any]:
        """The data points of an instrument."""
        data = self.reader.get_metrics_data()
        return [
            point
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]

    def text(self) -> str:
        data = self.reader.get_metrics_data()
        return "".join(span.to_json() for span in self.spans()) + (data.to_json() if data else "")


@pytest.fixture
def telemetry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Telemetry]:
    """Replace the providers during a test; set_tracer_provider cannot be undone."""
    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracers, meters = TracerProvider(), MeterProvider([reader])
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: tracers)
    monkeypatch.setattr(metrics, "get_meter_provider", lambda: meters)
    yield Telemetry(exporter, reader)
    meters.shutdown()
    tracers.shutdown()


def test_the_plugin_is_found_by_its_entry_point() -> None:
    assert "otel" in [plugin.name for plugin in load_wrappers()]


async def test_each_call_is_a_span_of_kind_client(namespace: str, backend: str, telemetry: Telemetry) -> None:
    async with open_store(namespace) as store:
        run_id = await new_run(store)
        with trace.get_tracer_provider().get_tracer("test").start_as_current_span("outer"):
            assert await store.try_claim_step(run_id, "a")
        await store.ping()
    spans = {span.name: span for span in telemetry.spans()}
    assert list(spans) == ["start_run runs", "try_claim_step claims", "outer", "ping"]
    claim = spans["try_claim_step claims"]
    assert claim.kind is SpanKind.CLIENT
    assert claim.status.status_code is StatusCode.UNSET
    assert claim.parent is not None
    assert claim.parent.span_id == spans["outer"].get_span_context().span_id
    assert claim.attributes is not None
    expected = {
        "db.system.name": backend,
        "db.operation.name": "try_claim_step",
        "db.collection.name": "claims",
        "flowstore.run_id": str(run_id),
    }
    assert expected.items() <= dict(claim.attributes).items()
    duration = {
        point.attributes["db.operation.name"]: point
        for point in telemetry.points("db.client.operation.duration")
    }
    assert set(duration) == {"start_run", "try_claim_step", "ping"}
    assert duration["ping"].count == 1
    assert 0 < duration["ping"].sum < 30
    assert "flowstore.run_id" not in duration["start_run"].attributes


def test_the_span_of_a_synchronous_call_is_a_child_of_its_callers_span(telemetry: Telemetry) -> None:
    tracer = trace.get_tracer_provider().get_tracer("test")
    with open_store_sync("memory://") as store, ThreadPoolExecutor(8) as threads:

        def request(number: int) -> None:
            with tracer.start_as_current_span(f"request {number}"):
                store.ping()

        list(threads.map(request, range(8)))
    spans = telemetry.spans()
    parents = {span.get_span_context().span_id: span for span in spans}
    pings = [span for span in spans if span.name == "ping"]
    assert len(pings) == 8
    assert {parents[span.parent.span_id].name for span in pings if span.parent is not None} == {
        f"request {number}" for number in range(8)
    }


async def test_the_span_of_a_failed_call_has_the_error_type(telemetry: Telemetry) -> None:
    async with open_store("memory://") as store:
        with pytest.raises(RunNotFoundError):
            await store.try_claim_step(uuid4(), CANARY)
        call = asyncio.ensure_future(store.get_runs())
        await call
    span, _ = telemetry.spans()
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes is not None
    assert span.attributes["error.type"] == "RunNotFoundError"
    assert not span.events
    failed, _ = telemetry.points("db.client.operation.duration")
    assert failed.attributes["error.type"] == "RunNotFoundError"
    assert CANARY not in telemetry.text()


async def test_the_error_code_of_the_database_is_recorded(postgresql_url: str, telemetry: Telemetry) -> None:
    async with (
        find_backend("postgresql")[1].scratch(postgresql_url) as fresh,
        open_store(fresh, retry_timeout=0) as store,
    ):
        run_id = await new_run(store)
        schema = fresh.partition("schema=")[2].partition("&")[0]
        administrator = await asyncpg.connect(postgresql_url)
        await administrator.execute(f'DROP TABLE "{schema}".outputs')
        await administrator.close()
        with pytest.raises(ConfigurationError, match="42P01") as raised:
            await store.save_output(run_id, "key", f'"{CANARY}"')
    assert raised.value.database_code == "42P01"
    span = telemetry.spans()[-1]
    assert span.attributes is not None
    assert span.attributes["db.response.status_code"] == "42P01"
    assert span.attributes["error.type"] == "ConfigurationError"
    assert CANARY not in telemetry.text()


async def test_batches_and_waits_are_measured(tmp_path: Path, telemetry: Telemetry) -> None:
    async with open_store(f"sqlite:///{tmp_path}/flows.db") as store:
        run_id = await new_run(store)
        await together(store.try_claim_step(run_id, f"s{n}") for n in range(30))
    (size,) = telemetry.points("flowstore.batch.size")
    (wait,) = telemetry.points("flowstore.batch.wait")
    assert size.sum == 31
    assert size.max > 1
    assert wait.count == size.count
    assert dict(size.attributes) == {
        "db.system.name": "sqlite",
        "db.namespace": f"{tmp_path}/flows.db",
        "db.operation.name": "write",
    }


async def test_retries_and_unacknowledged_writes_are_counted(
    postgresql_url: str, telemetry: Telemetry
) -> None:
    async with (
        find_backend("postgresql")[1].scratch(postgresql_url) as fresh,
        proxy_before(fresh) as (proxy, through),
        open_store(through, pool_size=1) as store,
    ):
        run_id = await new_run(store)
        for number in range(2):
            proxy.arm(number, Fault.REPLY_LOST)
            assert await store.try_claim_step(run_id, f"s{number}")
        proxy.arm(1, Fault.REQUEST_LOST)
        await store.get_run_status(run_id)
    retries = {
        point.attributes["db.operation.name"]: point for point in telemetry.points("flowstore.retries")
    }
    assert retries["try_claim_step"].attributes["flowstore.reason"] == "connection_lost"
    assert retries["read"].value >= 1
    (unknown,) = telemetry.points("flowstore.outcome_unknown")
    assert (unknown.value, unknown.attributes["flowstore.resolution"]) == (1, "happened")
    # A retry outside a batch is an event of the call's span.
    (read,) = [span for span in telemetry.spans() if span.name == "get_run_status runs"]
    assert [event.name for event in read.events][:1] == ["flowstore.retry"]


QUEUED = {"mail": 3, "video": 1}
MINUTE = timedelta(minutes=1)


async def _fill_queues(store: FlowStore) -> None:
    run_id = await new_run(store)
    for queue, steps in QUEUED.items():
        for number in range(steps):
            await store.try_record_dispatch(run_id, f"{queue}-{number}", queue=queue, step_type="test")


async def test_claims_are_counted_by_queue(namespace: str, backend: str, telemetry: Telemetry) -> None:
    async with open_store(namespace) as store:
        await _fill_queues(store)
        assert len(await store.claim_next_steps(["mail", "video"], lease=MINUTE, limit=10)) == 4
        for queues in (["mail"], ["mail"], ["mail", "video"]):
            assert not await store.claim_next_steps(queues, lease=MINUTE)
    claimed = telemetry.points("flowstore.queue.claimed_steps")
    assert {point.attributes["flowstore.queue"]: point.value for point in claimed} == QUEUED
    assert {point.attributes["db.system.name"] for point in claimed} == {backend}
    empty = telemetry.points("flowstore.queue.empty_claims")
    assert {point.attributes.get("flowstore.queue"): point.value for point in empty} == {"mail": 2, None: 1}


async def test_the_last_result_of_get_queues_is_reported(
    namespace: str, backend: str, telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steps() -> dict[tuple[str, str], int]:
        points = telemetry.points("flowstore.queue.steps")
        assert {point.attributes["db.system.name"] for point in points} <= {backend}
        return {(p.attributes["flowstore.queue"], p.attributes["flowstore.state"]): p.value for p in points}

    def ages() -> dict[str, float]:
        points = telemetry.points("flowstore.queue.oldest_ready_age")
        return {point.attributes["flowstore.queue"]: point.value for point in points}

    clock = VirtualClock(datetime.now(UTC))
    async with open_store(namespace, clock=clock) as store:
        await _fill_queues(store)
        later = clock() + MINUTE
        run_id = await new_run(store)
        await store.try_record_dispatch(run_id, "later", queue="mail", step_type="test", due_at=later)
        await store.try_record_dispatch(run_id, "waits", queue="mail", step_type="test")
        await store.register_waiter(run_id, "waits", "go")
        assert not steps()
        (video,) = await store.claim_next_steps(["video"], lease=MINUTE)
        clock.advance(seconds=30)
        await store.get_queues()
        counted = {
            "mail": {"ready": 3, "scheduled": 1, "waiting": 1, "running": 0},
            "video": {"ready": 0, "scheduled": 0, "waiting": 0, "running": 1},
        }
        assert steps() == {(queue, state): n for queue, one in counted.items() for state, n in one.items()}
        assert ages() == {"mail": 30.0, "video": 0.0}
        # A later result replaces the earlier one: a queue that is empty now is not reported any more.
        await store.advance_run(video.run_id, video.step_key, StepStatus.SUCCEEDED, attempt=video.attempt)
        await store.get_queues()
        assert ages() == {"mail": 30.0}
        monkeypatch.setattr(instruments, "READING_SECONDS", 0.0)
        await store.get_queues()
        assert not steps()
        assert not ages()


async def test_no_application_data_and_no_password_is_exported(namespace: str, telemetry: Telemetry) -> None:
    async with open_store(namespace) as store:
        run_id = await new_run(store, flow_name=CANARY, trigger_data=CANARY)
        attempt = await store.record_step_start(run_id, CANARY, CANARY, input_json=f'"{CANARY}"')
        await store.register_waiter(run_id, CANARY, CANARY)
        await store.deliver_signal(run_id, CANARY, f'"{CANARY}"')
        await store.save_output(run_id, CANARY, f'"{CANARY}"')
        await store.record_step_complete(
            run_id, CANARY, StepStatus.FAILED, error_message=CANARY, attempt=attempt
        )
        await store.get_runs_page(search=CANARY)
    assert len(telemetry.spans()) == 7
    assert CANARY not in telemetry.text()


@pytest.mark.parametrize(
    ("url", "options", "expected"),
    [
        (
            "postgresql://app:hunter2@db.example:6432/flows?schema=mine",
            {"schema": "mine"},
            {"server.address": "db.example", "server.port": 6432, "db.namespace": "flows|mine"},
        ),
        (
            "postgres://app:p@ss%3Fw%2Ford@db.example/flows",
            {},
            {"server.address": "db.example", "db.namespace": "flows|flowstore"},
        ),
        (
            "postgresql:///flows?host=/run/postgresql&password=hunter2",
            {"host": "/run/postgresql", "password": "hunter2"},
            {"server.address": "/run/postgresql", "db.namespace": "flows|flowstore"},
        ),
        ("postgresql://one,two/flows", {}, {"db.namespace": "flows|flowstore"}),
    ],
)
def test_the_address_of_a_server_is_recorded_without_secrets(
    url: str, options: dict[str, object], expected: dict[str, object]
) -> None:
    config = StoreConfig(
        url=url, scheme=url.partition(":")[0], options=MappingProxyType(options), clock=None, migrate=True
    )
    attributes = describe_store(config)
    assert "hunter2" not in str(attributes)
    assert "p@ss" not in str(attributes)
    assert "w/ord" not in str(attributes)
    assert attributes == {"db.system.name": "postgresql", **expected}


def test_every_operation_has_a_span() -> None:
    import inspect

    operations = {name for name, _ in inspect.getmembers(FlowStore, inspect.iscoroutinefunction)}
    assert set(NOUNS) == operations
    assert {noun for noun in NOUNS.values() if noun} == {
        "claims",
        "controls",
        "events",
        "outputs",
        "queues",
        "runs",
        "signals",
        "steps",
        "tags",
        "transfer",
    }


def test_a_store_is_not_wrapped_without_a_provider() -> None:
    _, _, config = resolve_store("memory://")
    assert flowstore_wrap_store(object(), config) is None
    assert not config.observers


WITHOUT_OPENTELEMETRY = """
import asyncio, json, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "opentelemetry":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from flowstore_core import open_store
from flowstore_cli.main import main

async def work():
    async with open_store("memory://") as store:
        await store.ping()

asyncio.run(work())
main(["backends", "--json"])
"""


def test_the_plugin_reports_that_opentelemetry_is_missing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_OPENTELEMETRY], capture_output=True, text=True, check=True
    )
    (listed,) = [entry for entry in json.loads(done.stdout) if entry["name"] == "otel"]
    assert listed["status"] == "driver missing"
    assert listed["problem"] == "module 'opentelemetry' is not installed, so this wrapper does nothing"
    assert listed["remedy"].startswith("pip install ")
