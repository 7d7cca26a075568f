"""The techniques that flowstore is compared with, each in its own file with its own tables.

They return the results of the store's calls and are safe under concurrency. Otherwise they are as fast as
possible: no foreign keys, no resolution of lost replies, no handling of cancelled calls.
"""
