"""flowstore_sqlite: the embedded backend; many processes may share one SQLite file.

Start at ``store.py``. The protocols of flowstore_core are the specification, noun by noun.
"""

import logging

# Quiet unless the application asks for it.
logging.getLogger("flowstore_sqlite").addHandler(logging.NullHandler())
