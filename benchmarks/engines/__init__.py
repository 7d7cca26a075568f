"""Other engines for PostgreSQL, each with its public interface and its own worker loop.

Every file has ``STEP``, a description of one step, and ``engine``, a context manager whose function
prepares a number of steps, executes them, verifies their completion, and returns a sample.
"""
