"""flowstore_postgres: the PostgreSQL backend. Start at ``store.py``; each noun has a file of its own."""

import logging

# Quiet unless the application asks for it.
logging.getLogger("flowstore_postgres").addHandler(logging.NullHandler())
