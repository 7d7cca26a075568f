"""Benchmarks of the stores against the techniques that engines use today.

Each program starts its servers, measures all variants interleaved in one run, verifies their work and prints
the figures: ``python -m benchmarks.postgres``, ``.sqlite``, ``.memory``, ``.growth``, ``.queues`` and
``.peers``.
``python -m benchmarks.report`` publishes their JSON files in docs/performance.md.
"""
