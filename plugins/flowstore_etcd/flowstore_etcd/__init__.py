"""flowstore_etcd: a backend on etcd, made of the document toolkit and one space.

``space.py`` is the space, ``connection.py`` sends its requests, ``plugin.py`` is the descriptor.
"""
