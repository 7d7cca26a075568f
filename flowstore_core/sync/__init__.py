"""The synchronous store: every operation as a plain method, for code without an event loop.

``open.py`` opens it. ``store.py`` has the operations and is generated from the protocols, ``base.py`` has the
rest of the class. ``loop_thread.py`` runs the asynchronous store and passes the calls of all threads to it.
"""

from flowstore_core.sync.open import open_store_sync
from flowstore_core.sync.store import SyncFlowStore

__all__ = ["SyncFlowStore", "open_store_sync"]
