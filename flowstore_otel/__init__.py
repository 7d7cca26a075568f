"""flowstore_otel: OpenTelemetry spans and metrics of every store; ``pip install 'flowstore[otel]'``.

``plugin.py`` is found by its entry point. ``tracing.py`` makes a span of each call, ``metrics.py`` holds
the instruments, ``attributes.py`` says what is told of a store. docs/operating.md lists all names.
"""
