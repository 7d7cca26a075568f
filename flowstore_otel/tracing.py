"""A span and a duration measurement for each call of a store."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from time import perf_counter
from types import MappingProxyType
from typing import Any

from opentelemetry import metrics, trace
from opentelemetry.trace import SpanKind, StatusCode

from flowstore_core import FlowStore, StoreConfig
from flowstore_otel.attributes import (
    COLLECTION,
    OPERATION,
    RUN_ID,
    Attributes,
    describe_error,
    describe_store,
)
from flowstore_otel.metrics import SCOPE, MetricsObserver, QueueRecorder, instruments, scope_version

Operation = Callable[..., Awaitable[Any]]
Record = Callable[[Mapping[str, Any], Any], None]


def _nouns() -> Mapping[str, str | None]:
    """The noun of each operation: the name of the file in flowstore_core that declares it."""
    # cleanup and statistics concern runs, waiting concerns queues; ping concerns nothing stored.
    others = {"retention": "runs", "statistics": "runs", "watching": "queues", "store": None}
    found: dict[str, str | None] = {}
    for name, method in inspect.getmembers(FlowStore, inspect.iscoroutinefunction):
        noun = method.__module__.rpartition(".")[2]
        found[name] = others.get(noun, noun)
    return MappingProxyType(found)


NOUNS = _nouns()


def trace_store(store: Any, config: StoreConfig) -> Any:
    """Wrap the store with a span around each call, and record the reports of its backend as metrics.

    None if the application has set neither a tracer provider nor a meter provider: many libraries install
    the API of OpenTelemetry, and a store must not pay for telemetry that is discarded.
    """
    tracers, meters = trace.get_tracer_provider(), metrics.get_meter_provider()
    if not _is_configured(tracers, "opentelemetry.trace") and not _is_configured(
        meters, "opentelemetry.metrics"
    ):
        return None
    attributes, made = describe_store(config), instruments(meters)
    config.observers.append(MetricsObserver(made, attributes))
    queues = QueueRecorder(made, attributes, config.clock)
    tracer = tracers.get_tracer(SCOPE, scope_version())
    return TracedStore(store, attributes, tracer, made.duration, queues.by_operation)


def _is_configured(provider: object, interface: str) -> bool:
    """Whether the application set the provider; the API's default does nothing."""
    return not type(provider).__module__.startswith(interface)


class TracedStore:
    """A proxy for a store that traces each of its operations."""

    def __init__(
        self,
        store: Any,
        attributes: Attributes,
        tracer: trace.Tracer,
        duration: metrics.Histogram,
        records: Mapping[str, Record],
    ) -> None:
        self._store = store
        self._attributes = attributes
        self._tracer = tracer
        self._duration = duration
        self._records = records

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if name not in NOUNS or not callable(found):
            return found
        # Cached on the instance: the next lookup bypasses __getattr__.
        self.__dict__[name] = traced = _trace(
            found, name, self._attributes, self._tracer, self._duration, self._records.get(name)
        )
        return traced


def _trace(
    call: Operation,
    operation: str,
    store: Attributes,
    tracer: trace.Tracer,
    duration: metrics.Histogram,
    record: Record | None,
) -> Operation:
    noun = NOUNS[operation]
    attributes: Attributes = {**store, OPERATION: operation}
    if noun is not None:
        attributes[COLLECTION] = noun
    name = f"{operation} {noun}" if noun else operation

    async def traced(**arguments: Any) -> Any:
        recorded = attributes
        span = tracer.start_span(name, kind=SpanKind.CLIENT, attributes=attributes)
        if span.is_recording() and (run_id := arguments.get("run_id")) is not None:
            span.set_attribute(RUN_ID, str(run_id))
        began = perf_counter()
        # The span must not record the exception itself, which contains messages and arguments.
        with trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            try:
                result = await call(**arguments)
            except BaseException as error:
                failure = describe_error(error)
                recorded = {**attributes, **failure}
                span.set_attributes(failure)
                span.set_status(StatusCode.ERROR)
                raise
            finally:
                duration.record(perf_counter() - began, recorded)
        if record is not None:
            record(arguments, result)
        return result

    return traced
