"""A span and a duration for each call of a store."""

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
from flowstore_otel.metrics import SCOPE, Measuring, instruments, scope_version

Operation = Callable[..., Awaitable[Any]]


def _nouns() -> Mapping[str, str | None]:
    """Each operation and what it is about: the noun in whose file of core its promise stands."""
    # Deleting runs and counting them are about runs; ping is about nothing that is stored.
    others = {"retention": "runs", "statistics": "runs", "store": None}
    found: dict[str, str | None] = {}
    for name, method in inspect.getmembers(FlowStore, inspect.iscoroutinefunction):
        noun = method.__module__.rpartition(".")[2]
        found[name] = others.get(noun, noun)
    return MappingProxyType(found)


NOUNS = _nouns()


def trace_store(store: Any, config: StoreConfig) -> Any:
    """The store with a span around each call, and its metrics fed by what its backend reports.

    None while the application has set neither a tracer provider nor a meter provider: OpenTelemetry's
    interface comes with many libraries, and a store must not pay for what nobody will see.
    """
    tracers, meters = trace.get_tracer_provider(), metrics.get_meter_provider()
    if not _is_real(tracers, "opentelemetry.trace") and not _is_real(meters, "opentelemetry.metrics"):
        return None
    attributes, made = describe_store(config), instruments(meters)
    config.observers.append(Measuring(made, attributes))
    return Traced(store, attributes, tracers.get_tracer(SCOPE, scope_version()), made.duration)


def _is_real(provider: object, interface: str) -> bool:
    """Whether a provider is one that was set, not the interface's own that does nothing."""
    return not type(provider).__module__.startswith(interface)


class Traced:
    """Stands for a store; each of its operations is traced from its first use on."""

    def __init__(
        self, store: Any, attributes: Attributes, tracer: trace.Tracer, duration: metrics.Histogram
    ) -> None:
        self._store = store
        self._attributes = attributes
        self._tracer = tracer
        self._duration = duration

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if name not in NOUNS or not callable(found):
            return found
        # Kept, so that the next call finds it without coming here.
        self.__dict__[name] = traced = _trace(found, name, self._attributes, self._tracer, self._duration)
        return traced


def _trace(
    call: Operation, operation: str, store: Attributes, tracer: trace.Tracer, duration: metrics.Histogram
) -> Operation:
    noun = NOUNS[operation]
    attributes: Attributes = {**store, OPERATION: operation}
    if noun is not None:
        attributes[COLLECTION] = noun
    name = f"{operation} {noun}" if noun else operation

    async def traced(**arguments: Any) -> Any:
        outcome = attributes
        span = tracer.start_span(name, kind=SpanKind.CLIENT, attributes=attributes)
        if span.is_recording() and (run_id := arguments.get("run_id")) is not None:
            span.set_attribute(RUN_ID, str(run_id))
        began = perf_counter()
        # Not the span's own record of an exception: that holds messages and arguments.
        with trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            try:
                return await call(**arguments)
            except BaseException as error:
                failure = describe_error(error)
                outcome = {**attributes, **failure}
                span.set_attributes(failure)
                span.set_status(StatusCode.ERROR)
                raise
            finally:
                duration.record(perf_counter() - began, outcome)

    return traced
