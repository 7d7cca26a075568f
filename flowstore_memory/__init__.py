"""flowstore_memory: the smallest complete backend. Read it first when you write your own.

Start at ``store.py``. ``state.py`` has the data structures; each noun file implements one noun of the
contract.
"""

import logging

# Quiet unless the application asks for it.
logging.getLogger("flowstore_memory").addHandler(logging.NullHandler())
