"""Where a checkpoint is stored: the run of its thread, and the keys of the run's outputs.

=====================  =====================================================
key of an output       value
=====================  =====================================================
c/NS/ID                a checkpoint, without the values of its channels
b/NS/VALUE             the value of a channel at one version
w/NS/ID/TASK           the writes of a task that belong to a checkpoint
w/NS/ID/TASK/INDEX     its last write to a special channel, such as an error
=====================  =====================================================

Outputs are read in the order of their keys. ID is such that the newest checkpoint of a namespace comes first.
A key has at most 256 characters, so other names of any length are hashed.
"""

from __future__ import annotations

import json
from hashlib import blake2b
from uuid import UUID, uuid5

FLOW_ID = UUID("6f1c6a52-4f0e-5d0b-9a57-0c4f6a1f5d3e")
FLOW_NAME = "langgraph"
MAX_ID_BYTES = 80
_INVERT = str.maketrans("0123456789abcdef", "fedcba9876543210")


def run_id_of(thread_id: str) -> UUID:
    return uuid5(FLOW_ID, thread_id)


def namespace_prefix(kind: str, namespace: str) -> str:
    """The beginning of every key of a kind (c, b or w) in a namespace; the empty one stays empty."""
    return f"{kind}/{_hash(namespace) if namespace else ''}/"


def checkpoint_key(namespace: str, checkpoint_id: str) -> str:
    return namespace_prefix("c", namespace) + _descending(checkpoint_id)


def value_key(namespace: str, channel: str, version: str | int | float) -> str:
    return namespace_prefix("b", namespace) + _hash(json.dumps([channel, version]))


def writes_prefix(namespace: str, checkpoint_id: str) -> str:
    return f"{namespace_prefix('w', namespace)}{_descending(checkpoint_id)}/"


def writes_key(namespace: str, checkpoint_id: str, task_id: str, index: int | None) -> str:
    """The key of the writes of a task, or of the one to the special channel with this (negative) index."""
    key = writes_prefix(namespace, checkpoint_id) + _hash(task_id)
    return key if index is None else f"{key}/{-index}"


def _descending(checkpoint_id: str) -> str:
    """A text that sorts in the opposite order: the inverted hexadecimal digits of the id, and an end."""
    data = checkpoint_id.encode()
    if not 0 < len(data) <= MAX_ID_BYTES:
        raise ValueError(f"a checkpoint id must have 1 to {MAX_ID_BYTES} bytes of UTF-8, not {len(data)}")
    return data.hex().translate(_INVERT) + "~"


def _hash(name: str) -> str:
    return blake2b(name.encode(), digest_size=16).hexdigest()
