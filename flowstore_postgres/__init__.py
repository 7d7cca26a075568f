"""The PostgreSQL backend. Start at ``store.py``; each noun, such as claims or signals, has its own file."""

import logging

# No output unless the application configures logging.
logging.getLogger("flowstore_postgres").addHandler(logging.NullHandler())
