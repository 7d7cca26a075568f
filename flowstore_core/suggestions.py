"""Suggestions for misspelt words, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest_word(word: str, known: Iterable[str]) -> str | None:
    """The only known word that begins with ``word``, else the most similar one; None if none is similar.

    Case is ignored.
    """
    by_lower_case = {one.lower(): str(one) for one in known}
    word = word.lower()
    begun = [one for one in by_lower_case if word and one.startswith(word)]
    near = begun if len(begun) == 1 else difflib.get_close_matches(word, by_lower_case, n=1)
    return by_lower_case[near[0]] if near else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The closest known word as `` (did you mean 'sqlite'?)``, to append to ``word``; empty if none is close.

    The result never contains ``word``, so it is safe to show even if ``word`` may be a secret.
    """
    near = closest_word(word, known)
    return f" (did you mean {near!r}?)" if near else ""
