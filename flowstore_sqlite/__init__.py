"""flowstore_sqlite: the embedded backend, one SQLite file that many processes may share.

Start at ``store.py``; the promises stand in the protocols of flowstore_core, noun by noun.
"""

import logging

# Quiet unless the application asks for it.
logging.getLogger("flowstore_sqlite").addHandler(logging.NullHandler())
