"""flowstore_sqlite: the embedded backend, one SQLite file that many processes may share.

Start at ``store.py``; the promises stand in the protocols of flowstore_core, noun by noun.
"""
