"""Faults, injected into real stores and counted: ``python -m flowstore_chaos`` makes docs/reliability.md.

A line of the scorecard injects one kind of fault while clients work, and checks afterwards that nothing
acknowledged was lost, nothing was done twice, no answer was wrong and nothing leaked. Every line also has
a broken variant of the store or its settings, on which it must go red (``--broken``). The package is a
program beside flowstore, not a part of what is installed.
"""
