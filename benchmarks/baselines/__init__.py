"""The techniques that flowstore is held against, each in a file of its own, with tables of its own.

They give the answers of the store's calls and are safe under concurrency. Where there was a choice,
the faster way was taken: no foreign keys, no idempotency of a lost answer, no cancelled-call handling.
"""
