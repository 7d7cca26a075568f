"""Faults, injected into real stores and counted: ``python -m flowstore_chaos`` makes docs/reliability.md.

A fault scenario injects one kind of fault while clients work. Afterwards it checks that no acknowledged
operation was lost, no effect happened twice, no result was wrong and no resource leaked. Every scenario also
has a mutant, a defective store or setting, on which it must fail (``--mutants``). The package is a program
beside flowstore and not part of the wheel.
"""
