"""Texts of up to 16 MiB: short ones are part of their document, long ones are pieces beside it."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping
from typing import TypeAlias
from uuid import UUID

from msgspec import Struct

from flowstore_documents import keys
from flowstore_documents.codec import json_bytes
from flowstore_documents.space import SpaceLimits

INLINE_SHARE = 12
"""A document has room for this number of texts that are as long as an inline text may be."""


class LongText(Struct, frozen=True, gc=False):
    """A reference to the pieces of a text. Two references to equal texts may differ: see ``same_text``."""

    token: str
    count: int
    """Number of pieces."""
    digest: str


Text: TypeAlias = "str | LongText"

ReadText: TypeAlias = Callable[["Text | None"], "str | None"]
"""A function from a text of a document to its characters, whose pieces were read."""


def same_text(one: Text | None, other: Text | None) -> bool:
    """Whether two texts are equal, without reading their pieces."""
    if isinstance(one, LongText) and isinstance(other, LongText):
        return one.digest == other.digest
    return one == other


def split(data: bytes, limits: SpaceLimits) -> list[bytes]:
    """The pieces of some bytes, each as long as a value may be."""
    size = limits.value_bytes
    return [data[start : start + size] for start in range(0, len(data), size)]


class StagedTexts:
    """The long texts of one operation. A retry of its transaction uses the same pieces."""

    def __init__(self, limits: SpaceLimits) -> None:
        self._limits = limits
        self.marks: dict[tuple[UUID, str], bytes] = {}
        """The marks of the pieces that are stored already, by run and token."""
        self._made: dict[tuple[bytes, str], tuple[LongText, list[bytes]]] = {}

    def put(self, text: str | None, owner: bytes = b"") -> Text | None:
        """The text for a document: itself, or a reference to pieces that the commit will store.

        Equal texts of one owner share their pieces.
        """
        if text is None or (
            len(text) * 6 <= self._limits.value_bytes // INLINE_SHARE
            or json_bytes(text) <= self._limits.value_bytes // INLINE_SHARE
        ):
            return text
        name = owner, text
        if name not in self._made:
            data = text.encode()
            pieces = split(data, self._limits)
            made = LongText(secrets.token_hex(12), len(pieces), hashlib.sha256(data).hexdigest())
            self._made[name] = made, pieces
        return self._made[name][0]

    def pieces(self) -> Mapping[str, list[bytes]]:
        """The pieces of every long text, by token."""
        return {made.token: pieces for made, pieces in self._made.values()}


def piece_keys(run_id: UUID, text: Text | None, *, count: int | None = None) -> list[bytes]:
    """The keys of the first ``count`` pieces of a text; None: all."""
    if not isinstance(text, LongText):
        return []
    numbers = range(text.count if count is None else min(count, text.count))
    return [keys.piece(run_id, text.token, number) for number in numbers]
