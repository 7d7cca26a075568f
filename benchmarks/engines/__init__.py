"""Other engines for PostgreSQL, each driven by its own public interface through its own worker loop.

Every file has ``STEP``, what one step is there, and ``engine``: a context that gives a function which
makes so many steps ready, works through them, checks that they were done, and returns a sample.
"""
