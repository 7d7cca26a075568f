"""flowstore_memory: the smallest honest backend, the one to read first when writing your own.

Start at ``store.py``; ``state.py`` is what is kept, and each noun file is one noun of the contract.
"""

import logging

# Quiet unless the application asks for it.
logging.getLogger("flowstore_memory").addHandler(logging.NullHandler())
