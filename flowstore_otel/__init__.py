"""OpenTelemetry spans and metrics for every store; ``pip install 'flowstore[otel]'``.

``plugin.py`` is the entry point, ``tracing.py`` creates a span for each call, ``metrics.py`` holds the
instruments and ``attributes.py`` describes stores and errors. docs/operating.md lists all names.
"""
