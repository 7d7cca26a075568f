"""The instruments, and the observer that records the reports of backends."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from opentelemetry import metrics, trace

from flowstore_core.distributions import installed_version
from flowstore_core.instrumentation import Resolution
from flowstore_otel.attributes import OPERATION, REASON, RESOLUTION, Attributes

SCOPE = "flowstore_otel"

# The bucket boundaries that the semantic conventions recommend for database operations.
SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)
CALLS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def scope_version() -> str:
    return installed_version("flowstore") or ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruments:
    """The instruments that all stores of the process share."""

    duration: metrics.Histogram
    retries: metrics.Counter
    batch_size: metrics.Histogram
    queue_wait: metrics.Histogram
    outcome_unknown: metrics.Counter


@functools.lru_cache(maxsize=4)
def instruments(provider: metrics.MeterProvider) -> Instruments:
    """Create the instruments of a provider, once: OpenTelemetry rejects duplicates."""
    meter = provider.get_meter(SCOPE, scope_version())
    return Instruments(
        duration=meter.create_histogram(
            "db.client.operation.duration",
            unit="s",
            description="Duration of the calls of a store",
            explicit_bucket_boundaries_advisory=SECONDS,
        ),
        retries=meter.create_counter(
            "flowstore.retries", unit="{retry}", description="Retries inside a call"
        ),
        batch_size=meter.create_histogram(
            "flowstore.batch.size",
            unit="{call}",
            description="Calls in a batch",
            explicit_bucket_boundaries_advisory=CALLS,
        ),
        queue_wait=meter.create_histogram(
            "flowstore.queue.wait",
            unit="s",
            description="Time that the oldest call of a batch was queued",
            explicit_bucket_boundaries_advisory=SECONDS,
        ),
        outcome_unknown=meter.create_counter(
            "flowstore.outcome_unknown",
            unit="{call}",
            description="Unacknowledged calls, by resolution",
        ),
    )


class MetricsObserver:
    """An observer (see flowstore_core.instrumentation) that records the reports of a backend as metrics.

    A retry is also an event of the call's span, unless the call was sent in a batch: a batch belongs to
    several calls.
    """

    def __init__(self, instruments: Instruments, store: Attributes) -> None:
        self._instruments = instruments
        self._store = store
        self._by_operation: dict[str, Attributes] = {}

    def _attributes(self, operation: str) -> Attributes:
        known = self._by_operation.get(operation)
        if known is None:
            known = self._by_operation[operation] = {**self._store, OPERATION: operation}
        return known

    def retried(self, operation: str, reason: str, wait: float) -> None:
        self._instruments.retries.add(1, {**self._attributes(operation), REASON: reason})
        span = trace.get_current_span()
        if span.is_recording():
            span.add_event("flowstore.retry", {REASON: reason, "flowstore.wait_seconds": wait})

    def batch(self, operation: str, size: int, waited: float) -> None:
        attributes = self._attributes(operation)
        self._instruments.batch_size.record(size, attributes)
        self._instruments.queue_wait.record(waited, attributes)

    def outcome_unknown(self, operation: str, resolution: Resolution, calls: int) -> None:
        attributes = {**self._attributes(operation), RESOLUTION: resolution.value}
        self._instruments.outcome_unknown.add(calls, attributes)
        span = trace.get_current_span()
        if span.is_recording():
            span.add_event("flowstore.outcome_unknown", {RESOLUTION: resolution.value})
