"""The instruments, the observer that records the reports of backends, and the metrics of queues."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from opentelemetry import metrics, trace
from opentelemetry.metrics import CallbackOptions, Observation

from flowstore_core import ClaimedStep, QueueStatistics
from flowstore_core.distributions import installed_version
from flowstore_core.instrumentation import Resolution
from flowstore_otel.attributes import OPERATION, QUEUE, REASON, RESOLUTION, STATE, Attributes

SCOPE = "flowstore_otel"

# The bucket boundaries that the semantic conventions recommend for database operations.
SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)
CALLS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)

READING_SECONDS = 300.0
"""The time for which the gauges report a result of get_queues."""
STATES = ("ready", "scheduled", "waiting", "running")
"""The fields of QueueStatistics that count steps."""


def scope_version() -> str:
    return installed_version("flowstore") or ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruments:
    """The instruments that all stores of the process share."""

    duration: metrics.Histogram
    retries: metrics.Counter
    batch_size: metrics.Histogram
    batch_wait: metrics.Histogram
    outcome_unknown: metrics.Counter
    claimed_steps: metrics.Counter
    empty_claims: metrics.Counter
    readings: QueueReadings
    """The source of the observable gauges."""


@functools.lru_cache(maxsize=4)
def instruments(provider: metrics.MeterProvider) -> Instruments:
    """Create the instruments of a provider, once: OpenTelemetry rejects duplicates."""
    meter = provider.get_meter(SCOPE, scope_version())
    readings = QueueReadings()
    meter.create_observable_gauge(
        "flowstore.queue.steps",
        unit="{step}",
        description="Steps of a queue, by state",
        callbacks=[readings.observe_steps],
    )
    meter.create_observable_gauge(
        "flowstore.queue.oldest_ready_age",
        unit="s",
        description="Time for which the oldest ready step of a queue has been ready",
        callbacks=[readings.observe_ages],
    )
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
        batch_wait=meter.create_histogram(
            "flowstore.batch.wait",
            unit="s",
            description="Time that the oldest call of a batch was queued",
            explicit_bucket_boundaries_advisory=SECONDS,
        ),
        outcome_unknown=meter.create_counter(
            "flowstore.outcome_unknown",
            unit="{call}",
            description="Unacknowledged calls, by resolution",
        ),
        claimed_steps=meter.create_counter(
            "flowstore.queue.claimed_steps",
            unit="{step}",
            description="Steps that claim_next_steps claimed, by queue",
        ),
        empty_claims=meter.create_counter(
            "flowstore.queue.empty_claims",
            unit="{call}",
            description="Calls of claim_next_steps that found no ready step",
        ),
        readings=readings,
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
        self._instruments.batch_wait.record(waited, attributes)

    def outcome_unknown(self, operation: str, resolution: Resolution, calls: int) -> None:
        attributes = {**self._attributes(operation), RESOLUTION: resolution.value}
        self._instruments.outcome_unknown.add(calls, attributes)
        span = trace.get_current_span()
        if span.is_recording():
            span.add_event("flowstore.outcome_unknown", {RESOLUTION: resolution.value})


@dataclass(frozen=True, slots=True)
class _Reading:
    """A result of get_queues."""

    store: Attributes
    queues: Sequence[QueueStatistics]
    read_at: datetime
    expires_at: float
    """On the monotonic clock."""


class QueueReadings:
    """The last result of get_queues of each store, which the observable gauges report.

    A reader of metrics collects in any thread, in which no store can be called. Counting reads every queued
    step, so the application decides which process counts, and how often.
    """

    def __init__(self) -> None:
        self._readings: dict[object, _Reading] = {}

    def update(self, store: Attributes, queues: Sequence[QueueStatistics], read_at: datetime) -> None:
        expires_at = time.monotonic() + READING_SECONDS
        self._readings[frozenset(store.items())] = _Reading(store, queues, read_at, expires_at)

    def observe_steps(self, options: CallbackOptions) -> Iterator[Observation]:
        for reading, one in self._current():
            for state in STATES:
                attributes = {**reading.store, QUEUE: one.queue, STATE: state}
                yield Observation(getattr(one, state), attributes)

    def observe_ages(self, options: CallbackOptions) -> Iterator[Observation]:
        for reading, one in self._current():
            age = 0.0
            if one.oldest_ready_at is not None:
                # The clock of the store may be ahead.
                age = max((reading.read_at - one.oldest_ready_at).total_seconds(), 0.0)
            yield Observation(age, {**reading.store, QUEUE: one.queue})

    def _current(self) -> Iterator[tuple[_Reading, QueueStatistics]]:
        now = time.monotonic()
        for reading in tuple(self._readings.values()):
            if now < reading.expires_at:
                for one in reading.queues:
                    yield reading, one


class QueueRecorder:
    """Records the results of one store's calls on queues."""

    def __init__(
        self, instruments: Instruments, store: Attributes, clock: Callable[[], datetime] | None
    ) -> None:
        self._instruments = instruments
        self._store = store
        self._clock = clock
        self.by_operation: Mapping[str, Callable[[Mapping[str, Any], Any], None]] = {
            "claim_next_steps": self._record_claims,
            "get_queues": self._record_queues,
        }
        """The function that records a call's arguments and result."""

    def _record_claims(self, arguments: Mapping[str, Any], steps: Sequence[ClaimedStep]) -> None:
        for queue, claimed in Counter(step.queue for step in steps).items():
            self._instruments.claimed_steps.add(claimed, {**self._store, QUEUE: queue})
        if not steps:
            queues = arguments["queues"]
            named = {QUEUE: queues[0]} if len(queues) == 1 else {}
            self._instruments.empty_claims.add(1, {**self._store, **named})

    def _record_queues(self, arguments: Mapping[str, Any], queues: Sequence[QueueStatistics]) -> None:
        now = datetime.now(UTC) if self._clock is None else self._clock()
        self._instruments.readings.update(self._store, queues, now)
