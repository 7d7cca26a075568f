"""Suggestions for misspelt words, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The closest known word as `` (did you mean 'sqlite'?)``, to append to ``word``; empty if none is close.

    The result never contains ``word``, so it is safe to show even if ``word`` may be a secret.
    """
    by_lower_case = {one.lower(): one for one in known}
    near = difflib.get_close_matches(word.lower(), by_lower_case, n=1)
    return f" (did you mean {by_lower_case[near[0]]!r}?)" if near else ""
