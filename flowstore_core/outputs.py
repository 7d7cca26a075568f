"""The outputs of a run, by key (EVT-2)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Protocol
from uuid import UUID

MAX_CHARACTER = chr(sys.maxunicode)
AFTER_EVERY_KEY = MAX_CHARACTER * 257
"""Longer than any key (INP-1), so it comes after all of them."""


class Outputs(Protocol):
    """Capability OUTPUTS: a key-value store for each run."""

    async def save_output(self, run_id: UUID, key: str, value_json: str) -> None:
        """Store a value under a key; the last write wins. Raises RunNotFoundError."""
        ...

    async def save_outputs(self, run_id: UUID, outputs: Mapping[str, str]) -> None:
        """Store several values, by key, in one transaction: readers see all of them or none.

        As save_output for each. At most 1,000 keys, and 16 MiB of UTF-8 in all values together. Raises
        RunNotFoundError, also without outputs.
        """
        ...

    async def get_output(self, run_id: UUID, key: str) -> str | None:
        """The value, unchanged; None if there is none."""
        ...

    async def get_outputs(
        self, run_id: UUID, *, prefix: str = "", after: str | None = None, take: int | None = None
    ) -> Mapping[str, str]:
        """The outputs of a run, read-only, ordered by key; empty for an unknown run.

        Only those whose key begins with ``prefix`` and comes after ``after``, and the first ``take`` of them
        (None: all). The last key of a page is the ``after`` of the next.
        """
        ...

    async def delete_outputs(self, run_id: UUID, *, prefix: str) -> int:
        """Delete the outputs whose key begins with ``prefix``, atomically, and return their number.

        ``""`` is a prefix of every key. 0 for an unknown run. Allowed on a terminal run.
        """
        ...


def end_of_prefix(prefix: str) -> str:
    """The least text, by code point, after every key that begins with a prefix.

    So the keys with the prefix are those from the prefix up to, and excluding, this text.
    """
    head = prefix.rstrip(MAX_CHARACTER)
    if not head:
        return AFTER_EVERY_KEY
    last = ord(head[-1]) + 1
    # Lone surrogates are not characters of a text (INP-2).
    return head[:-1] + chr(0xE000 if last == 0xD800 else last)
