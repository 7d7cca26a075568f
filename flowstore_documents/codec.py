"""Documents as JSON: a field that has its default is left out, an unknown field is ignored."""

from __future__ import annotations

from datetime import datetime
from typing import Any, TypeVar

import msgspec

T = TypeVar("T", bound=msgspec.Struct)


def encode(document: msgspec.Struct) -> bytes:
    """A document as bytes. Equal documents have equal bytes."""
    return _encoder.encode(document)


def decode(kind: type[T], data: bytes) -> T:
    """The document that ``encode`` made."""
    return msgspec.json.decode(data, type=kind, dec_hook=_decode_time)


def json_bytes(text: str) -> int:
    """The size of a text in a document."""
    return len(_encoder.encode(text))


# Programs that change the clock, such as tests, replace ``datetime.datetime`` by a class of their own, and
# msgspec itself knows the original class alone.


def _encode_time(time: Any) -> str:
    if not isinstance(time, datetime):
        raise TypeError(f"a document cannot hold a {type(time).__name__}")
    return time.isoformat().replace("+00:00", "Z")


def _decode_time(kind: type[datetime], text: str) -> datetime:
    return kind.fromisoformat(text)


_encoder = msgspec.json.Encoder(enc_hook=_encode_time)
