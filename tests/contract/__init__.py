"""Every clause of the contract, each test named after its clause, on every built-in backend.

A test opens stores through open_store alone and looks at them through their public operations alone.
It takes nothing but the fixtures ``store``, ``open_another`` and ``clock``, and says with
``needs(Capability...)`` what it asks of a backend.
"""
