"""The instruments, and the observer that feeds those which only a backend can feed."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from opentelemetry import metrics, trace

from flowstore_core.distributions import installed_version
from flowstore_core.instrumentation import Resolution
from flowstore_otel.attributes import OPERATION, REASON, RESOLUTION, Attributes

SCOPE = "flowstore_otel"

# As the semantic conventions advise for operations of databases.
SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)
CALLS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def scope_version() -> str:
    return installed_version("flowstore") or ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruments:
    """Every instrument, for all stores of the process."""

    duration: metrics.Histogram
    retries: metrics.Counter
    batch_size: metrics.Histogram
    queue_wait: metrics.Histogram
    outcome_unknown: metrics.Counter


@functools.lru_cache(maxsize=4)
def instruments(provider: metrics.MeterProvider) -> Instruments:
    """Made once for a provider: a second one of the same name is a mistake in OpenTelemetry."""
    meter = provider.get_meter(SCOPE, scope_version())
    return Instruments(
        duration=meter.create_histogram(
            "db.client.operation.duration",
            unit="s",
            description="Duration of the calls of a store",
            explicit_bucket_boundaries_advisory=SECONDS,
        ),
        retries=meter.create_counter(
            "flowstore.retries", unit="{retry}", description="Tries that were made again inside a call"
        ),
        batch_size=meter.create_histogram(
            "flowstore.batch.size",
            unit="{call}",
            description="Calls that went to the database together",
            explicit_bucket_boundaries_advisory=CALLS,
        ),
        queue_wait=meter.create_histogram(
            "flowstore.queue.wait",
            unit="s",
            description="How long the first call of a batch had waited for it to go out",
            explicit_bucket_boundaries_advisory=SECONDS,
        ),
        outcome_unknown=meter.create_counter(
            "flowstore.outcome_unknown",
            unit="{call}",
            description="Calls whose acknowledgement was lost, by what became of them",
        ),
    )


class Measuring:
    """An observer (see flowstore_core.instrumentation) that turns what a backend reports into metrics.

    A retry is an event of the call's span as well, unless the call went out in a batch: a batch belongs
    to no call alone.
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
