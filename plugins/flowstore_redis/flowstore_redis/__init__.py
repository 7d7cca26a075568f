"""flowstore_redis: a backend on Redis, made of the document toolkit and one space.

``space.py`` is the space, ``commit.lua`` and ``read.lua`` are its scripts, ``connection.py`` sends them,
``plugin.py`` is the descriptor.
"""
