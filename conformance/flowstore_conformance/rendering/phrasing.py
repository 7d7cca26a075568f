"""Calls and answers in the fewest words that a person needs."""

from __future__ import annotations

import re

from flowstore_conformance.diffing import plain, shorten
from flowstore_conformance.history import UNKNOWN, Call, Outcome, Raised, literal
from flowstore_conformance.races import AFTER, BEFORE

_ILLEGIBLE = re.compile("[^\n\t\u0020-\u007e\u00a0-\ud7ff\ue000-\U0010ffff]")


def client_words(client: int) -> str:
    """Who made a call: a client, or the race itself before and after."""
    return {BEFORE: "before", AFTER: "after"}.get(client, f"client {client}")


def call_words(call: Call) -> str:
    """A call, without the arguments that are None, and with ids and datetimes shortened."""
    given = (f"{name}={literal(value)}" for name, value in call.arguments.items() if value is not None)
    return f"{call.method}({shorten(', '.join(given))})"


def outcome_words(outcome: Outcome) -> str:
    """What a call returned, or the name of the error that it raised."""
    if outcome is UNKNOWN:
        return "no answer"
    if isinstance(outcome, Raised):
        return f"raises {outcome.error}"
    return plain(outcome.value)


def outcome_word(outcome: Outcome) -> str:
    """The same as one word, to stand in a bar."""
    if isinstance(outcome, Raised):
        return outcome.error.removesuffix("Error")
    return "?" if outcome is UNKNOWN else outcome_words(outcome)


def legible(text: str) -> str:
    """Text with control characters and lone surrogates as escapes.

    A terminal might obey the first, and UTF-8 does not have the second.
    """
    return _ILLEGIBLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def span(seconds: float) -> str:
    """A length of time in a few characters."""
    if not seconds:
        return "0"
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.0f} µs"
