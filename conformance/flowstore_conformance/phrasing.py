"""Short descriptions of calls and outcomes."""

from __future__ import annotations

import re

from flowstore_conformance.diffing import plain, shorten
from flowstore_conformance.history import UNKNOWN, Call, Outcome, Raised, literal
from flowstore_conformance.races import AFTER, BEFORE

_ILLEGIBLE = re.compile("[^\n\t\u0020-\u007e\u00a0-\ud7ff\ue000-\U0010ffff]")


def client_words(client: int) -> str:
    """The name of a client; the setup is "before", the final reads are "after"."""
    return {BEFORE: "before", AFTER: "after"}.get(client, f"client {client}")


def call_words(call: Call) -> str:
    """A call without None arguments, with ids and datetimes abbreviated."""
    given = (f"{name}={literal(value)}" for name, value in call.arguments.items() if value is not None)
    return f"{call.method}({shorten(', '.join(given))})"


def outcome_words(outcome: Outcome) -> str:
    """The result of a call, or the class of its error."""
    if outcome is UNKNOWN:
        return "no answer"
    if isinstance(outcome, Raised):
        return f"raises {outcome.error}"
    return plain(outcome.value)


def outcome_word(outcome: Outcome) -> str:
    """The outcome as one word, for a bar of a timeline."""
    if isinstance(outcome, Raised):
        return outcome.error.removesuffix("Error")
    return "?" if outcome is UNKNOWN else outcome_words(outcome)


def legible(text: str) -> str:
    """Escape control characters, which a terminal might execute, and lone surrogates, which UTF-8 lacks."""
    return _ILLEGIBLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def span(seconds: float) -> str:
    """Format a duration."""
    if not seconds:
        return "0"
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.0f} µs"
