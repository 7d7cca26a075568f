"""flowstore_documents: a backend on any key-value store with atomic conditional commits.

An author writes a ``KeyValueSpace`` (space.py) and opens a ``DocumentStore`` on it (store.py).
``documents.py`` has the documents and their rules, ``keys.py`` the layout, ``transactions.py`` the loop that
makes every operation atomic; each noun file implements one noun of the contract.
"""

import logging

from flowstore_documents.deletion import clear_keys, delete_all_keys
from flowstore_documents.options import TLS_FILES, read_address, read_tls_files, scratch_prefix
from flowstore_documents.space import (
    AppliedOrRefused,
    Change,
    KeyValueSpace,
    MaybeApplied,
    NotApplied,
    Page,
    Range,
    SnapshotGone,
    SpaceLimits,
    TooLarge,
    Version,
    Versioned,
    View,
)
from flowstore_documents.store import OPTIONS, DocumentStore, capabilities_of, open_documents

__all__ = [
    "OPTIONS",
    "TLS_FILES",
    "AppliedOrRefused",
    "Change",
    "DocumentStore",
    "KeyValueSpace",
    "MaybeApplied",
    "NotApplied",
    "Page",
    "Range",
    "SnapshotGone",
    "SpaceLimits",
    "TooLarge",
    "Version",
    "Versioned",
    "View",
    "capabilities_of",
    "clear_keys",
    "delete_all_keys",
    "open_documents",
    "read_address",
    "read_tls_files",
    "scratch_prefix",
]

# Quiet unless the application asks for it.
logging.getLogger("flowstore_documents").addHandler(logging.NullHandler())
