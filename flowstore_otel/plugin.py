"""The plugin: it wraps every store that is opened, of any backend, where OpenTelemetry is installed."""

from __future__ import annotations

from typing import Any

from flowstore_core import StoreConfig, hookimpl

drivers = ("opentelemetry",)
"""What ``flowstore backends`` looks for, to say why nothing is measured."""


@hookimpl
def flowstore_wrap_store(store: Any, config: StoreConfig) -> Any:
    """The store with a span around each call; None, which leaves it as it is, where nobody listens."""
    try:
        # Not at the top: the module is imported whenever a store is opened, with the extra or without.
        from flowstore_otel.tracing import trace_store
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in drivers:
            raise
        return None
    return trace_store(store, config)
