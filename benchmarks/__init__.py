"""Benchmarks of the stores against the techniques that engines use today.

Each program starts what it needs, measures all variants in turn in the same run, checks what they
did, and prints its figures: ``python -m benchmarks.postgres``, ``.sqlite``, ``.memory``, ``.growth``
and ``.peers``; ``python -m benchmarks.report`` writes their JSON files into docs/performance.md.
"""
