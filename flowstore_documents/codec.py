"""Documents as JSON: a field that has its default is left out, an unknown field is ignored."""

from __future__ import annotations

from typing import TypeVar

import msgspec

T = TypeVar("T", bound=msgspec.Struct)


def encode(document: msgspec.Struct) -> bytes:
    """A document as bytes. Equal documents have equal bytes."""
    return msgspec.json.encode(document)


def decode(kind: type[T], data: bytes) -> T:
    """The document that ``encode`` made."""
    return msgspec.json.decode(data, type=kind)


def json_bytes(text: str) -> int:
    """The size of a text in a document."""
    return len(msgspec.json.encode(text))
