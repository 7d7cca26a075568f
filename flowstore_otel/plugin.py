"""The plugin: it wraps every store of any backend if OpenTelemetry is installed."""

from __future__ import annotations

from typing import Any

from flowstore_core import StoreConfig, hookimpl

drivers = ("opentelemetry",)
"""The modules that ``flowstore backends`` checks for, to explain why nothing is measured."""


@hookimpl
def flowstore_wrap_store(store: Any, config: StoreConfig) -> Any:
    """Wrap the store with a span around each call; None, for no wrapper, if telemetry is not set up."""
    try:
        # Not at the top: opening a store imports this module also without the extra.
        from flowstore_otel.tracing import trace_store
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in drivers:
            raise
        return None
    return trace_store(store, config)
