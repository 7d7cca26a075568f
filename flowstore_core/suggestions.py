"""Suggestions for misspelt words in error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The nearest known word as `` (did you mean 'sqlite'?)``, to append to ``word``; empty if none is near.

    The result contains known words only, so it is safe where ``word`` itself must not be shown.
    """
    by_lower_case = {one.lower(): one for one in known}
    near = difflib.get_close_matches(word.lower(), by_lower_case, n=1)
    return f" (did you mean {by_lower_case[near[0]]!r}?)" if near else ""
